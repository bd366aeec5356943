"""The run folder: made once, read while it is written, believed alive only with proof."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from refusals import refusal
from synthetic import evaluation

from gsae_core import files
from gsae_core.config import RunConfig, SAESpec, TrainRecipe
from gsae_core.errors import InputError
from gsae_core.files import replace_durably, to_json, write_json
from gsae_core.runs.evals import (
    EvalRow,
    averaged,
    measured_elsewhere,
    measured_on,
    write_arrays,
    write_evals,
)
from gsae_core.runs.jobs import job as jobs
from gsae_core.runs.jobs.job import (
    State,
    escalate_cancel,
    of_process,
    read_status,
    start,
    write_status,
)
from gsae_core.runs.jobs.worker import Worker
from gsae_core.runs.metrics_log import MetricsCursor, MetricsLog
from gsae_core.runs.run import Run, find_run, list_runs, survey

CONFIG = RunConfig(
    saes=(SAESpec(name="gated-0.1", architecture="gated", d_sae=3, sparsity=0.1),),
    train=TrainRecipe(n_tokens=105, batch_size=10),
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "first", CONFIG)


def pretend(run: Run, state: State, *, pid: int, started: float) -> None:
    status = read_status(run.folder)
    write_status(run.folder, status._replace(state=state, pid=pid, process_started=started))


def sleeper(code: str = "import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


# Making and opening


def test_a_new_run_is_queued_with_all_its_whole_batches_to_do(run: Run) -> None:
    status = run.status
    assert (status.state, status.step, status.n_steps) == ("queued", 0, 10)  # 105 // 10
    assert (status.pid, status.process_started, status.error) == (None, None, None)
    assert not run.status.expects_process
    assert run.metrics() == run.evals() == run.log_tail() == []
    assert [event["event"] for event in run.events()] == ["created"]
    assert Run.open(run.folder) == run


def test_status_json_has_exactly_the_promised_keys_and_older_ones_no_stage(run: Run) -> None:
    fields = json.loads((run.folder / "status.json").read_text())
    promised = """state step n_steps pid process_started heartbeat error stage done total"""
    assert list(fields) == promised.split()
    for key in ("stage", "done", "total"):
        del fields[key]
    (run.folder / "status.json").write_text(json.dumps(fields))
    assert (run.status.stage, run.status.done, run.status.total) == (None, 0, 0)


def test_an_empty_folder_is_taken_and_one_with_other_files_or_a_file_refused(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    assert Run.create(folder, CONFIG).status.state == "queued"
    (folder / "config.json").rename(folder / "chapter.tex")
    assert refusal(Run.create, folder, CONFIG) == (
        f"expected a new or empty folder for the run, found other files in {folder}"
    )
    # A link whose disk is not mounted, say.
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = (folder / "chapter.tex", tmp_path / "link", Path(os.devnull))
    for path in [*places, *(place / "run" for place in places)]:
        said = refusal(Run.create, path, CONFIG)
        assert said == f"expected a folder for the run, found a file at {path}"


def test_a_full_disk_is_told_with_need_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.files.free_bytes", lambda path: 7_300)
    assert refusal(Run.create, tmp_path / "run", CONFIG) == (
        f"expected 1.0 MB free for {tmp_path / 'run'}, found 7.3 kB; make room on the disk and "
        "start again"
    )
    monkeypatch.undo()
    assert Run.create(tmp_path / "run", CONFIG).status.state == "queued"  # room was made


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "", "x" * 65, "run\n", "-rf", "é"])
def test_a_name_that_could_be_more_than_a_name_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(find_run, tmp_path, name) == (
        "expected a run name of 1 to 64 letters, digits, dots, dashes and underscores that starts "
        f"with a letter or digit, got {name!r}"
    )


def test_a_name_cannot_lead_out_of_the_runs_folder(tmp_path: Path, run: Run) -> None:
    with pytest.raises(InputError, match="expected a run name"):
        find_run(tmp_path / "first", "../first")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(run.folder)
    with pytest.raises(InputError, match="got 'link', which leads out of it"):
        find_run(tmp_path / "root", "link")


def test_a_run_of_a_newer_layout_is_refused_before_its_config_is_judged(run: Run) -> None:
    (run.folder / "events.jsonl").write_text('{"event": "created", "schema_version": 2}\n')
    (run.folder / "config.json").write_text('{"telepathy": true}')
    assert refusal(Run.open, run.folder) == (
        f"expected a run of layout 1 or older, got 2 in {run.folder}; a newer version of gsae-core "
        "made it: update to open it"
    )


def test_runs_are_listed_newest_first_and_damaged_ones_apart(tmp_path: Path, run: Run) -> None:
    second = Run.create(tmp_path / "second", CONFIG)
    os.utime(run.folder / "config.json", (1000, 1000))
    damaged = Run.create(tmp_path / "damaged", CONFIG)
    (damaged.folder / "config.json").write_text("{")
    bare = Run.create(tmp_path / "bare", CONFIG)
    (bare.folder / "status.json").unlink()
    (tmp_path / "not-a-run").mkdir()
    assert list_runs(tmp_path) == [second, run]
    reasons = survey(tmp_path)[1]
    assert set(reasons) == {"damaged", "bare"}
    assert reasons["damaged"].startswith(f"expected JSON in {damaged.folder / 'config.json'}")
    assert reasons["bare"] == (
        f"expected {bare.folder / 'status.json'}, found no such file; was the run deleted?"
    )
    assert list_runs(tmp_path / "nowhere") == []


# Metrics, evaluations, log


def row(step: int, **more: float) -> dict[str, object]:
    return {"step": step, "tokens": 16 * step, "seconds": 0.5 * step, "sae": "gated-0.1", **more}


def line(step: int) -> str:
    return json.dumps(row(step)) + "\n"


def test_a_half_written_metrics_line_is_left_for_the_next_reading(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    assert run.recent_metrics() == []
    path.write_text(line(1) + line(2)[:9])
    assert run.recent_metrics() == [row(1)]
    first = run.metrics_since(MetricsCursor())
    assert first.rows == [row(1)]
    assert run.metrics() == [row(1)]
    with path.open("a") as file:
        file.write(line(2)[9:] + line(3))
    then = run.metrics_since(first.cursor)
    assert (then.rows, then.restarted) == ([row(2), row(3)], False)
    assert run.metrics_since(then.cursor).rows == []
    path.write_text("".join(line(step) for step in range(2000)))
    assert run.recent_metrics() == run.metrics()[-len(run.recent_metrics()) :]
    assert 0 < len(run.recent_metrics()) < 2**16 / len(line(1))


def test_a_reader_sees_that_a_resumed_run_took_lines_back(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    path.write_text(line(1) + line(2))
    cursor = run.metrics_since(MetricsCursor()).cursor
    log = MetricsLog(path, n_bytes=len(line(1)))
    log.add([row(2, l0=5.0), row(3)])
    log.close()
    slice_ = run.metrics_since(cursor)
    assert slice_.restarted
    assert slice_.rows == [row(1), row(2, l0=5.0), row(3)]


def test_numbers_that_are_not_finite_become_null() -> None:
    written = to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (float("-inf"),)})
    assert written == '{"a": null, "b": [null, 1.5], "c": [null]}'


def eval_row() -> EvalRow:
    asked = {"n_tokens_asked": 120, "shortage": "the held-out text has no more"}
    counted = {"n_tokens": 100, "n_predictions": 90, "gamma_gate": None}
    return EvalRow(**evaluation(CONFIG.saes[0]) | asked | counted)


def test_evals_json_has_exactly_the_promised_keys_and_says_what_was_measured(run: Run) -> None:
    write_evals(run.folder, [eval_row()])
    (row,) = run.evals()
    promised = """name architecture sparsity d_in d_sae l0 loss_recovered ce_clean ce_sae ce_zero kl
        gamma gamma_gate fvu cosine alive_fraction n_tokens n_tokens_asked shortage
        n_predictions zeroed replaced layer site text max_norm_ratio n_outliers outlier_share
        fvu_ordinary"""
    assert set(row) == set(promised.split())
    assert row["gamma_gate"] is None  # NaN
    assert measured_on(row) == (
        "100 held-out tokens of 120 asked for: the held-out text has no more"
    )
    assert averaged(row) == "mean over 90 predictions"
    # As a table has them, with NaN for what is not there.
    assert measured_on(row | {"shortage": float("nan")}) == "100 held-out tokens"
    assert averaged(row | {"n_predictions": float("nan")}) == "mean over predictions"
    assert measured_elsewhere([row, row | {"text": float("nan")}], "runs/a") is None
    other = row | {"text": "a.txt", "shortage": None}
    assert measured_on(other) == "100 tokens of a.txt, not the run's own text"


def test_an_earlier_evaluation_opens_and_says_that_it_zeroed_counted_positions_alone(
    run: Run,
) -> None:
    earlier = {"zeroed", "replaced", "n_tokens_asked", "shortage", "n_predictions", "text"}
    write_json(run.folder / "evals.json", {"saes": [eval_row().model_dump(exclude=earlier)]})
    (row,) = run.evals()
    assert (row["zeroed"], row["replaced"]) == ("counted", "counted")
    assert row["ce_zero"] == 9.75
    assert measured_on(row) == "100 held-out tokens"
    assert averaged(row) == "mean over predictions"


def test_feature_statistics_are_a_table_with_a_row_per_latent(run: Run) -> None:
    folder = run.sae_folder("gated-0.1")
    said = refusal(run.feature_stats, "gated-0.1")
    path = folder / "feature_stats.safetensors"
    assert said.startswith(f"expected the arrays fired, gate_open, density, gamma in {path}, found")
    assert said.endswith(f"; measure them: python -m gsae_core evaluate {run.folder}")
    folder.mkdir(parents=True)
    columns = {
        "gate_open": np.array([6, 0, 1]),
        "fired": np.array([5, 0, 1]),
        "density": np.array([0.5, 0.0, 0.1]),
        "gamma": np.array([0.9, np.nan, 1.0]),
    }
    write_arrays(folder / "feature_stats.safetensors", columns)
    table = run.feature_stats("gated-0.1")
    assert list(table.columns) == ["fired", "gate_open", "density", "gamma"]
    assert table["fired"].tolist() == [5, 0, 1]
    assert table.index.name == "latent"
    assert table["gamma"].isna().tolist() == [False, True, False]


def test_the_tail_of_a_long_log_is_read_from_its_end(run: Run) -> None:
    (run.folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert run.log_tail(2) == ["line 9998", "line 9999"]


def test_a_replaced_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def half(sibling: Path) -> None:
        sibling.write_text("ne")
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"expected 5\.0 GB free for .*state, found .*; make room"):
        replace_durably(path, half, n_bytes=5 * 10**9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert path.read_text() == "old"


def test_other_failures_of_a_disk_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), files.writing(tmp_path, 1):
        raise OSError(errno.EIO, "Input/output error")


# Liveness


@pytest.mark.parametrize(
    ("said", "later", "state"),
    [
        ("running", 0, "running"),
        ("running", -60, "lost"),  # the id is another process's by now
        ("finished", -60, "finished"),  # which needs none
    ],
)
def test_a_process_is_believed_by_its_id_and_its_start(
    run: Run, said: State, later: int, state: State
) -> None:
    pretend(run, said, pid=os.getpid(), started=psutil.Process().create_time() + later)
    assert run.status.state == state
    assert run.status.expects_process == (state == "running")


def test_a_zombie_is_not_alive(run: Run) -> None:
    process = sleeper()
    pretend(run, "running", pid=process.pid, started=psutil.Process(process.pid).create_time())
    assert run.status.state == "running"
    process.kill()
    # Nobody has collected it, so the id still answers; only its state tells.
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    os.kill(process.pid, 0)
    assert run.status.state == "lost"
    end(process)


# Start and cancel


def test_pressing_start_twice_starts_one_process_in_a_session_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = sleeper()
    seen: dict[str, object] = {}

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        seen.update(options, command=command)
        return process

    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    assert start(run) == process.pid
    assert run.status.state == "starting"
    monkeypatch.setattr(jobs.subprocess, "Popen", None)
    assert start(run) == process.pid
    end(process)
    assert run.status.state == "lost"
    folder = str(run.folder)
    assert seen["command"] == [sys.executable, "-u", "-m", "gsae_core", "resume", folder]
    assert seen["start_new_session"] is True
    assert "shell" not in seen


def test_a_finished_run_is_not_started_again(run: Run) -> None:
    pretend(run, "finished", pid=1, started=0.0)
    assert refusal(start, run) == "expected a run with steps left, got first, which is finished"


def test_a_run_that_was_never_started_is_cancelled_at_once(run: Run) -> None:
    run.request_cancel(by="ada")
    assert run.status.state == "cancelled"
    assert [run.events()[-1][key] for key in ("event", "by")] == ["cancel requested", "ada"]


def test_two_people_may_cancel_one_run(run: Run) -> None:
    pretend(run, "running", pid=os.getpid(), started=psutil.Process().create_time())
    run.request_cancel(by="ada")
    first = (run.folder / "control.json").read_bytes()
    run.request_cancel(by="grace")
    assert (run.folder / "control.json").read_bytes() == first
    assert run.status.state == "cancelling"


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_cancellation_goes_from_asking_to_sigterm_to_sigkill(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = sleeper(STUBBORN)
    assert process.stdout is not None
    process.stdout.readline()
    pretend(run, "running", pid=process.pid, started=psutil.Process(process.pid).create_time())
    assert escalate_cancel(run) == "none"
    run.request_cancel()
    assert escalate_cancel(run) == "requested"
    # Patience is what runs out, not this test's time: a busy machine would be late for both.
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", -1)
    assert escalate_cancel(run) == "terminating"
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 600)
    assert escalate_cancel(run) == "terminating"
    assert run.status.state == "cancelling"
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", -1)
    assert escalate_cancel(run) == "killing"
    process.wait(timeout=10)
    assert escalate_cancel(run) == "gone"
    end(process)
    assert run.status.state == "cancelled"
    assert not (run.folder / "control.json").exists()
    assert escalate_cancel(run) == "gone"


# Worker

TRAINING = ("training", 7, 10)


def test_a_worker_says_each_stage_and_then_how_it_ended(run: Run) -> None:
    with Worker(run) as worker:
        status = read_status(run.folder)
        assert (status.state, status.pid) == ("starting", os.getpid())
        assert run.status.expects_process
        worker.enter("loading", total=0)
        assert run.status.state == "starting"
        worker.step = 7
        worker.enter("training", total=10, done=7)
        status = run.status
        assert (status.state, status.stage, status.done, status.total) == ("running", *TRAINING)
        worker.outcome = "cancelled"
    stages = [event["event"] for event in run.events()]
    assert stages == ["created", "loading", "training", "cancelled"]
    status = run.status
    assert (status.state, status.step, status.error) == ("cancelled", 7, None)


def test_a_second_worker_is_refused(run: Run) -> None:
    with Worker(run), pytest.raises(InputError) as caught, Worker(run):
        pass
    assert str(caught.value) == (
        f"expected a run that no process is training, got first, which process {os.getpid()} is "
        "training; cancel that one first"
    )


@pytest.mark.parametrize("starting", [False, True])
def test_a_worker_hears_a_request_and_answers_it(run: Run, starting: bool) -> None:
    if starting:
        write_status(run.folder, of_process(run.status, "starting", os.getpid()))
        run.request_cancel()
    with Worker(run) as worker:
        run.request_cancel()
        wait_for(lambda: worker.stop_requested)
        worker.outcome = "cancelled"
    assert run.status.state == "cancelled"
    assert not (run.folder / "control.json").exists()


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(
    run: Run,
) -> None:
    # As a shell starts what a script puts into the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Worker(run) as worker:
            signal.raise_signal(signal.SIGINT)
            assert not worker.stop_requested
            signal.raise_signal(signal.SIGTERM)
            assert worker.stop_requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_request_meant_for_an_earlier_process_does_not_stop_a_later_one(run: Run) -> None:
    pretend(run, "running", pid=1, started=0.0)
    write_json(run.folder / "control.json", {"request": "cancel", "time": 0.0})
    with Worker(run) as worker:
        time.sleep(0.3)
        assert not worker.stop_requested


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("expected tea, got coffee"), "expected tea, got coffee"),
        (ZeroDivisionError("by zero\nthere"), "ZeroDivisionError: by zero; see log.txt"),
    ],
)
def test_a_mistake_is_the_runs_error_and_a_traceback_goes_to_the_log_alone(
    run: Run, error: Exception, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), Worker(run):
        raise error
    assert (run.status.state, run.status.error) == ("failed", said)
    assert ("Traceback" in "\n".join(run.log_tail())) == isinstance(error, ZeroDivisionError)
    assert capfd.readouterr().err == ""


def test_a_heartbeat_moves_while_the_worker_works(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.runs.jobs.worker.HEARTBEAT_SECONDS", 0.0)
    with Worker(run) as worker:
        first = read_status(run.folder).heartbeat
        worker.step = 3
        wait_for(lambda: read_status(run.folder).step == 3)
        assert read_status(run.folder).heartbeat > first
