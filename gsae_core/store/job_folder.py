"""What every job's folder has: a run's, and that of a transfer from or to the Hub.

    status.json  events.jsonl  log.txt  control.json

Code that starts a job, watches it or ends it reads and writes these files, and knows no more.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsae_core.store import json_lines
from gsae_core.store.files import unreadable, write_json, writing
from gsae_core.store.json_lines import Lines
from gsae_core.store.status import Status, lock, read_status, write_status

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

        Raises:
            InputError: if the run's files are gone or damaged.
        """
        return self.judged(read_status(self.folder))

    def judged(self, status: Status) -> Status:
        """Return where the run stands, given what its status.json said a moment ago.

        Raises:
            InputError: as `status`.
        """
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

    def is_alive(self) -> bool:
        """Return whether a process holds this run: right id, right start, not a zombie."""
        status = read_status(self.folder)
        return status.expects_process and status.process is not None

    def events(self) -> list[dict[str, Any]]:
        """Return what happened to the run: dicts with `time` (seconds since 1970) and `event`.

        Raises:
            InputError: if events.jsonl cannot be read; damaged lines are left out.
        """
        return self.event_lines().rows

    def event_lines(self) -> Lines:
        """Return what `events` does, and how many lines it leaves out.

        Raises:
            InputError: as there.
        """
        lines = json_lines.read(self.folder / "events.jsonl")
        events = [row for row in lines.rows if _is_event(row)]
        return lines._replace(rows=events, damaged=lines.damaged + len(lines.rows) - len(events))

    def n_lost_events(self, status: Status) -> int:
        """Return how many lines of events.jsonl are damaged; half a line, while it is written, not.

        Raises:
            InputError: as `events`.
        """
        lines = self.event_lines()
        return lines.damaged + (lines.torn and not status.expects_process)

    def add_event(self, event: str, **details: Any) -> None:
        """Append to events.jsonl."""
        row = {"time": time.time(), "event": event, **details}
        json_lines.append(self.folder / "events.jsonl", row)

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

        A run that was never started is cancelled at once.

        Args:
            by: who asks, for the run's events.

        Raises:
            InputError: if the folder is gone or cannot be written.
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


def _is_event(row: dict[str, Any]) -> bool:
    return isinstance(row.get("event"), str) and isinstance(row.get("time"), int | float)
