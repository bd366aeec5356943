"""metrics.jsonl: written line by line, read while it grows, cut back when a run resumes."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gsae_core.errors import InputError
from gsae_core.store.files import replace_durably, to_json, writing

# What a look at the newest rows reads: ten logged steps of 16 SAEs.
TAIL_BYTES = 2**16


class MetricsCursor(NamedTuple):
    """How far metrics.jsonl was read. A resumed run replaces the file, hence its identity."""

    file: int = 0
    offset: int = 0


class MetricsSlice(NamedTuple):
    """What was added to metrics.jsonl since a cursor."""

    rows: list[dict[str, Any]]
    cursor: MetricsCursor
    restarted: bool
    """The file is another than the cursor's: `rows` is everything, forget what was read before."""
    damaged: int = 0
    """Whole lines that are no JSON objects, left out: a disk that was full leaves such."""


def read_since(path: Path, cursor: MetricsCursor) -> MetricsSlice:
    """Return the rows after `cursor`; a last line still being written is left for the next call."""
    if not path.exists():
        return MetricsSlice([], MetricsCursor(), cursor != MetricsCursor())
    with path.open("rb") as file:
        identity = os.fstat(file.fileno()).st_ino
        restarted = cursor.file not in (0, identity)
        offset = 0 if restarted else cursor.offset
        file.seek(offset)
        data = file.read()
    end = offset + data.rfind(b"\n") + 1
    rows, damaged = _rows(data[: end - offset])
    return MetricsSlice(rows, MetricsCursor(identity, end), restarted, damaged)


def read_tail(path: Path) -> list[dict[str, Any]]:
    """Return the newest rows, from the last 64 kB of the file; oldest first."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
        file.seek(start)
        data = file.read()
    whole = data if start == 0 else data[data.find(b"\n") + 1 :]
    return _rows(whole[: whole.rfind(b"\n") + 1])[0]


def _rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in whole lines, and how many lines hold none."""
    rows, damaged = [], 0
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def cut_back(path: Path, n_bytes: int) -> None:
    """Drop what was written after the first `n_bytes`: steps that will be taken again.

    The file is replaced, so that readers see by its identity that it changed.

    Raises:
        InputError: if the file is shorter than that.
    """
    data = path.read_bytes() if path.exists() else b""
    if len(data) < n_bytes:
        raise InputError(
            f"expected at least {n_bytes} bytes in {path}, as its resumable state says, found "
            f"{len(data)}; delete the folder {path.parent / 'resume'} to train from step 0"
        )
    replace_durably(path, lambda sibling: _write(sibling, data[:n_bytes]), n_bytes=n_bytes)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class MetricsLog:
    """metrics.jsonl opened for appending, after what belongs to later steps is cut off.

    Args:
        path: the file; made when it is not there.
        n_bytes: how much of it stands; 0 for a run that begins.

    Raises:
        InputError: if the file is shorter than `n_bytes`, or the disk is full or read-only.
    """

    def __init__(self, path: Path, *, n_bytes: int) -> None:
        cut_back(path, n_bytes)
        self._path = path
        self._file = path.open("ab")

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows in one write, so that a reader sees a step's SAEs together."""
        data = "".join(to_json(row) + "\n" for row in rows).encode("utf-8")
        with writing(self._path, len(data)):
            self._file.write(data)
            self._file.flush()

    def sync(self) -> int:
        """Wait until everything is on the disk and return the file's length in bytes."""
        with writing(self._path, 0):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
