"""Files that hold tensors: what kind a file is, and names and shapes without reading a tensor.

Nothing is extracted, executed or allocated before sizes agree. Nothing here imports torch.

    safetensors   a length, a JSON header, the data
    npz           a zip of .npy files
    pickle        a zip with data.pkl and one stored file a tensor, as torch.save writes
"""

import math
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Literal, NamedTuple

import numpy as np

from gsae_core.errors import InputError
from gsae_core.store.files import readable
from gsae_core.store.formats.found import Shape
from gsae_core.store.formats.pickles import names_in
from gsae_core.store.formats.safe_json import parse_object

Kind = Literal["safetensors", "npz", "pickle"]

LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
LARGEST_PICKLE = 64 * 2**20  # of data.pkl, which holds names and not numbers
MOST_ENTRIES = 4096

# Weights hardly compress. Zeros do, a thousandfold, so that small files are left alone.
LARGEST_RATIO, BELOW_SUSPICION = 100, 16 * 2**20

# What zipfile raises over bytes that are no zip; names that are no text are a ValueError.
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    EOFError,
    RuntimeError,
    ValueError,
)

SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}


class Held(NamedTuple):
    """The names in a file, with shapes where those can be told without torch."""

    kind: Kind
    shapes: dict[str, Shape | None]


def look(path: Path) -> Held | None:
    """Return what a file holds; None if it is no container of tensors.

    Raises:
        InputError: if it is one that is damaged, or made to do harm.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return _look_into_zip(path)
    if start[8:9] == b"{":
        return Held("safetensors", dict(safetensors_shapes(path)))
    return None


def is_bare_pickle(path: Path) -> bool:
    """Return whether a file is what torch wrote before version 1.6, or pickle itself."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Return names and shapes from a safetensors header, whose sizes agree with the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > min(size - 8, LARGEST_HEADER):
            raise InputError(
                f"expected a safetensors header within the {size} bytes of {path}, found one that "
                f"claims {n_header}; copy the file again"
            )
        header = parse_object(file.read(n_header), f"the header of {path}")
    header.pop("__metadata__", None)
    shapes = {name: _declared_shape(name, entry, path) for name, entry in header.items()}
    n_data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if n_data != size - 8 - n_header:
        raise InputError(
            f"expected {n_data} bytes of tensors in {path}, as its header says, found "
            f"{size - 8 - n_header}; copy the file again"
        )
    return shapes


def _declared_shape(name: str, entry: object, path: Path) -> Shape:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            whole = all(isinstance(n, int) and n >= 0 for n in shape)
            bits = SAFETENSORS_BITS.get(dtype)
            if whole and bits and math.prod(shape) * bits == 8 * (end - start):
                return tuple(shape)
    raise InputError(
        f"expected a type, a shape and as many bytes for {name!r} in the header of {path}, found "
        f"{str(entry)[:120]}"
    )


def _look_into_zip(path: Path) -> Held | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            if any(entry.filename.endswith(".npy") for entry in entries):
                return Held("npz", {e.filename[:-4]: _npy_shape(path, archive, e) for e in entries})
            for entry in entries:
                if PurePosixPath(entry.filename).name == "data.pkl":
                    return Held("pickle", dict.fromkeys(_pickled_names(path, archive, entry)))
    except InputError:
        raise
    except (*BROKEN_ZIP, OSError) as error:
        raise InputError(
            f"expected a whole zip archive in {path}, found a damaged one ({error}); copy the "
            "file again"
        ) from None
    return None


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuse archives that no library writes, by their directory alone."""
    names = [entry.filename for entry in entries]
    if len(names) > MOST_ENTRIES:
        raise InputError(f"expected an SAE's few tensors in {path}, found {len(names)} files")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"expected each name once in {path}, found {twice!r} twice")
    for name in names:
        if _leads_out(name):
            raise InputError(
                f"expected plain names in {path}, found {name!r}, which leads out of the archive; "
                "do not trust this file"
            )
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if sum(entry.compress_size for entry in entries) > size or (
        unpacked > max(BELOW_SUSPICION, LARGEST_RATIO * size)
    ):
        raise InputError(
            f"expected an archive whose content has about its size, found {readable(size)} that "
            f"claim to hold {readable(unpacked)} in {path}; do not trust this file"
        )


def _leads_out(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.anchor) or ".." in {*posix.parts, *windows.parts}


def _npy_shape(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Shape:
    with archive.open(entry) as file:
        return npy_header(path, entry, file)[0]


def npy_header(
    path: Path, entry: zipfile.ZipInfo, file: IO[bytes] | zipfile.ZipExtFile
) -> tuple[Shape, bool, np.dtype]:
    """Return shape, whether columns come first, and type, which agree with the entry's size."""
    try:
        version = np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, columns_first, dtype = read[version[0]](file)  # pyright: ignore[reportArgumentType]
    except (ValueError, EOFError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(
            f"expected a numpy array in {entry.filename!r} of {path}, found something else "
            f"({str(error)[:120]})"
        ) from None
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InputError(
            f"expected numbers in {entry.filename!r} of {path}, found type {dtype}, which can "
            "hold code"
        )
    claimed = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or claimed != entry.file_size - file.tell():
        raise InputError(
            f"expected {entry.file_size - file.tell()} bytes in {entry.filename!r} of {path}, as "
            f"its archive says, found a shape {list(shape)} of {claimed}"
        )
    return shape, columns_first, dtype


def _pickled_names(path: Path, archive: zipfile.ZipFile, pickle: zipfile.ZipInfo) -> list[str]:
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"expected tensors stored as they are, as torch.save does, found "
                f"{entry.filename!r} compressed in {path}; do not trust this file"
            )
    if pickle.file_size > LARGEST_PICKLE:
        raise InputError(
            f"expected names alone in the pickle of {path}, found {readable(pickle.file_size)}"
        )
    return names_in(archive.read(pickle), path)
