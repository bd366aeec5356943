"""sparsify: TopK over ReLU, one folder for each module, `cfg.json` and safetensors."""

from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts
from gsae_core.store.formats.values import one_of, whole

NEEDED = "its k"
ACTIVATIONS = {None: "topk", "topk": "topk"}


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in tensors:
        raise InputError(
            f"expected an SAE in {found.weights}, found a transcoder, which writes other "
            "activations than it reads; train an SAE on either side instead"
        )
    if config.get("signed"):
        raise InputError(f"expected latents of at least zero in {path}, found signed ones")
    one_of(config, "activation", ACTIVATIONS, path)
    k = whole(config.get("k"))
    # num_latents is 0 where the width is a multiple of d_in, and W_dec is (latents, d_in) already.
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    assumed = [
        "Takes raw activations, less b_dec.",
        "The k largest of relu(z) are those of the k largest z.",
    ]
    sparsity = None if k is None else float(k)
    return Parts("topk", weights, centred=True, k=k, assumed=assumed, sparsity=sparsity)
