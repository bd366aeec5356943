"""Who hears each term of the loss, and how much: every gradient and stop-gradient of the paper."""

from typing import Any

import pytest
import torch
from examples import loss, numbers, random_gated, random_relu, slopes
from torch import Tensor

from gsae_core.config import Aux
from gsae_core.sae.architectures import GatedSAE, ReluSAE

TERMS = ["reconstruction", "sparsity", "auxiliary"]


# Which parameter hears which term

ENCODER = {"W_gate", "b_gate"}
HEARD: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "the paper": (
        {},
        {
            # b_gate is not there: the gate is a step. W_gate is: it also carries the magnitude.
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "without r_mag": (
        {"tie": "none"},
        {
            "reconstruction": {"W_gate", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "untied": (
        {"tie": "untied"},
        {
            "reconstruction": {"W_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "b_dec detached": (
        {"detach_b_dec": True},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER,
            "auxiliary": ENCODER,
        },
    ),
    "b_dec detached, untied": (
        {"detach_b_dec": True, "tie": "untied"},
        {
            "reconstruction": {"W_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER,
            "auxiliary": ENCODER,
        },
    ),
    "auxiliary decoder unfrozen": (
        {"aux": "unfrozen"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec", "W_dec"},
        },
    ),
    "recipe A": (
        {"recipe": "A"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec", "W_dec"},
            "auxiliary": ENCODER | {"b_dec", "W_dec"},
        },
    ),
    "recipe B": (
        {"recipe": "B"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
}


def hearers(sae: GatedSAE | ReluSAE, term: Tensor) -> set[str]:
    """Return the parameters whose gradient is not exactly zero everywhere."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None and (g != 0).any()}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("variant", HEARD)
def test_a_term_moves_the_parameters_the_paper_says_and_no_others(variant: str, term: str) -> None:
    options, heard = HEARD[variant]
    sae = random_gated(**options)
    parts = loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    assert hearers(sae, getattr(parts, term)) == heard[term]


@pytest.mark.parametrize(
    ("recipe", "heard"),
    [("P", {"W_enc", "b_enc", "b_dec"}), ("A", {"W_enc", "b_enc", "b_dec", "W_dec"})],
)
def test_the_baselines_sparsity_moves_norms_under_recipe_a_only(
    recipe: str, heard: set[str]
) -> None:
    sae = random_relu(recipe=recipe)
    parts = loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    assert hearers(sae, parts.sparsity) == heard
    assert hearers(sae, parts.reconstruction) == {"W_enc", "b_enc", "b_dec", "W_dec"}


# How much they hear


def closed_form(sae: GatedSAE, x: Tensor, lam: float) -> dict[str, Tensor]:
    """Gradients of Eq. 8 (tied by r_mag, unit norm, frozen copy), written out by hand.

    e and e_aux are the two errors; gate and magnitude pre-activations share h = xc W_gate.
    """
    assert sae.r_mag is not None
    n, gain = len(x), sae.r_mag.exp()
    xc = x - sae.b_dec
    h = xc @ sae.W_gate
    pi_gate, pi_mag = h + sae.b_gate, gain * h + sae.b_mag
    open_ = (pi_gate > 0).double()
    f = open_ * pi_mag.clamp(min=0)
    e = f @ sae.W_dec + sae.b_dec - x
    e_aux = pi_gate.clamp(min=0) @ sae.W_dec + sae.b_dec - x
    d_mag = open_ * (pi_mag > 0) * (2 * e @ sae.W_dec.T) / n
    d_gate = open_ * (lam + 2 * e_aux @ sae.W_dec.T) / n
    d_h = gain * d_mag + d_gate
    return {
        "W_gate": xc.T @ d_h,
        "b_gate": d_gate.sum(0),
        "r_mag": (d_mag * gain * h).sum(0),
        "b_mag": d_mag.sum(0),
        "W_dec": f.T @ (2 * e) / n,
        "b_dec": (2 * e / n).sum(0) - sae.W_gate @ d_h.sum(0),
    }


def test_autograd_agrees_with_the_gradients_written_out_by_hand() -> None:
    sae, x = random_gated(), numbers(30, 4)
    loss(sae, x, sparsity_coeff=0.3).total.backward()
    for name, expected in closed_form(sae, x, 0.3).items():
        gradient = sae.get_parameter(name).grad
        assert gradient is not None
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("name", ["W_gate", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"])
def test_gradients_are_finite_differences_of_the_loss_with_its_copies_held(name: str) -> None:
    sae, x, lam = random_gated(), numbers(30, 4), 0.3
    W_copy, b_copy = sae.W_dec.detach().clone(), sae.b_dec.detach().clone()

    def eq_8() -> float:
        with torch.no_grad():
            pi_gate = sae.pre_activations(x).pi_gate.clamp(min=0)
            per_token = (
                (x - sae(x)).square().sum(1)
                + lam * pi_gate.sum(1)
                + (x - pi_gate @ W_copy - b_copy).square().sum(1)
            )
            return per_token.mean().item()

    loss(sae, x, sparsity_coeff=lam).total.backward()
    parameter = sae.get_parameter(name)
    assert parameter.grad is not None
    found = slopes(parameter, eq_8, parameter.numel())
    assert parameter.grad.view(-1).tolist() == pytest.approx(found, abs=1e-7)


@pytest.mark.parametrize("aux", ["frozen", "unfrozen"])
def test_the_auxiliary_term_moves_b_dec_as_an_output_bias_only_when_unfrozen(aux: Aux) -> None:
    sae, x = random_gated(aux=aux), numbers(30, 4)
    pi_gate = sae.pre_activations(x).pi_gate
    e_aux = pi_gate.clamp(min=0) @ sae.W_dec + sae.b_dec - x
    d_gate = (pi_gate > 0) * (2 * e_aux @ sae.W_dec.T) / 30
    expected = -sae.W_gate @ d_gate.sum(0)  # through the centred input
    if aux == "unfrozen":
        expected = expected + 2 * e_aux.mean(0)
    auxiliary = loss(sae, x, sparsity_coeff=0.3).auxiliary
    (gradient,) = torch.autograd.grad(auxiliary, [sae.b_dec])
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)


def test_recipe_a_sparsity_pulls_each_direction_shorter_by_its_latents_mean_activity() -> None:
    sae, x = random_gated(recipe="A"), numbers(30, 4)
    sparsity = loss(sae, x, sparsity_coeff=0.3).sparsity
    (gradient,) = torch.autograd.grad(sparsity, [sae.W_dec])
    # d |w| / d w = w / |w|
    activity = sae.pre_activations(x).pi_gate.clamp(min=0).mean(0)
    directions = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    assert torch.allclose(gradient, 0.3 * activity[:, None] * directions, rtol=0, atol=1e-12)
