"""The recipes: what each stands for, and the mixtures that are refused."""

import pytest
from refusals import refusal

from gsae_core.config import Recipe
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import Aux


@pytest.mark.parametrize(
    ("recipe", "aux", "expected"),
    [
        ("P", None, (True, "none", "frozen")),  # the paper
        ("P", "unfrozen", (True, "none", "unfrozen")),  # its ablation, Fig. 8
        ("P", "off", (True, "none", "off")),
        ("A", None, (False, "norm", "unfrozen")),
        ("A", "off", (False, "norm", "off")),
        ("B", None, (False, "detached_norm", "frozen")),
        ("B", "off", (False, "detached_norm", "off")),
    ],
)
def test_a_recipe_names_three_explicit_choices(
    recipe: Recipe, aux: Aux | None, expected: tuple[bool, str, str]
) -> None:
    sae = GatedSAE(4, 7, recipe=recipe, aux=aux)
    assert tuple(sae.objective) == expected
    assert (sae.recipe, sae.objective.unit_norm, sae.aux) == (recipe, expected[0], expected[2])
    # A checkpoint may record the resolved choice and build the same SAE from it.
    assert GatedSAE(4, 7, recipe=recipe, aux=sae.aux).objective == sae.objective


def test_norm_weighting_that_moves_norms_is_refused_beside_a_frozen_decoder() -> None:
    assert refusal(GatedSAE, 4, 7, recipe="A", aux="frozen") == (
        "expected recipe 'A' with aux 'unfrozen' or 'off', got 'frozen': the L1 term would shrink "
        "decoder norms that the frozen auxiliary term cannot hold up, and latents die; use recipe "
        "'B', which freezes the norm in both terms"
    )


def test_norm_weighting_that_ignores_norms_is_refused_beside_a_live_decoder() -> None:
    assert refusal(GatedSAE, 4, 7, recipe="B", aux="unfrozen") == (
        "expected recipe 'B' with aux 'frozen' or 'off', got 'unfrozen': the auxiliary term would "
        "grow decoder norms whose cost the L1 term, with the norm detached, cannot feel; use "
        "recipe 'A', which lets both terms move the norm"
    )


def test_a_relu_sae_has_no_recipe_b() -> None:
    assert ReluSAE(4, 7, recipe="P").objective.unit_norm
    assert not ReluSAE(4, 7, recipe="A").objective.unit_norm
    assert ReluSAE(4, 7).objective.aux == "off"
    assert refusal(ReluSAE, 4, 7, recipe="B") == (
        "expected recipe 'P' or 'A' for a ReLU SAE, got 'B': with the norm detached in the L1 "
        "term, latents shrink and decoder norms grow without limit"
    )
