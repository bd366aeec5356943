"""The dictionaries: what they compute, how they start, what they refuse."""

import math
from typing import Any

import pytest
import torch
from examples import numbers, perturb_, set_, worked_example
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from gsae_core.config import SAESpec, Tie
from gsae_core.sae.architectures import GatedSAE, ReluSAE, build_sae, fold_scale_
from gsae_core.sae.base import RECIPES

TIES: list[Tie] = ["r_mag", "none", "untied"]


def test_a_latent_fires_where_its_gate_is_open_and_its_magnitude_positive() -> None:
    sae = worked_example()
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    pi_gate, pi_mag = sae.pre_activations(x)
    assert pi_gate.tolist() == [1, -1, 1]
    assert pi_mag.tolist() == [4.5, 6, -2]
    assert sae.encode(x).tolist() == [4.5, 0, 0]
    # 4.5 * (0.6, 0.8) + (1, 0)
    assert sae(x).tolist() == pytest.approx([3.7, 3.6])


def test_without_r_mag_the_paths_differ_by_their_biases_alone() -> None:
    sae = worked_example(tie="none")
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert sae.pre_activations(x).pi_mag.tolist() == [2.5, 6, -2]


def test_untied_paths_read_their_own_directions() -> None:
    sae = worked_example(tie="untied")
    set_(sae, W_mag=[[7, 0, 0], [0, 0, 0]])
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    pi_gate, pi_mag = sae.pre_activations(x)
    assert pi_gate.tolist() == [1, -1, 1]
    assert pi_mag.tolist() == [14.5, 5, -3]  # 7 * 2 + b_mag: centred like the gate


def test_a_gate_at_exactly_zero_is_closed() -> None:
    sae = GatedSAE(2, 3)
    set_(sae, b_mag=[1, 1, 1])
    assert sae.encode(torch.zeros(2)).tolist() == [0, 0, 0]  # xc = 0, so pi_gate = b_gate = 0


def test_the_baseline_has_one_number_for_whether_and_how_much() -> None:
    sae = ReluSAE(2, 3)
    set_(
        sae,
        W_enc=[[1, 0, 1], [0, 1, -1]],
        b_enc=[-1, -2, 0],
        W_dec=[[0.6, 0.8], [1, 0], [0, 1]],
        b_dec=[1, 0],
    )
    x = torch.tensor([3.0, 1.0])
    assert sae.encode(x).tolist() == [1, 0, 1]
    assert sae(x).tolist() == pytest.approx([1.6, 1.8])  # (0.6, 0.8) + (0, 1) + (1, 0)


@pytest.mark.parametrize("tie", TIES)
def test_training_starts_from_a_relu_sae_with_unit_directions(tie: Tie) -> None:
    gated, relu = GatedSAE(4, 7, tie=tie, seed=3), ReluSAE(4, 7, seed=3)
    assert gated.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 7)
    assert torch.equal(gated.W_gate, gated.W_dec.T)
    assert torch.equal(relu.W_enc, relu.W_dec.T)
    x = numbers(50, 4).float()
    assert torch.equal(gated.encode(x), relu.encode(x))
    assert gated.encode(x).count_nonzero() > 0
    biases = [p for name, p in gated.named_parameters() if not name.startswith("W_")]
    assert sum(p.count_nonzero() for p in biases) == 0


@pytest.mark.parametrize("kind", [GatedSAE, ReluSAE])
def test_the_seed_alone_decides_the_start(kind: type[GatedSAE] | type[ReluSAE]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = kind(4, 7, seed=5), kind(4, 7, seed=5), kind(4, 7, seed=6)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("tie", "extra"), [("r_mag", {"r_mag"}), ("none", set()), ("untied", {"W_mag"})]
)
def test_a_gated_sae_has_the_parameters_its_tie_needs_and_no_others(
    tie: Tie, extra: set[str]
) -> None:
    shapes = {name: tuple(p.shape) for name, p in GatedSAE(4, 7, tie=tie).named_parameters()}
    every = {"W_gate": (4, 7), "b_gate": (7,), "b_mag": (7,), "W_dec": (7, 4), "b_dec": (4,)}
    own = {"r_mag": (7,), "W_mag": (4, 7)}
    assert shapes == every | {name: own[name] for name in extra}


