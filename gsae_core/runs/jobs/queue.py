"""One run at a time on a device: a line that needs no server, and that no death can block.

    runs/.slots/  cuda-0.lock               held by the process that trains on the device
                  cuda-0/<time>-<run>.json  a ticket of each process that waits

A slot is a lock of the operating system, which frees it when its holder dies, however it dies.
Tickets keep the order: only the first in line whose process lives tries the lock.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from gsae_core.errors import InputError
from gsae_core.files import read_json, write_json, writing
from gsae_core.runs.jobs.job import live_process

FOLDER = ".slots"

# Slots this process holds: it may train one run inside another, but must not wait for itself.
_held: set[Path] = set()


class Waiting(NamedTuple):
    """A run that waits for its device."""

    run: str
    slot: str


class Place:
    """A run's place in the line for a device; leave it in the end, whether its turn came or not.

    Args:
        folder: the run's; the line is that of the runs beside it.
        slot: name of the device, from `machine.slot_of`.

    Raises:
        InputError: if the folder of the runs cannot be written.
    """

    def __init__(self, folder: Path, slot: str) -> None:
        from filelock import FileLock

        slots = folder.parent / FOLDER
        self._lock = FileLock(slots / f"{slot}.lock")
        self._path = slots / f"{slot}.lock"
        self._tickets = slots / slot
        self._ticket = self._tickets / f"{time.time_ns():020d}-{folder.name}.json"
        self._mine = False
        process = psutil.Process()
        ticket = {"run": folder.name, "pid": process.pid, "started": process.create_time()}
        with writing(slots, 0):
            self._tickets.mkdir(parents=True, exist_ok=True)
            write_json(self._ticket, ticket)

    def ahead(self) -> int:
        """Return how many runs go first; 0 means that the device is ours from now on."""
        from filelock import Timeout

        if self._mine or self._path in _held:
            self._ticket.unlink(missing_ok=True)
            return 0
        before = [t for t, _ in _living(self._tickets) if t.name < self._ticket.name]
        if before:
            return len(before) + 1
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return 1
        self._mine = True
        _held.add(self._path)
        self._ticket.unlink(missing_ok=True)
        return 0

    def leave(self) -> None:
        """Step out of the line, or free the device."""
        self._ticket.unlink(missing_ok=True)
        if self._mine:
            self._mine = False
            _held.discard(self._path)
            self._lock.release()


def line(root: Path) -> list[Waiting]:
    """Return the runs that wait, first in line first, device by device."""
    slots = sorted(path for path in (root / FOLDER).glob("*") if path.is_dir())
    return [Waiting(ticket["run"], slot.name) for slot in slots for _, ticket in _living(slot)]


def _living(tickets: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the tickets whose process lives, oldest first; throw the others away."""
    found = []
    for path in sorted(tickets.glob("*.json")):
        try:
            ticket = read_json(path)
        except InputError:
            continue  # Its turn came between the listing and the look, or it is damaged.
        pid, started = ticket.get("pid"), ticket.get("started")
        if not isinstance(pid, int) or not isinstance(started, float) or "run" not in ticket:
            path.unlink(missing_ok=True)  # damaged: it names no process to wait for
        elif live_process(pid, started) is None:
            path.unlink(missing_ok=True)
        else:
            found.append((path, ticket))
    return found
