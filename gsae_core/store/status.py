"""status.json: where a run stands, and whether the process that wrote it is really there."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import psutil

from gsae_core.errors import InputError
from gsae_core.store.files import read_bytes, unreadable, write_json
from gsae_core.validation import parse_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

State = Literal[
    "queued", "starting", "running", "cancelling", "cancelled", "finished", "failed", "lost"
]
ACTIVE: tuple[State, ...] = ("starting", "running", "cancelling")
Stage = Literal[
    "waiting",
    "loading",
    "training",
    "evaluating",
    "indexing",
    "sorting",
    "describing",
    "downloading",
    "importing",
    "uploading",
]

# A process's start is read from the boot clock, which moves by a little when the time is set.
SAME_START_SECONDS = 2.0
MOST_SECONDS = 1e11  # since 1970: the year 5138


class Status(NamedTuple):
    """Where a run stands; status.json holds exactly these."""

    state: State
    step: int
    """Steps done."""
    n_steps: int
    """Steps planned."""
    pid: int | None
    """Process that trains the run, or trained it last."""
    process_started: float | None
    """When that process began, in seconds since 1970: ids are reused, this pair is not."""
    heartbeat: float
    """When the process last wrote this file, in seconds since 1970."""
    error: str | None
    """Why the run failed, in one sentence."""
    stage: Stage | None = None
    """What the process does now; None before it did anything, and in older runs."""
    done: int = 0
    """How much of the stage is done: runs that went first, steps, or tokens evaluated."""
    total: int = 0
    """How much the stage has to do; 0 where that is not known."""

    @property
    def process(self) -> psutil.Process | None:
        """The live process with this id *and* this start time, or None."""
        if self.pid is None or self.process_started is None:
            return None
        return live_process(self.pid, self.process_started)

    @property
    def expects_process(self) -> bool:
        """Whether a process should be there: the run is active, or waits in line."""
        return self.state in ACTIVE or (self.state == "queued" and self.pid is not None)


def live_process(pid: int, started: float) -> psutil.Process | None:
    """Return the live process with this id *and* this start time, or None.

    A process id alone proves nothing: ids are reused, and a dead child whose parent has not
    collected it (a zombie) still answers signal 0.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < SAME_START_SECONDS
        alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return None
    return process if same and alive else None


def of_process(status: Status, state: State, pid: int) -> Status:
    """Return `status` in another state, written now, in the name of process `pid`."""
    return status._replace(
        state=state,
        pid=pid,
        process_started=psutil.Process(pid).create_time(),
        heartbeat=time.time(),
        error=None,
    )


def read_status(folder: Path) -> Status:
    """Return status.json as the process left it.

    Raises:
        InputError: if the file is missing or damaged.
    """
    path = folder / "status.json"
    try:
        seen = path.stat()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None
    return _parsed(path, seen.st_ino, seen.st_mtime_ns, seen.st_size)


# Replaced as a whole at each write, so that a new file is a new number. Every page asks each of a
# folder's runs, and most have ended.
@functools.lru_cache(maxsize=4096)
def _parsed(path: Path, inode: int, mtime_ns: int, size: int) -> Status:
    """Return a status file's content; the last three arguments tell a new file from the old."""
    fields = read_json(path)
    known, needed = set(Status._fields), set(Status._fields) - set(Status._field_defaults)
    if not needed <= set(fields) <= known or fields["state"] not in get_args(State):
        raise InputError(
            f"expected the keys {', '.join(Status._fields)} in {path}, "
            f"found {', '.join(fields) or 'none'}"
        )
    for name, value in fields.items():
        if not _may_be(name, value):
            raise InputError(f"expected {_WANTED[name]} as {name} in {path}, got {value!r}")
    return Status(**fields)


_WANTED = {
    "state": "a state",
    **dict.fromkeys(("step", "n_steps", "done", "total"), "a whole number from 0"),
    "pid": "a process id or null",
    "process_started": "seconds since 1970 or null",
    "heartbeat": "seconds since 1970",
    **dict.fromkeys(("error", "stage"), "a text or null"),
}


def _may_be(name: str, value: Any) -> bool:
    if value is None:
        return name in ("pid", "process_started", "error", "stage")
    if name in ("state", "error", "stage"):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return False
    if name in ("process_started", "heartbeat"):
        return value < MOST_SECONDS
    return isinstance(value, int) and (name != "pid" or 0 < value < 2**31)


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json."""
    write_json(folder / "status.json", status._asdict())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in one of a run's JSON files.

    Raises:
        InputError: if the file is missing, cannot be read or holds no JSON object.
    """
    try:
        fields = parse_json(read_bytes(path))
    except ValueError as error:
        raise InputError(f"expected JSON in {path}, got something else: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"expected a JSON object in {path}, got {type(fields).__name__}")
    return fields


def lock(folder: Path, name: str) -> "BaseFileLock":
    """Return the lock `name` of a run: `start` for a moment, `worker` for a process's life.

    The system frees it when its holder dies, however it dies.

    Raises:
        InputError: if the folder is gone.
    """
    if not folder.is_dir():
        # Taking the lock would make the folder again, without the run in it.
        raise InputError(f"expected the folder {folder}, found none; was the run deleted?")
    # Imported here: it costs as much as everything else the app's first page needs.
    from filelock import FileLock

    return FileLock(folder / f".{name}.lock")
