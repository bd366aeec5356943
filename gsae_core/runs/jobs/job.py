"""A job: a folder that a process works on. It is started, watched and ended through its files.

    status.json  events.jsonl  log.txt  control.json

Runs, feature indices and transfers from and to the Hub are jobs. `worker` is the other side: what
the process itself does.
"""

import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import psutil
from pydantic import Field

from gsae_core import files
from gsae_core.errors import InputError
from gsae_core.files import Lines, lock, read_checked, read_json, unreadable, write_json, writing

T = TypeVar("T")
State = Literal[
    "queued", "starting", "running", "cancelling", "cancelled", "finished", "failed", "lost"
]
ACTIVE: tuple[State, ...] = ("starting", "running", "cancelling")
# A process's start is read from the boot clock, which moves by a little when the time is set.
SAME_START_SECONDS = 2.0
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
"""Since 1970, before the year 5138."""


class Status(NamedTuple):
    """Where a run stands; status.json holds exactly these."""

    state: State
    step: Count
    """Steps done."""
    n_steps: Count
    """Steps planned."""
    pid: Annotated[int, Field(gt=0, lt=2**31)] | None
    """Process that trains the run, or trained it last."""
    process_started: Seconds | None
    """When that process began: ids are reused, this pair is not."""
    heartbeat: Seconds
    """When the process last wrote this file."""
    error: str | None
    """Why the run failed, in one sentence."""
    stage: str | None = None
    """What the process does now: `loading`, `training`, ...; None before, and in older runs."""
    done: Count = 0
    """How much of the stage is done: runs that went first, steps, or tokens evaluated."""
    total: Count = 0
    """How much the stage has to do; 0 where that is not known."""

    @property
    def process(self) -> psutil.Process | None:
        """The live process with this id *and* this start time, or None."""
        if self.pid is None or self.process_started is None:
            return None
        return live_process(self.pid, self.process_started)

    @property
    def reason(self) -> str:
        """Why the run failed, as a sentence with its full stop."""
        error = self.error or "the process gave no reason; the last lines of its log are below"
        return error if error.endswith((".", "!", "?")) else f"{error}."

    @property
    def expects_process(self) -> bool:
        """Whether a process should be there: the run is active, or waits in line."""
        return self.state in ACTIVE or (self.state == "queued" and self.pid is not None)


def live_process(pid: int, started: float) -> psutil.Process | None:
    """Return the live process with this id *and* this start time, or None.

    Ids are reused, and a dead child whose parent has not collected it (a zombie) keeps its own.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < SAME_START_SECONDS
        alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return None
    return process if same and alive else None


def new_status(n_steps: int = 0) -> Status:
    """Return the status of a job that was not started yet."""
    return Status("queued", 0, n_steps, None, None, time.time(), None)


def of_process(status: Status, state: State, pid: int) -> Status:
    """Return `status` in another state, written now, in the name of process `pid`."""
    return status._replace(
        state=state,
        pid=pid,
        process_started=psutil.Process(pid).create_time(),
        heartbeat=time.time(),
        error=None,
    )


def read_once(read: Callable[[Path], T], path: Path) -> T:
    """Return what a module's function makes of a file, called anew when the file has changed."""
    try:
        seen = path.stat()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None
    return _read(read, path, seen.st_ino, seen.st_mtime_ns, seen.st_size)


# Files are replaced as a whole at each write, so that a new file is a new number.
@functools.lru_cache(maxsize=8192)
def _read(read: Callable[[Path], Any], path: Path, inode: int, mtime_ns: int, size: int) -> Any:
    return read(path)


def read_status(folder: Path) -> Status:
    """Return status.json as the process left it."""
    return read_once(_parsed, folder / "status.json")


