"""JumpReLU SAEs: what fires, what the penalty counts, and both pseudo-derivatives by hand."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from examples import loss, numbers, perturb_, set_, slopes
from refusals import refusal
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.stream import ActivationStream
from gsae_core.presets import preset
from gsae_core.runs.work.setup import load_lm, load_text
from gsae_core.sae.architectures import JumpReluSAE, fold_scale_
from gsae_core.sae.jumprelu import jump, step
from gsae_core.sae.losses import dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training import TrainConfig, Trainer, train
from gsae_core.training.optimizer import DictionaryAdam

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
        threshold=[1, 1.6, 1, 1],
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


def test_training_starts_from_unit_directions_and_a_tenth_of_the_activations_length() -> None:
    sae = JumpReluSAE(4, 7, seed=3)
    assert sae.threshold.tolist() == pytest.approx([0.1] * 7)
    assert (sae.bandwidth, sae.threshold_unit, sae.eps) == (0.1, None, 0.1)
    assert sae.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 7)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.b_enc.count_nonzero() == 0


def test_thresholds_stay_in_float32_where_the_rest_gets_shorter() -> None:
    sae = JumpReluSAE(4, 7)
    set_(sae, threshold=[0.1 + i * 2.0**-20 for i in range(7)])  # all one number in 8 bits
    theta = sae.threshold.detach().clone()
    sae.bfloat16()
    assert (sae.W_enc.dtype, sae.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(sae.threshold, theta)
    dense_step(sae, numbers(30, 4).bfloat16(), sparsity_coeff=0.3)
    assert sae.threshold.grad is not None
    assert sae.threshold.grad.dtype == torch.float32
    assert sae.double().threshold.dtype == torch.float64


# The pseudo-derivatives, eps = 1/2: the window is theta - 1/4 to theta + 1/4, its ends left out.
# z - theta = (1, -1/8, 1/8, -3/8, 1/4) for theta = 1.

Z = [2.0, 0.875, 1.125, 0.625, 1.25]
UPSTREAM = [3.0, 5.0, 7.0, 11.0, 13.0]


def gradients(function: Callable[..., Tensor]) -> tuple[list[float] | None, list[float]]:
    """Return the derivatives of sum(upstream * function(z, theta)), one theta for each z."""
    z = torch.tensor(Z, dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (function(z, theta, 0.5) * torch.tensor(UPSTREAM, dtype=torch.float64)).sum().backward()
    assert theta.grad is not None
    return None if z.grad is None else z.grad.tolist(), theta.grad.tolist()


def test_the_derivatives_are_the_mask_of_the_jump_and_the_window() -> None:
    # To theta: -(theta / eps) upstream and -(1 / eps) upstream = -2 upstream, in the window.
    window = [0, -10, -14, 0, 0]
    # To z: the upstream gradient, where z > theta; the penalty never moves the encoder.
    assert gradients(jump) == ([3, 0, 7, 0, 13], window)
    assert gradients(step) == (None, window)


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
    parts = loss(worked_example(), X, sparsity_coeff=0.5)
    assert [term.item() for term in parts] == pytest.approx([1.0, 0.5, 0.0])


def test_the_gradient_of_a_threshold_by_hand() -> None:
    # Latent 1 is the only one in its window: z - theta = 1.5 - 1.6 = -0.1, eps = 0.4.
    # Reconstruction: 2 (x_hat - x) . d_1 = 2 (2.2 - 3) = -1.6, times -(1.6 / 0.4) = 6.4.
    # Penalty: lambda = 0.5 times -(1 / 0.4) = -1.25.
    for take in (None, dense_step, sparse_step):
        sae = worked_example(bandwidth=0.4)
        set_(sae, b_enc=[0, 0.5, -2, -3])  # latent 3 out of the way
        if take is None:
            loss(sae, X, sparsity_coeff=0.5).total.backward()
        else:
            take(sae, X, sparsity_coeff=0.5)
        assert sae.threshold.grad is not None
        assert sae.threshold.grad.tolist() == pytest.approx([0, 6.4 - 1.25, 0, 0])


def test_at_a_threshold_of_zero_the_penalty_alone_is_left_and_raises_it() -> None:
    # z - theta = 1.5 and 0.1 at theta = 0 and eps = 0.4: the second latent lies in the window.
    # dtheta = -(theta df + lambda) / eps = -(0 + 0.5) / 0.4, whatever the reconstruction wants.
    for take in (dense_step, sparse_step):
        sae = JumpReluSAE(1, 2, bandwidth=0.4).double()
        set_(sae, W_enc=[[1, 1]], b_enc=[0.5, -0.9], threshold=[0, 0], W_dec=[[1], [1]])
        take(sae, torch.ones(1, 1, dtype=torch.float64), sparsity_coeff=0.5)
        assert sae.threshold.grad is not None
        assert sae.threshold.grad.tolist() == pytest.approx([0, -1.25])


def test_the_penalty_moves_thresholds_and_nothing_else() -> None:
    sae = random_jumprelu()
    parts = loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    names = [name for name, _ in sae.named_parameters()]
    found = torch.autograd.grad(parts.sparsity, list(sae.parameters()), allow_unused=True)
    moved = {name for name, grad in zip(names, found, strict=True) if grad is not None}
    assert moved == {"threshold"}


def test_all_but_thresholds_have_the_true_gradient() -> None:
    # A finite difference crosses no threshold here, so it knows the true derivative.
    sae, x = random_jumprelu(), numbers(6, 4)
    dense_step(sae, x, sparsity_coeff=0.3)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        parameter = sae.get_parameter(name)
        found = slopes(parameter, lambda: loss(sae, x, sparsity_coeff=0.3).total.item(), 5)
        assert parameter.grad is not None
        assert parameter.grad.view(-1)[:5].tolist() == pytest.approx(found, abs=1e-6), name


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
    assert (sae.eps, sae.start) == (0.25, 0.25)
    assert (sae.bandwidth, sae.init_threshold, sae.threshold_unit) == (1.0, 1.0, 0.25)


# Learning


def adam_on(sae: JumpReluSAE, gradient: list[float]) -> DictionaryAdam:
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sae.threshold.grad = torch.tensor(gradient).to(sae.threshold)
    return DictionaryAdam(sae, beta1=0.0, beta2=0.999)


def test_a_threshold_moves_in_its_unit_and_stops_at_zero() -> None:
    # Adam's first step is the learning rate long, whatever the gradient: 0.2 of a unit of 5 is 1.
    sae = JumpReluSAE(2, 3, threshold_unit=5.0)
    set_(sae, threshold=[3, 3, 0.5])
    adam_on(sae, [0.02, -7, 1]).step(lr=0.2)
    assert sae.threshold.tolist() == pytest.approx([2, 4, 0], abs=1e-6)
    assert torch.equal(sae.b_enc, torch.zeros(3))


def test_the_first_batch_says_what_one_is() -> None:
    # |x| = 3 and 4: sqrt((9 + 16) / 2) = 3.5355.
    sae = JumpReluSAE(2, 3, init_threshold=0.2, bandwidth=0.4)
    sae.measure_unit_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    assert sae.threshold_unit == pytest.approx(12.5**0.5)
    assert sae.threshold.tolist() == pytest.approx([0.2 * 12.5**0.5] * 3)
    assert (sae.start, sae.eps) == pytest.approx((0.2 * 12.5**0.5, 0.4 * 12.5**0.5))
    sae.measure_unit_(torch.ones(5, 2))  # once
    assert sae.threshold_unit == pytest.approx(12.5**0.5)


def test_thresholds_that_were_learnt_before_stay_where_they_are() -> None:
    sae = JumpReluSAE(2, 3)
    set_(sae, threshold=[0.1, 0.7, 0.1])
    sae.measure_unit_(torch.tensor([[3.0, 4.0]]))
    assert sae.threshold.tolist() == pytest.approx([0.1, 0.7, 0.1])
    assert sae.eps == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "unit"), [(0.0, None), (math.nan, None), (math.inf, None), (5.0, 2.0)]
)
def test_a_batch_without_a_length_or_a_given_unit_changes_nothing(
    value: float, unit: float | None
) -> None:
    sae = JumpReluSAE(2, 3, threshold_unit=unit)
    sae.measure_unit_(torch.full((4, 2), value))
    assert sae.threshold_unit == unit
    assert sae.threshold.tolist() == pytest.approx([0.1 * (unit or 1)] * 3)


def sums_of_atoms(n_steps: int, *, length: float, seed: int) -> Tensor:
    """Return batches of 256 sums of 8 of 128 atoms on average, E|x| about `length`."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(128, 32, generator=generator)
    active = torch.rand(n_steps, 256, 128, generator=generator)
    x = (active * (active > 1 - 1 / 16)) @ atoms
    return length * x / x.square().sum(-1).mean().sqrt()


