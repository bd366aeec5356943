"""A learner's step: what it is chosen by, what it waits for, when it is taken again or refused.

Whole steps on a core each, as on a CPU; and launched for every SAE before any is finished, as on
other devices, made to happen on a CPU.
"""

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_trainer import assert_same_bits
from tiny_runs import flat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import LossParts, StepResult, dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training import StepReport, TrainConfig, Trainer, train
from gsae_core.training.learner import CROSSOVER, Launched, Learner, Stepper

D_IN, BATCH, N_STEPS = 6, 16, 24


@pytest.fixture(autouse=True, params=["a core each", "launched first"])
def phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # So that both ways to compute a step are taken, by what the one before measured.
    monkeypatch.setitem(CROSSOVER, "cpu", 0.4)
    if request.param == "launched first":
        # No CPU's own steps then either.
        monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False))
    return request.param


def some_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, D_IN, generator=generator)
    on = torch.rand(N_STEPS, BATCH, 12, generator=generator) < 0.2
    return list((on * (0.5 + torch.rand(on.shape, generator=generator))) @ directions)


BATCHES = some_batches()


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "n_tokens": N_STEPS * BATCH,
        "batch_size": BATCH,
        "sparsity": 0.1,
        "lr": 0.01,
        "lr_warmup_steps": 3,
        "sparsity_warmup_steps": 5,
        "revive_every": 6,
        "revive_window": 4,
        "revive_until": 0.7,
    }
    return TrainConfig(**settings | changes)


def gated() -> GatedSAE:
    """Latent 0's gate never opens, until it is resampled."""
    sae = GatedSAE(D_IN, 9, seed=1)
    with torch.no_grad():
        sae.b_gate[0] = -100.0
    return sae


def all_kinds() -> list[SAE]:
    return [
        gated(),
        ReluSAE(D_IN, 13, seed=2),
        GatedSAE(D_IN, 8, recipe="A", tie="untied", seed=3),
        JumpReluSAE(D_IN, 10, seed=4),
        TopKSAE(D_IN, 11, k=2, seed=5),
    ]


def numbers(report: StepReport) -> list[tuple[Any, ...]]:
    """Every number of a report but the wall-clock time."""
    return [
        (
            *map(float, each.loss or ()),
            *(each.lr, each.sparsity_coeff, each.n_resampled, each.n_candidates),
            *(str(each.l0), str(each.fvu), str(each.gamma), each.dead_fraction, each.stopped),
        )
        for each in report.saes
    ]


def learnt(trainer: Trainer) -> Any:
    """Every bit the next steps depend on."""
    return flat({key: v for key, v in trainer.state_dict().items() if key != "seconds"})


def run(
    saes: list[SAE], after: Callable[[Trainer, StepReport], object] = lambda *_: None, **kw: Any
) -> tuple[Any, list[list[tuple[Any, ...]]]]:
    """Return what N steps leave, and the numbers of all reports, read at the end."""
    trainer = Trainer(saes, config(**kw))
    reports = []
    for x in BATCHES:
        reports.append(trainer.step(x))
        after(trainer, reports[-1])
    return learnt(trainer), [numbers(report) for report in reports]


Attempts = Callable[..., StepResult]


def overflow_at(monkeypatch: pytest.MonkeyPatch, *which: int, unseen: int = 0) -> None:
    """Let attempts at these batches say that buffers overflowed, and leave garbage behind.

    Args:
        unseen: entries that a dense step does not count.
    """
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, **settings: Any) -> StepResult:
        made = original(self, x, **settings)
        if not any(torch.equal(x, BATCHES[i]) for i in which):
            return made
        for parameter in self._sae.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)  # finite: the flag alone tells
        loss = LossParts(*(term * 0 + 77.0 for term in made.loss))
        stats = made.stats._replace(fired=made.stats.fired * 0 + 1)
        return made._replace(
            loss=loss,
            stats=stats,
            n_entries=made.n_entries + unseen,
            overflowed=torch.tensor(True),
            capacity=4,
        )

    monkeypatch.setattr(Stepper, "attempt", attempt)


def dense_at(monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
    """Take the dense step at these batches in the first place."""
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, *, density: float | None, **settings: Any) -> StepResult:
        if any(torch.equal(x, BATCHES[i]) for i in which):
            return dense_step(self._sae, x, **settings)
        return original(self, x, density=density, **settings)

    monkeypatch.setattr(Stepper, "attempt", attempt)


