"""Gemma Scope: JumpReLU SAEs, 1 as npz without a config, 2 as safetensors with one."""

import math
from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts
from gsae_core.store.formats.places import claimed_l0
from gsae_core.store.formats.values import mapping, number, one_of


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    """Read either release: names are in upper case in one and lower in the other."""
    spelled = {"w_enc": "W_enc", "w_dec": "W_dec"}
    ours = {spelled.get(name, name): tensor for name, tensor in tensors.items()}
    if "affine_skip_connection" in ours or config.get("hf_hook_point_out"):
        raise InputError(
            f"expected an SAE in {found.weights}, found a transcoder, which writes other "
            "activations than it reads; take the release's SAEs (res, mlp or att)"
        )
    if ours["W_dec"].ndim == 3:
        raise InputError(
            f"expected an SAE in {found.weights}, found a cross-layer transcoder, whose decoder "
            "has an axis of layers"
        )
    if "architecture" in config:
        one_of(config, "architecture", {"jump_relu": "jumprelu"}, found.config or found.weights)
    factors = ours.pop("scaling_factor", None)
    if factors is not None and bool((factors != 1).any()):
        raise InputError(
            f"expected a scaling_factor of ones in {found.weights}, found others, which the "
            "release does not explain"
        )
    parts = Parts("jumprelu", ours, centred=False, l0=claimed_l0(found.weights))
    parts.assumed.append("Takes raw activations: the release has folded its normalisation.")
    if found.format == "gemma_scope" and "embedding" in found.weights.absolute().parts:
        # Trained on embeddings divided by sqrt(d_model), where the model multiplies by it.
        root = math.sqrt(ours["W_dec"].shape[-1])
        ours["W_enc"], ours["W_dec"] = ours["W_enc"] / root, ours["W_dec"] * root
        parts.assumed.append("An SAE of the embeddings: its weights are scaled by sqrt(d_in).")
    return parts


def read_llama_scope(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    """Read Llama Scope: one threshold, in units in which E|x| = sqrt(d_in)."""
    path = found.config or found.weights
    threshold = config.get("jump_relu_threshold")
    mean_norm = number(mapping(config, "dataset_average_activation_norm"), "in")
    if mean_norm is None or not isinstance(threshold, int | float):
        raise InputError(
            f"expected jump_relu_threshold and dataset_average_activation_norm in {path}, found "
            f"{', '.join(config)}"
        )
    decoder = tensors["decoder.weight"].T
    parts = Parts(
        "jumprelu",
        {
            "W_enc": tensors["encoder.weight"].T,
            "W_dec": decoder,
            "b_enc": tensors["encoder.bias"],
            "b_dec": tensors["decoder.bias"],
            "threshold": decoder.new_tensor(float(threshold)),
        },
        centred=False,
        scale=math.sqrt(decoder.shape[-1]) / mean_norm,
    )
    parts.assumed.append(
        f"Trained on activations scaled by {parts.scale:.6g} to a mean norm of sqrt(d_in); folded "
        "into the weights, so that latents keep the release's units."
    )
    return parts
