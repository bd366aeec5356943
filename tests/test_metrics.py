"""The metrics: each by hand, whole-set sums, and what happens when nothing is beneath a ratio."""

import math
from itertools import pairwise

import pytest
import torch
from examples import batch_stats, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae_core.sae.metrics import BatchStats, Metrics, stats_from_counts, sum_dtype

SCALARS = ["l0", "fvu", "gamma", "gamma_gate", "cosine", "alive_fraction"]
PER_LATENT = ["density", "gamma_per_feature"]


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Two tokens in the plane, three latents that write (1, 0), (0, 1) and (1, 0).
X = tensor([3, 4], [1, 3])
F = tensor([3, 0, 0], [1, 2, 0])
PI_GATE = tensor([1, -1, 1], [1, 1, 0])
W_DEC = tensor([1, 0], [0, 1], [1, 0])
X_HAT = tensor([3, 0], [1, 2])  # F @ W_DEC
X_HAT_GATE = tensor([2, 0], [1, 1])  # relu(PI_GATE) @ W_DEC


def worked_example() -> BatchStats:
    return batch_stats(x=X, x_hat=X_HAT, x_hat_gate=X_HAT_GATE, f=F, pi_gate=PI_GATE, W_dec=W_DEC)


def random_batch(n: int, seed: int, *, d_in: int = 4, d_sae: int = 6) -> dict[str, Tensor]:
    both = numbers(n, 3 * d_in + 2 * d_sae, seed=seed)
    x, x_hat, x_hat_gate, f, pi_gate = both.split([d_in, d_in, d_in, d_sae, d_sae], dim=1)
    W_dec = numbers(d_sae, d_in, seed=99)
    keys = ["x", "x_hat", "x_hat_gate", "f", "pi_gate", "W_dec"]
    return dict(zip(keys, [x, x_hat, x_hat_gate, f.clamp(min=0), pi_gate, W_dec], strict=True))


def test_every_metric_by_hand() -> None:
    m = Metrics(worked_example())
    assert m.n_tokens == 2
    assert m.l0 == 1.5  # (1 + 2) / 2
    # errors (0, 4), (0, 1): 17. The mean is (2, 3.5); about it 1.25 + 1.25.
    assert m.fvu == pytest.approx(17 / 2.5)
    # |x_hat|^2: 9 + 5. x . x_hat: 9 + 7.
    assert m.gamma == pytest.approx(14 / 16)
    # |x_hat_gate|^2: 4 + 2. x . x_hat_gate: 6 + 4.
    assert m.gamma_gate == pytest.approx(6 / 10)
    # 9 / (5 * 3) and 7 / sqrt(10 * 5)
    assert m.cosine == pytest.approx((0.6 + 7 / math.sqrt(50)) / 2)
    assert m.density.tolist() == [1, 0.5, 0]
    assert m.firings.tolist() == [2, 1, 0]
    assert m.alive_fraction == pytest.approx(2 / 3)


def test_gamma_per_feature_by_hand() -> None:
    # x - x_hat = (0, 4), (0, 1).
    # Latent 0 cannot help: (9 + 1) / (3 * 3 + 1 * 1) = 1.
    # Latent 1 fires with 2 where 3 is right: 4 / (2 * (2 + 1)) = 2 / 3.
    # Latent 2 never fires.
    gammas = Metrics(worked_example()).gamma_per_feature
    assert gammas[:2].tolist() == pytest.approx([1, 2 / 3])
    assert gammas[2].isnan()


def test_one_open_gate_upon_a_zero_magnitude_counts_for_the_gate_alone() -> None:
    # Latent 2 on the first token: pi_gate = 1 and f = 0.
    stats = worked_example()
    assert (stats.opened - stats.fired).tolist() == [0, 0, 1]


def test_gamma_equals_its_other_form() -> None:
    batch = random_batch(50, seed=1)
    m = Metrics(batch_stats(**batch))
    power, power_hat = (batch[k].square().sum().item() for k in ("x", "x_hat"))
    error = (batch["x"] - batch["x_hat"]).square().sum().item()
    # arXiv:2404.16014v2, Eq. 10
    assert m.gamma == pytest.approx(2 * power_hat / (power_hat + power - error))


