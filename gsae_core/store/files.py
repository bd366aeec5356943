"""Files that are there whole or not at all, and sentences for a disk that refuses them."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
MISPLACED = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}

EXAMPLE = Path(__file__).resolve().parents[1] / "assets" / "example"
"""The run that ships with the package: read, never written, wherever it is installed."""


@contextmanager
def writing(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn failures a person can mend into a sentence: a full disk, a read-only place, a folder.

    Args:
        path: what is being written.
        n_bytes: how much room it takes.

    Raises:
        InputError: how much is needed and how much is free, that the place is not writable, or
            that something else than a file is there.
    """
    if path.absolute().is_relative_to(EXAMPLE):
        raise InputError(
            "expected a run of your own, got the bundled example, which is only read; train one "
            "like it: Duplicate with changes on its Live page"
        )
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = free_bytes(path)
            raise InputError(
                f"expected {readable(n_bytes)} free for {path}, found {readable(free)}; "
                "make room on the disk and resume the run"
            ) from error
        if error.errno in REFUSED:
            raise InputError(
                f"expected to be allowed to write {path}, got {os.strerror(error.errno)!r}; "
                "choose a folder you own"
            ) from error
        if error.errno in MISPLACED:
            raise InputError(
                f"expected a file at {path}, got: {os.strerror(error.errno)}; move it away"
            ) from error
        raise


def free_bytes(path: Path) -> int:
    """Return the free space on the disk that holds `path` or would hold it."""
    parents = [path, *path.absolute().parents]
    return shutil.disk_usage(next(place for place in parents if place.exists())).free


def readable(n_bytes: int) -> str:
    """Return a size as a person writes it, e.g. `3.2 GB` (1 GB = 10^9 bytes)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def replace_durably(path: Path, write: Callable[[Path], None], *, n_bytes: int) -> None:
    """Put a file at `path` that is whole whenever it is seen, even after a power cut.

    Args:
        path: where the file ends up; an older one stays until the new one is on the disk.
        write: writes the whole content to the path it is given, a sibling of `path`.
        n_bytes: about how large the file gets, for the sentence when the disk is full.

    Raises:
        InputError: if the disk is full or the folder cannot be written.
    """
    # One name a process: two writers of one file never share a half-written sibling.
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, n_bytes):
        try:
            write(sibling)
            sync(sibling)
            os.replace(sibling, path)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows keeps the names itself and refuses to open a folder.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file; NaN and infinities become null, which is what JSON has for them."""
    text = to_json(value, indent=2) + "\n"
    replace_durably(
        path, lambda sibling: _write_text(sibling, text), n_bytes=len(text.encode("utf-8"))
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON (RFC 8259) with null for numbers that are not finite."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        InputError: if there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None


def unreadable(path: Path, error: OSError) -> str:
    """Return the sentence for a file that is not there or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return f"expected {path}, found no such file; was the run deleted?"
    return f"expected a file to read at {path}, got: {error.strerror}"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
