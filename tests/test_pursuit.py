"""Gradient pursuit: what it promises for any dictionary, and small cases by hand."""

import pytest
import torch
from examples import numbers, random_gated, random_relu, set_
from refusals import refusal
from torch import Tensor

from gsae_core.sae.ablations import pursue
from gsae_core.sae.architectures import ReluSAE

ATOMS = torch.tensor([[1, 0], [0.6, 0.8], [0, -1]], dtype=torch.float64)
ORIGIN = torch.zeros(2, dtype=torch.float64)


def token(*x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def dictionary(d_sae: int, d_in: int) -> Tensor:
    """Return unit directions that overlap: there are more of them than dimensions."""
    return torch.nn.functional.normalize(numbers(d_sae, d_in, seed=5), dim=1)


def pursued(x: Tensor, W_dec: Tensor, b_dec: Tensor, *, k: int) -> Tensor:
    sae = ReluSAE(W_dec.shape[1], len(W_dec)).double()
    set_(sae, W_dec=W_dec.tolist(), b_dec=b_dec.tolist())
    return pursue(sae, x, k=k)


def error(x: Tensor, alpha: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return (x - alpha @ W_dec - b_dec).square().sum(1)


# x = (2, 0.5) in ATOMS, whose first two overlap by 0.6.
# 1. r = (2, 0.5): products (2, 1.6, -0.5); take d_0; g = 2, step 1:      alpha = (2, 0, 0)
# 2. r = (0, 0.5): products (0, 0.4, -0.5); take d_1; g = (0, 0.4):       alpha = (2, 0.4, 0)
# 3. r = (0, 0.5) - 0.4 (0.6, 0.8) = (-0.24, 0.18): products (-0.24, 0, -0.18); d_1 again;
#    g = (-0.24, 0), step 1: the first direction gives back:              alpha = (1.76, 0.4, 0)
@pytest.mark.parametrize(("k", "expected"), [(1, [2, 0, 0]), (2, [2, 0.4, 0]), (3, [1.76, 0.4, 0])])
def test_each_round_of_an_example_by_hand(k: int, expected: list[float]) -> None:
    alpha = pursued(token(2, 0.5), ATOMS, ORIGIN, k=k)
    assert alpha[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_matching_pursuit_would_leave_more_error_where_directions_overlap() -> None:
    # It moves only the direction a round takes. In round 3 that is d_1, whose product is 0, so
    # that (2, 0.4, 0) stays: 0.24^2 + 0.18^2 = 0.09. Stepping over all of S: 0.18^2 = 0.0324.
    x = token(2, 0.5)
    stuck = error(x, torch.tensor([[2, 0.4, 0]], dtype=torch.float64), ATOMS, ORIGIN)
    better = error(x, pursued(x, ATOMS, ORIGIN, k=3), ATOMS, ORIGIN)
    assert stuck.item() == pytest.approx(0.09)
    assert better.item() == pytest.approx(0.0324)


def test_a_step_down_two_directions_at_once_has_the_length_that_minimises_the_error() -> None:
    # Unit rows e_0, (0.6, 0.8, 0), (0.36, 0.48, 0.8): d_0.d_1 = d_1.d_2 = 0.6, d_0.d_2 = 0.36.
    # x = (2, 1.5, 1): products (2, 2.4, 2.24); take d_1: alpha_1 = 2.4, r = (0.56, -0.42, 1).
    # Products (0.56, 0, 0.8); take d_2: alpha_2 = 0.8, r = (0.272, -0.804, 0.36).
    # Products (0.272, -0.48, 0); take d_0, g = (0.272, -0.48, 0), c = (-0.016, -0.384, 0),
    # c.c = 0.147712, c.r = 0.304384 = 0.272^2 + 0.48^2: step = 2.0606586...
    W_dec = torch.tensor([[1, 0, 0], [0.6, 0.8, 0], [0.36, 0.48, 0.8]], dtype=torch.float64)
    alpha = pursued(token(2, 1.5, 1), W_dec, torch.zeros(3).double(), k=3)
    step = 0.304384 / 0.147712
    expected = [0.272 * step, 2.4 - 0.48 * step, 0.8]
    assert alpha[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_planted_code_in_an_orthonormal_dictionary_comes_back() -> None:
    v = torch.nn.functional.normalize(numbers(6), dim=0)
    W_dec = (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(v, v))[:5]  # of a reflection
    b_dec = numbers(6, seed=3)
    planted = torch.tensor([[0, 1.5, 0, 0.2, 0], [3, 0, 0, 0, 0.7]], dtype=torch.float64)
    alpha = pursued(planted @ W_dec + b_dec, W_dec, b_dec, k=2)
    torch.testing.assert_close(alpha, planted, rtol=0, atol=1e-12)


def test_mean_error_falls_with_every_round() -> None:
    x, W_dec, b_dec = numbers(200, 8), dictionary(20, 8), numbers(8, seed=3)
    errors = [
        error(x, pursued(x, W_dec, b_dec, k=k), W_dec, b_dec).mean().item() for k in range(1, 11)
    ]
    assert errors[0] < (x - b_dec).square().sum(1).mean().item()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("k", [1, 3, 20])
def test_alpha_is_not_negative_and_has_at_most_k_entries(k: int) -> None:
    alpha = pursued(numbers(200, 8), dictionary(20, 8), numbers(8, seed=3), k=k)
    assert alpha.shape == (200, 20)
    assert (alpha >= 0).all()
    counts = (alpha > 0).sum(1)
    assert counts.max() <= k
    assert counts.min() >= 1


def test_a_token_that_points_away_from_every_direction_gets_nothing() -> None:
    # Products (-1, -0.6) in the first two directions: the step goes below 0 and is cut there.
    assert pursued(token(-1, 0), ATOMS[:2], ORIGIN, k=2).tolist() == [[0, 0]]


def test_a_solved_token_stays_solved() -> None:
    # r = 0 from the start: c . c = 0, and nothing is divided by it.
    assert pursued(token(3, 4), ATOMS, token(3, 4)[0], k=3).tolist() == [[0, 0, 0]]


def test_a_row_of_zeros_is_never_used() -> None:
    # Its product, 0, is the largest: the others are -1 and -1 on (-1, 1). Nothing is divided by 0.
    W_dec = ATOMS * torch.tensor([[1.0], [0.0], [1.0]])
    assert pursued(token(-1, 1), W_dec, ORIGIN, k=3).tolist() == [[0, 0, 0]]


def test_norms_of_directions_change_alpha_and_not_the_reconstruction() -> None:
    x, W_dec, b_dec = numbers(50, 8), dictionary(20, 8), numbers(8, seed=3)
    norms = torch.linspace(0.2, 3, 20, dtype=torch.float64)[:, None]
    alpha = pursued(x, W_dec, b_dec, k=4)
    scaled = pursued(x, norms * W_dec, b_dec, k=4)
    torch.testing.assert_close(scaled, alpha / norms[:, 0])


@pytest.mark.parametrize("make", [random_gated, random_relu])
def test_an_sae_decodes_what_is_pursued_in_its_dictionary(make) -> None:
    sae, x = make(), numbers(6, 4)
    f = pursue(sae, x, k=2)
    assert not f.requires_grad
    expected = pursued(x, sae.W_dec, sae.b_dec, k=2)
    assert torch.equal(f, expected)
    centred = (x - sae.b_dec).square().sum(1)
    assert ((x - sae.decode(f)).square().sum(1) < centred).any()


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_dictionary_is_refused(k: int) -> None:
    assert refusal(pursued, token(2, 0.5), ATOMS, ORIGIN, k=k) == (
        f"expected k from 1 to d_sae=3, got {k}; k is how many latents a token may use"
    )


def test_activations_of_another_width_are_refused() -> None:
    assert refusal(pursued, token(1, 2, 3), ATOMS, ORIGIN, k=1) == (
        "expected activations of width d_in=2, got shape (1, 3); "
        "was this SAE trained on another model or site?"
    )
