"""JumpReLU SAEs: what fires, what the penalty counts, and both pseudo-derivatives by hand."""

import math
from typing import Any

import pytest
import torch
from examples import numbers, perturb_, set_

from gsae_core.errors import InputError
from gsae_core.sae.architectures import JumpReluSAE, fold_scale_
from gsae_core.sae.jumprelu import jump, step
from gsae_core.sae.losses import dense_step, jumprelu_loss, loss

X = torch.tensor([[3.0, 1.0]], dtype=torch.float64)


def worked_example(**options: Any) -> JumpReluSAE:
    """Four latents in the plane on x = (3, 1), that is, xc = (2, 1).

    z     = (2, 1, 1, 2 - 1) + b_enc = (2, 1.5, -1, 1)
    theta =                            (1, 1.6,  1, 1)
    f: fires; just short of its threshold; negative; exactly at its threshold, which is silent
    """
    sae = JumpReluSAE(2, 4, **options).double()
    set_(
        sae,
        W_enc=[[1, 0, 0, 1], [0, 1, 1, -1]],
        b_enc=[0, 0.5, -2, 0],
        log_threshold=[0, math.log(1.6), 0, 0],
        W_dec=[[0.6, 0.8], [1, 0], [0, 1], [0, 1]],
        b_dec=[1, 0],
    )
    return sae


def random_jumprelu() -> JumpReluSAE:
    """Thresholds near one and a window as wide, so that every case occurs."""
    sae = JumpReluSAE(4, 7, init_threshold=1.0, bandwidth=1.0).double()
    perturb_(sae)
    return sae


def test_a_latent_fires_above_its_threshold_and_keeps_its_whole_height() -> None:
    sae = worked_example()
    assert sae.pre_activations(X).tolist() == [[2, 1.5, -1, 1]]
    assert sae.encode(X).tolist() == [[2, 0, 0, 0]]  # 2, not 2 - 1: nothing is shrunk
    assert sae(X)[0].tolist() == pytest.approx([2.2, 1.6])  # 2 (0.6, 0.8) + (1, 0)


def test_training_starts_from_unit_directions_and_the_papers_threshold() -> None:
    sae = JumpReluSAE(4, 7, seed=3)
    assert sae.threshold.tolist() == pytest.approx([0.001] * 7)
    assert sae.bandwidth == 0.001
    assert sae.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 7)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.b_enc.count_nonzero() == 0


def test_a_threshold_is_positive_wherever_its_logarithm_goes() -> None:
    sae = JumpReluSAE(4, 2)
    set_(sae, log_threshold=[-50, 3])
    assert (sae.threshold > 0).all()
    assert sae.threshold.tolist() == pytest.approx([math.exp(-50), math.exp(3)], rel=1e-5)


# The pseudo-derivatives, eps = 1/2: the window is theta - 1/4 to theta + 1/4, its ends left out.
# z - theta = (1, -1/8, 1/8, -3/8, 1/4) for theta = 1.

Z = [2.0, 0.875, 1.125, 0.625, 1.25]
UPSTREAM = [3.0, 5.0, 7.0, 11.0, 13.0]


def gradients(function: str) -> tuple[list[float] | None, list[float]]:
    """Return the derivatives of sum(upstream * function(z, theta)), one theta for each z."""
    z = torch.tensor(Z, dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    out = {"jump": jump, "step": step}[function](z, theta, 0.5)
    (out * torch.tensor(UPSTREAM, dtype=torch.float64)).sum().backward()
    assert theta.grad is not None
    return None if z.grad is None else z.grad.tolist(), theta.grad.tolist()


def test_the_jumps_derivatives_are_the_mask_and_the_window() -> None:
    to_z, to_theta = gradients("jump")
    assert to_z == [3, 0, 7, 0, 13]  # the upstream gradient, where z > theta
    assert to_theta == [0, -10, -14, 0, 0]  # -(theta / eps) upstream = -2 upstream, in the window


def test_the_steps_derivatives_are_nothing_and_the_window() -> None:
    to_z, to_theta = gradients("step")
    assert to_z is None  # the penalty moves thresholds, never the encoder
    assert to_theta == [0, -10, -14, 0, 0]  # -(1 / eps) upstream


def test_the_jump_weighs_the_window_by_the_threshold_and_the_step_does_not() -> None:
    z = torch.full((3, 1), 2.0, dtype=torch.float64)  # three tokens: their derivatives add up
    for function, wanted in ((jump, -3 * 2 / 0.5), (step, -3 / 0.5)):
        theta = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
        function(z, theta, 0.5).sum().backward()
        assert theta.grad is not None
        assert theta.grad.tolist() == pytest.approx([wanted])


def test_the_window_estimates_the_slope_of_the_expected_count() -> None:
    # z uniform on (0, 1): E H(z - theta) = 1 - theta, whose slope is -1 at every theta. A grid in
    # place of draws: 1000 of 10 000 points lie in a window of 0.1.
    z = (torch.arange(10_000, dtype=torch.float64)[:, None] + 0.5) / 10_000
    theta = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    step(z, theta, 0.1).mean().backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-1)


