"""SAELens, 6 and older: `cfg.json` and safetensors; some are unfolded, some folded wrongly."""

import math
from typing import Any, get_args

import torch
from torch import Tensor

from gsae_core.checkpoints.formats.detect import look, read_object
from gsae_core.checkpoints.formats.found import Found, claimed_l0
from gsae_core.checkpoints.formats.parts import (
    BIASES,
    Parts,
    Whitening,
    as_float32,
    load_values,
    mapping,
    number,
    one_of,
    whole,
)
from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.sae.base import InputNorm

SCALER = "activation_scaler.json"
MEAN_NORM = "expected_average_only_in"
WHITENER = "activation_whitening.safetensors"
WHITENING = "covariance_whitening"

SAE_LENS_NEEDED = "its architecture and its input normalisation"
ARCHITECTURES: dict[Any, Architecture] = {
    None: "relu",
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
}
SAE_LENS_ACTIVATIONS = {None: "relu", "relu": "relu", "topk": "topk"}


def read_sae_lens(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    legacy = found.format == "sae_lens_legacy"
    architecture: Architecture = one_of(config, "architecture", ARCHITECTURES, path)
    arguments = mapping(config, "activation_fn_kwargs")
    key = "activation_fn_str" if "activation_fn_str" in config else "activation_fn"
    if one_of(config, key, SAE_LENS_ACTIVATIONS, path) == "topk":
        # 5 and older: a standard SAE whose activation function is TopK.
        architecture = "topk"
    metadata = mapping(config, "metadata")
    parts = Parts(
        architecture,
        dict(tensors),
        centred=bool(config.get("apply_b_dec_to_input", True)),
        k=whole(config.get("k", arguments.get("k"))),
        latents_by_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
        l0=number(metadata, "l0"),
        sparsity=number(config, "l1_coefficient")
        or number(mapping(metadata, "training_architecture_details"), "l1_coefficient"),
    )
    _normalise_(parts, found, config)
    if parts.centred and "apply_b_dec_to_input" not in config:
        parts.assumed.append("The config does not say so: the encoder reads x - b_dec.")
    if architecture == "topk":
        parts.sparsity = float(parts.k) if parts.k is not None else None
    if parts.scale != 1.0:
        parts.assumed.append(
            f"A checkpoint from the middle of training: its scale of {parts.scale:.6g} lay beside "
            f"it in {SCALER} and is folded into the weights."
        )
    _take_scaling_factor_(parts, bool(config.get("finetuning_scaling_factor")), found)
    if legacy and architecture == "gated":
        _refuse_if_folded_wrongly(tensors, config, found)
    parts.tensors = {
        name: tensor
        for name, tensor in parts.tensors.items()
        if name in ("W_enc", "W_dec", "b_dec", *BIASES[architecture])
    }
    return parts


def _normalise_(parts: Parts, found: Found, config: dict[str, Any]) -> None:
    """Say what activations go through first: nothing, where it is folded into the weights."""
    said = config.get("normalize_activations")
    # 5 and older wrote a bool: true is scaling by the mean norm.
    said = {None: "none", False: "none", True: MEAN_NORM}.get(said, said)
    beside = found.weights.with_name(SCALER)
    scaler = read_object(beside) if beside.is_file() else {}
    factor = number(scaler, "scaling_factor")
    if said not in ("none", MEAN_NORM, WHITENING, *get_args(InputNorm)):
        known = ", ".join(("none", MEAN_NORM, WHITENING, *get_args(InputNorm)))
        raise InputError(
            f"expected normalize_activations to be one of {known} for {found.weights}, found "
            f"{str(said)[:40]!r}; export its folded form, if it has one"
        )
    if (said == WHITENING) != bool(scaler.get("has_whitening")):
        raise InputError(
            f"expected has_whitening in {SCALER} beside {found.weights} where "
            f"normalize_activations is {WHITENING!r} and only there, found "
            f"{scaler.get('has_whitening')!r} and {said!r}; copy the whole checkpoint again"
        )
    if (said == MEAN_NORM) != (factor is not None):
        beside_it = f"{SCALER} of {factor:g}" if factor is not None else f"no {SCALER}"
        raise InputError(
            f"expected normalize_activations and {SCALER} to agree beside {found.weights}, found "
            f"{said!r} and {beside_it}; the scale of its activations is not known"
        )
    parts.scale = factor or 1.0
    parts.input_norm = next((norm for norm in get_args(InputNorm) if norm == said), None)
    if said == WHITENING:
        parts.whitening = _whitening(found, d_in=parts.tensors["b_dec"].numel())
        parts.assumed.append(
            f"A checkpoint from the middle of training: the whitening in {WHITENER} is folded into "
            "the weights."
        )


def _whitening(found: Found, *, d_in: int) -> Whitening:
    path = found.weights.with_name(WHITENER)
    shapes = {"mean": [d_in], "matrix": [d_in, d_in], "inverse_matrix": [d_in, d_in]}
    held = look(path) if path.is_file() else None
    readable = held is not None and held.kind == "safetensors"
    tensors = load_values(path, shapes) if readable else {}
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
        there = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items()))
        raise InputError(
            f"expected mean, matrix and inverse_matrix for {d_in} activations in {path}, found "
            f"{there or 'none'}; copy the whole checkpoint again"
        )
    as_float32(tensors, path)  # refuses what is not a finite number
    return Whitening(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])


