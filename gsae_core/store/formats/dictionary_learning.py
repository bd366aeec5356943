"""dictionary_learning, and SAEBench's names for the same SAEs: a pickled state dict and a config.

Weights lie transposed, for they are `nn.Linear`s. Normalisation is folded into the biases when a
file is saved, so they all take raw activations; the factor itself is not recorded.
"""

from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts
from gsae_core.store.formats.values import mapping, number, whole

NAMES = {
    "decoder_bias": "b_dec",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "encoder.bias": "b_enc",
}
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
BY_TOKEN = {"AutoEncoderTopK", "topk"}
BY_BATCH = {"BatchTopKSAE", "MatryoshkaBatchTopKSAE", "batch_topk", "matryoshka_batch_topk"}
UNCENTRED = {"JumpReluAutoEncoder", "AutoEncoderNew"}


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    trainer = mapping(config, "trainer")
    ours = {NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    for theirs, name in TRANSPOSED.items():
        if theirs in ours:
            ours[name] = ours.pop(theirs).T
    k = whole(ours.pop("k", trainer.get("k")))
    ours.pop("group_sizes", None)
    parts = Parts("relu", ours, centred=True, sparsity=number(trainer, "l1_penalty"))
    if "b_gate" in ours:
        parts.architecture = "gated"
    elif k is not None:
        _read_topk_(parts, found, k, config)
    elif "threshold" in ours:
        parts.architecture = "jumprelu"
        parts.sparsity = number(trainer, "sparsity_penalty")
    parts.centred = found.architecture not in UNCENTRED
    parts.assumed.append(
        "Takes raw activations: the library folds its normalisation into the biases and records "
        "no factor."
    )
    return parts


def _read_topk_(parts: Parts, found: Found, k: int, config: dict[str, Any]) -> None:
    """Tell TopK, which counts within a token, from BatchTopK, which has a threshold by then.

    Both store k and a threshold, and their names are the same.
    """
    parts.k, parts.sparsity = k, float(k)
    if found.architecture in BY_TOKEN or "threshold" not in parts.tensors:
        parts.architecture = "topk"
        parts.tensors.pop("threshold", None)
        parts.assumed.append("The k largest of relu(z) are those of the k largest z.")
        return
    if found.architecture not in BY_BATCH or not config:
        raise InputError(
            f"expected a config.json beside {found.weights} that says TopK or BatchTopK, whose "
            "tensors have the same names, found none; copy it too"
        )
    parts.architecture = "jumprelu"
    parts.assumed.append(
        "BatchTopK at inference is a JumpReLU SAE with one threshold, kept while training."
    )
    if bool((parts.tensors["threshold"] < 0).any()):
        parts.assumed.append(
            "The threshold is negative: it was never set, and every positive latent fires."
        )


def read_bench(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    """Read an SAE under SAEBench's names; it centres the input."""
    parts = read(found, {_BENCH.get(name, name): t for name, t in tensors.items()}, config)
    parts.assumed[-1] = "Takes raw activations, as all of SAEBench's do."
    return parts


_BENCH = {"b_mag": "mag_bias"}
