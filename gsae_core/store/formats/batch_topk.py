"""The BatchTopK repository: `sae.pt` and a `config.json` that says which of its four SAEs it is."""

from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts
from gsae_core.store.formats.values import number, one_of, whole

NEEDED = "its sae_type"
KINDS = {"vanilla": "relu", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "batchtopk"}


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    kind = one_of(config, "sae_type", KINDS, path)
    if kind == "batchtopk":
        raise InputError(
            f"expected an SAE whose latents depend on one token in {found.weights}, found a "
            "BatchTopK SAE without a threshold, whose latents depend on the batch they are in; set "
            "a threshold and save it as JumpReLU"
        )
    ours = dict(tensors)
    log_threshold = ours.pop("jumprelu.log_threshold", None)
    k = whole(config.get("top_k")) if kind == "topk" else None
    sparsity = float(k) if k is not None else number(config, "l1_coeff")
    parts = Parts(kind, ours, centred=kind != "jumprelu", k=k, sparsity=sparsity)
    if config.get("input_unit_norm") not in (False, None, "False"):
        # Despite its name: less the mean, over the deviation.
        parts.input_norm = "layer_norm"
    if kind == "jumprelu":
        if log_threshold is None:
            raise InputError(
                f"expected jumprelu.log_threshold in {found.weights}, as its config says, found "
                f"{', '.join(sorted(tensors))}"
            )
        ours["threshold"] = log_threshold.exp()
    if kind == "topk":
        # In the file, and unused by the code that trained it.
        ours["b_enc"] = ours["b_enc"] * 0
        parts.assumed.append("The file's b_enc is left out, as its library leaves it out of TopK.")
    return parts