def test_dividing_reconstructions_by_gamma_is_the_best_single_factor() -> None:
    batch = random_batch(50, seed=2)
    batch["x_hat"] = 0.7 * batch["x"] + 0.1 * batch["x_hat"]
    gamma = Metrics(batch_stats(**batch)).gamma

    def error(divisor: float) -> float:
        return (batch["x_hat"] / divisor - batch["x"]).square().sum().item()

    assert error(gamma) < min(error(0.999 * gamma), error(1.001 * gamma))


@pytest.mark.parametrize("c", [0.5, 1.0, 1.25, 4.0])
def test_gamma_is_one_over_c_when_an_unbiased_reconstruction_is_divided_by_c(c: float) -> None:
    # Leaving out the last two of four coordinates is unbiased, though far too short:
    # |x_hat|^2 = x . x_hat. So the ratio of lengths is no measure of shrinkage, and gamma is.
    x = numbers(50, 4)
    unbiased = x * torch.tensor([1, 1, 0, 0])
    counts = torch.zeros(6, dtype=torch.int64)
    stats = stats_from_counts(
        x=x, x_hat=unbiased / c, x_hat_gate=None, fired=counts, gate_open=None
    )
    assert Metrics(stats).gamma == pytest.approx(1 / c)
    assert unbiased.square().sum() < 0.7 * x.square().sum()


def test_gamma_per_feature_is_the_best_factor_with_the_others_held() -> None:
    batch = random_batch(50, seed=3)  # directions of any norm
    gammas = Metrics(batch_stats(**batch)).gamma_per_feature
    residual = batch["x"] - batch["x_hat"]
    for i, gamma in enumerate(gammas.tolist()):
        own = batch["f"][:, i, None] * batch["W_dec"][i]
        best = torch.linalg.lstsq(own.reshape(-1, 1), (residual + own).reshape(-1, 1)).solution
        assert 1 / gamma == pytest.approx(best.item())


def test_nothing_is_clipped() -> None:
    x = numbers(20, 4)
    opposite = Metrics(batch_stats(x=x, x_hat=-x, f=numbers(20, 6)))
    assert opposite.gamma == pytest.approx(-1)
    assert opposite.fvu > 3  # |2 x|^2 = 4 |x|^2
    assert opposite.cosine == pytest.approx(-1)


def test_the_mean_activation_explains_no_variance_and_the_activation_all_of_it() -> None:
    x = numbers(20, 4) + 100
    f, mean = numbers(20, 6), x.mean(0).expand_as(x)
    assert Metrics(batch_stats(x=x, x_hat=mean, f=f)).fvu == pytest.approx(1)
    assert Metrics(batch_stats(x=x, x_hat=x, f=f)).fvu == 0


# Batches


@settings(deadline=None, derandomize=True, max_examples=30)
@given(cuts=st.sets(st.integers(1, 39), max_size=8), seed=st.integers(0, 100))
def test_results_do_not_depend_on_how_tokens_fall_into_batches(cuts: set[int], seed: int) -> None:
    batch = random_batch(40, seed=seed)
    whole, streamed = Metrics(batch_stats(**batch)), Metrics()
    edges = [0, *sorted(cuts), 40]
    for start, end in pairwise(edges):
        part = {k: v if k == "W_dec" else v[start:end] for k, v in batch.items()}
        streamed.add(batch_stats(**part))
    assert streamed.n_tokens == whole.n_tokens == 40
    assert torch.equal(streamed.firings, whole.firings)
    for name in SCALARS:
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    for name in PER_LATENT:
        ours, theirs = getattr(streamed, name), getattr(whole, name)
        assert torch.allclose(ours, theirs, rtol=1e-9, equal_nan=True), name


def test_ratios_are_of_sums_and_no_averages_of_ratios() -> None:
    streamed = Metrics()
    for row in (slice(0, 1), slice(1, 2)):
        streamed.add(batch_stats(x=X[row], x_hat=X_HAT[row], f=F[row]))
    # The average of 9 / 9 and 5 / 7 would be 6 / 7.
    assert streamed.gamma == pytest.approx(14 / 16)


