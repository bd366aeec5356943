"""The process that works on a job: it holds the job, waits for its device, says how far it is.

    runs/.slots/  cuda-0.lock               held by the process that works on the device
                  cuda-0/<time>-<run>.json  a ticket of each process that waits

A slot is a lock of the operating system, which frees it when its holder dies, however it dies.
Tickets keep the order: only the first in line whose process lives tries the lock.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import psutil

from gsae_core.errors import InputError
from gsae_core.files import lock, read_json, write_json, writing
from gsae_core.runs.jobs.job import (
    Job,
    State,
    holding,
    live_process,
    of_process,
    read_status,
    write_status,
)
from gsae_core.text import Progress

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
# How soon a request to stop is heard; looking costs microseconds.
LOOK_SECONDS = 0.25
# How soon a waiting run sees that the device is free.
TURN_SECONDS = 0.5

FOLDER = ".slots"

# Slots this process holds: it may train one run inside another, but must not wait for itself.
_held: set[Path] = set()


class Waiting(NamedTuple):
    """A run that waits for its device."""

    run: str
    slot: str


class QueuePlace:
    """A run's place in the line for a device; leave it in the end, whether its turn came or not.

    The line is that of the runs beside its folder; `slot` names the device, see `machine.slot_of`.
    """

    def __init__(self, folder: Path, slot: str) -> None:
        from filelock import FileLock

        slots = folder.parent / FOLDER
        self._lock = FileLock(slots / f"{slot}.lock")
        self._mine = False  # the lock's own `is_locked` is another in each thread
        self._path = slots / f"{slot}.lock"
        self._tickets = slots / slot
        self._ticket = self._tickets / f"{time.time_ns():020d}-{folder.name}.json"
        process = psutil.Process()
        ticket = {"run": folder.name, "pid": process.pid, "started": process.create_time()}
        with writing(slots, 0):
            self._tickets.mkdir(parents=True, exist_ok=True)
            write_json(self._ticket, ticket)

    def ahead(self) -> int:
        """Return how many runs go first; 0: the device is ours from now on."""
        from filelock import Timeout

        if self._path in _held:
            self._ticket.unlink(missing_ok=True)
            return 0
        before = [t for t, _ in _living(self._tickets) if t.name < self._ticket.name]
        if before:
            return len(before) + 1
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return 1
        _held.add(self._path)
        self._mine = True
        self._ticket.unlink(missing_ok=True)
        return 0

    def leave(self) -> None:
        """Step out of the line, or free the device."""
        self._ticket.unlink(missing_ok=True)
        if self._mine:
            self._mine = False
            _held.discard(self._path)
            self._lock.release()


def waiting_runs(root: Path) -> list[Waiting]:
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
        match ticket:
            case {"pid": int(pid), "started": float(start), "run": _} if live_process(pid, start):
                found.append((path, ticket))
            case _:
                path.unlink(missing_ok=True)  # Its process is gone, or it names none.
    return found


class Worker:
    """A run held by this process, from `with` to the end of the block.

    On entry status.json says `starting`, and a thread keeps its step and heartbeat fresh; log.txt
    receives the package's log. On leaving, status.json says how it ended: `outcome`, or `failed`
    with the cause in one sentence (a traceback goes to log.txt alone).

    Attributes:
        step: steps done.
        done: how much of the present stage is done.
        outcome: the last state, unless an exception ends the block.
    """

    def __init__(self, run: Job) -> None:
        self.run = run
        self.step = 0
        self.done = 0
        self.outcome: State = "finished"
        self._stop = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        # The heartbeat and the one who trains both write the status.
        self._writing = threading.Lock()

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked this process to finish its step, save and stop."""
        return self._stop.is_set()

    def __enter__(self) -> "Worker":
        folder, status = self.run.folder, read_status(self.run.folder)
        if status.state == "finished":
            raise InputError(
                f"expected a run with steps left, got {self.run.id}, which is finished"
            )
        busy = (
            f"expected a run that no process is training, got {self.run.id}, which process "
            f"{status.pid} is training; cancel that one first"
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(holding(folder, busy))
            stack.enter_context(_logging_to(folder / "log.txt"))
            with lock(folder, "start"):
                status = read_status(folder)
                if status.state != "starting":
                    # Started by hand: a request in the folder was meant for an earlier process.
                    (folder / "control.json").unlink(missing_ok=True)
                self._status = of_process(status, "starting", os.getpid())
                self._status = self._status._replace(stage=None, done=0, total=0)
                self.step = status.step
                write_status(folder, self._status)
            stack.enter_context(_signals_to(self._on_signal))
            self._thread.start()
            self._held = stack.pop_all()
        return self

    def wait_for_device(self, slot: str, *, of: Path | None = None) -> Iterator[int]:
        """Wait until the device is free; yield how many runs go first, about twice a second.

        Ends at once when somebody asks the run to stop. The device is held until the worker ends.
        `of`: folder of the run in whose place in the line the work stands; None: the run itself.
        """
        place = QueuePlace(of or self.run.folder, slot)
        self._held.callback(place.leave)
        ahead = place.ahead()
        if ahead:
            self._status = self._status._replace(state="queued")
            self.enter("waiting", total=0)
            logger.info("waiting for %s: %d ahead", slot, ahead)
        while ahead and not self.stop_requested:
            if ahead != self.done:
                self.done = ahead
                self._write("queued")
            yield ahead
            self._stop.wait(TURN_SECONDS)
            ahead = place.ahead()
        if not ahead:
            self._status = self._status._replace(state="starting")

    def enter(self, stage: str, *, total: int, done: int = 0) -> None:
        """Say that a stage begins: in status.json, and with the time of it in events.jsonl."""
        states: dict[str, State] = {"waiting": "queued", "loading": "starting"}
        self.done = done
        self._status = self._status._replace(stage=stage, total=total)
        self._write(states.get(stage, "running"))
        self.run.add_event(stage, step=self.step)

    def follow(self, now: Progress) -> None:
        """Say how far the work is, and that a stage begins, where it does."""
        if now.stage != self._status.stage:
            self.enter(now.stage, total=now.total, done=now.done)
        self.done = now.done
        if now.stage == "training":
            self.step = now.done

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        sentence = None
        if isinstance(error, GeneratorExit | KeyboardInterrupt):
            self.outcome = "cancelled"
        elif isinstance(error, InputError):
            self.outcome, sentence = "failed", str(error)
            logger.error("%s", error)
        elif error is not None:
            first = str(error).partition("\n")[0]
            self.outcome, sentence = "failed", f"{type(error).__name__}: {first}; see log.txt"
            logger.error("the run failed", exc_info=error)
        try:
            if self.run.folder.is_dir():
                with lock(self.run.folder, "start"):
                    self._write(self.outcome, error=sentence)
                    self.run.add_event(self.outcome, step=self.step, error=sentence)
                    (self.run.folder / "control.json").unlink(missing_ok=True)
        finally:
            self._held.close()

    def _beat(self) -> None:
        control = self.run.folder / "control.json"
        beat = time.monotonic()
        while not self._done.wait(LOOK_SECONDS):
            if control.exists():
                self._stop.set()
            if not self.run.folder.is_dir():
                self._stop.set()  # Deleted by hand: the rest is not wanted.
                continue
            if time.monotonic() - beat >= HEARTBEAT_SECONDS:
                beat = time.monotonic()
                state: State = "cancelling" if self.stop_requested else self._status.state
                try:
                    self._write(state)
                except InputError as error:
                    # A full disk is met again, and answered for, when the run saves its state.
                    logger.warning("no heartbeat: %s", error)

    def _write(self, state: State, *, error: str | None = None) -> None:
        with self._writing:
            self._status = self._status._replace(
                state=state, step=self.step, heartbeat=time.time(), error=error, done=self.done
            )
            write_status(self.run.folder, self._status)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_requested:
            raise KeyboardInterrupt  # The second Ctrl-C does not wait for the step.
        self._stop.set()


@contextlib.contextmanager
def _signals_to(heard: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Python delivers signals to the main thread only; elsewhere control.json is the way.
    numbers = [signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    # A shell starts background commands of a script with SIGINT ignored: Ctrl-C is for the
    # command in front, so it stays ignored here.
    if numbers and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("gsae_core")
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(file)
    try:
        yield
    finally:
        package.removeHandler(file)
        package.setLevel(level)
        file.close()


def perform(
    job: Job,
    work: Callable[[Worker], Iterator[Progress]],
    *,
    slot: str | None = None,
    of: Path | None = None,
    worker: Worker | None = None,
) -> Iterator[Progress]:
    """Yield the progress of work on a job, held by this process; the last says how it ended.

    A request to stop (control.json, SIGTERM, Ctrl-C, or closing this iterator) closes the work at
    its next progress, unless that ends a stage, and the job ends in state `cancelled`. An
    `InputError` is said in status.json too.

    Args:
        work: yields its progress; what it must save when it is closed, it saves.
        slot: device to wait for, in the place of the run `of`; None: the work needs none.
        worker: holds the job and its device already; it is the caller's to end.
    """
    with contextlib.nullcontext(worker) if worker else Worker(job) as held:
        if slot is not None and worker is None:
            for ahead in held.wait_for_device(slot, of=of):
                yield Progress("waiting", 0, ahead, "run")
        now = Progress("loading", 0, 0)
        if not held.stop_requested:
            # Generators, though their type says Iterator.
            with contextlib.closing(work(held)) as steps:  # pyright: ignore[reportArgumentType]
                for now in steps:
                    held.follow(now)
                    yield now
                    if held.stop_requested and now.done != now.total:
                        break
                else:
                    yield Progress("finished", now.total, now.total, now.unit)
                    return
        held.outcome = "cancelled"
        yield Progress("cancelled", now.done, now.total, now.unit)