def densities(monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
    """Return what will say by which density the step at each batch was chosen, in the end."""
    chosen: dict[int, float | None] = {}
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, *, density: float | None, **settings: Any) -> StepResult:
        (i,) = (i for i, batch in enumerate(BATCHES) if torch.equal(x, batch))
        chosen[i] = density
        return original(self, x, density=density, **settings)

    monkeypatch.setattr(Stepper, "attempt", attempt)
    return chosen


def test_a_report_read_early_or_a_state_saved_in_between_changes_no_bit() -> None:
    untouched, expected = run(all_kinds())
    seen = []

    def look(trainer: Trainer, report: StepReport) -> None:
        if report.step % 3 == 0:
            seen.append((report.step, numbers(report)))
        if report.step % 5 == 0:
            trainer.state_dict()
        if report.step % 7 == 0:
            assert trainer.saes[0].d_sae == 9

    looked_at, reports = run(all_kinds(), look)
    assert looked_at == untouched
    assert reports == expected
    assert seen == [(i, expected[i - 1]) for i in range(3, N_STEPS + 1, 3)]


@pytest.mark.parametrize("which", [(0, 3, 7, 8), (5, N_STEPS - 1)])
def test_a_step_that_overflows_is_taken_again_and_leaves_the_bits_of_a_dense_one(
    monkeypatch: pytest.MonkeyPatch, which: tuple[int, ...]
) -> None:
    # 3 is where a latent turns dead, 5 the batch of a resampling. Steps of one kind round alike,
    # whatever density they go by, and unlike the dense one.
    monkeypatch.setattr("gsae_core.training.learner.choose_step", lambda *_, **__: sparse_step)
    with monkeypatch.context() as patch:
        dense_at(patch, *which)
        expected, expected_numbers = run([gated(), ReluSAE(D_IN, 13)])
    assert expected != run([gated(), ReluSAE(D_IN, 13)])[0]
    overflow_at(monkeypatch, *which)
    got, reports = run([gated(), ReluSAE(D_IN, 13)])
    assert got == expected
    assert reports == expected_numbers


def test_a_step_is_chosen_by_the_density_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []

    def look(trainer: Trainer, _: StepReport) -> None:
        measured.append(trainer.state_dict()["saes"][0]["density"])

    overflow_at(monkeypatch, 9)
    chosen = densities(monkeypatch)
    run([gated()], look)
    assert len(set(measured)) > N_STEPS / 2
    assert chosen == dict(enumerate([None, *measured[:-1]]))


def test_an_overflow_is_logged_once_with_the_gates_that_were_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = []

    def look(trainer: Trainer, _: StepReport) -> None:
        counted.append(round(trainer.state_dict()["saes"][0]["density"] * BATCH * 9))

    overflow_at(monkeypatch, 4)
    with caplog.at_level("INFO", logger="gsae_core.training.learner"):
        run([gated()], look)
    assert caplog.messages == [
        f"expected at most 4 open gates, got {counted[4]}: "
        "this step was taken again by the dense way, with the same gradients"
    ]


def test_what_overflowed_is_the_room_to_ask_for_next_though_a_dense_step_counts_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of a JumpReLU SAE the kernels hold what lies just below a threshold, too.
    asked = []
    for unseen in (0, 9):
        with monkeypatch.context() as patch:
            overflow_at(patch, 4, unseen=unseen)
            chosen = densities(patch)
            run([gated()])
            asked.append(chosen[5])
    assert asked[1] == pytest.approx(asked[0] + 9 / (BATCH * 9))


def test_a_run_cut_anywhere_and_resumed_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_at(monkeypatch, 9)
    expected, expected_numbers = run(all_kinds())
    assert any(report[0][5] for report in expected_numbers)  # some latents were resampled
    # After a resampling, before and after an overflow, and at both ends.
    for cut in (0, 6, 9, 10, N_STEPS):
        first = Trainer(all_kinds(), config())
        for x in BATCHES[:cut]:
            first.step(x)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        # Other initial weights: everything has to come from the state.
        saes = all_kinds()
        for parameter in (p for sae in saes for p in sae.parameters()):
            torch.nn.init.constant_(parameter, 0.5)
        second = Trainer(saes, config())
        second.load_state_dict(torch.load(file, weights_only=True))
        reports = list(train(saes, BATCHES[cut:], config(), trainer=second))
        assert [numbers(report) for report in reports] == expected_numbers[cut:], cut
        assert learnt(second) == expected, cut