def test_weight_sharing_costs_two_numbers_a_latent_more_than_the_baseline() -> None:
    count = [sum(p.numel() for p in sae.parameters()) for sae in (GatedSAE(4, 7), ReluSAE(4, 7))]
    assert count[0] - count[1] == 2 * 7  # arXiv:2404.16014v2, section 3.2.1


@pytest.mark.parametrize("sae", [GatedSAE(4, 7), GatedSAE(4, 7, tie="untied"), ReluSAE(4, 7)])
def test_any_leading_axes_pass_through(sae: GatedSAE | ReluSAE) -> None:
    x = numbers(2, 3, 4).float()
    assert sae.encode(x).shape == (2, 3, 7)
    assert sae(x).shape == (2, 3, 4)
    assert sae.encode(x[0, 0]).shape == (7,)
    assert torch.allclose(sae(x)[1, 2], sae(x[1, 2]), atol=1e-6)


def test_dtype_follows_the_tensors() -> None:
    x = numbers(3, 4)
    assert GatedSAE(4, 7).double()(x).dtype == torch.float64
    assert GatedSAE(4, 7).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("sae", [GatedSAE(4, 7), ReluSAE(4, 7)])
def test_activations_of_another_width_are_refused(sae: GatedSAE | ReluSAE) -> None:
    assert refusal(sae.encode, torch.zeros(2, 5)) == (
        "expected activations of width d_in=4, got shape (2, 5); "
        "was this SAE trained on another model or site?"
    )


def test_latents_of_another_width_are_refused() -> None:
    assert refusal(GatedSAE(4, 7).decode, torch.zeros(2, 4)) == (
        "expected latents of width d_sae=7, got shape (2, 4); "
        "decode() takes what this SAE's encode() returns"
    )


def test_an_sae_without_latents_is_refused() -> None:
    assert refusal(GatedSAE, 4, 0) == "expected d_sae of at least 1, got 0"


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "Q"}, "expected recipe to be one of P, A, B, got 'Q'"),
        ({"tie": "tied"}, "expected tie to be one of r_mag, none, untied, got 'tied'"),
        ({"aux": "on"}, "expected aux to be one of frozen, unfrozen, off, got 'on'"),
    ],
)
def test_a_mistyped_choice_is_told_the_choices(options: dict[str, Any], sentence: str) -> None:
    assert refusal(GatedSAE, 4, 7, **options) == sentence


def test_build_sae_follows_every_field_of_the_spec() -> None:
    fields = {"name": "a", "d_sae": 7, "sparsity": 0.1, "seed": 4}
    spec = SAESpec(architecture="gated", tie="none", aux="unfrozen", detach_b_dec=True, **fields)
    sae = build_sae(spec, 4)
    assert isinstance(sae, GatedSAE)
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.tie) == ("gated", 4, 7, "none")
    assert (sae.aux, sae.detach_b_dec) == ("unfrozen", True)
    assert torch.equal(sae.W_dec, GatedSAE(4, 7, seed=4).W_dec)
    assert build_sae(spec.model_copy(update={"recipe": "A"}), 4).objective == RECIPES["A"]
    relu = build_sae(spec.model_copy(update={"architecture": "relu"}), 4)
    assert (relu.architecture, relu.d_in, relu.d_sae) == ("relu", 4, 7)
    assert torch.equal(relu.W_dec, sae.W_dec)


# The same thing as a JumpReLU SAE

halves = st.integers(-6, 6).map(lambda n: n / 2)


