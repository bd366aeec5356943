"""The loop: what a step leaves, that runs resume to the same bits, who stops, what is learnt."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import batch_stats
from refusals import refusal
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.metrics import Metrics
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training import StepReport, TrainConfig, Trainer, train
from gsae_core.training.learner import CROSSOVER, choose_step

D_IN, BATCH = 6, 16
N_STEPS = 24


def sparse_batches(
    n: int, *, batch_size: int = BATCH, d_in: int = D_IN, n_true: int = 12, p: float = 0.1
) -> list[Tensor]:
    """Sums of a few of `n_true` fixed directions, with strengths between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(n_true, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(n, batch_size, n_true, generator=generator) < p
    strength = 0.5 + torch.rand(n, batch_size, n_true, generator=generator)
    return list((on * strength) @ directions)


def config(n_steps: int = N_STEPS, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "n_tokens": n_steps * BATCH,
        "batch_size": BATCH,
        "sparsity": 0.1,
        "lr": 0.01,
        "lr_warmup_steps": 3,
        "lr_decay_fraction": 0.25,
        "sparsity_warmup_steps": 5,
        "revive_every": 6,
        "revive_window": 4,
        "revive_until": 0.7,
    }
    return TrainConfig(**settings | changes)


def gated_with_corpses() -> GatedSAE:
    """Latent 0's gate never opens; latent 1's opens, onto a magnitude of zero."""
    sae = GatedSAE(D_IN, 9, seed=1)
    with torch.no_grad():
        sae.b_gate[0] = -100.0
        sae.b_gate[1] = 100.0
        sae.b_mag[1] = -100.0
    return sae


def all_kinds() -> list[GatedSAE | ReluSAE]:
    relu = ReluSAE(D_IN, 13, seed=2)
    with torch.no_grad():
        relu.b_enc[3] = -100.0
    return [gated_with_corpses(), relu, GatedSAE(D_IN, 8, recipe="A", tie="untied", seed=3)]


def assert_same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def numbers(report: StepReport) -> list[tuple[float, ...]]:
    """Every number of a report but the wall-clock time."""
    return [
        (
            *map(float, each.loss or ()),
            each.lr,
            each.sparsity_coeff,
            each.l0,
            each.fvu,
            each.gamma,
            each.gate_dead_fraction,
            each.magnitude_dead_fraction,
            each.n_resampled,
        )
        for each in report.saes
    ]


def test_rows_of_the_dictionary_are_unit_after_every_step() -> None:
    saes = [gated_with_corpses(), ReluSAE(D_IN, 13)]
    resampled = 0
    for report in train(saes, sparse_batches(N_STEPS), config(lr=0.1)):
        resampled += sum(each.n_resampled for each in report.saes)
        for sae in saes:
            assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert resampled > 0


def test_saes_trained_together_equal_each_trained_alone() -> None:
    together, alone = all_kinds(), all_kinds()
    cfg = config(sparsity=(0.1, 0.2, 0.3), lrs=(0.01, 0.02, 0.03))
    batches = sparse_batches(N_STEPS)
    *_, last = train(together, batches, cfg)
    for i, sae in enumerate(alone):
        own = config(sparsity=cfg.sparsity[i], lr=0.01 * (i + 1))
        *_, report = train([sae], batches, own)
        assert_same_bits(sae, together[i])
        assert numbers(report)[0] == numbers(last)[i]


def test_a_state_does_not_change_with_later_steps() -> None:
    trainer = Trainer(all_kinds(), config())
    batches = sparse_batches(N_STEPS)
    for x in batches[:4]:
        trainer.step(x)
    state = trainer.state_dict()
    before = copy.deepcopy(state)
    for x in batches[4:]:
        trainer.step(x)
    fresh = Trainer(all_kinds(), config())
    fresh.load_state_dict(state)
    assert fresh.steps_done == 4
    assert str(fresh.state_dict()["saes"]) == str(before["saes"])


def test_dead_latents_are_told_apart_by_what_keeps_them_silent() -> None:
    # revive_every=0; latent 0 never opens its gate, latent 1 opens onto nothing; the others fire on
    # half of all inputs. The window is 4 steps.
    sae = gated_with_corpses()
    batches = [
        torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(i)) for i in range(5)
    ]
    cfg = config(5, revive_every=0, lr=1e-6)
    reports = [report.saes[0] for report in train([sae], batches, cfg)]
    dead = [(r.gate_dead_fraction, r.magnitude_dead_fraction, r.dead_fraction) for r in reports]
    assert dead[:3] == [(0.0, 0.0, 0.0)] * 3
    assert dead[3:] == [pytest.approx((1 / 9, 1 / 9, 2 / 9))] * 2