def _take_scaling_factor_(parts: Parts, used: bool, found: Found) -> None:
    """Fold a factor for each latent, learnt after training, into its direction."""
    factors = parts.tensors.pop("scaling_factor", None)
    if factors is None or bool((factors == 1).all()):
        return
    if not used:
        raise InputError(
            f"expected finetuning_scaling_factor to be true for the scaling_factor in "
            f"{found.weights}, found it false or missing; whether it applies is not known"
        )
    if factors.shape != parts.tensors["W_dec"].shape[:1]:
        raise InputError(
            f"expected a scaling_factor for each latent in {found.weights}, found shape "
            f"{list(factors.shape)}"
        )
    parts.tensors["W_dec"] = parts.tensors["W_dec"] * factors[:, None]
    parts.assumed.append(
        "A factor for each latent, learnt after training, is folded into its direction; latents "
        "are those before it."
    )


def _refuse_if_folded_wrongly(
    tensors: dict[str, Tensor], config: dict[str, Any], found: Found
) -> None:
    """Refuse a Gated SAE of 5 or older whose decoder norms were folded before it was saved.

    Folding there multiplied r_mag, a logarithm, by the norms, which are one afterwards and lost.
    Where r_mag is zero that did nothing, and where norms were one in training as well.
    """
    norms = tensors["W_dec"].norm(dim=-1)
    folded = bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4))
    if folded and bool((tensors["r_mag"] != 0).any()) and not config.get("normalize_sae_decoder"):
        raise InputError(
            f"expected r_mag as it was trained in {found.weights}, found a Gated SAE of SAELens 5 "
            "or older with unit norms, whose folding multiplied r_mag by the norms and lost them; "
            "use the file from before fold_W_dec_norm, or set normalize_sae_decoder to true in its "
            "config if it was trained at unit norm"
        )


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


def read_dictionary_learning(
    found: Found, tensors: dict[str, Tensor], config: dict[str, Any]
) -> Parts:
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
    parts = read_dictionary_learning(
        found, {_BENCH.get(name, name): t for name, t in tensors.items()}, config
    )
    parts.assumed[-1] = "Takes raw activations, as all of SAEBench's do."
    return parts


_BENCH = {"b_mag": "mag_bias"}


def read_gemma_scope(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
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


def read_openai(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
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


BATCH_TOPK_NEEDED = "its sae_type"
BATCH_TOPK_KINDS = {
    "vanilla": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "batchtopk",
}


def read_batch_topk(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    kind = one_of(config, "sae_type", BATCH_TOPK_KINDS, path)
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


SPARSIFY_NEEDED = "its k"
SPARSIFY_ACTIVATIONS = {None: "topk", "topk": "topk"}


def read_sparsify(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in tensors:
        raise InputError(
            f"expected an SAE in {found.weights}, found a transcoder, which writes other "
            "activations than it reads; train an SAE on either side instead"
        )
    if config.get("signed"):
        raise InputError(f"expected latents of at least zero in {path}, found signed ones")
    one_of(config, "activation", SPARSIFY_ACTIVATIONS, path)
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