def test_a_state_of_an_earlier_version_loads_and_its_choices_are_left_out() -> None:
    first = Trainer([gated()], config())
    for x in BATCHES[:4]:
        first.step(x)
    state = first.state_dict()
    (saved,) = state["saes"]
    del saved["max_steps_since_fired"]
    more = {"silent": 3, "crossover": 0.01, "known_before": {"density": 0.5, "silent": 2}}
    second = Trainer([gated()], config())
    second.load_state_dict(state | {"saes": [saved | more]})
    for x in BATCHES[4:]:
        first.step(x)
        second.step(x)
    assert learnt(second) == learnt(first)


@pytest.mark.parametrize("k", [0, 4, 5, N_STEPS - 1])
def test_activations_that_are_not_finite_stop_an_sae_as_the_step_before_left_it(k: int) -> None:
    batches = [x.clone() for x in BATCHES]
    batches[k][3, 1] = math.nan
    saes = all_kinds()
    trainer, shorter = Trainer(saes, config()), Trainer(untouched := all_kinds(), config())
    for x in batches[:k]:
        trainer.step(x)
        shorter.step(x)
    before = learnt(shorter)
    report = trainer.step(batches[k])
    sentence = f"step {k + 1}: the activations are not finite"
    assert trainer.finished
    assert trainer.stopped == (sentence,) * 5
    assert [each.stopped for each in report.saes] == [sentence] * 5
    assert all(each.loss is None for each in report.saes)
    assert all(p.grad is None for sae in saes for p in sae.parameters())
    for sae, other in zip(saes, untouched, strict=True):
        assert_same_bits(sae, other)
    for ours, theirs in zip(learnt(trainer)["saes"], before["saes"], strict=True):
        assert ours["since_fired"] == theirs["since_fired"]
        assert ours["since_open"] == theirs["since_open"]


def test_an_sae_that_overflows_float32_stops_and_the_others_go_on() -> None:
    sick, well = gated(), ReluSAE(D_IN, 13)
    trainer = Trainer([sick, well], config())
    for x in BATCHES[:4]:
        trainer.step(x)
    with torch.no_grad():
        assert sick.r_mag is not None
        sick.r_mag.fill_(100.0)  # exp(100) is beyond float32
    before = copy.deepcopy(sick)
    reports = list(train([sick, well], BATCHES[4:], config(), trainer=trainer))
    sentence = "step 5: the reconstruction loss is not finite"
    assert [r.saes[0].stopped for r in reports] == [sentence] * 20
    assert [r.saes[1].stopped for r in reports] == [None] * 20
    assert reports[0].saes[0].loss is None
    assert math.isnan(reports[0].saes[0].l0)
    assert_same_bits(sick, before)
    alone = ReluSAE(D_IN, 13)
    run([alone])
    assert_same_bits(well, alone)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (math.nan, "step 3: the gradient of W_gate is not finite"),
        (-math.inf, "step 3: the gradient of W_gate is not finite"),
        (1e30, "step 3: the gradients are too large to be squared"),
    ],
)
@pytest.mark.parametrize("overflows", [False, True])
def test_gradients_that_are_not_finite_never_reach_the_weights_and_the_cause_is_told(
    monkeypatch: pytest.MonkeyPatch, value: float, cause: str, overflows: bool
) -> None:
    def spoil(way: Attempts) -> Attempts:
        def attempt(its: Stepper | SAE, x: Tensor, **settings: Any) -> StepResult:
            made = way(its, x, **settings)
            grad = sae.get_parameter("W_gate").grad
            assert grad is not None
            if torch.equal(x, BATCHES[2]):
                grad.view(-1)[0] = value
            return made

        return attempt

    sae, before = gated(), gated()
    shorter = Trainer([before], config())
    for x in BATCHES[:2]:
        shorter.step(x)
    monkeypatch.setattr("gsae_core.training.learner.dense_step", spoil(dense_step))
    monkeypatch.setattr(Stepper, "attempt", spoil(Stepper.attempt))
    if overflows:
        overflow_at(monkeypatch, 2)
    reports = list(train([sae], BATCHES, config()))
    assert [r.saes[0].stopped for r in reports] == [None, None, cause]
    assert [r.saes[0].loss is None for r in reports] == [False, False, True]
    assert_same_bits(sae, before)