# The loss


def test_each_term_of_the_loss() -> None:
    # x_hat = (2.2, 1.6): 0.8^2 + 0.6^2 = 1;  one latent fires, times lambda = 0.5
    parts = jumprelu_loss(worked_example(), X, sparsity_coeff=0.5)
    assert [term.item() for term in parts] == pytest.approx([1.0, 0.5, 0.0])


def test_the_gradient_of_a_threshold_by_hand() -> None:
    # Latent 1 is the only one in its window: z - theta = 1.5 - 1.6 = -0.1, eps = 0.4.
    # Reconstruction: 2 (x_hat - x) . d_1 = 2 (2.2 - 3) = -1.6, times -(1.6 / 0.4) = 6.4.
    # Penalty: lambda = 0.5 times -(1 / 0.4) = -1.25. To log theta: times theta = 1.6.
    sae = worked_example(bandwidth=0.4)
    set_(sae, log_threshold=[0, math.log(1.6), 0, -9])
    set_(sae, b_enc=[0, 0.5, -2, -3])  # latent 3 out of the way
    jumprelu_loss(sae, X, sparsity_coeff=0.5).total.backward()
    assert sae.log_threshold.grad is not None
    assert sae.log_threshold.grad.tolist() == pytest.approx([0, 1.6 * (6.4 - 1.25), 0, 0])


def test_the_penalty_moves_thresholds_and_nothing_else() -> None:
    sae = random_jumprelu()
    parts = jumprelu_loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    names = [name for name, _ in sae.named_parameters()]
    found = torch.autograd.grad(parts.sparsity, list(sae.parameters()), allow_unused=True)
    moved = {name for name, grad in zip(names, found, strict=True) if grad is not None}
    assert moved == {"log_threshold"}


def test_all_but_thresholds_have_the_true_gradient() -> None:
    # A finite difference crosses no threshold here, so it knows the true derivative.
    sae, x = random_jumprelu(), numbers(6, 4)
    dense_step(sae, x, sparsity_coeff=0.3)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        parameter = sae.get_parameter(name)
        assert parameter.grad is not None
        for place in range(min(parameter.numel(), 5)):
            entry, losses = parameter.data.view(-1), []
            for shift in (1e-6, -2e-6, 1e-6):
                entry[place] += shift
                losses.append(loss(sae, x, sparsity_coeff=0.3).total.item())
            slope = (losses[0] - losses[1]) / 2e-6
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, abs=1e-6), name


def test_a_step_leaves_gradients_and_statistics_without_a_gate() -> None:
    sae, x = random_jumprelu(), numbers(30, 4)
    result = dense_step(sae, x, sparsity_coeff=0.3)
    assert all(p.grad is not None for p in sae.parameters())
    assert result.stats.fired.tolist() == (sae.encode(x) > 0).sum(0).tolist()
    assert result.stats.gate_open is None
    assert result.stats.gate_power is None
    l0 = result.stats.fired.sum().item() / 30
    assert result.loss.sparsity.item() == pytest.approx(0.3 * l0)
    assert not result.loss.total.requires_grad


def test_a_folded_scale_shifts_thresholds_like_biases() -> None:
    sae, x = random_jumprelu(), numbers(30, 4)
    f, x_hat, theta = sae.encode(4 * x), sae(4 * x), sae.threshold.detach().clone()
    fold_scale_(sae, 4.0)
    torch.testing.assert_close(sae.encode(x), f / 4)
    torch.testing.assert_close(sae(x), x_hat / 4)
    torch.testing.assert_close(sae.threshold, theta / 4)
    assert (sae.bandwidth, sae.init_threshold) == (0.25, 0.25)


# Mistakes


@pytest.mark.parametrize("recipe", ["A", "B"])
def test_recipes_that_weigh_an_l1_term_are_refused(recipe: str) -> None:
    with pytest.raises(InputError) as caught:
        JumpReluSAE(4, 7, recipe=recipe)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == (
        f"expected recipe 'P' for a JumpReLU SAE, got {recipe!r}: recipes A and B weigh an L1 "
        "term, and this architecture has none"
    )


@pytest.mark.parametrize("name", ["init_threshold", "bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_thresholds_and_windows_are_positive(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=f"^expected a positive, finite {name}, got {value}$"):
        JumpReluSAE(4, 7, **wrong)


def test_a_batch_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"width d_in=4, got shape \(2, 5\)"):
        dense_step(JumpReluSAE(4, 7), torch.zeros(2, 5), sparsity_coeff=0.3)
