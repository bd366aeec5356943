"""Runs as processes: start one that outlives its starter, and end one by stages."""

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from gsae_core.errors import InputError
from gsae_core.files import lock, read_json, write_json, writing
from gsae_core.runs.jobs.job import (
    ACTIVE,
    FOLDER_BYTES,
    Job,
    Status,
    of_process,
    read_status,
    write_status,
)

CancelStage = Literal["none", "requested", "terminating", "killing", "gone"]

# Patience with a stage of a cancellation before the next, in seconds.
CANCEL_SECONDS = 10.0

# A deleted run is called this until its files are gone; names with a dot are never listed.
TRASH = ".deleted-"

# Processes started here. Polling them collects the dead, which otherwise stay as zombies.
_children: list[subprocess.Popen[bytes]] = []


def start(run: Job, command: Sequence[str] | None = None) -> int:
    """Train a run, or go on with it, in a process that outlives this one; return its id.

    Pressing twice starts one process: the second call returns the first one's id.

    Args:
        command: words after `python -m gsae_core` that work on the folder; None: `resume FOLDER`.

    Raises:
        InputError: if the run is finished, or its folder cannot be written.
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

    Raises:
        InputError: if the folder is gone or cannot be written.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    control = run.folder / "control.json"
    with writing(run.folder, 0), lock(run.folder, "start"):
        status = read_status(run.folder)
        process = status.process
        if run.is_ending(status) and process is not None:
            return _see_off(status, process)
        if status.state == "cancelled":
            return "gone"
        if not control.exists() or not status.expects_process:
            return "none"
        if process is None:
            write_status(run.folder, status._replace(state="cancelled"))
            control.unlink()
            return "gone"
        request, now = _request(control), time.time()
        terminated = request.get("terminated")
        if not isinstance(terminated, int | float):
            asked = request.get("time")
            if not isinstance(asked, int | float):
                write_json(control, request | {"time": now})  # damaged: patience begins anew
                return "requested"
            if now - asked < CANCEL_SECONDS:
                return "requested"
            write_json(control, request | {"terminated": now})
            run.add_event("terminated")
            _signal(process, "terminate")
            return "terminating"
        if now - terminated < CANCEL_SECONDS:
            return "terminating"
        run.add_event("killed")
        _signal(process, "kill")
        return "killing"


def delete(run: Job) -> None:
    """Delete a run and everything in it; one deleted meanwhile is no mistake.

    The folder is renamed out of sight before anything in it goes, so that no half of a run is
    listed after an interruption; what an interruption left behind goes with the next deletion.

    Raises:
        InputError: if a process works on the run, or the folder cannot be written.
    """
    from filelock import Timeout

    root = run.folder.parent
    if run.folder.is_dir():
        with writing(run.folder, 0), lock(run.folder, "start"):
            held = lock(run.folder, "worker")
            try:
                held.acquire(blocking=False)
            except Timeout:
                raise InputError(_busy(run)) from None
            with held:
                if run.status.state in ("queued", *ACTIVE) and run.status.pid is not None:
                    raise InputError(_busy(run))
                run.folder.rename(root / f"{TRASH}{run.id}.{secrets.token_hex(3)}")
    for trash in root.glob(f"{TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)


def _request(control: Path) -> dict[str, Any]:
    """Return what a control.json asks for; nothing where it is damaged, which is written anew."""
    try:
        return read_json(control)
    except InputError:
        return {}


def _busy(run: Job) -> str:
    return (
        f"expected a run that no process works on, got {run.id}, which one does; "
        "cancel it first, or wait until it has ended"
    )


def _see_off(status: Status, process: psutil.Process) -> CancelStage:
    """Take a process that has saved and said so, but does not end, to its end."""
    overdue = time.time() - status.heartbeat - CANCEL_SECONDS
    if overdue < 0:
        return "requested"
    _signal(process, "terminate" if overdue < CANCEL_SECONDS else "kill")
    return "terminating" if overdue < CANCEL_SECONDS else "killing"


def _signal(process: psutil.Process, how: Literal["terminate", "kill"]) -> None:
    # The tree and not the process group: a run started by hand shares its group with what
    # started it (a Makefile, a test session), which must survive.
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.terminate() if how == "terminate" else member.kill()
        except psutil.NoSuchProcess:
            continue  # It ended first, which is what was wanted.
