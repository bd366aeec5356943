"""One run at a time on a device, in the order of arrival, whoever dies; runs that are deleted."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from refusals import refusal
from synthetic import config
from tiny_runs import finish

from gsae_core import machine
from gsae_core.errors import InputError
from gsae_core.files import lock
from gsae_core.machine import slot_of
from gsae_core.runs.jobs import job as jobs
from gsae_core.runs.jobs import worker as queue
from gsae_core.runs.jobs.job import delete, of_process, read_status, start, write_status
from gsae_core.runs.jobs.worker import Worker, in_line, waiting_runs
from gsae_core.runs.run import Run, survey


def ticket(root: Path, run: str, pid: int, *, when: int = 1) -> Path:
    """Put a process into the line for the processor."""
    path = root / ".slots" / "cpu" / f"{when:020d}-{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = psutil.Process(pid).create_time()
    path.write_text(json.dumps({"run": run, "pid": pid, "started": started}))
    return path


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])  # kept: a lock that is collected is free
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the slot of the processor until it is told to end."""
    (tmp_path / ".slots").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".slots" / "cpu.lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def let_go(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait()


# The line


def test_those_who_came_earlier_go_first_and_are_counted(tmp_path: Path, worker: int) -> None:
    for when, name in enumerate(("a", "b")):
        ticket(tmp_path, name, worker, when=when)
    with in_line(tmp_path / "third", "cpu") as ahead:
        # Two wait, and somebody trains, or one of the two is about to.
        assert ahead() == 3
        assert waiting_runs(tmp_path) == ["a", "b", "third"]
    assert waiting_runs(tmp_path) == ["a", "b"]


