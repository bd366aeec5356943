"""Baseline + rescale & shift: the baseline at first, its gate always, no shrinkage in the end."""

import pytest
import torch
from examples import batch_stats, numbers, random_gated, random_relu, set_
from refusals import refusal
from torch import Tensor

from gsae_core.sae.ablations import rescale_and_shift, rescale_step
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.metrics import Metrics


def shrunk_baseline() -> ReluSAE:
    """Return three latents in the plane whose f is h - 0.5 where h = x . d is what it should be."""
    sae = ReluSAE(2, 3).double()
    set_(
        sae,
        W_enc=[[1, 0, -1], [0, 1, 0]],
        b_enc=[-0.5, -0.5, -0.5],
        W_dec=[[1, 0], [0, 1], [-1, 0]],
    )
    return sae


# Each token lies on one direction, at 1 or at 2.
X = torch.tensor([[1, 0], [2, 0], [0, 1], [0, 2], [-1, 0], [-2, 0]], dtype=torch.float64)


def gamma(sae: GatedSAE | ReluSAE, x: Tensor) -> float:
    metrics, f = Metrics(), sae.encode(x)
    metrics.add(batch_stats(x=x, x_hat=sae.decode(f), f=f))
    return metrics.gamma


def learn(sae: GatedSAE, x: Tensor, *, n_steps: int, lr: float) -> float:
    """Train as a caller would; return the last loss."""
    adam = torch.optim.Adam((p for p in sae.parameters() if p.requires_grad), lr=lr)
    loss = torch.tensor(torch.nan)
    for _ in range(n_steps):
        loss = rescale_step(sae, x)
        adam.step()
    return loss.item()


@pytest.mark.parametrize("recipe", ["P", "A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_begins_as_the_baseline_bit_for_bit(recipe: str, dtype: torch.dtype) -> None:
    baseline, x = random_relu(recipe=recipe).to(dtype), numbers(200, 4).to(dtype)
    sae = rescale_and_shift(baseline)
    f = sae.encode(x)
    assert f.dtype == dtype
    assert (f > 0).any()
    assert torch.equal(f, baseline.encode(x))
    assert torch.equal(sae(x), baseline(x))
    assert sae.recipe == recipe


def test_only_the_scale_and_the_shift_learn() -> None:
    baseline, x = random_relu(), numbers(50, 4)
    kept = {name: value.clone() for name, value in baseline.state_dict().items()}
    sae = rescale_and_shift(baseline)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    # Every parameter is given to Adam: those without a gradient have to stay.
    adam = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(5):
        rescale_step(sae, x)
        adam.step()
    after = sae.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"r_mag", "b_mag"}
    assert {name for name, p in sae.named_parameters() if p.grad is not None} == changed
    assert all(torch.equal(kept[name], value) for name, value in baseline.state_dict().items())


def test_gradients_of_one_token_by_hand_and_fresh_each_time() -> None:
    # x = (2, 0): h = (2, 0, -2), f = (1.5, 0, 0), x_hat = (1.5, 0), |x - x_hat|^2 = 0.25;
    # d/db_mag_0 = 2 (x_hat - x) . d_0 = -1, and d/dr_mag_0 = -1 * h_0 exp(0) = -2.
    sae = rescale_and_shift(shrunk_baseline())
    assert sae.r_mag is not None
    for _ in range(2):
        loss = rescale_step(sae, X[1:2])
        assert loss.item() == 0.25
        assert not loss.requires_grad
        assert sae.b_mag.grad is not None
        assert sae.b_mag.grad.tolist() == [-1, 0, 0]
        assert sae.r_mag.grad is not None
        assert sae.r_mag.grad.tolist() == [-2, 0, 0]


def test_what_is_active_stays_among_the_latents_of_the_baseline() -> None:
    baseline, x = random_relu(), numbers(200, 4)
    sae = rescale_and_shift(baseline)
    active = baseline.encode(x) > 0
    for _ in range(10):
        learn(sae, x, n_steps=5, lr=0.1)
        assert not ((sae.encode(x) > 0) & ~active).any()
        assert (sae.encode(x) > 0).sum() <= active.sum()


def test_no_shift_opens_a_gate_that_the_baseline_kept_closed() -> None:
    # Every pi_mag is positive after this shift; f > 0 exactly where the baseline's is.
    baseline, x = random_relu(), numbers(200, 4)
    sae = rescale_and_shift(baseline)
    sae.b_mag.data += 100
    assert torch.equal(sae.encode(x) > 0, baseline.encode(x) > 0)


def test_learning_undoes_shrinkage() -> None:
    # Baseline: f = 0.5 at 1 and 1.5 at 2. gamma = sum |x_hat|^2 / sum x . x_hat
    #         = (0.25 + 2.25) / (1 * 0.5 + 2 * 1.5) = 2.5 / 3.5; loss (0.25 + 0.25) / 2.
    # r_mag = 0 and b_mag = 0 make x_hat = x: gamma 1, loss 0.
    baseline = shrunk_baseline()
    sae = rescale_and_shift(baseline)
    assert gamma(baseline, X) == pytest.approx(2.5 / 3.5)
    assert rescale_step(sae, X).item() == pytest.approx(0.25)
    # Five steps of 0.01 from 0 reach exp(r_mag) = 1.05 and b_mag = -0.45 at most: f = 0.6 and 1.65,
    # gamma = (0.6^2 + 1.65^2) / (0.6 + 3.3) = 0.79.
    assert learn(sae, X, n_steps=5, lr=0.01) < 0.25
    assert 2.5 / 3.5 < gamma(sae, X) < 0.8
    assert learn(sae, X, n_steps=400, lr=0.02) < 1e-4
    assert gamma(sae, X) == pytest.approx(1, abs=1e-3)


def test_an_sae_in_which_nothing_learns_is_refused() -> None:
    assert refusal(rescale_step, random_gated().requires_grad_(False), numbers(5, 4)) == (
        "expected an SAE of rescale_and_shift(baseline), got one in which [] learn"
    )


def test_activations_of_another_width_are_refused() -> None:
    assert refusal(rescale_step, rescale_and_shift(shrunk_baseline()), numbers(5, 3)) == (
        "expected activations of width d_in=2, got shape (5, 3); "
        "was this SAE trained on another model or site?"
    )
