"""Interrupted anywhere and resumed, a run ends with the bits of one that was left alone."""

import errno
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal
from tiny_runs import N_STEPS, ended, finish, leave_at, outcome, tiny_config, write_text

from gsae_core import files
from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.runs.jobs.job import start
from gsae_core.runs.metrics_log import MetricsCursor
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.train import evaluate_run, train_run
from gsae_core.text import Progress

STEPS = {11: (), 20: (), 4: pytest.mark.slow, 13: pytest.mark.slow, 25: pytest.mark.slow}
"""Between two saved states, at a revival, and more."""


pytestmark = pytest.mark.usefixtures("one_thread", "saved_every_third_step")


@pytest.fixture
def saved_every_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves when it is read: states are saved at the same steps on every machine."""
    readings = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.004 * next(readings))  # two readings a step
    monkeypatch.setattr("gsae_core.runs.work.train.time", clock)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, words: Path
) -> dict[str, Any]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run = Run.create(folder, tiny_config(tiny_lm_folder, words, checkpoint_minutes=60))
    finish(run)
    torch.set_num_threads(n_threads)
    result = outcome(run)
    assert result["state"] == "finished"
    # Revivals happened, so their random choices and new warm-ups are part of what must come back.
    assert {sae["warmup_start"] for sae in result["trainer"]["saes"]} & {10, 20}
    return result


def in_a_child(run: Run, act: Callable[[Progress], None], *, before: Any = None) -> int:
    """Train in a forked process, `act` on each progress, and return how the process ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if before is not None:
                before()
            for progress in train_run(Run.open(run.folder)):
                act(progress)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(run: Run, step: int, *, stage: str = "training") -> None:
    def act(progress: Progress) -> None:
        if progress.stage == stage and progress.done == step:
            kill_me()

    assert os.WTERMSIG(in_a_child(run, act)) == signal.SIGKILL
    assert run.status.state == "lost"


def resumed(run: Run) -> list[int]:
    """Return the steps from which a run went on."""
    return [event["step"] for event in run.events() if event["event"] == "resumed"]


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        *(pytest.param("training", step, marks=marks) for step, marks in STEPS.items()),
        ("evaluating", 100),
    ],
)
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(
    run: Run, undisturbed: dict[str, Any], stage: str, done: int
) -> None:
    killed_at(run, done, stage=stage)
    assert run.evals() == []
    finish(run)
    assert outcome(run) == undisturbed


def test_killed_again_and_again_it_ends_with_the_same_bits(
    run: Run, undisturbed: dict[str, Any]
) -> None:
    for step in (3, 12, 21, N_STEPS):
        killed_at(run, step)
    finish(run)
    assert outcome(run) == undisturbed
    assert resumed(run) == [3, 12, 21, N_STEPS]  # each killed where a state had just been saved
    steps = [row["step"] for row in run.metrics() if row["sae"] == "relu"]
    assert steps == list(range(1, N_STEPS + 1))  # 30 steps are fewer than 300 points: all logged