def test_a_relu_sae_has_gate_dead_latents_only() -> None:
    sae = ReluSAE(D_IN, 13)
    with torch.no_grad():
        sae.b_enc[3] = -100.0
    *_, last = train([sae], sparse_batches(5), config(5, revive_every=0, lr=1e-6))
    assert last.saes[0].gate_dead_fraction == pytest.approx(1 / 13)
    assert last.saes[0].magnitude_dead_fraction == 0
    assert math.isnan(last.saes[0].gamma_gate)


def test_a_resampling_is_reported_and_warms_up_again() -> None:
    cfg = config(revive_until=0.3, lr_decay_fraction=0.0)  # one resampling, after step 6
    reports = [r.saes[0] for r in train([gated_with_corpses()], sparse_batches(N_STEPS), cfg)]
    assert [i + 1 for i, r in enumerate(reports) if r.n_resampled] == [6]
    assert reports[5].n_resampled == 2  # latents 0 and 1
    assert reports[5].dead_fraction == pytest.approx(2 / 9)  # as the step found it
    assert reports[6].dead_fraction == 0
    # 0.1 + 0.9 (1 - cos(pi k / 3)) / 2 of 0.01 at k = 0, 1, 2, 3.
    expected = [0.001, 0.00325, 0.00775, 0.01]
    assert [r.lr for r in reports[:4]] == pytest.approx(expected)
    assert [r.lr for r in reports[6:10]] == pytest.approx(expected)


def test_a_resampled_latent_gets_a_whole_window() -> None:
    trainer = Trainer([gated_with_corpses()], config())
    for x in sparse_batches(6):
        trainer.step(x)
    (state,) = trainer.state_dict()["saes"]
    assert state["since_fired"][:2].tolist() == [0, 0]
    assert state["since_open"][:2].tolist() == [0, 0]


def test_no_warm_up_where_nothing_was_resampled() -> None:
    cfg = config(lr_decay_fraction=0.0, revive_window=1000)
    reports = [r.saes[0] for r in train([GatedSAE(D_IN, 9)], sparse_batches(N_STEPS), cfg)]
    assert [r.lr for r in reports[3:]] == pytest.approx([0.01] * (N_STEPS - 3))


def test_each_sae_has_its_own_lambda_and_learning_rate() -> None:
    cfg = config(sparsity=(0.1, 0.2), lrs=(0.01, 0.03))
    reports = list(train([GatedSAE(D_IN, 9), ReluSAE(D_IN, 13)], sparse_batches(N_STEPS), cfg))
    assert [each.sparsity_coeff for each in reports[0].saes] == [0.0, 0.0]
    assert [each.sparsity_coeff for each in reports[10].saes] == pytest.approx([0.1, 0.2])
    assert [each.lr for each in reports[10].saes] == pytest.approx([0.01, 0.03])


def test_a_report_counts_steps_and_tokens_and_measures_before_the_step() -> None:
    sae = GatedSAE(D_IN, 9)
    before = copy.deepcopy(sae)
    x = sparse_batches(1)[0]
    trainer = Trainer([sae], config(n_tokens=N_STEPS * BATCH + BATCH - 1))  # rounded down
    report = trainer.step(x)
    assert (report.step, report.n_steps, report.tokens) == (1, N_STEPS, BATCH)
    assert 0 < report.seconds < 100
    f = before.encode(x).detach()
    metrics = Metrics(batch_stats(x=x, x_hat=before(x).detach(), f=f))
    assert report.saes[0].l0 == pytest.approx(metrics.l0)
    assert report.saes[0].fvu == pytest.approx(metrics.fvu, rel=1e-5)
    assert report.saes[0].gamma == pytest.approx(metrics.gamma, rel=1e-5)
    assert report.saes[0].loss is not None
    error = (x - before(x)).square().sum(1).mean().item()
    assert float(report.saes[0].loss.reconstruction) == pytest.approx(error, rel=1e-5)


def test_an_open_gate_counts_towards_the_density_whether_or_not_its_latent_fires() -> None:
    sae = GatedSAE(D_IN, 9)
    with torch.no_grad():
        sae.b_gate.fill_(-100.0)
        sae.b_gate[0] = 100.0
        sae.b_mag.fill_(-100.0)
    trainer = Trainer([sae], config())
    trainer.step(sparse_batches(1)[0])
    # One gate of nine is always open; that nothing fires makes no difference to the cost.
    assert trainer.state_dict()["saes"][0]["density"] == pytest.approx(1 / 9)