def test_a_device_in_use_is_free_when_its_holder_is_killed(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    with in_line(tmp_path / "second", "cpu") as ahead, in_line(tmp_path / "x", "cuda-0") as other:
        assert (ahead(), other()) == (1, 0)  # each device has a line of its own
        holder.kill()
        holder.wait()
        assert ahead() == 0


def test_the_dead_do_not_wait(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    path = ticket(tmp_path, "killed", process.pid)
    process.kill()
    process.wait()
    with in_line(tmp_path / "second", "cpu") as ahead:
        assert ahead() == 0
        assert waiting_runs(tmp_path) == []
    assert not path.exists()


def test_a_process_does_not_wait_for_itself(tmp_path: Path) -> None:
    with in_line(tmp_path / "outer", "cpu") as outer:
        with in_line(tmp_path / "inner", "cpu") as inner:
            assert (outer(), inner()) == (0, 0)
        assert queue._held
    assert not queue._held


@pytest.mark.parametrize(
    ("device", "visible", "slot"),
    [
        ("cpu", None, "cpu"),
        ("mps", None, "cuda-0"),  # of another machine
        ("auto", None, "cuda-0"),
        ("cuda", None, "cuda-0"),
        ("cuda:1", None, "cuda-1"),
        ("cuda:0", "1,0", "cuda-1"),  # CUDA numbers what it is shown
        ("auto", "", "cpu"),
        ("auto", "-1", "cpu"),
        ("cuda:7", None, "cuda-0"),
        ("cuda", "", "cpu"),
    ],
)
def test_a_slot_is_the_device_that_a_config_means_here(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, slot: str
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ("one", "two"))
    monkeypatch.setattr(machine, "_is_apple", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slot_of(device) == slot


# A worker in the line


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "waits", config())


def test_a_waiting_run_says_how_many_go_first_and_starts_by_itself(
    run: Run, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.runs.jobs.worker.TURN_SECONDS", 0.01)
    seen = []
    with Worker(run) as worker:
        for ahead in worker.wait_for_device("cpu"):
            status = run.status
            seen.append((ahead, status.state, status.stage, status.done))
            let_go(holder)
        assert seen == [(1, "queued", "waiting", 1)]
        worker.enter("loading", total=0)
        assert run.status.state == "starting"
    assert [event["event"] for event in run.events()][1:3] == ["waiting", "loading"]


@pytest.mark.usefixtures("holder")
def test_a_waiting_run_is_cancelled_at_once(run: Run) -> None:
    with Worker(run) as worker:
        for _ in worker.wait_for_device("cpu"):
            run.request_cancel(by="ada")
            assert run.status.state == "cancelling"
        assert worker.stop_requested
        worker.outcome = "cancelled"
    assert run.status.state == "cancelled"
    assert waiting_runs(run.folder.parent) == []


def test_a_run_killed_while_it_waits_is_lost_and_not_queued_for_ever(run: Run) -> None:
    process = subprocess.Popen(["sleep", "60"])
    write_status(run.folder, of_process(run.status, "queued", process.pid))
    assert run.status.state == "queued"
    process.kill()
    process.wait()
    assert run.status.state == "lost"


def test_a_waiting_run_is_not_started_twice(run: Run, worker: int) -> None:
    write_status(run.folder, of_process(run.status, "queued", worker))
    assert start(run) == worker


def test_two_runs_of_one_folder_train_one_after_the_other(
    new_run: Callable[..., Run],
    holder: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gsae_core.runs.jobs.worker.TURN_SECONDS", 0.01)
    run = new_run("second")
    thread = threading.Thread(target=finish, args=(run,))
    thread.start()
    while read_status(run.folder).stage != "waiting":
        time.sleep(0.01)
    assert not run.metrics()
    let_go(holder)
    thread.join(timeout=60)
    assert run.status.state == "finished"


# Cancelled means gone


def test_a_run_is_cancelling_until_its_process_is_gone(run: Run, worker: int) -> None:
    write_status(run.folder, of_process(run.status, "cancelled", worker))
    # A notebook that goes on after its run is no unfinished cancellation.
    assert run.status.state == "cancelled"
    run.add_event("started", pid=worker)
    assert run.status.state == "cancelling"
    with pytest.raises(InputError, match="expected the last process of waits to be gone"):
        start(run)
    process = psutil.Process(worker)
    process.kill()
    psutil.wait_procs([process], timeout=10)
    assert run.status.state == "cancelled"


def test_a_process_that_saved_but_does_not_end_is_ended(
    run: Run, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.add_event("started", pid=worker)
    write_status(run.folder, of_process(run.status, "cancelled", worker))
    assert jobs.escalate_cancel(run) == "requested"
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 0.0)
    assert jobs.escalate_cancel(run) == "killing"
    psutil.wait_procs([psutil.Process(worker)], timeout=10)
    assert jobs.escalate_cancel(run) == "gone"


# Deletion


def test_a_deleted_run_is_gone_whoever_deletes_it_again(run: Run) -> None:
    delete(run)
    assert list(run.folder.parent.glob("*waits*")) == []
    assert not list(run.folder.parent.glob(".deleted-*"))
    delete(run)
    assert not run.folder.exists()


@pytest.mark.parametrize("state", ["queued", "starting", "running"])
def test_a_run_with_a_process_is_not_deleted(run: Run, worker: int, state: str) -> None:
    write_status(run.folder, of_process(run.status, state, worker))  # pyright: ignore
    assert refusal(delete, run) == (
        "expected a run that no process works on, got waits, which one does; cancel it first, or "
        "wait until it has ended"
    )
    assert run.folder.is_dir()


def test_a_run_that_is_evaluated_is_not_deleted(run: Run) -> None:
    with lock(run.folder, "worker"), pytest.raises(InputError, match="which one does"):
        delete(run)


def test_an_interrupted_deletion_leaves_nothing_that_is_listed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    root = run.folder.parent
    with monkeypatch.context() as patch:
        patch.setattr(jobs.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            delete(run)
    assert survey(root) == ([], {})
    other = Run.create(root / "other", config())
    delete(other)
    assert not list(root.glob(".deleted-*"))


def test_starting_a_deleted_run_does_not_bring_its_folder_back(run: Run) -> None:
    delete(run)
    with pytest.raises(InputError, match="was the run deleted"):
        start(run)
    assert not run.folder.exists()
