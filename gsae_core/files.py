"""Files that are there whole or not at all, and sentences for a disk that refuses them."""

import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gsae_core.errors import InputError, expecting

if TYPE_CHECKING:
    from filelock import BaseFileLock

PathOrText = Path | str
"""Where something lies: a `Path` on this machine; text may be an address on the Hub instead."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
MISPLACED = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}

EXAMPLE = Path(__file__).resolve().parent / "assets" / "example"
"""The run that ships with the package: read, never written, wherever it is installed."""


@contextmanager
def writing(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn what a person can mend into an InputError: a full disk, a read-only place, a folder.

    `n_bytes` is how much room `path` takes.
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
            sentence = (
                f"expected {readable(n_bytes)} free for {path}, found {readable(free_bytes(path))}"
                "; make room on the disk and resume the run"
            )
        elif error.errno in REFUSED:
            sentence = (
                f"expected to be allowed to write {path}, got {os.strerror(error.errno)!r}; "
                "choose a folder you own"
            )
        elif error.errno in MISPLACED:
            sentence = f"expected a file at {path}, got: {os.strerror(error.errno)}; move it away"
        else:
            raise
        raise InputError(sentence) from error


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


def replace_durably(path: Path, write: Callable[[Path], object], *, n_bytes: int) -> None:
    """Put a file at `path` that is whole whenever it is seen, even after a power cut.

    Args:
        write: writes the whole content to the path it is given, a sibling of `path`.
        n_bytes: about how large the file gets, for the sentence when the disk is full.

    Raises:
        InputError: as `writing`; an older file is then still there.
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
    data = f"{to_json(value, indent=2)}\n".encode()
    replace_durably(path, lambda sibling: sibling.write_bytes(data), n_bytes=len(data))


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON (RFC 8259) with null for numbers that are not finite."""
    plain = _JSON.dump_python(value, mode="json")
    return json.dumps(plain, indent=indent, allow_nan=False, ensure_ascii=False)


_JSON = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="null"))


def read_bytes(path: Path, *, missing: str | None = None) -> bytes:
    """Return a file's content; an InputError says `missing` where there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        lacks = missing is not None and isinstance(error, FileNotFoundError)
        raise InputError(missing if lacks else unreadable(path, error)) from None


def unreadable(path: Path, error: OSError) -> str:
    """Return the sentence for a file that is not there or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return f"expected {path}, found no such file; was the run deleted?"
    return f"expected a file to read at {path}, got: {error.strerror}"


def not_permitted(where: object) -> str:
    """Return the sentence for a file or folder that this user may not read."""
    return (
        f"expected a file that can be read at {where}, got no permission: change its owner or "
        "mode, or leave it out"
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says, UTF-8 if it comes as bytes.

    Raises:
        ValueError: for anything that no file of ours holds: other encodings, numbers beyond 2^63
            (arrays, charts and process ids could not take them), half a surrogate pair, nesting
            deeper than Python follows.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # some editors begin a file with a mark
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_real)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]}, which is too large")
    return value


def read_json(path: Path, *, missing: str | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; an InputError says why there is none, as `read_bytes`."""
    data = read_bytes(path, missing=missing)
    with expecting("JSON", path, ValueError):
        fields = parse_json(data)
    if not isinstance(fields, dict):
        raise InputError(f"expected a JSON object in {path}, got {type(fields).__name__}")
    return fields


def first_of(error: ValidationError) -> str:
    """Return what came first in the wrong place, and where: `'three' as saes.gated.alive`."""
    wrong = error.errors()[0]
    where, came = ".".join(map(str, wrong["loc"])), wrong["input"]
    if wrong["type"] == "missing":
        return f"no {where}"
    shown = type(came).__name__ if isinstance(came, dict | list) else repr(came)
    return f"{shown} as {where}"


class _Source(BaseModel):
    library: str = ""
    assumed: list[str] = []


class _Metadata(BaseModel):
    source: _Source | None = None
    weights_sha256: str | None = None
    recipe: str | None = None
    k_aux: int | None = None
    stopped: str | None = None


class _SAECfg(BaseModel):
    """What cfg.json holds, where it holds it; loading the SAE asks for more."""

    architecture: str = ""
    d_in: int = Field(1, gt=0, lt=2**31)
    d_sae: int = Field(1, gt=0, lt=2**31)
    metadata: _Metadata | None = None
    normalize_activations: str | None = None


def read_sae_cfg(path: Path) -> dict[str, Any]:
    """Return the cfg.json of an SAE; an InputError says that it is missing or damaged."""
    return read_checked(path, _SAECfg, what="the config of an SAE")


def read_checked(path: Path, schema: type[Any], *, what: str) -> dict[str, Any]:
    """Return a file's JSON object, as it stands; an InputError names what makes it no `what`."""
    fields = read_json(path)
    try:
        _adapter(schema).validate_python(fields, strict=True)
    except ValidationError as error:
        raise InputError(f"expected {what} in {path}, got {first_of(error)}") from None
    return fields


_adapter = functools.cache(TypeAdapter)


class Lines(NamedTuple):
    """What a file of JSON lines holds."""

    rows: list[dict[str, Any]]
    damaged: int
    """Lines that are no JSON objects."""
    torn: bool
    """The end is half a line: it is being written, or its writer died."""

    def where(self, fits: Callable[[dict[str, Any]], bool]) -> "Lines":
        """Return the rows that fit; the others count as damaged."""
        rows = [row for row in self.rows if fits(row)]
        return self._replace(rows=rows, damaged=self.damaged + len(self.rows) - len(rows))


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row, whole and on the disk on return; others may too. InputError: as `writing`."""
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
    """Append whole lines, or nothing, to a file opened by `ab+` without a buffer.

    The caller sees to it that nothing else appends meanwhile.
    """
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            data = b"\n" + data
    try:
        while data:
            data = data[file.write(data) :]
    except BaseException:
        os.ftruncate(file.fileno(), end)
        raise


def encoded(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as the lines of a file."""
    return "".join(to_json(row) + "\n" for row in rows).encode("utf-8")


def read(path: Path) -> Lines:
    """Return what a file holds; nothing where there is none."""
    return parsed(read_bytes(path)) if os.path.lexists(path) else Lines([], 0, False)


def parsed(data: bytes) -> Lines:
    """Return the objects of lines. A last line without its end counts if it is a whole object."""
    lines = data.split(b"\n")
    *found, end = map(_object, lines)
    rows = [row for row in (*found, end) if row is not None]
    return Lines(rows, damaged=found.count(None), torn=end is None and lines[-1] != b"")


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


def lock(folder: Path, name: str) -> "BaseFileLock":
    """Return the lock `name` of a run: `start` for a moment, `worker` for a process's life.

    The system frees it when its holder dies, however it dies.
    """
    if not folder.is_dir():
        # Taking the lock would make the folder again, without the run in it.
        raise InputError(f"expected the folder {folder}, found none; was the run deleted?")
    # Imported here: it costs as much as everything else the app's first page needs.
    from filelock import FileLock

    return FileLock(folder / f".{name}.lock")


def public_name(name: str) -> str:
    """Return a model's or data set's name; of a folder, its last part alone."""
    path = Path(os.path.expanduser(name))
    return path.name if path.is_absolute() or os.path.exists(path) else name
