"""JSON lines: files that grow by an object a line, and lose one line at most however a write ends.

events.jsonl, labels.jsonl and metrics.jsonl are written and read here. What is appended starts on a
line of its own, is taken back where the disk refuses the rest of it, and is on the disk before
`append` returns. A power cut can still leave half a line or bytes of zero in what was being
written: what is no JSON object is left out by readers, and counted.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gsae_core.store.files import read_bytes, sync, to_json, writing
from gsae_core.store.status import lock
from gsae_core.validation import parse_json


class Lines(NamedTuple):
    """What a file of JSON lines holds."""

    rows: list[dict[str, Any]]
    damaged: int
    """Lines that are no JSON objects."""
    torn: bool
    """The end is half a line: it is being written, or its writer died."""


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, whole and on the disk before this returns; others may append meanwhile.

    Raises:
        InputError: if the disk is full or the folder cannot be written or is gone.
    """
    data = encoded([row])
    with (
        writing(path, len(data)),
        lock(path.parent, path.stem),
        path.open("ab+", buffering=0) as file,
    ):
        is_new = file.seek(0, os.SEEK_END) == 0
        append_to(file, data)
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def append_to(file: BinaryIO, data: bytes) -> None:
    """Append whole lines to a file opened by `ab+` without a buffer, or nothing.

    The caller sees to it that nothing else appends meanwhile.
    """
    end = file.seek(0, os.SEEK_END)
    if end and not _ends_a_line(file):
        data = b"\n" + data
    try:
        while data:
            data = data[file.write(data) :]
    except BaseException:
        os.ftruncate(file.fileno(), end)
        raise


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def encoded(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as the lines of a file."""
    return "".join(to_json(row) + "\n" for row in rows).encode("utf-8")


def read(path: Path) -> Lines:
    """Return what a file holds; nothing where there is none.

    Raises:
        InputError: if there is something else than a file, or it may not be read.
    """
    return parsed(read_bytes(path)) if os.path.lexists(path) else Lines([], 0, False)


def parsed(data: bytes) -> Lines:
    """Return the objects of lines. A last line without its end counts if it is a whole object."""
    *lines, last = data.split(b"\n")
    found = [_object(line) for line in lines]
    end = _object(last)
    rows = [row for row in (*found, end) if row is not None]
    return Lines(rows, damaged=found.count(None), torn=end is None and last != b"")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def left_out(n_lines: int, name: str) -> str:
    """Return the sentence on damaged lines of a file."""
    lines, they = ("1 line", "is") if n_lines == 1 else (f"{n_lines:,} lines", "are")
    return f"{lines} of {name} cannot be read and {they} left out"
