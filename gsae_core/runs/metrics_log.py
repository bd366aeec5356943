"""metrics.jsonl: written line by line, read while it grows, cut back when a run resumes."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from gsae_core import files
from gsae_core.errors import InputError
from gsae_core.files import read_bytes, replace_durably, unreadable, writing


class MetricsCursor(NamedTuple):
    """How far metrics.jsonl was read. A resumed run replaces the file, hence its identity."""

    file: int = 0
    offset: int = 0
    """Bytes that were read; below 0, how many of the last to read."""


TAIL = MetricsCursor(offset=-(2**16))
"""Before the newest rows alone: ten logged steps of 16 SAEs."""


class MetricsSlice(NamedTuple):
    """What was added to metrics.jsonl since a cursor."""

    rows: list[dict[str, Any]]
    cursor: MetricsCursor
    restarted: bool
    """The file is another than the cursor's: `rows` is everything, forget what was read before."""
    damaged: int = 0
    """Whole lines that are no rows, left out: power cuts and full disks leave such."""


def read_since(path: Path, cursor: MetricsCursor) -> MetricsSlice:
    """Return the rows after `cursor`; a last line still being written is left for the next call."""
    if not os.path.lexists(path):
        return MetricsSlice([], MetricsCursor(), cursor != MetricsCursor())
    try:
        with path.open("rb") as file:
            seen = os.fstat(file.fileno())
            restarted = cursor.file not in (0, seen.st_ino)
            offset = 0 if restarted else cursor.offset
            if offset < 0:  # The half line that it may begin with is no row.
                offset = max(0, seen.st_size + offset)
            file.seek(offset)
            data = file.read()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None
    end = offset + data.rfind(b"\n") + 1
    lines = files.parsed(data[: end - offset]).where(_is_row)
    return MetricsSlice(lines.rows, MetricsCursor(seen.st_ino, end), restarted, lines.damaged)


def _is_row(row: dict[str, Any]) -> bool:
    """Return whether a line has what every reader needs: its place, its SAE, and numbers."""
    place = [row.get(key) for key in ("step", "tokens", "seconds")]
    place += [row.get(key, 0.0) for key in ("seconds_lm", "seconds_sae")]  # older lines lack these
    numbers = (value for key, value in row.items() if key != "sae")
    return (
        isinstance(row.get("sae"), str)
        and all(isinstance(value, int | float) for value in place)
        and all(value is None or isinstance(value, int | float) for value in numbers)
    )


class MetricsLog:
    """metrics.jsonl opened for appending, after its first `n_bytes`; later steps are taken again.

    A line reaches the system with its step, and so every reader, also after a kill; it
    is on the disk when `sync` returns, which each resumable state calls. A wait for the disk with
    every step would save nothing: after a power cut the steps since that state are taken and logged
    again, and their lines, torn or whole, are cut off. On an SSD it took 3.4 ms a step, 45 at most.
    """

    def __init__(self, path: Path, *, n_bytes: int) -> None:
        # The file is replaced, so that readers see by its identity that it changed.
        kept = read_bytes(path)[:n_bytes] if os.path.lexists(path) else b""
        replace_durably(path, lambda sibling: sibling.write_bytes(kept), n_bytes=n_bytes)
        self._path = path
        self._file = path.open("ab+", buffering=0)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows in one write, so that a reader sees a step's SAEs together."""
        data = files.encoded(rows)
        with writing(self._path, len(data)):
            files.append_to(self._file, data)

    def sync(self) -> int:
        """Wait until everything is on the disk and return the file's length in bytes."""
        with writing(self._path, 0):
            os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
