"""What readers yield: documents in pieces, of text or of token ids; and files that hold either."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gsae_core.errors import InputError

# About so many characters (or ids) a piece: bounds what is read and tokenised in one go.
PIECE = 2**20

TOKEN_SUFFIXES = {".bin", ".npy"}

# What to do where `zstandard`, which both our readers and those of `datasets` unpack with, is away.
NO_ZSTANDARD = (
    "expected the package zstandard to unpack {}, found it not installed; pip install -r "
    "requirements.txt"
)

# llm.c writes (magic, version) and 254 more int32 in front of the ids.
LLM_C_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
LLM_C_HEADER_BYTES = 1024


class Piece(NamedTuple):
    """Part of a document: text, or token ids as a 1-D integer array."""

    content: str | np.ndarray
    ends: bool
    """Whether the document ends here."""


class _Unzstd(io.RawIOBase):
    """The bytes of a `.zst` file, its frames one after the other.

    zstandard's own reader ends quietly where a file was cut off; here that is an EOFError, as it is
    for the other kinds.
    """

    def __init__(self, path: Path, unpacker: Any) -> None:
        self._file = path.open("rb")
        self._unpacker = unpacker
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(2**16)
            if not self._packed and self._frame is None:
                return 0
            if not self._packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            self._frame = self._frame or self._unpacker.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._unpacked))
        buffer[:n], self._unpacked = self._unpacked[:n], self._unpacked[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path) -> io.BufferedIOBase:
    try:
        import zstandard
    except ImportError:
        raise InputError(NO_ZSTANDARD.format(path)) from None
    # `--long=31` needs the whole window.
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(_Unzstd(path, unpacker), 2**20)


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
    ".zstd": _open_zstandard,
}
"""How a compressed file is opened, by its suffix: those that `datasets` streams, too."""


def unpacked(path: Path) -> Path:
    """Return the path without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def _open_binary(path: Path) -> Any:
    opener = PACKED.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _is_damage(error: Exception) -> bool:
    """Whether an error is of a file's content, however it is packed, and not of the disk."""
    if isinstance(error, OSError):
        return error.errno is None  # gzip's and bz2's own
    kinds = (UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError)
    return isinstance(error, kinds) or type(error).__name__ == "ZstdError"


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a UTF-8 file, unpacked if it is called so, its line ends as they are.

    A byte-order mark at its start is dropped.

    Raises:
        InputError: here or within, when the file turns out to be no UTF-8 text, or damaged.
    """
    binary = _open_binary(path)
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield file
    except Exception as error:
        if not _is_damage(error):
            raise
        raise not_text(path, error) from None


def text_pieces(path: Path, size: int = PIECE) -> Iterator[Piece]:
    """Yield a UTF-8 file in pieces of about `size` characters that end at a line's end.

    Raises:
        InputError: if the file is not UTF-8 text.
    """
    with open_text(path) as file:
        piece = file.read(size) + file.readline()
        while piece:
            following = file.read(size) + file.readline()
            yield Piece(piece, ends=not following)
            piece = following


def not_text(path: Path, error: Exception | str = "not UTF-8, or with a NUL") -> InputError:
    """Return the sentence for a file whose bytes are no UTF-8 text."""
    if isinstance(error, EOFError):
        return InputError(f"expected all of {path}, got its beginning ({error}); download it again")
    if is_utf16(path):
        return InputError(
            f"expected UTF-8 text in {path}, got UTF-16; save it as UTF-8 (Notepad: Save as, "
            "Encoding: UTF-8)"
        )
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return InputError(f"expected UTF-8 text in {path}, got a zip archive; unpack it")
    return InputError(
        f"expected UTF-8 text in {path}, got something else ({error}); convert or remove the file"
    )


def is_utf16(path: Path) -> bool:
    """Whether a file starts with UTF-16's byte-order mark."""
    with path.open("rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def starts_with_bom(path: Path) -> bool:
    """Whether a file, unpacked, starts with UTF-8's byte-order mark."""
    try:
        with _open_binary(path) as file:
            return file.read(3) == codecs.BOM_UTF8
    except Exception as error:
        if not _is_damage(error):
            raise
        return False  # reading it says so


def looks_like_text(path: Path) -> bool:
    """Whether a file starts (64 KiB) with valid UTF-8 without a NUL."""
    with path.open("rb") as file:
        head = file.read(2**16)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the 64 KiB cut in two is no mistake of the file's.
        if error.end < len(head) or len(head) < 2**16:
            return False
    return b"\0" not in head


def token_pieces(path: Path, vocabulary: int) -> Iterator[Piece]:
    """Yield the ids of a `.npy` (flat, or a row a document) or flat `.bin` file.

    The width of a `.bin` is said by an llm.c header, else by `<file>.json` with a `"dtype"` of
    uint16 or uint32, else it is the narrowest that holds `vocabulary` (as nanoGPT writes).

    Raises:
        InputError: if the file holds no ids.
    """
    if path.suffix == ".npy":
        ids = _load_npy(path)
    else:
        dtype, start = _bin_layout(path, vocabulary)
        if (path.stat().st_size - start) % np.dtype(dtype).itemsize:
            raise InputError(
                f"expected whole {dtype} token ids in {path}, got {path.stat().st_size} bytes; "
                f'say the width in {path.name}.json, e.g. {{"dtype": "uint32"}}'
            )
        if path.stat().st_size == start:
            return
        ids = np.memmap(path, dtype, mode="r", offset=start)
    if ids.ndim == 2:
        for row in ids:
            yield Piece(np.asarray(row), ends=True)
        return
    for start in range(0, len(ids), PIECE):
        yield Piece(np.asarray(ids[start : start + PIECE]), ends=False)


def _load_npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"expected a NumPy array in {path}, got something else: {error}") from None
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(
            f"expected token ids in one or two dimensions in {path}, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    return ids


def _bin_layout(path: Path, vocabulary: int) -> tuple[str, int]:
    """Return the dtype of a flat file's ids, and the byte they start at."""
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
    if len(head) == LLM_C_HEADER_BYTES:
        magic, version = struct.unpack("<ii", head[:8])
        if (magic, version) in LLM_C_HEADERS:
            return LLM_C_HEADERS[magic, version], LLM_C_HEADER_BYTES
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.exists():
        return narrowest(vocabulary), 0
    text = sidecar.read_text(encoding="utf-8-sig")
    try:
        dtype = json.loads(text)["dtype"]
    except (ValueError, KeyError, TypeError):
        dtype = text
    if dtype not in ("uint16", "uint32"):
        raise InputError(f'expected {{"dtype": "uint16"}} or "uint32" in {sidecar}, got {text!r}')
    return dtype, 0


def narrowest(vocabulary: int) -> str:
    """Return the dtype that token ids are kept in: uint16 where it holds them all."""
    return "uint16" if vocabulary <= 2**16 else "uint32"