def recipe(n_steps: int, *coeffs: float) -> TrainConfig:
    return TrainConfig(n_tokens=256 * n_steps, batch_size=256, sparsity=coeffs)


@pytest.mark.parametrize("length", [1.0, 30.0])
def test_a_trainer_measures_and_a_resumed_one_goes_on_with_the_same_bits(length: float) -> None:
    x = sums_of_atoms(6, length=length, seed=0)
    whole = JumpReluSAE(32, 40)
    for _ in train([whole], x, recipe(6, 0.01)):
        pass
    assert whole.threshold_unit == pytest.approx(length, rel=0.05)
    half, rest = Trainer([JumpReluSAE(32, 40)], recipe(6, 0.01)), JumpReluSAE(32, 40)
    for batch in x[:3]:
        half.step(batch)
    trainer = Trainer([rest], recipe(6, 0.01))
    trainer.load_state_dict(half.state_dict())
    for _ in train([rest], x[3:], recipe(6, 0.01), trainer=trainer):
        pass
    assert rest.settings == whole.settings
    for name, parameter in whole.named_parameters():
        assert torch.equal(rest.get_parameter(name), parameter), name


def test_a_state_of_an_earlier_version_is_refused_in_a_sentence() -> None:
    trainer = Trainer([JumpReluSAE(32, 40)], recipe(6, 0.01))
    state = trainer.state_dict()
    weights = state["saes"][0]["weights"]
    weights["log_threshold"] = weights.pop("threshold").log()
    assert refusal(trainer.load_state_dict, state) == (
        "expected SAE 0 of the state to have learnt its thresholds, got one of an earlier version, "
        "which learnt their logarithms and cannot go on here; start a new run (train --config with "
        "the run's config.json, and --init-threshold 0.1 --bandwidth 0.1, which are today's)"
    )


