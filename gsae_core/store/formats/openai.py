"""OpenAI's sparse_autoencoder: a pickled state dict that names its activation function."""

from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts
from gsae_core.store.formats.values import mapping, one_of, whole


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    activation = str(config.get("activation", "ReLU"))
    if activation not in ("ReLU", "TopK"):
        raise InputError(
            f"expected the activation ReLU or TopK in {found.weights}, found {activation[:40]!r}"
        )
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["pre_bias"],
    }
    if activation == "TopK":
        return _topk(found, weights, mapping(config, "activation_state_dict"))
    parts = Parts("relu", weights, centred=True)
    parts.assumed.append(
        "Takes raw activations: nothing in the file says so, but the library normalises for TopK "
        "alone."
    )
    if "activation" not in config:
        parts.assumed.append("The file names no activation function: ReLU, the library's default.")
    return parts


def _topk(found: Found, weights: dict[str, Tensor], settings: dict[str, Any]) -> Parts:
    one_of(settings, "postact_fn", {None: "relu", "ReLU": "relu"}, found.weights)
    k = whole(settings.get("k"))
    parts = Parts("topk", weights, centred=True, k=k, input_norm="layer_norm")
    parts.sparsity = None if k is None else float(k)
    parts.assumed.append(
        "The library normalises for TopK, and for TopK alone; nothing in the file says so."
    )
    if "postact_fn" not in settings:
        parts.assumed.append("The file does not say what follows the choice of k: ReLU.")
    return parts