def test_both_steps_are_taken_and_training_does_not_tell_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = set()

    def choose(*args: Any, **kwargs: Any) -> Callable[..., StepResult]:
        step = original(*args, **kwargs)
        taken.add(step)
        return step

    original = choose_step
    monkeypatch.setattr("gsae_core.training.learner.choose_step", choose)
    monkeypatch.setitem(CROSSOVER, "cpu", 0.4)  # half of all gates are open at the start
    batches = sparse_batches(N_STEPS)
    cfg = config(lr=1e-3, revive_every=0)
    mixed, dense = GatedSAE(D_IN, 9), GatedSAE(D_IN, 9)
    list(train([mixed], batches, cfg))
    assert taken == {manual_dense_step, sparse_step}
    monkeypatch.setattr("gsae_core.training.learner.choose_step", lambda *_, **__: dense_step)
    list(train([dense], batches, cfg))
    for name, parameter in mixed.named_parameters():
        # Adam divides by the gradient's size, so rounding shows where that is near zero.
        assert torch.allclose(parameter, dense.get_parameter(name), atol=2e-4), name


def test_kept_reports_hold_no_numbers_per_latent() -> None:
    sae = GatedSAE(D_IN, 1000)
    (report,) = train([sae], sparse_batches(1), config(1)).__next__().saes
    assert report.stats is not None
    sizes = [value.numel() for value in report.stats if value is not None]
    assert max(sizes) <= D_IN


def test_activations_that_are_not_finite_stop_all_and_end_the_run() -> None:
    batches = sparse_batches(N_STEPS)
    batches[2][3, 1] = math.nan
    taken = iter(batches)
    saes = [GatedSAE(D_IN, 9), ReluSAE(D_IN, 13)]
    reports = list(train(saes, taken, config()))
    assert len(reports) == 3
    assert [each.stopped for each in reports[2].saes] == [
        "step 3: the activations are not finite"
    ] * 2
    assert len(list(taken)) == N_STEPS - 3  # no more was read


def test_a_stopped_sae_is_still_stopped_after_resuming() -> None:
    batches = sparse_batches(N_STEPS)
    batches[0] = batches[0] * math.nan
    trainer = Trainer([GatedSAE(D_IN, 9)], config())
    trainer.step(batches[0])
    sae = GatedSAE(D_IN, 9)
    resumed = Trainer([sae], config())
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.finished
    assert list(train([sae], batches[1:], config(), trainer=resumed)) == []


def test_no_batch_is_read_beyond_the_last_step() -> None:
    batches = iter(sparse_batches(N_STEPS + 3))
    assert len(list(train([ReluSAE(D_IN, 13)], batches, config()))) == N_STEPS
    assert len(list(batches)) == 3


def test_a_run_that_ends_in_its_warm_up_says_so(caplog: pytest.LogCaptureFixture) -> None:
    Trainer([ReluSAE(D_IN, 13)], config(lr_warmup_steps=N_STEPS))
    assert caplog.messages == [
        "all 24 steps lie within the learning-rate warm-up of 24, so the learning rate never "
        "reaches its peak; shorten the warm-up or train longer"
    ]


GATED = GatedSAE(D_IN, 9)


