"""An SAE in no library's words: weights as ours are laid out, and the four ways files differ.

    input centred or not        x @ W + b = (x - b_dec) @ W + (b + b_dec @ W)
    input scaled by s or not    f(s x) with W s, and x_hat / s with W_dec / s and b_dec / s
    input whitened or not       f((x - m) M) with M @ W, and x_hat M^-1 + m likewise
    latents scaled on the way   (c f) @ W_dec = f @ (c W_dec)

Each is the same function in other numbers, so an SAE reads as well here as where it comes from. A
file whose library normalises token by token stays so: no other numbers would do the same.
"""

import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gsae_core.checkpoints.checkpoint import centre_input_, shift_input_, take_norms_into_encoder_
from gsae_core.checkpoints.formats.detect import BROKEN_ZIP, look, npy_header
from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, InputNorm

BIASES: dict[Architecture, tuple[str, ...]] = {
    "gated": ("b_gate", "b_mag", "r_mag"),
    "relu": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
}


class Whitening(NamedTuple):
    """What a file's encoder reads in place of x, (x - mean) @ matrix, and what leads back."""

    mean: Float[Tensor, " d_in"]
    matrix: Float[Tensor, "d_in d_in"]
    inverse: Float[Tensor, "d_in d_in"]
    """Back by z @ inverse + mean."""


@dataclass
class Parts:
    """What a reader found, and how the file means it."""

    architecture: Architecture
    tensors: dict[str, Tensor]
    """`W_enc` (d_in, d_sae), `W_dec` (d_sae, d_in), `b_dec`, and the `BIASES` of the architecture;
    `threshold` may be one number for all latents."""

    centred: bool
    """Whether the file's encoder reads x - b_dec."""

    k: int | None = None
    scale: float = 1.0
    """What activations are multiplied by before they reach the file's encoder."""

    input_norm: InputNorm | None = None
    """How the library normalises each token, before all else."""

    whitening: Whitening | None = None
    """An affine map that activations go through before they reach the file's encoder."""

    latents_by_norm: bool = False
    """Whether TopK ranks and reports latents times the norms of their directions."""

    assumed: list[str] = field(default_factory=list)
    sparsity: float | None = None
    l0: float | None = None


@torch.no_grad()
def build(parts: Parts, path: Path) -> SAE:
    """Return the SAE that computes what the file's own library computes, on raw activations.

    Raises:
        InputError: if shapes do not agree with each other.
    """
    tensors, d_in, d_sae = _checked(parts, path)
    if parts.scale != 1.0:
        # As SAELens folds it: latents keep the numbers they have in the file's own units.
        tensors["W_enc"] = tensors["W_enc"] * parts.scale
        tensors["W_dec"] = tensors["W_dec"] / parts.scale
        tensors["b_dec"] = tensors["b_dec"] / parts.scale
    sae = _empty(parts, d_in, d_sae, tensors, path)
    _fill_(sae, tensors)
    sae.input_norm = parts.input_norm
    if parts.input_norm is not None:
        parts.assumed.append(
            f"Takes raw activations and normalises each token itself ({parts.input_norm}), which "
            "is undone on its reconstruction; latents count in normalised units."
        )
    if not parts.centred:
        centre_input_(sae)
        parts.assumed.append(
            "The encoder reads x, not x - b_dec; b_dec @ W_enc is added to the encoder's bias, "
            "which is the same function."
        )
    if parts.latents_by_norm and isinstance(sae, TopKSAE):
        take_norms_into_encoder_(sae)
        parts.assumed.append("Latents compete by size times the norm of their direction; folded.")
    if parts.whitening is not None:
        fold_whitening_(sae, parts.whitening)
    return sae


@torch.no_grad()
def fold_whitening_(sae: SAE, whitening: Whitening) -> None:
    """Turn an SAE of whitened activations into the same one for raw `x`, in place.

    In double precision, and right also where `inverse` is the inverse but nearly: biases take what
    b_dec loses on its way out and in again.
    """
    mean, matrix, inverse = (each.double() for each in whitening)
    b_dec = sae.b_dec.double() @ inverse
    shift_input_(sae, (b_dec @ matrix - sae.b_dec).to(sae.b_dec))
    for name, W in sae.named_parameters():
        if name in ("W_enc", "W_gate", "W_mag"):
            W.copy_(matrix @ W.double())
    sae.W_dec.copy_(sae.W_dec.double() @ inverse)
    sae.b_dec.copy_(b_dec + mean)