# What lambda does, at the package's defaults

LAMBDAS = (1e-3, 1e-2, 1e-1)


def mean_l0(saes: list[JumpReluSAE], batches: Iterable[Tensor], cfg: TrainConfig) -> list[float]:
    """Return each SAE's mean L0 over the last 32 batches of its training."""
    last = [
        [sae.l0 for sae in report.saes]
        for report in train(saes, batches, cfg)
        if report.step > cfg.n_steps - 32
    ]
    return [sum(each) / 32 for each in zip(*last, strict=True)]


@pytest.mark.parametrize(("seed", "length"), [(0, 1.0), (1, 30.0)])
def test_l0_falls_tenfold_over_two_decades_of_lambda(seed: int, length: float) -> None:
    # Of activations `length` times as long the same lambda is length^2 times as large. Seen: 37 to
    # 39, 12 to 13 and 1.0; when log theta was learnt from 0.001, 61 at all three.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 64, 64, generator=generator) * length / 8
    saes = [JumpReluSAE(64, 128, seed=seed) for _ in LAMBDAS]
    coeffs = tuple(coeff * length**2 for coeff in LAMBDAS)
    cfg = TrainConfig(n_tokens=200 * 64, batch_size=64, sparsity=coeffs)
    least, some, most = mean_l0(saes, x, cfg)
    assert least > some > most > 0.1
    assert least > 10 * most


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("n_steps", "batch", "width", "n_seeds"),
    [
        pytest.param(256, 256, 256, 1, marks=pytest.mark.slow),
        # The quick preset's batch and width.
        pytest.param(512, 2048, 1024, 3, marks=pytest.mark.long),
    ],
)
def test_l0_falls_tenfold_over_two_decades_of_lambda_on_the_bundled_model(
    n_steps: int, batch: int, width: int, n_seeds: int
) -> None:
    # Where the quick preset trains, at the defaults of everything else. Seen: 81 to 0.8, 71 to 1.3.
    quick = preset("quick").config()
    model = load_lm(quick)
    text, place = load_text(quick, model).train, quick.model
    harvest = Harvest(model, text, layer=place.layer, site=place.site)
    stream = ActivationStream(harvest, batch_size=batch, seed=0, n_batches=n_steps)
    saes = [JumpReluSAE(harvest.d_in, width, seed=seed) for seed in range(n_seeds) for _ in LAMBDAS]
    n_tokens = n_steps * batch
    cfg = TrainConfig(n_tokens=n_tokens, batch_size=batch, sparsity=LAMBDAS * n_seeds)
    found = mean_l0(saes, stream.batches(), cfg)
    for seed in range(n_seeds):
        least, some, most = found[3 * seed : 3 * seed + 3]
        print(f"seed {seed}: L0 {least:.1f}, {some:.1f}, {most:.2f}")
        assert least > some > most > 0.1
        assert least > 10 * most


# Mistakes


@pytest.mark.parametrize("name", ["init_threshold", "bandwidth", "threshold_unit"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_thresholds_and_windows_are_positive(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=f"^expected a positive, finite {name}, got {value}$"):
        JumpReluSAE(4, 7, **wrong)


def test_a_batch_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"width d_in=4, got shape \(2, 5\)"):
        dense_step(JumpReluSAE(4, 7), torch.zeros(2, 5), sparsity_coeff=0.3)
