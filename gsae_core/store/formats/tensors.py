"""Tensors out of a file that was looked into: only those asked for, in float32 on the CPU."""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.containers import BROKEN_ZIP, look, npy_header

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_values(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the named entries of a file that are there: tensors, in a pickle plain values too.

    Raises:
        InputError: if the file is damaged, or would execute code or take memory beyond its size.
    """
    held = look(path)
    assert held is not None  # callers have recognised it
    wanted = set(names)
    read = {"safetensors": _safetensors, "npz": _npz, "pickle": _pickle}[held.kind]
    return read(path, wanted)


def _safetensors(path: Path, wanted: set[str]) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(wanted & set(file.keys()))}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"expected whole safetensors in {path}, found damage ({str(error)[:120]}); copy the "
            "file again"
        ) from None


def _npz(path: Path, wanted: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in wanted:
                    with archive.open(entry) as file:
                        shape, columns_first, dtype = npy_header(path, entry, file)
                        # As many bytes as the archive's directory says, however long it unpacks.
                        data = file.read(math.prod(shape) * dtype.itemsize)
                    array = np.frombuffer(bytearray(data), dtype)
                    array = array.reshape(shape, order="F" if columns_first else "C")
                    array = array.astype(dtype.newbyteorder("="), order="C", copy=False)
                    found[name] = torch.from_numpy(array)
    except InputError:
        raise
    except (*BROKEN_ZIP, OSError, TypeError) as error:
        raise InputError(_damaged(path, error)) from None
    return found


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"expected whole arrays in {path}, found damage ({str(error)[:120]}); copy the file again"
    )


def _pickle(path: Path, wanted: set[str]) -> dict[str, Any]:
    try:
        # Mapped: an optimiser's state beside the weights is never read. weights_only: torch's
        # reader builds tensors and plain values and calls nothing else.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # What a damaged pickle makes torch's reader raise is not listed anywhere.
        raise InputError(_not_tensors(path, error)) from None
    found: dict[str, Any] = {}
    for entries in _levels(value):
        for name in wanted & entries.keys():
            entry = entries[name]
            if isinstance(entry, Tensor):
                _check_plain(path, name, entry)
                entry = entry.detach()
            found[name] = entry
        if found:
            break
    return found


def _not_tensors(path: Path, error: Exception) -> str:
    first = str(error).partition("\n")[0][:120]
    return f"expected tensors in {path}, found what torch cannot read ({first}); copy it again"


def _levels(value: Any) -> Iterable[dict[str, Any]]:
    """Yield a pickle's dictionary and those it holds: dictionary_learning nests one in mid-run."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            if isinstance(inner, dict):
                yield inner


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is larger than what the file stores of it."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"expected as many numbers as its shape {list(tensor.shape)} says for {name!r} in "
            f"{path}, found fewer; do not trust this file"
        )


def as_float32(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return floating-point tensors in float32.

    Raises:
        InputError: if one holds no floating-point numbers, or a NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"expected floating-point numbers in {name!r} of {path}, found {tensor.dtype}"
            )
        # A sum is NaN or infinite where an entry is, and takes no memory of the tensor's size.
        if not math.isfinite(tensor.sum(dtype=torch.float64)):
            raise InputError(
                f"expected finite numbers in {name!r} of {path}, found a NaN or an infinity; the "
                "SAE did not survive its training or its copying"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}
