"""An SAE in no library's words: weights as ours are laid out, and the four ways files differ.

    input centred or not        x @ W + b = (x - b_dec) @ W + (b + b_dec @ W)
    input scaled by s or not    f(s x) with W s, and x_hat / s with W_dec / s and b_dec / s
    input whitened or not       f((x - m) M) with M @ W, and x_hat M^-1 + m likewise
    latents scaled on the way   (c f) @ W_dec = f @ (c W_dec)

Each is the same function in other numbers, so an SAE reads as well here as where it comes from. A
file whose library normalises token by token stays so: no other numbers would do the same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.input_norm import InputNorm
from gsae_core.store.checkpoint import centre_input_, shift_input_, take_norms_into_encoder_

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
