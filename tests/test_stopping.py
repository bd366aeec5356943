"""A whole run of which SAEs stop learning: what it logs, keeps and says."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import N_STEPS, finish, outcome, tiny_config, write_text
from torch import Tensor

from gsae_core.checkpoints.checkpoint import read_cfg
from gsae_core.errors import InputError
from gsae_core.runs.run import Run
from gsae_core.runs.work import train
from gsae_core.runs.work.train import train_run
from gsae_core.sae.architectures import ReluSAE
from gsae_core.sae.losses import StepResult
from gsae_core.training.learner import Stepper


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def new_run(folder: Path, lm_folder: Path, **fields: Any) -> Run:
    text = folder.parent / "words.txt"
    if not text.exists():
        write_text(text)
    return Run.create(folder, tiny_config(lm_folder, text, **fields))


def spoil_at(monkeypatch: pytest.MonkeyPatch, step: int, *, every_sae: bool = False) -> None:
    """Let the ReLU SAE's gradients at a step, or those of all SAEs, not be finite."""
    seen: dict[int, list[Tensor]] = {}
    original = Stepper.attempt

    def attempt(self: Stepper, x: Tensor, **settings: Any) -> StepResult:
        made = original(self, x, **settings)
        batches = seen.setdefault(id(self), [])
        batches.append(x.clone())
        grad = self._sae.b_dec.grad
        assert grad is not None
        if len(batches) == step and (every_sae or isinstance(self._sae, ReluSAE)):
            grad[0] = math.nan
        return made

    monkeypatch.setattr(Stepper, "attempt", attempt)


def stops(run: Run) -> list[tuple[str, str]]:
    return [(e["sae"], e["why"]) for e in run.events() if e["event"] == "sae stopped"]


def test_how_often_a_run_is_saved_changes_no_bit(tmp_path: Path, tiny_lm_folder: Path) -> None:
    often, never = (
        new_run(tmp_path / name, tiny_lm_folder, checkpoint_minutes=minutes)
        for name, minutes in (("often", 1e-9), ("never", 60))
    )
    finish(often)
    finish(never)
    assert outcome(often) == outcome(never)
    assert often.status.state == "finished"


@pytest.mark.parametrize("step", [7, N_STEPS])
def test_an_sae_that_stops_is_told_once_also_at_the_last_step(
    tmp_path: Path, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil_at(monkeypatch, step)
    run = new_run(tmp_path / "run", tiny_lm_folder, checkpoint_minutes=60)
    finish(run)
    why = f"step {step}: the gradient of b_dec is not finite"
    assert stops(run) == [("relu", why)]
    assert read_cfg(run.sae_folder("relu"))["metadata"]["stopped"] == why
    assert [row["name"] for row in run.evals()] == ["gated"]
    assert max(row["step"] for row in run.metrics() if row["sae"] == "relu") == step - 1
    assert max(row["step"] for row in run.metrics() if row["sae"] == "gated") == N_STEPS


@pytest.mark.parametrize("step", [7, N_STEPS])
def test_a_run_of_which_every_sae_stopped_is_refused(
    tmp_path: Path, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil_at(monkeypatch, step, every_sae=True)
    run = new_run(tmp_path / "run", tiny_lm_folder, checkpoint_minutes=60)
    with pytest.raises(InputError, match=rf"got none: gated stopped at step {step}: the gradient"):
        finish(run)
    assert [name for name, _ in stops(run)] == ["gated", "relu"]


def test_a_run_left_at_the_step_that_stops_an_sae_says_so_before_and_after_it_goes_on(
    tmp_path: Path, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOGGED_POINTS", 4)
    spoil_at(monkeypatch, 7)
    run = new_run(tmp_path / "run", tiny_lm_folder, checkpoint_minutes=60)
    progresses = train_run(run)
    for progress in progresses:
        if progress.stage == "training" and progress.done == 7:
            break
    progresses.close()  # pyright: ignore[reportAttributeAccessIssue]
    why = "step 7: the gradient of b_dec is not finite"
    assert stops(run) == [("relu", why)]
    assert run.status.state == "cancelled"
    finish(run)
    assert stops(run) == [("relu", why)]
    assert read_cfg(run.sae_folder("relu"))["metadata"]["stopped"] == why
