"""The recipes: what each stands for, and the mixtures that are refused."""

from collections.abc import Callable
from functools import partial

import pytest
from refusals import refusal

from gsae_core.config import Aux, Recipe
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE


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


@pytest.mark.parametrize(
    ("recipe", "usual", "aux"), [("A", "unfrozen", "frozen"), ("B", "frozen", "unfrozen")]
)
def test_one_term_that_moves_norms_beside_one_that_does_not_is_refused(
    recipe: Recipe, usual: Aux, aux: Aux
) -> None:
    assert refusal(GatedSAE, 4, 7, recipe=recipe, aux=aux) == (
        f"expected recipe {recipe} with aux {usual} or off, got {aux}: where only one of the L1 "
        "and the auxiliary term moves decoder norms, they run away or latents die"
    )


def test_a_relu_sae_has_no_auxiliary_term() -> None:
    assert ReluSAE(4, 7, recipe="P").objective.unit_norm
    assert not ReluSAE(4, 7, recipe="A").objective.unit_norm
    assert ReluSAE(4, 7).objective.aux == "off"


@pytest.mark.parametrize(
    ("make", "recipe", "allowed"),
    [
        (ReluSAE, "B", "P or A for architecture relu"),
        (JumpReluSAE, "A", "P for architecture jumprelu"),
        (JumpReluSAE, "B", "P for architecture jumprelu"),
        (partial(TopKSAE, k=2), "A", "P for architecture topk"),
    ],
)
def test_a_recipe_that_does_not_fit_an_architecture_is_refused(
    make: Callable[..., SAE], recipe: Recipe, allowed: str
) -> None:
    assert refusal(make, 4, 7, recipe=recipe) == (
        f"expected recipe {allowed}, got {recipe}: any other lets its norms run away, or weighs an "
        "L1 term that it lacks"
    )
