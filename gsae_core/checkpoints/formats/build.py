"""Weights, and how a file means them -> an SAE of ours that computes the same.

    input centred or not        x @ W + b = (x - b_dec) @ W + (b + b_dec @ W)
    input scaled by s or not    f(s x) with W s, and x_hat / s with W_dec / s and b_dec / s
    input whitened or not       f((x - m) M) with M @ W, and x_hat M^-1 + m likewise
    latents scaled on the way   (c f) @ W_dec = f @ (c W_dec)

A file whose library normalises token by token stays so: no other numbers would do the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import Architecture, SAESpec, validated
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, build_sae
from gsae_core.sae.base import SAE, InputNorm
from gsae_core.sae.jumprelu import JumpReluSAE

Tensors = dict[str, Tensor]
Config = dict[str, Any]

BIASES: dict[Architecture, tuple[str, ...]] = {
    "gated": ("b_gate", "b_mag", "r_mag"),
    "relu": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
}
SETTINGS: dict[Architecture, tuple[str, ...]] = {
    "gated": ("recipe", "tie", "aux", "detach_b_dec"),
    "relu": ("recipe",),
    "jumprelu": ("init_threshold", "bandwidth", "threshold_unit"),
    "topk": ("k_aux",),
}
"""What SAELens has no key for, and training would go on with: in `metadata` of our own files."""


@dataclass
class Weights:
    """What a file holds, and how it means it."""

    architecture: Architecture
    # `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_in), `b_dec`, and the `BIASES` of the architecture;
    # `threshold` may be one number for all latents.
    tensors: Tensors
    centred: bool  # whether the file's encoder reads x - b_dec
    k: int | None = None  # latents a token may have, or had in training; it is the sparsity then
    scale: float = 1.0  # what activations are multiplied by before they reach the file's encoder
    input_norm: InputNorm | None = None  # how the library normalises each token, before all else
    whitening: Tensors | None = None  # x -> (x - mean) @ matrix comes first, as SAELens names them
    latents_by_norm: bool = False  # whether TopK ranks and reports |f_i d_i| in place of f_i
    assumed: list[str] = field(default_factory=list)
    sparsity: float | None = None
    l0: float | None = None
    settings: Config = field(default_factory=dict)  # the `SETTINGS` that the file states


@torch.no_grad()
def build(weights: Weights, path: Path, *, fold_decoder_norms: bool = False) -> SAE:
    """Return the SAE that computes what the file's own library computes, on raw activations.

    With `fold_decoder_norms` its latents are those that SAELens' `fold_W_dec_norm` gives.
    """
    tensors = _checked(weights, path)
    if weights.scale != 1.0:
        # As SAELens folds it: latents keep the numbers they have in the file's own units.
        tensors["W_enc"] = tensors["W_enc"] * weights.scale
        tensors["W_dec"] = tensors["W_dec"] / weights.scale
        tensors["b_dec"] = tensors["b_dec"] / weights.scale
    if weights.input_norm is not None:
        weights.assumed.append(
            f"Takes raw activations and normalises each token itself ({weights.input_norm}), which "
            "is undone on its reconstruction; latents count in normalised units."
        )
    if not weights.centred:
        _shift_input_(tensors, tensors["b_dec"])
        weights.assumed.append(
            "The encoder reads x, not x - b_dec; b_dec @ W_enc is added to the encoder's bias, "
            "which is the same function."
        )
    if weights.latents_by_norm and weights.architecture == "topk":
        # With directions of length one, |f_i d_i| is f_i.
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        weights.assumed.append("Latents compete by size times the norm of their direction; folded.")
    if weights.whitening is not None:
        _fold_whitening_(tensors, **weights.whitening)
    if fold_decoder_norms:
        _fold_norms_(weights, tensors, path)
    return _filled(weights, tensors)


def _fold_norms_(weights: Weights, tensors: Tensors, path: Path) -> None:
    """Give each latent f_i the size |d_i| f_i, and its direction d_i the length one."""
    # A direction of nothing stays one, at SAELens' least norm.
    norms = tensors["W_dec"].norm(dim=1).clamp(min=1e-8)
    if weights.architecture == "topk" and bool((norms - 1).abs().max() > 1e-4):
        raise InputError(
            f"expected decoder norms of one, or latents that compete by them, to fold into the "
            f"TopK SAE in {path}, found norms from {norms.min():.3g} to {norms.max():.3g}: other "
            "latents would be the k largest; read it without folding"
        )
    for name in {"W_enc", "W_mag", "b_enc", "b_gate", "b_mag", "threshold"} & tensors.keys():
        tensors[name] = tensors[name] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    weights.assumed.append(
        "Decoder norms are folded into the latents, as by SAELens' fold_W_dec_norm: directions "
        "have length one, reconstructions are the same."
    )


def _shift_input_(tensors: Tensors, by: Float[Tensor, " d_in"]) -> None:
    """Make the encoder read its input plus `by`: (x + by) @ W + b = x @ W + (b + by @ W)."""
    shift = by @ tensors["W_enc"]
    if "b_enc" in tensors:
        tensors["b_enc"] = tensors["b_enc"] + shift
        return
    mag = by @ tensors["W_mag"] if "W_mag" in tensors else shift * tensors["r_mag"].exp()
    tensors["b_gate"], tensors["b_mag"] = tensors["b_gate"] + shift, tensors["b_mag"] + mag


def _fold_whitening_(
    tensors: Tensors, mean: Tensor, matrix: Tensor, inverse_matrix: Tensor
) -> None:
    """Turn weights for whitened activations into the same for raw `x`.

    In double precision, and right also where the inverse is only nearly one: biases take what
    b_dec loses on its way out and in again.
    """
    mean, matrix, inverse = mean.double(), matrix.double(), inverse_matrix.double()
    b_dec = tensors["b_dec"].double() @ inverse
    _shift_input_(tensors, (b_dec @ matrix - tensors["b_dec"]).float())
    tensors["W_enc"] = (matrix @ tensors["W_enc"].double()).float()
    tensors["W_dec"] = (tensors["W_dec"].double() @ inverse).float()
    tensors["b_dec"] = (b_dec + mean).float()


def _filled(weights: Weights, tensors: Tensors) -> SAE:
    """Return the SAE of tensors that are right for raw activations."""
    d_sae, d_in = tensors["W_dec"].shape
    architecture, settings = weights.architecture, weights.settings
    own = {name: settings[name] for name in SETTINGS[architecture] if name in settings}
    if architecture in ("gated", "relu"):
        # Its norms tell how to go on training it, where the file does not.
        unit = bool((tensors["W_dec"].norm(dim=1) - 1).abs().max() < 1e-4)
        own["recipe"] = own.get("recipe") or ("P" if unit else "A")
    if "bandwidth" in own:
        # Earlier versions wrote both in the units of x, and had no unit.
        own.setdefault("threshold_unit", 1.0)
    k = weights.k if architecture == "topk" else None
    shape = {"name": "read", "architecture": architecture, "d_sae": d_sae, "sparsity": k}
    sae = build_sae(validated(SAESpec, shape | own), d_in)
    if isinstance(sae, GatedSAE):
        tensors["W_gate"] = tensors.pop("W_enc")
        if sae.tie == "none":
            del tensors["r_mag"]
    if isinstance(sae, JumpReluSAE):
        # SAELens takes relu(z) where z > threshold, so one below zero does what zero does.
        tensors["threshold"] = tensors["threshold"].clamp(min=0)
    sae.load_state_dict(tensors)
    sae.input_norm = weights.input_norm
    return sae


def _checked(weights: Weights, path: Path) -> Tensors:
    """Return the tensors of the architecture; InputError if shapes do not agree on its widths."""
    tensors = dict(weights.tensors)
    d_sae, d_in = tensors["W_dec"].shape
    threshold = tensors.get("threshold")
    if weights.architecture == "jumprelu" and threshold is not None and threshold.ndim == 0:
        tensors["threshold"] = threshold.expand(d_sae)
        weights.assumed.append("One threshold serves every latent.")
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    expected |= {name: [d_sae] for name in BIASES[weights.architecture]}
    if weights.settings.get("tie") == "untied":
        expected["W_mag"] = [d_in, d_sae]
        expected.pop("r_mag", None)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if not expected.items() <= found.items():
        raise InputError(
            f"expected tensors {_listed(expected)} in {path} for a {weights.architecture} SAE, as "
            f"its decoder asks, found {_listed(found)}"
        )
    if weights.architecture == "topk" and not 1 <= (weights.k or 0) <= d_sae:
        raise InputError(
            f"expected a k from 1 to d_sae={d_sae} for the TopK SAE in {path}, found "
            f"{str(weights.k)[:40]}"
        )
    return {name: tensors[name] for name in expected}


def _listed(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"