@pytest.mark.parametrize(
    ("line", "n"),
    [
        *(("replace", 5), ("fsync", 2), ("fsync", 14)),
        *(pytest.param("replace", n, marks=pytest.mark.slow) for n in (2, 11)),
        pytest.param("fsync", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_while_a_file_is_written_it_ends_with_the_same_bits(
    run: Run, undisturbed: dict[str, Any], line: str, n: int
) -> None:
    # status.json and the states alike are written by a sibling, fsync, replace, fsync.
    def arm() -> None:
        calls = iter(range(n))
        real = getattr(os, line)

        def fatal(*args: Any) -> Any:
            if next(calls, None) is None:
                kill_me()
            return real(*args)

        setattr(files.os, line, fatal)

    assert os.WTERMSIG(in_a_child(run, lambda progress: None, before=arm)) == signal.SIGKILL
    finish(run)
    assert outcome(run) == undisturbed


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_and_says_cancelled(
    run: Run, undisturbed: dict[str, Any], number: signal.Signals, tmp_path: Path
) -> None:
    last = tmp_path / "last"

    def act(progress: Progress) -> None:
        if progress.stage == "training" and progress.done == 7:
            os.kill(os.getpid(), number)
        last.write_text(f"{progress.stage} {progress.done}")

    assert in_a_child(run, act) == 0
    assert last.read_text() == "cancelled 7"
    status = run.status
    assert (status.state, status.step) == ("cancelled", 7)
    assert (run.folder / "saes" / "gated" / "cfg.json").exists()  # kept, and told by its n_tokens
    finish(run)
    assert outcome(run) == undisturbed


def test_closing_the_iterator_saves_and_says_cancelled(
    run: Run, undisturbed: dict[str, Any]
) -> None:
    leave_at(run, 5)
    assert (run.status.state, run.status.step) == ("cancelled", 5)
    finish(run)
    assert outcome(run) == undisturbed


def test_a_disk_that_fills_up_while_saving_fails_the_run_and_loses_nothing(
    run: Run, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save
    calls = iter(range(2))

    def fill_up(state: Any, path: Path) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(InputError, match=r"expected .* kB free for .*state-\d+\.pt, found "):
        finish(run)
    status = run.status
    assert status.state == "failed"
    assert status.error is not None
    assert status.error.endswith("; make room on the disk and resume the run")
    monkeypatch.undo()
    finish(run)
    assert outcome(run) == undisturbed


def test_a_damaged_state_is_told_and_the_run_starts_over_without_it(
    run: Run, undisturbed: dict[str, Any]
) -> None:
    killed_at(run, 20)
    (state,) = (run.folder / "resume").glob("*.pt")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(InputError, match="expected the resumable state"):
        finish(run)
    assert run.status.state == "failed"
    for path in (run.folder / "resume").iterdir():
        path.unlink()
    finish(run)
    assert outcome(run) == undisturbed


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_power_cut_that_tears_the_log_files_costs_no_step(
    run: Run, undisturbed: dict[str, Any], kept: int
) -> None:
    killed_at(run, 15)
    events, metrics = run.folder / "events.jsonl", run.folder / "metrics.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[:kept]) + b"\0" * sum(map(len, lines[kept:])))
    # What was logged since the state was saved reached no disk: half of it is there, then zeros.
    with metrics.open("ab") as file:
        file.write(b'{"step": 16, "tok' + b"\0" * 200)
    assert Run.open(run.folder).status.state == "lost"
    finish(run)
    assert resumed(run) == [15]
    assert outcome(run) == undisturbed
    found = run.event_lines()
    assert (found.damaged, found.torn) == (1, False)
    assert found.rows[-1]["event"] == "finished"
    assert run.metrics_since(MetricsCursor()).damaged == 0


def test_metrics_that_are_lost_cost_no_step(run: Run, undisturbed: dict[str, Any]) -> None:
    killed_at(run, 20)
    (run.folder / "metrics.jsonl").unlink()
    finish(run)
    assert resumed(run) == [18]
    assert outcome(run) | {"metrics": None} == undisturbed | {"metrics": None}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_text(tmp_path / "own.txt")


@pytest.fixture
def on_own(own: Path, new_run: Callable[..., Run]) -> Run:
    """A run on a text of its own."""
    return new_run("on_own", data=DataConfig(source=str(own), held_out=0.2))


def moved(run: Run, n_words: int) -> None:
    """Kill a run, and put another text in the place of its own."""
    killed_at(run, 20)
    write_text(Path(run.config.data.source), n_words=n_words, seed=1)


def change_events(run: Run, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run.folder / "events.jsonl"
    events = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events if event))


def as_an_older_version(run: Run) -> None:
    """Take from a run's events what older versions did not note."""
    noted = ("text_digest", "text_starts")
    change_events(run, lambda event: {k: v for k, v in event.items() if k not in noted})


@pytest.mark.parametrize("older", [False, True])
def test_another_text_under_the_same_name_is_refused(on_own: Run, own: Path, older: bool) -> None:
    moved(on_own, n_words=500 if older else 1500)
    if older:  # which noted the number of tokens
        as_an_older_version(on_own)
    # 500 words and EOS are 33 rows of 15 counted tokens; every fifth is held out, 26 are not.
    now = 26 * 15 if older else 480
    assert refusal(finish, on_own) == (
        "expected the text this run began with (480 training tokens), got other text from "
        f"{own} ({now}): it has changed, or an earlier version read it in another way; start a new "
        "run"
    )


def test_other_text_of_as_many_tokens_is_refused_by_what_the_model_makes_of_it(
    on_own: Run,
) -> None:
    moved(on_own, n_words=1500)
    as_an_older_version(on_own)
    said = refusal(finish, on_own)
    assert said.startswith("expected the activations this run began with (E|x|^2 = ")
    assert said.endswith("); the model or the corpus has changed, so start a new run")


def index(run: Run, n_tokens: int) -> None:
    for _ in index_run(run, run.config.saes[0].name, n_tokens=n_tokens, split="mixed"):
        pass


@pytest.mark.parametrize("older", [False, True])
def test_other_text_is_neither_evaluated_nor_indexed(on_own: Run, own: Path, older: bool) -> None:
    run = on_own
    finish(run)
    measured = (run.folder / "evals.json").read_bytes()
    # A longer text begins with what was trained on; as much of it is read as before.
    own.write_text(own.read_text() + own.read_text())
    list(evaluate_run(run))
    for n_tokens in (15, 1000):
        index(run, n_tokens)
    assert (run.folder / "evals.json").read_bytes() == measured
    write_text(own, n_words=500 if older else 1500, seed=1)
    if older:
        as_an_older_version(run)
    so = (
        "it has changed, or an earlier version read it in another way; what is held out now may "
        "have been trained on; bring the text back or train a new run"
    )
    began = "expected the text this run began with (480 training tokens), got other text from "
    with pytest.raises(InputError) as caught:
        list(evaluate_run(run))
    assert str(caught.value) == f"{began}{own} ({26 * 15 if older else 480}): {so}"
    assert (run.folder / "evals.json").read_bytes() == measured
    if older:
        return  # what it noted tells nothing of a part
    for n_tokens in (15, 1000):
        assert refusal(index, run, n_tokens) == f"{began}{own}: {so}"


def test_a_run_that_was_trained_elsewhere_is_measured_on_any_text(on_own: Run, own: Path) -> None:
    finish(on_own)
    change_events(on_own, lambda event: event if event["event"] != "set up" else {})
    write_text(own, seed=1)
    list(evaluate_run(on_own))
    assert on_own.evals()


@pytest.mark.slow
def test_a_detached_process_goes_on_where_a_killed_one_was(
    run: Run, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed_at(run, 15)
    pid = start(run)
    assert pid == start(run) != os.getpid()
    assert ended(run) == "finished", run.log_tail()
    assert outcome(run) == undisturbed