def test_a_stream_may_fill_one_buffer_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_at(monkeypatch, 4)
    ours, theirs = gated(), gated()
    buffer = torch.empty(BATCH, D_IN)
    list(train([ours], (buffer.copy_(x) for x in BATCHES), config()))
    list(train([theirs], BATCHES, config()))
    assert_same_bits(ours, theirs)


def test_a_kept_report_keeps_no_sae() -> None:
    sae = gated()
    reports = list(train([sae], BATCHES, config()))
    there = weakref.ref(sae)
    del sae
    gc.collect()
    assert there() is None
    assert reports[0].saes[0].l0 > 0


class ReadsNothing(TorchDispatchMode):
    """Fails where a tensor's numbers, or how many there are of a kind, reach the interpreter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        assert name not in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::equal",
            "aten::_unique2",
        }, name
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **kwargs or {})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Callable[..., None]:
        def read(*_: Any, **__: Any) -> None:
            raise AssertionError(f"launching called Tensor.{name}")

        return read

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse(name))
    with ReadsNothing():
        yield
    monkeypatch.undo()


@pytest.mark.parametrize(
    "sae",
    [
        gated(),
        ReluSAE(D_IN, 13),
        # With a unit given: it is else read off the first batch, once.
        JumpReluSAE(D_IN, 10, threshold_unit=1.0),
        TopKSAE(D_IN, 11, k=2),
    ],
    ids=lambda sae: sae.architecture,
)
def test_launching_reads_no_tensor(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, sae: SAE
) -> None:
    # A CPU's own steps read sizes by nature; autograd's is the one a GPU has too.
    monkeypatch.setattr("gsae_core.training.learner.choose_step", lambda *_, **__: dense_step)
    learner = Learner(copy.deepcopy(sae), config(), lr=0.01, sparsity=0.1)
    for number, x in enumerate(BATCHES[:3], 1):
        learner.finish(learner.launch(x, number), x, number, pool=None)
    request.getfixturevalue("unread")
    assert learner.launch(BATCHES[3], 4) is not None


def test_other_devices_have_the_gradients_of_every_sae_before_anybody_waits(
    monkeypatch: pytest.MonkeyPatch, phases: str
) -> None:
    done = []

    def noted(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(what)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(Learner, "launch", noted("launch", Learner.launch))
    monkeypatch.setattr(Launched, "check", noted("wait", Launched.check))
    monkeypatch.setattr("gsae_core.threads.torch.get_num_threads", lambda: 1)
    trainer = Trainer([gated(), ReluSAE(D_IN, 13)], config())
    trainer.step(BATCHES[0])
    each, first = ["launch", "wait"] * 2, ["launch"] * 2 + ["wait"] * 2
    assert done == (first if phases == "launched first" else each)


def test_a_topk_sae_is_spared_the_loss_of_its_dead_latents_while_none_can_be_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All latents fire on every batch but latent 0, which has not for 4 steps when step 5 begins.
    asked = []
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, *, dead: Tensor | None, **settings: Any) -> StepResult:
        asked.append(None if dead is None else int(dead.sum()))
        return original(self, x, dead=dead, **settings)

    monkeypatch.setattr(Stepper, "attempt", attempt)
    monkeypatch.setattr("gsae_core.training.learner.choose_step", lambda *_, **__: dense_step)
    sae = TopKSAE(D_IN, 3, k=2)
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([-100.0, 100.0, 100.0]))
    trainer = Trainer([sae], config(revive_every=0, lr=1e-6))
    reports = [trainer.step(x) for x in BATCHES[:6]]
    # Before step 1 nothing is known.
    assert asked == [0, None, None, None, 1, 1]
    losses = [each.saes[0].loss for each in reports]
    assert [float(loss.auxiliary) for loss in losses[:4] if loss] == [0.0] * 4
    # The latent is below zero everywhere: once dead, it leaves all of the error.
    assert losses[4] is not None
    assert float(losses[4].auxiliary) == pytest.approx(float(losses[4].reconstruction) / 32)