@pytest.mark.parametrize(
    ("saes", "changes", "sentence"),
    [
        ([], {}, "expected at least one SAE, got none; pass a list of SAEs"),
        (
            [GATED, GATED],
            {},
            "expected different SAEs, got the same one twice; copy.deepcopy() makes another",
        ),
        (
            [GATED, ReluSAE(5, 9)],
            {},
            "expected SAEs of one d_in, got 5 and 6; "
            "SAEs that read different activations are trained apart",
        ),
        (
            [GATED, ReluSAE(D_IN, 9)],
            {"sparsity": (0.1, 0.2, 0.3)},
            "expected sparsity to hold one number, or one for each of 2 SAEs, got 3",
        ),
        (
            [GATED],
            {"lrs": (0.1, 0.2)},
            "expected lrs to hold one number, or one for each of 1 SAEs, got 2",
        ),
        (
            [GATED],
            {"n_tokens": 15},
            "expected n_tokens of at least one batch (16), got 15; "
            "train on more tokens or in smaller batches",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_batch(
    saes: list[GatedSAE | ReluSAE], changes: dict[str, Any], sentence: str
) -> None:
    assert refusal(train, saes, [], config(**changes)) == sentence


def test_batches_that_run_out_are_named_with_what_was_needed() -> None:
    reports = train([ReluSAE(D_IN, 13)], sparse_batches(3), config())
    assert refusal(list, reports) == (
        "expected 24 batches of 16, got 3; give more data, or lower n_tokens"
    )


def test_a_batch_of_another_shape_is_refused() -> None:
    trainer = Trainer([ReluSAE(D_IN, 13)], config())
    assert refusal(trainer.step, torch.zeros(15, D_IN)) == (
        "expected batches of shape (batch_size, d_in) = (16, 6), got (15, 6); "
        "leave out an incomplete last batch, or change batch_size"
    )


def test_a_trainer_of_other_saes_or_settings_is_refused() -> None:
    sae = ReluSAE(D_IN, 13)
    trainer = Trainer([sae], config())
    assert refusal(train, [ReluSAE(D_IN, 13)], [], config(), trainer=trainer) == (
        "expected a trainer made from these SAEs and this config, got one made from others; make "
        "it with Trainer(saes, cfg)"
    )
    said = refusal(train, [sae], [], config(lr=0.5), trainer=trainer)
    assert said.startswith("expected a trainer made from these SAEs and this config")


def test_a_state_of_other_saes_is_refused_and_changes_nothing() -> None:
    state = Trainer([ReluSAE(D_IN, 13)], config()).state_dict()
    two = Trainer([ReluSAE(D_IN, 13), GatedSAE(D_IN, 9)], config())
    assert refusal(two.load_state_dict, state) == (
        "expected a state of 2 SAEs, got one of 1; "
        "build the trainer from the config of the run that saved it"
    )
    sae = ReluSAE(D_IN, 12, seed=4)
    before = copy.deepcopy(sae)
    assert refusal(Trainer([sae], config()).load_state_dict, state) == (
        "expected SAE 0 of the state to have W_dec 12x6, W_enc 6x12, b_dec 6, b_enc 12, "
        "got W_dec 13x6, W_enc 6x13, b_dec 6, b_enc 13; build the trainer from the config of the "
        "run that saved it"
    )
    assert_same_bits(sae, before)


@pytest.fixture(scope="module")
def superposition() -> list[Tensor]:
    """32 sparse directions in 16 dimensions; the last 40 batches are kept to measure on."""
    batches = sparse_batches(280, batch_size=128, d_in=16, n_true=32, p=0.06)
    return [x / 1.4 for x in batches]


def test_a_gated_sae_is_unbiased_where_the_baseline_shrinks(superposition: list[Tensor]) -> None:
    cfg = TrainConfig(
        n_tokens=240 * 128, batch_size=128, lr=0.01, sparsity=(0.2,), lr_warmup_steps=20,
        lr_decay_fraction=0.25, revive_every=0,
    )  # fmt: skip
    gated, relu = GatedSAE(16, 40), ReluSAE(16, 60)
    list(train([gated, relu], superposition, cfg))
    gammas, fvus = [], []
    for sae in (gated, relu):
        with torch.no_grad():
            x = torch.cat(superposition[-40:])
            x_hat, f = sae(x), sae.encode(x)
        metrics = Metrics(batch_stats(x=x, x_hat=x_hat, f=f))
        gammas.append(metrics.gamma)
        fvus.append(metrics.fvu)
    assert gammas[0] == pytest.approx(1.0, abs=0.015)
    assert gammas[1] < 0.93
    assert fvus[0] < fvus[1]


def test_killed_latents_come_back_to_life(superposition: list[Tensor]) -> None:
    def alive_after(revive_every: int, *, n_steps: int = 200) -> float:
        sae = GatedSAE(16, 40)
        with torch.no_grad():
            sae.b_gate[:20] = -100.0
        cfg = TrainConfig(
            n_tokens=n_steps * 128, batch_size=128, lr=0.01, sparsity=(0.1,), lr_warmup_steps=20,
            revive_every=revive_every, revive_window=40, revive_until=0.7,
        )  # fmt: skip
        list(train([sae], superposition, cfg))
        with torch.no_grad():
            return float((sae.encode(torch.cat(superposition[-40:])) > 0).any(0).float().mean())

    assert alive_after(0, n_steps=60) <= 0.5
    assert alive_after(50) > 0.9