def _empty(parts: Parts, d_in: int, d_sae: int, tensors: dict[str, Tensor], path: Path) -> SAE:
    # A recipe says how to go on training; a file that names none has norms that tell.
    W_dec, whitening = tensors["W_dec"].double(), parts.whitening
    norms = (W_dec if whitening is None else W_dec @ whitening.inverse.double()).norm(dim=1)
    recipe = "P" if (norms - 1).abs().max() < 1e-4 else "A"
    match parts.architecture:
        case "gated":
            return GatedSAE(d_in, d_sae, recipe=recipe)
        case "relu":
            return ReluSAE(d_in, d_sae, recipe=recipe)
        case "jumprelu":
            return JumpReluSAE(d_in, d_sae)
        case "topk":
            if parts.k is None or not 1 <= parts.k <= d_sae:
                raise InputError(
                    f"expected a k from 1 to d_sae={d_sae} for the TopK SAE in {path}, found "
                    f"{parts.k}"
                )
            return TopKSAE(d_in, d_sae, k=parts.k)


def _fill_(sae: SAE, tensors: dict[str, Tensor]) -> None:
    state: dict[str, Any] = dict(tensors)
    if isinstance(sae, GatedSAE):
        state["W_gate"] = state.pop("W_enc")
    if isinstance(sae, JumpReluSAE):
        # relu(z) where z > threshold: below zero a threshold does what zero does.
        state["threshold"] = state["threshold"].clamp(min=0)
    # Contiguous copies: a transposed view of a mapped file is neither ours nor safe to write.
    sae.load_state_dict({name: tensor.clone().contiguous() for name, tensor in state.items()})


def _checked(parts: Parts, path: Path) -> tuple[dict[str, Tensor], int, int]:
    """Return the tensors with agreeing shapes, and the widths they agree on."""
    tensors = {name: tensor for name, tensor in parts.tensors.items()}
    W_dec = tensors["W_dec"]
    if W_dec.ndim != 2 or 0 in W_dec.shape:
        raise InputError(
            f"expected a decoder with an axis of latents and one of activations in {path}, found "
            f"shape {list(W_dec.shape)}"
        )
    d_sae, d_in = W_dec.shape
    if "threshold" in tensors and tensors["threshold"].ndim == 0:
        tensors["threshold"] = tensors["threshold"].expand(d_sae)
        parts.assumed.append("One threshold serves every latent.")
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    expected |= dict.fromkeys(BIASES[parts.architecture], (d_sae,))
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(
                f"expected {name} in {path} for a {parts.architecture} SAE, found "
                f"{', '.join(sorted(tensors))}"
            )
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"expected {name} of shape {list(shape)} in {path}, as its decoder of "
                f"{d_sae} latents over {d_in} activations asks, found {list(tensors[name].shape)}"
            )
    return {name: tensors[name] for name in expected}, d_in, d_sae


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


def one_of(config: Mapping[str, Any], key: str, choices: Mapping[Any, Any], path: Path) -> Any:
    """Return what `choices` has for a config's value; a missing key is None.

    Raises:
        InputError: if the value is none of the choices.
    """
    value = config.get(key)
    try:
        return choices[value]
    except (KeyError, TypeError):
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise InputError(
            f"expected {key} to be one of {known} in {path}, found {str(value)[:80]!r}; an SAE "
            "with another one computes what no SAE here can"
        ) from None


def number(config: Mapping[str, Any], *keys: str) -> float | None:
    """Return the first positive finite number under the keys; None where there is none."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        # A whole number of JSON may be longer than any float.
        if 0 < value < 1e300:
            return float(value)
    return None


def whole(value: Any) -> int | None:
    """Return a number or a tensor of one entry as an int; None for anything else."""
    try:
        # A tensor of one whole number, or the number.
        found = value.item() if hasattr(value, "item") else value
    except RuntimeError:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return int(found) if math.isfinite(found) and found == math.floor(found) else None


def mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside a config; empty where there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}
