"""The screened encode finds the gates that float32 opens, and no others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import products_above
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training.trainer import Trainer


def random_batch(n: int, d_in: int, d_sae: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) / d_in**0.5
    return x, torch.randn(d_in, d_sae, generator=generator)


def assert_same_entries(x: Tensor, W: Tensor, above: Tensor) -> int:
    """Compare with float64's entries, those within float32's rounding of the threshold aside."""
    found = products_above(x, W, above, screened=True)
    assert found.n_candidates is not None
    exact = x.double() @ W.double()
    rows = torch.arange(len(x)).repeat_interleave(found.row_offsets.diff())
    opened = torch.zeros_like(exact, dtype=torch.bool)
    opened[rows, found.latent] = True
    rounding = 1e-5 * x.norm(dim=1)[:, None].double() * W.norm(dim=0).double()
    sure = (exact - above).abs() > rounding
    assert bool((opened == (exact > above))[sure].all())
    off = (found.h - exact[rows, found.latent]).abs()
    assert bool((off <= rounding[rows, found.latent]).all())
    assert found.n_candidates >= found.latent.numel()
    return found.n_candidates - found.latent.numel()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 5),
    d_in=st.integers(1, 40),
    d_sae=st.integers(1, 70),
    threshold=st.sampled_from([-50.0, -0.5, 0.0, 0.7, 2.0, 50.0]),
    length=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_the_entries_are_float32s_whatever_the_shape_and_scale(
    n: int, d_in: int, d_sae: int, threshold: float, length: float, seed: int
) -> None:
    x, W = random_batch(n, d_in, d_sae, seed=seed)
    assert_same_entries(x * length, W, torch.full((d_sae,), threshold * length))


def test_entries_of_a_realistic_batch_are_those_of_the_exact_encode_and_the_bound_is_needed() -> (
    None
):
    # More rows than a chunk. Both sum in float32, in different orders: no product of this seed lies
    # so near its threshold that the order would show.
    x, W = random_batch(600, 64, 1000, seed=0)
    above = torch.full((1000,), 2.5)
    exact, screened = products_above(x, W, above), products_above(x, W, above, screened=True)
    assert torch.equal(exact.row_offsets, screened.row_offsets)
    assert torch.equal(exact.latent, screened.latent)
    torch.testing.assert_close(exact.h, screened.h, atol=1e-5, rtol=0)
    in_vain = assert_same_entries(x, W, above)
    assert 0 < in_vain < exact.latent.numel()


def test_a_product_that_bfloat16_loses_is_found() -> None:
    # 1 + 2^-8 rounds to 1 in bfloat16 (ties to even), so the rounded product is 1 and lies below a
    # threshold of 1.002; the exact one, 1.0039, above it.
    x, W = torch.tensor([[1.0]]), torch.tensor([[1 + 2**-8]])
    assert float(x.bfloat16() @ W.bfloat16()) == 1.0
    found = products_above(x, W, torch.tensor([1.002]), screened=True)
    assert found.latent.tolist() == [0]
    assert found.h.tolist() == [1 + 2**-8]


def test_a_product_that_bfloat16_invents_is_dropped() -> None:
    # 1 + 3 * 2^-8 = 1.0117 lies halfway between 1 + 2^-7 and 1 + 2^-6; ties go to even, the larger.
    x, W = torch.tensor([[1.0]]), torch.tensor([[1 + 3 * 2**-8]])
    assert float(x.bfloat16() @ W.bfloat16()) == 1 + 2**-6
    found = products_above(x, W, torch.tensor([1.013]), screened=True)
    assert found.n_candidates == 1
    assert found.latent.numel() == 0


def test_rounding_to_bfloat16_is_torchs() -> None:
    W = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    W[0, 0], W[0, 1], W[0, 2] = 1 + 2**-8, 1 + 3 * 2**-8, 0.0
    rows, half = np.empty((33, 7), np.float32), np.empty((33, 7), np.uint16)
    off, length = np.empty(33, np.float32), np.empty(33, np.float32)
    arrays = (W.numpy(), rows, rows.view(np.uint32), half, off, length)
    loops.round_columns(0, 33, *arrays)
    rounded = W.T.contiguous().bfloat16()
    assert torch.equal(torch.from_numpy(half), rounded.view(torch.uint16))
    assert torch.equal(torch.from_numpy(rows), W.T)
    expected = (W.T - rounded.float()).norm(dim=1)
    torch.testing.assert_close(torch.from_numpy(off), expected)
    torch.testing.assert_close(torch.from_numpy(length), rounded.float().norm(dim=1))


@pytest.mark.parametrize("tie", ["r_mag", "none"])
def test_a_screened_step_has_the_gradients_of_the_exact_one(tie: str) -> None:
    x, _ = random_batch(50, 12, 1, seed=1)
    gradients, losses = [], []
    for screened in (False, True):
        sae = GatedSAE(12, 90, tie=tie)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            sae.b_gate.fill_(-0.2)
        result = sparse_step(sae, x, sparsity_coeff=0.1, screened=screened)
        assert (result.n_candidates is not None) == screened
        gradients.append({name: p.grad for name, p in sae.named_parameters()})
        losses.append(float(result.loss.total))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_report_says_how_often_the_bound_was_needed() -> None:
    x, _ = random_batch(64, 12, 1, seed=2)
    sae = GatedSAE(12, 90)
    with torch.no_grad():
        sae.b_gate.fill_(-0.5)
    cfg = TrainConfig(n_tokens=640, batch_size=64, sparsity=(0.1,), screened=True)
    trainer = Trainer([sae], cfg)
    first, second = (trainer.step(x).saes[0] for _ in range(2))
    assert first.n_candidates is None  # a dense step: no density is known yet
    assert np.isnan(first.screen_ratio)
    assert second.n_candidates is not None
    opened = round(trainer.state_dict()["saes"][0]["density"] * 64 * 90)
    assert second.screen_ratio == pytest.approx(second.n_candidates / opened)
