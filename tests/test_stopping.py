"""A whole run of which SAEs stop learning: what it logs, keeps and says."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from refusals import refusal
from tiny_runs import N_STEPS, finish, leave_at, outcome
from torch import Tensor

from gsae_core.checkpoints.checkpoint import read_cfg
from gsae_core.config import SAESpec
from gsae_core.errors import InputError
from gsae_core.runs.run import Run
from gsae_core.runs.work import train
from gsae_core.sae.architectures import ReluSAE
from gsae_core.sae.losses import StepResult
from gsae_core.training.learner import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    return new_run(checkpoint_minutes=60)


def spoil_at(
    monkeypatch: pytest.MonkeyPatch, step: int, *, every_sae: bool = False, batch: bool = False
) -> None:
    """Let the ReLU SAE's gradients at a step, those of all SAEs or their batch not be finite."""
    seen: dict[int, list[Tensor]] = {}
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, **settings: Any) -> StepResult:
        made = original(self, x, **settings)
        batches = seen.setdefault(id(self), [])
        batches.append(x.clone())
        grad = self._sae.b_dec.grad
        assert grad is not None
        if len(batches) == step and (every_sae or isinstance(self._sae, ReluSAE)):
            (x[0] if batch else grad)[0] = math.nan
            return original(self, x, **settings) if batch else made
        return made

    monkeypatch.setattr(Stepper, "attempt", attempt)


def stops(run: Run) -> list[tuple[str, str]]:
    return [(e["sae"], e["why"]) for e in run.events() if e["event"] == "sae stopped"]


def test_how_often_a_run_is_saved_changes_no_bit(run: Run, new_run: Callable[..., Run]) -> None:
    often = new_run("often", checkpoint_minutes=1e-9)
    finish(often)
    finish(run)
    assert outcome(often) == outcome(run)
    assert often.status.state == "finished"


@pytest.mark.parametrize("step", [7, N_STEPS])
def test_an_sae_that_stops_is_told_once_also_at_the_last_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil_at(monkeypatch, step)
    finish(run)
    why = f"step {step}: the gradient of b_dec is not finite"
    assert stops(run) == [("relu", why)]
    assert read_cfg(run.sae_folder("relu"))["metadata"]["stopped"] == why
    assert [row["name"] for row in run.evals()] == ["gated"]
    assert max(row["step"] for row in run.metrics() if row["sae"] == "relu") == step - 1
    assert max(row["step"] for row in run.metrics() if row["sae"] == "gated") == N_STEPS


@pytest.mark.parametrize("step", [7, N_STEPS])
def test_a_run_of_which_every_sae_stopped_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil_at(monkeypatch, step, every_sae=True)
    with pytest.raises(InputError, match=rf"got none: gated stopped at step {step}: the gradient"):
        finish(run)
    assert [name for name, _ in stops(run)] == ["gated", "relu"]


@pytest.mark.parametrize("name", ["activations", "gated"])
def test_a_run_that_its_activations_stopped_is_advised_on_them_and_no_other_is(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = new_run(saes=(SAESpec(name=name, architecture="gated", d_sae=24, sparsity=0.3),))
    spoil_at(monkeypatch, 3, every_sae=True, batch=name == "gated")
    advice = "give the model float32" if name == "gated" else "lower the learning rate"
    assert refusal(finish, run).endswith(f"; {advice} and start a new run")


def test_a_run_left_at_the_step_that_stops_an_sae_says_so_before_and_after_it_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOGGED_POINTS", 4)
    spoil_at(monkeypatch, 7)
    leave_at(run, 7)
    why = "step 7: the gradient of b_dec is not finite"
    assert stops(run) == [("relu", why)]
    assert run.status.state == "cancelled"
    finish(run)
    assert stops(run) == [("relu", why)]
    assert read_cfg(run.sae_folder("relu"))["metadata"]["stopped"] == why