@settings(deadline=None, derandomize=True)
@given(b_gate=halves, b_mag=halves, gain=st.sampled_from([0.5, 1.0, 2.0]), h=halves)
def test_a_tied_gated_latent_is_a_jumprelu_latent_boundaries_included(
    b_gate: float, b_mag: float, gain: float, h: float
) -> None:
    # All numbers are halves and quarters: no rounding, so equality at the threshold is equality.
    sae = GatedSAE(2, 1).double()
    set_(sae, W_gate=[1, 0], b_gate=[b_gate], b_mag=[b_mag], r_mag=[math.log(gain)])
    assert sae.r_mag is not None
    assert sae.r_mag.exp().item() == gain
    theta = sae.jumprelu_threshold().item()
    assert theta == max(0, b_mag - gain * b_gate)
    z = gain * h + b_mag
    f = sae.encode(torch.tensor([h, 9.0], dtype=torch.float64)).item()
    assert f == (z if z > theta else 0)


@pytest.mark.parametrize("tie", ["r_mag", "none"])
def test_a_tied_gated_sae_is_a_jumprelu_sae_exactly(tie: Tie) -> None:
    sae = GatedSAE(6, 40, tie=tie).double()
    perturb_(sae)
    x = numbers(5000, 6)
    gain = torch.ones(()) if sae.r_mag is None else sae.r_mag.exp()
    raw = sae.b_mag - gain * sae.b_gate
    assert 5 < (raw <= 0).sum() < 35  # latents whose gate never binds are among them
    z = sae.pre_activations(x).pi_mag
    theta = sae.jumprelu_threshold()
    assert torch.equal(sae.encode(x), torch.where(z > theta, z, 0.0))
    # Without the maximum, latents with theta < 0 would put out negative numbers.
    assert not torch.equal(sae.encode(x), torch.where(z > raw, z, 0.0))


def test_an_untied_gated_sae_equals_no_jumprelu_sae() -> None:
    assert refusal(GatedSAE(4, 7, tie="untied").jumprelu_threshold) == (
        "expected a Gated SAE with tie 'r_mag' or 'none', got 'untied': its gate and its "
        "magnitude read different directions, so no JumpReLU threshold equals the gate"
    )


# Folding the scale of the activations


@pytest.mark.parametrize(
    "sae", [*(GatedSAE(4, 7, tie=tie) for tie in TIES), GatedSAE(4, 7, recipe="A"), ReluSAE(4, 7)]
)
def test_a_folded_sae_does_to_raw_activations_what_it_did_to_scaled_ones(
    sae: GatedSAE | ReluSAE,
) -> None:
    sae = sae.double()
    perturb_(sae)
    before = {name: parameter.clone() for name, parameter in sae.state_dict().items()}
    x, scale = numbers(100, 4), 0.05
    f, x_hat = sae.encode(scale * x) / scale, sae(scale * x) / scale
    fold_scale_(sae, scale)
    assert f.count_nonzero() > 100
    assert torch.allclose(sae.encode(x), f, rtol=0, atol=1e-12)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    assert torch.allclose(sae(x), x_hat, rtol=0, atol=1e-12)
    for name, parameter in sae.state_dict().items():  # directions, norms and r_mag stay
        assert torch.equal(parameter, before[name] / (scale if name.startswith("b_") else 1))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_cannot_be_divided_by_is_refused(scale: float) -> None:
    said = refusal(fold_scale_, ReluSAE(4, 7), scale)
    assert said == f"expected a positive, finite activation scale, got {scale}"


@pytest.mark.parametrize(("d_in", "d_sae"), [(1, 3), (3, 1), (1, 1)])
def test_an_axis_of_one_does_not_make_the_encoder_share_memory_with_the_dictionary(
    d_in: int, d_sae: int
) -> None:
    gated, relu = GatedSAE(d_in, d_sae), ReluSAE(d_in, d_sae)
    assert gated.W_gate.data_ptr() != gated.W_dec.data_ptr()
    assert relu.W_enc.data_ptr() != relu.W_dec.data_ptr()
