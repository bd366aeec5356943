"""A file from anywhere -> the names in it without torch, and then its tensors; nothing is run.

Every container is checked before anything in it is believed: sizes against the file's own, names
for coming twice or leading out, pickles for calling anything.
"""

import json
import math
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from gsae_core.checkpoints.formats.libraries import Shape
from gsae_core.errors import InputError
from gsae_core.files import readable

Kind = Literal["safetensors", "npz", "pickle", "bare pickle"]

LARGEST_PICKLE = 64 * 2**20  # of data.pkl, which holds names and not numbers
LARGEST_JSON = 16 * 2**20
MOST_ENTRIES = 4096

# Weights hardly compress. Zeros do, a thousandfold, so that small files are left alone.
LARGEST_RATIO, BELOW_SUSPICION = 100, 16 * 2**20


class Contents(NamedTuple):
    """The names in a file, with shapes where those can be told without torch."""

    kind: Kind
    shapes: dict[str, Shape | None]


def contents_of(path: Path) -> Contents | None:
    """Return what a file holds; None if it is no container of tensors.

    InputError names the damage in one, or what in it was made to do harm.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(
            f"expected a file that can be read at {path}, got an error ({error.strerror}); give "
            "the weights of an SAE, or their folder"
        ) from error
    if start[:4] == b"PK\x03\x04":
        return _look_into_zip(path)
    # A Parquet table (of an index, say) may happen to have the brace there too, and so may a JSON
    # file, which is text where a header's length has zeros.
    text = start.isascii() and 0 not in start
    if start[8:9] == b"{" and start[:4] != b"PAR1" and not text:
        return Contents("safetensors", dict(_safetensors_shapes(path)))
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return Contents("bare pickle", {})  # of torch before version 1.6, or pickle itself
    return None


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Return names and shapes from a safetensors header."""
    try:
        # Opening it checks the header: its length, and that what it declares fills the file.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(n_header), f"the header of {path}")
    except SafetensorError as error:
        raise InputError(
            f"expected whole safetensors in {path}, found {path.stat().st_size} bytes that are "
            f"not ({str(error)[:120]}); copy or train it again"
        ) from None
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _look_into_zip(path: Path) -> Contents | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            if any(entry.filename.endswith(".npy") for entry in entries):
                return Contents(
                    "npz", {e.filename[:-4]: _npy_shape(path, archive, e) for e in entries}
                )
            for entry in entries:
                if PurePosixPath(entry.filename).name == "data.pkl":
                    return Contents("pickle", dict.fromkeys(_pickled_names(path, archive, entry)))
    except InputError:
        raise
    except Exception as error:
        # zipfile, numpy and pickletools raise many kinds over damaged bytes, and list none of them.
        raise InputError(
            f"expected a whole archive of tensors in {path}, found a damaged one "
            f"({str(error)[:120]}); copy the file again"
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
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        if posix.is_absolute() or windows.anchor or ".." in {*posix.parts, *windows.parts}:
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


def _npy_shape(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Shape:
    """Return an array's shape from its header, which agrees with the entry's size."""
    with archive.open(entry) as file:
        major, minor = np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
        read = getattr(np.lib.format, f"read_array_header_{major}_{minor}", None)
        if read is None:
            raise InputError(
                f"expected a numpy array of version 1.0 or 2.0 in {entry.filename!r} of {path}, "
                f"found version {major}.{minor}; save it again with numpy.savez"
            )
        shape, _, dtype = read(file)
        n_bytes = entry.file_size - file.tell()
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InputError(
            f"expected numbers in {entry.filename!r} of {path}, found type {dtype}, which can "
            "hold code"
        )
    claimed = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or claimed != n_bytes:
        raise InputError(
            f"expected {n_bytes} bytes in {entry.filename!r} of {path}, as its archive says, found "
            f"a shape {list(shape)} of {claimed}"
        )
    return shape


# What rebuilds a tensor, a dictionary that keeps its order, and a type in a saved config.
HARMLESS = re.compile(
    r"torch\._utils (_rebuild_tensor_v[23]|_rebuild_parameter)"
    r"|collections OrderedDict"
    r"|torch (\w+Storage|device|float32|float64|float16|bfloat16|float8_\w+|Size)"
    r"|torch\.storage UntypedStorage"
)
STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8"}
UNREADABLE_CALLS = {"INST", "OBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def _pickled_names(path: Path, archive: zipfile.ZipFile, pickle: zipfile.ZipInfo) -> list[str]:
    """Return every string in a pickle, each once, in order; nothing in it may call what harms."""
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
    names: dict[str, None] = {}
    for opcode, argument, _ in pickletools.genops(archive.read(pickle)):
        called = ""
        if opcode.name in STRINGS:
            names[str(argument)] = None
        elif opcode.name in UNREADABLE_CALLS:
            called = opcode.name
        elif opcode.name == "GLOBAL" and HARMLESS.fullmatch(str(argument)) is None:
            called = str(argument).replace(" ", ".")
        if called:
            raise InputError(
                f"expected a pickle of tensors and plain values in {path}, found one that calls "
                f"{called[:80]!r}; it was not run: do not trust this file, or save it again as "
                "safetensors"
            )
    return list(names)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that is not too large and has no name twice."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise InputError(
            f"expected a config of at most {readable(LARGEST_JSON)} in {path}, found "
            f"{readable(size)}; is it another kind of file?"
        )
    return parse_object(path.read_bytes(), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the object that `data` is JSON of; `where` names it in a sentence."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        why = error if isinstance(error, ValueError) else "brackets nested too deeply"
        raise InputError(f"expected JSON in {where}, found something else ({why})") from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {where}, found a {type(value).__name__}")
    return value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def load_values(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the named entries of a file that are there: tensors, in a pickle plain values too.

    InputError if the file is damaged, or would execute code or take memory beyond its size.
    """
    held = contents_of(path)
    assert held is not None  # callers have recognised it
    read = {"safetensors": _load_safetensors, "npz": _load_npz, "pickle": _load_pickle}[held.kind]
    try:
        return read(path, set(names))
    except InputError:
        raise
    except Exception as error:
        # What a damaged file makes the libraries' readers raise is not listed anywhere.
        why = str(error).partition("\n")[0][:120]
        raise InputError(
            f"expected whole tensors in {path}, found damage ({why}); copy the file again"
        ) from None


def _load_safetensors(path: Path, wanted: set[str]) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(wanted & set(file.keys()))}


def _load_npz(path: Path, wanted: set[str]) -> dict[str, Any]:
    import torch

    # Never more than the archive's directory says, with which each header was found to agree.
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in sorted(wanted & set(archive.files))}
    return {
        name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=False))
        for name, array in arrays.items()
    }


def _load_pickle(path: Path, wanted: set[str]) -> dict[str, Any]:
    import torch

    # Mapped: an optimiser's state beside the weights is never read. weights_only: torch's reader
    # builds tensors and plain values and calls nothing else.
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    outer = value if isinstance(value, dict) else {}
    # dictionary_learning nests the weights within the state of an unfinished training.
    for entries in (outer, *(inner for inner in outer.values() if isinstance(inner, dict))):
        if found := {name: entries[name] for name in wanted & entries.keys()}:
            return {
                name: _detached(path, name, entry) if isinstance(entry, torch.Tensor) else entry
                for name, entry in found.items()
            }
    return {}


def _detached(path: Path, name: str, tensor: Any) -> Any:
    """Return a tensor if the file stores every number of it."""
    plain = str(tensor.layout) == "torch.strided" and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"expected as many numbers as its shape {list(tensor.shape)} says for {name!r} in "
            f"{path}, found fewer; do not trust this file"
        )
    return tensor.detach()