def test_float32_batches_are_summed_in_float64() -> None:
    # Past 2^24, float32 can no longer count by ones.
    metrics = Metrics()
    for x in [torch.tensor([[4096.0, 0.0]]), *[torch.tensor([[1.0, 0.0]])] * 500]:
        metrics.add(batch_stats(x=x, x_hat=x, f=torch.ones(1, 3)))
    assert metrics.sums is not None
    assert metrics.sums.x_power.item() == 2**24 + 500
    assert metrics.sums.x_hat_power.item() == 2**24 + 500
    assert metrics.sums.x_sum.tolist() == [4096 + 500, 0]
    assert metrics.firings.tolist() == [501] * 3
    assert metrics.sums.fired.dtype == torch.int64


def test_a_large_mean_costs_no_digits_of_fvu() -> None:
    # Variance 1 about a mean of 1000: float32 sums of squares would keep nothing of it.
    x = (numbers(200, 4) + 1000).float()
    x_hat = x + 0.5
    about_mean = (x.double() - x.double().mean(0)).square().sum().item()
    fvu = Metrics(batch_stats(x=x, x_hat=x_hat, f=torch.ones(200, 3))).fvu
    assert fvu == pytest.approx(200 * 4 * 0.25 / about_mean, rel=1e-6)


def test_gathering_and_adding_read_no_number_from_the_device() -> None:
    # Tensors on the meta device have no values: reading one raises.
    batch = {k: v.to("meta") for k, v in random_batch(5, seed=0).items()}
    metrics = Metrics()
    metrics.add(batch_stats(**batch))
    metrics.add(batch_stats(**batch))
    assert metrics.sums is not None
    assert metrics.sums.gate_open is not None
    assert metrics.sums.gate_open.shape == (6,)


def test_statistics_carry_no_graph() -> None:
    batch = {k: v.requires_grad_() for k, v in random_batch(5, seed=0).items()}
    assert not any(field.requires_grad for field in batch_stats(**batch) if field is not None)


def test_sums_are_float64_except_where_the_device_has_none() -> None:
    assert sum_dtype(torch.device("cpu")) == torch.float64
    assert sum_dtype(torch.device("mps")) == torch.float32


def test_half_precision_activations_are_multiplied_in_single() -> None:
    # 300^2 = 90000 is beyond float16.
    x = torch.full((2, 3), 300.0, dtype=torch.float16)
    stats = batch_stats(x=x, x_hat=x, f=torch.ones(2, 4, dtype=torch.float16))
    assert stats.x_hat_power.item() == 2 * 3 * 90000


# Nothing beneath


def test_before_any_batch_every_number_is_nan() -> None:
    m = Metrics()
    assert m.n_tokens == 0
    assert all(math.isnan(getattr(m, name)) for name in SCALARS)
    assert all(getattr(m, name).shape == (0,) for name in [*PER_LATENT, "firings"])


def test_an_empty_batch_gives_nan() -> None:
    m = Metrics(batch_stats(**random_batch(0, seed=0)))
    ratios = [name for name in SCALARS if name != "alive_fraction"]
    assert all(math.isnan(getattr(m, name)) for name in ratios)
    assert m.alive_fraction == 0
    assert all(getattr(m, name).isnan().all() for name in PER_LATENT)


def test_reconstructions_of_zero_have_no_gamma() -> None:
    batch = random_batch(5, seed=0)
    batch["x_hat"], batch["x_hat_gate"] = torch.zeros(5, 4), torch.zeros(5, 4)
    m = Metrics(batch_stats(**{k: v.double() for k, v in batch.items()}))
    assert math.isnan(m.gamma)
    assert math.isnan(m.gamma_gate)
    assert m.cosine == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_activations_that_never_vary_have_no_fvu(value: float) -> None:
    x = torch.full((7, 4), value)
    assert math.isnan(Metrics(batch_stats(x=x, x_hat=x + 1, f=torch.ones(7, 3))).fvu)


def test_a_relu_sae_has_no_gate_to_measure() -> None:
    m = Metrics(batch_stats(x=X, x_hat=X_HAT, f=F))
    assert math.isnan(m.gamma_gate)
    assert m.gamma_per_feature.isnan().tolist() == [True] * 3  # W_dec was not given
    assert m.l0 == 1.5


def test_every_number_explains_itself() -> None:
    # Pages show these texts beside the numbers.
    for name in ["n_tokens", "firings", *SCALARS, *PER_LATENT]:
        text = getattr(Metrics, name).__doc__
        assert text
        assert text.split("\n")[0].endswith((".", ","))