def _parsed(path: Path) -> Status:
    return Status(**read_checked(path, Status, what="a job's status"))


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json."""
    write_json(folder / "status.json", status._asdict())


# Config, status, events and the log; what weights need is checked when their size is known.
FOLDER_BYTES = 2**20


@dataclass(frozen=True)
class Job:
    """A folder that a process works on."""

    folder: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def status(self) -> Status:
        """Where the run stands now, as far as this machine can tell.

        status.json is what the process said last; a process that is gone cannot correct it. So an
        active run without its process reads `cancelled` if that was asked for, else `lost`.
        """
        return self.judged(read_status(self.folder))

    def judged(self, status: Status) -> Status:
        """Return where the run stands, given what its status.json said a moment ago."""
        if not status.expects_process:
            return status._replace(state="cancelling") if self.is_ending(status) else status
        cancel = (self.folder / "control.json").exists()
        if status.process is not None:
            return status._replace(state="cancelling") if cancel else status
        # The process may have ended in order between the two looks: its last word counts.
        status = read_status(self.folder)
        if not status.expects_process:
            return status
        return status._replace(state="cancelled" if cancel else "lost")

    def is_ending(self, status: Status) -> bool:
        """Return whether the process of a cancelled run has saved but is not gone yet.

        A process that was not started for this run, such as a notebook's, need not go.
        """
        if status.state != "cancelled" or status.pid == os.getpid() or status.process is None:
            return False
        return any(e["event"] == "started" and e.get("pid") == status.pid for e in self.events())

    def events(self) -> list[dict[str, Any]]:
        """Return what happened to the run: dicts with `time` (seconds since 1970) and `event`."""
        return self.event_lines().rows

    def event_lines(self) -> Lines:
        """Return what `events` does, and how many lines it leaves out."""

        def is_event(row: dict[str, Any]) -> bool:
            return isinstance(row.get("event"), str) and isinstance(row.get("time"), int | float)

        return files.read(self.folder / "events.jsonl").where(is_event)

    def n_lost_events(self, status: Status) -> int:
        """Return how many lines of events.jsonl are damaged, one that is being written aside."""
        lines = self.event_lines()
        return lines.damaged + (lines.torn and not status.expects_process)

    def add_event(self, event: str, **details: Any) -> None:
        """Append to events.jsonl."""
        files.append(self.folder / "events.jsonl", {"time": time.time(), "event": event} | details)

    def log_tail(self, n_lines: int = 30) -> list[str]:
        """Return the last lines of log.txt; one that says so, where it cannot be read."""
        path = self.folder / "log.txt"
        if not os.path.lexists(path):
            return []
        try:
            with path.open("rb") as file:
                # A long log is read from near its end; a traceback's lines are far below 400 bytes.
                file.seek(max(0, path.stat().st_size - 400 * n_lines))
                text = file.read().decode("utf-8", errors="replace")
        except OSError as error:
            return [unreadable(path, error)]
        return text.splitlines()[-n_lines:]

    def request_cancel(self, *, by: str = "") -> None:
        """Ask the process to finish its step, save and stop; a second request changes nothing.

        A run that was never started is cancelled at once. `by`: who asks, for the run's events.
        """
        with writing(self.folder, FOLDER_BYTES), lock(self.folder, "start"):
            status = self.status
            if status.state == "queued" and status.pid is None:
                write_status(self.folder, status._replace(state="cancelled"))
            elif status.state in ("queued", "starting", "running"):
                write_json(self.folder / "control.json", {"request": "cancel", "time": time.time()})
            else:
                return
            self.add_event("cancel requested", by=by)


def enqueue(job: Job, request: dict[str, Any]) -> int | None:
    """Make a job ready for a worker, its request.json written; return the process that works on it.

    Where there is one, nothing is written.
    """
    with writing(job.folder, FOLDER_BYTES):
        job.folder.mkdir(parents=True, exist_ok=True)
        # The starting process holds this lock; a worker that is starting has its status already.
        with lock(job.folder, "start"):
            status = job.status if (job.folder / "status.json").is_file() else new_status()
            if status.expects_process:
                return status.pid
            write_json(job.folder / "request.json", request)
            write_status(job.folder, new_status())
    return None


@contextlib.contextmanager
def holding(folder: Path, busy: str) -> Iterator[None]:
    """Hold a job as the process that works on it; `busy`: the sentence where another one does."""
    from filelock import Timeout

    try:
        held = lock(folder, "worker").acquire(blocking=False)
    except Timeout:
        raise InputError(busy) from None
    with held:
        yield


CancelStage = Literal["none", "requested", "terminating", "killing", "gone"]

# Patience with a stage of a cancellation before the next, in seconds.
CANCEL_SECONDS = 10.0

# A deleted run is called this until its files are gone; names with a dot are never listed.
TRASH = ".deleted-"

# Processes started here. Polling them collects the dead, which otherwise stay as zombies.
_children: list[subprocess.Popen[bytes]] = []


def start(run: Job, command: Sequence[str] | None = None) -> int:
    """Train a run, or go on with it, in a process that outlives this one; return its id.

    Pressing twice starts one process: the second call returns the first one's id. `command`: words
    after `python -m gsae_core` that work on the folder; None: `resume FOLDER`.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    with writing(run.folder, FOLDER_BYTES), lock(run.folder, "start"):
        status = read_status(run.folder)
        if status.state == "finished":
            raise InputError(f"expected a run with steps left, got {run.id}, which is finished")
        process = status.process
        if status.expects_process and process is not None:
            return process.pid
        if run.is_ending(status):
            raise InputError(
                f"expected the last process of {run.id} to be gone, it is ending; try in a moment"
            )
        (run.folder / "control.json").unlink(missing_ok=True)
        words = command or ("resume", str(run.folder))
        with (run.folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-u", "-m", "gsae_core", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _children.append(child)
        # The worker takes this lock before it writes its own status, so the order is certain.
        write_status(run.folder, of_process(status, "starting", child.pid))
        run.add_event("started", pid=child.pid)
        return child.pid


def escalate_cancel(run: Job) -> CancelStage:
    """Take a requested cancellation as far as it needs to go by now, and say how far that is.

    Call it about once a second after `run.request_cancel()`. The process is asked by control.json
    first; after 10 s it and its children get SIGTERM, after 10 s more SIGKILL. `gone` is said only
    when the process is, and then status.json says `cancelled`.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    control = run.folder / "control.json"
    with writing(run.folder, 0), lock(run.folder, "start"):
        status = read_status(run.folder)
        process = status.process
        if run.is_ending(status) and process is not None:
            # It has saved and said so, but does not end.
            overdue = time.time() - status.heartbeat - CANCEL_SECONDS
            if overdue < 0:
                return "requested"
            return _end(process, "terminating" if overdue < CANCEL_SECONDS else "killing")
        if status.state == "cancelled":
            return "gone"
        if not control.exists() or not status.expects_process:
            return "none"
        if process is None:
            write_status(run.folder, status._replace(state="cancelled"))
            control.unlink()
            return "gone"
        try:
            request = read_json(control)
        except InputError:
            request = {}  # damaged: written anew
        now = time.time()
        is_patient = now - control.stat().st_mtime < CANCEL_SECONDS
        if "terminated" in request:
            if is_patient:
                return "terminating"
            run.add_event("killed")
            return _end(process, "killing")
        if is_patient:
            return "requested"
        write_json(control, request | {"terminated": now})
        run.add_event("terminated")
        return _end(process, "terminating")


def delete(run: Job) -> None:
    """Delete a run and everything in it; one deleted meanwhile is no mistake.

    The folder is renamed out of sight before anything in it goes, so that no half of a run is
    listed after an interruption; what an interruption left behind goes with the next deletion.
    """
    root = run.folder.parent
    busy = (
        f"expected a run that no process works on, got {run.id}, which one does; "
        "cancel it first, or wait until it has ended"
    )
    if run.folder.is_dir():
        with writing(run.folder, 0), lock(run.folder, "start"), holding(run.folder, busy):
            if run.status.expects_process:
                raise InputError(busy)
            run.folder.rename(root / f"{TRASH}{run.id}.{secrets.token_hex(3)}")
    for trash in root.glob(f"{TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)


def _end(process: psutil.Process, stage: Literal["terminating", "killing"]) -> CancelStage:
    # The tree and not the process group: a run started by hand shares its group with what
    # started it (a Makefile, a test session), which must survive.
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended first, as is wanted
                member.terminate() if stage == "terminating" else member.kill()
    return stage
