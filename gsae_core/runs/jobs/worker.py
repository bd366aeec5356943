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
from types import FrameType
from typing import Any

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

logger: logging.Logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
# How soon a request to stop is heard; looking costs microseconds.
LOOK_SECONDS = 0.25
# How soon a waiting run sees that the device is free.
TURN_SECONDS = 0.5

FOLDER = ".slots"

# Slots this process holds: it may train one run inside another, but must not wait for itself.
_held: set[Path] = set()


@contextlib.contextmanager
def in_line(folder: Path, slot: str) -> Iterator[Callable[[], int]]:
    """Put a run into the line for a device, and yield what tells how many runs go first.

    0: the device is ours until the block ends. The line is that of the runs beside its folder;
    `slot` names the device, see `machine.slot_of`.
    """
    from filelock import FileLock, Timeout

    tickets = folder.parent / FOLDER / slot
    path = tickets.with_name(f"{slot}.lock")
    device = FileLock(path, thread_local=False)
    ticket = tickets / f"{time.time_ns():020d}-{folder.name}.json"
    process = psutil.Process()
    mine = {"run": folder.name, "pid": process.pid, "started": process.create_time()}
    with writing(tickets, 0):
        tickets.mkdir(parents=True, exist_ok=True)
        write_json(ticket, mine)

    def ahead() -> int:
        if path not in _held:
            before = [other for other, _ in _living(tickets) if other.name < ticket.name]
            if before:
                return len(before) + 1
            try:
                device.acquire(blocking=False)
            except Timeout:
                return 1
            _held.add(path)
        ticket.unlink(missing_ok=True)
        return 0

    try:
        yield ahead
    finally:
        ticket.unlink(missing_ok=True)
        if device.is_locked:
            _held.discard(path)
            device.release()


def waiting_runs(root: Path) -> list[str]:
    """Return the names of the runs that wait, first in line first, device by device."""
    slots = sorted(path for path in (root / FOLDER).glob("*") if path.is_dir())
    return [ticket["run"] for slot in slots for _, ticket in _living(slot)]


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
    """

    def __init__(self, run: Job) -> None:
        self.run = run
        self.step: int = 0
        self.done: int = 0  # of the present stage
        self.outcome: State = "finished"  # unless an exception ends the block
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
                status = read_status(folder)._replace(stage=None, done=0, total=0)
                if status.state != "starting":
                    # Started by hand: a request in the folder was meant for an earlier process.
                    (folder / "control.json").unlink(missing_ok=True)
                self._status = of_process(status, "starting", os.getpid())
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
        n_ahead = self._held.enter_context(in_line(of or self.run.folder, slot))
        ahead = n_ahead()
        if ahead:
            self.enter("waiting", total=0, done=ahead)
            logger.info("waiting for %s: %d ahead", slot, ahead)
        while ahead and not self.stop_requested:
            self.done = ahead
            yield ahead
            self._stop.wait(TURN_SECONDS)
            ahead = n_ahead()
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
        if now.stage == "training":
            self.step = now.done
        if now.stage != self._status.stage:
            self.enter(now.stage, total=now.total, done=now.done)
        self.done = now.done

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
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
    job: Job, work: Iterator[Progress], *, slot: str | None = None, of: Path | None = None
) -> Iterator[Progress]:
    """Yield the progress of work on a job, held by this process; the last says how it ended.

    A request to stop (control.json, SIGTERM, Ctrl-C, or closing this iterator) closes the work at
    its next progress, unless that ends a stage, and the job ends in state `cancelled`. An
    `InputError` is said in status.json too.

    Args:
        work: a generator of its progress, begun once the device is free; what it must save when
            it is closed, it saves.
        slot: device to wait for, in the place of the run `of`; None: the work needs none.
    """
    with Worker(job) as worker:
        if slot is not None:
            for ahead in worker.wait_for_device(slot, of=of):
                yield Progress("waiting", 0, ahead, "run")
        now = Progress("loading", 0, 0)
        if not worker.stop_requested:
            # A generator, though its type says Iterator.
            with contextlib.closing(work):  # pyright: ignore[reportArgumentType]
                for now in work:
                    worker.follow(now)
                    yield now
                    if worker.stop_requested and now.done != now.total:
                        break
                else:
                    yield Progress("finished", now.total, now.total, now.unit)
                    return
        worker.outcome = "cancelled"
        yield Progress("cancelled", now.done, now.total, now.unit)
