"""Files -> an SAE of ours that computes the same, and a record of how that was known.

A function a library says what its file means; `build` turns that into our numbers.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from gsae_core.checkpoints.formats.build import Config, Tensors, Weights, build
from gsae_core.checkpoints.formats.containers import contents_of, load_values, read_object
from gsae_core.checkpoints.formats.detect import config_of, detect
from gsae_core.checkpoints.formats.libraries import (
    SIGNATURES,
    Format,
    FoundSAE,
    Provenance,
    mapping,
)
from gsae_core.checkpoints.hub import local
from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.files import sha256
from gsae_core.sae.base import SAE, InputNorm


class Foreign(NamedTuple):
    """An SAE that takes raw activations, and where it came from."""

    sae: SAE
    source: Provenance


def read_sae(path: Path | str, *, fold_decoder_norms: bool = False) -> Foreign:
    """Return the one SAE in a file or folder, or at an address on the Hub, and where it came from.

    On the CPU in float32, written by any of the libraries known here. `source.assumed` says what
    the files did not say, and every conversion.

    Args:
        path: a folder or file; text under which none lies is an address, `OWNER/NAME:PATH@REVISION`
            (`hub.local`).
        fold_decoder_norms: whether to give latents in the units of SAELens' `fold_W_dec_norm` and
            Neuronpedia: each times the norm of its direction, which has length one then.

    Raises:
        InputError: if none can be read exactly, or there are several; if norms cannot be folded
            into a TopK SAE, whose k largest latents would be others.
    """
    return read_found(detect(local(path)), fold_decoder_norms=fold_decoder_norms)


def read_found(found: FoundSAE, *, fold_decoder_norms: bool = False) -> Foreign:
    """Return the SAE that was found, its decoder norms folded if asked for, as `read_sae` has it.

    InputError if its files contradict each other, or it computes what no SAE here does.
    """
    config = config_of(found)
    files = (found.weights, found.config)
    digests = tuple((file.name, sha256(file)) for file in files if file is not None)
    if found.format == "gsae_core":
        _check_ours(found, config, digest=digests[0][1])
    tensors, values = _tensors_and_values(found)
    config |= values
    dtypes = {tensor.dtype for tensor in tensors.values()}
    with torch.no_grad():
        tensors = _in_our_names(as_float32(tensors, found.weights))
        shape = list(tensors["W_dec"].shape)
        if len(shape) != 2 or 0 in shape:
            raise InputError(
                f"expected a decoder with an axis of latents and one of activations in "
                f"{found.weights}, found shape {shape}"
                + ", as crosscoders and cross-layer transcoders (CLTs) have"
                * (len(shape) == 3)
            )
        weights = READERS[found.format](found, tensors, config)
        _take_scaling_factor_(weights, tensors.get("scaling_factor"), found, config)
        sae = build(weights, found.weights, fold_decoder_norms=fold_decoder_norms)
    source = Provenance(
        format=found.format,
        library=found.library,
        architecture=found.architecture,
        place=found.place,
        files=digests,
        assumed=(*weights.assumed, *_about_precision(dtypes)),
        sparsity=weights.sparsity if weights.k is None else float(weights.k),
        l0=weights.l0,
    )
    return Foreign(sae, source)


def _check_ours(found: FoundSAE, config: Config, *, digest: str) -> None:
    """Raise InputError unless weights and config are those that were written together."""
    written = str(mapping(config, "metadata").get("weights_sha256"))
    if (written, config.get("d_in"), config.get("d_sae")) != (digest, found.d_in, found.d_sae):
        raise InputError(
            f"expected the weights that {found.config} was written with (SHA-256 "
            f"{written[:12]}...), found others in {found.weights}; copy or train it again"
        )


def _tensors_and_values(found: FoundSAE) -> tuple[Tensors, Config]:
    """Return a file's weights, and what else it holds of an SAE: counts and plain values."""
    like_sae_lens = found.format in ("gsae_core", "sae_lens_legacy")
    format_ = "sae_lens" if like_sae_lens else found.format
    signatures = [signature for signature in SIGNATURES if signature.format == format_]
    contents = contents_of(found.weights)
    names = contents.shapes if contents else ()
    known = {name for name in names if not all(s.strange([name]) for s in signatures)}
    held = load_values(found.weights, known)
    # A pickle's names were told without its values, and may be other things.
    there = {n for n, v in held.items() if isinstance(v, Tensor)}
    if not any(signature.required <= there for signature in signatures):
        raise InputError(
            f"expected the tensors of a {found.library} SAE in {found.weights}, found "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    weights = there - {"k", "group_sizes", "stats_last_nonzero"}
    tensors = {name: held[name] for name in held if name in weights}
    return tensors, {name: value for name, value in held.items() if name not in weights}


# Of every library; those of `nn.Linear`s are transposed as well.
OUR_NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "encoder_linear.weight": "W_enc",
    "decoder_linear.weight": "W_dec",
    "encoder_linear.bias": "b_enc",
    "decoder_linear.bias": "b_dec",
    "encoder.bias": "b_enc",
    "latent_bias": "b_enc",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "pre_bias": "b_dec",
    "bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


def _in_our_names(tensors: Tensors) -> Tensors:
    return {
        OUR_NAMES.get(name, name): tensor.T
        if name.endswith(".weight") and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


def _about_precision(dtypes: set[torch.dtype]) -> list[str]:
    if torch.float64 in dtypes:
        return ["Weights in float64 are rounded to float32."]
    if not dtypes - {torch.float32}:
        return []
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return [f"Weights in {kinds} are held in float32, which has them all exactly."]


SAME_K = "The k largest of relu(z) are those of the k largest z."
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOATS += (torch.float8_e4m3fn, torch.float8_e5m2)
# What a config may say of a switch.
SWITCH: dict[Any, bool] = {None: False, True: True, False: False}


def as_float32(tensors: Tensors, path: Path) -> Tensors:
    """Return tensors in float32; InputError if one holds no finite floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"expected floating-point numbers in {name!r} of {path}, found {tensor.dtype}"
            )
        if tensor.itemsize == 1:  # torch has no least and largest of such
            tensor = tensor.float()
        # Both are NaN where an entry is, and take no memory of the tensor's size.
        if tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            raise InputError(
                f"expected finite numbers in {name!r} of {path}, found a NaN or an infinity; the "
                "SAE did not survive its training or its copying"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}


def one_of(config: Mapping[str, Any], key: str, choices: Mapping[Any, Any], path: Path) -> Any:
    """Return what `choices` has for a config's value; a missing key is None."""
    value = config.get(key)
    try:
        return choices[value]
    except (KeyError, TypeError):
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise InputError(
            f"expected {key} to be one of {known} in {path}, found {str(value)[:80]!r}; an SAE "
            "with another one computes what no SAE here can"
        ) from None


def number(config: Mapping[str, Any], key: str) -> float | None:
    """Return the positive finite number under a key; None where there is none."""
    value: Any = config.get(key)
    # Neither a bool, which is an int to Python, nor a whole number longer than any float.
    return float(value) if type(value) in (int, float) and 0 < value < 1e300 else None


def whole(value: Any) -> int | None:
    """Return a whole number, or a tensor of one, as an int; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int else None


# SAELens, 6 and older: some files are not folded, and some are folded wrongly.

SCALER = "activation_scaler.json"
MEAN_NORM = "expected_average_only_in"
WHITENER = "activation_whitening.safetensors"
WHITENING = "covariance_whitening"
MID_TRAINING = "A checkpoint from the middle of training: "

# What SAELens' loader cannot build: ours alone.
UNTIED = "gated_untied"
ARCHITECTURES: dict[Any, Architecture] = {
    "gated": "gated",
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    UNTIED: "gated",
    None: "relu",
}


def _read_sae_lens(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read our own files too, whose layout it is."""
    path = found.config or found.weights
    architecture: Architecture = one_of(config, "architecture", ARCHITECTURES, path)
    key = "activation_fn_str" if "activation_fn_str" in config else "activation_fn"
    if one_of(config, key, {None: "relu", "relu": "relu", "topk": "topk"}, path) == "topk":
        # 5 and older: a standard SAE whose activation function is TopK.
        architecture = "topk"
    one_of(config, "reshape_activations", dict.fromkeys((None, "none", "hook_z")), path)
    metadata = mapping(config, "metadata")
    untied = {"tie": "untied"} if config.get("architecture") == UNTIED else {}
    if "log_threshold" in tensors:
        tensors = tensors | {"threshold": tensors["log_threshold"].exp()}
    weights = Weights(
        architecture,
        tensors,
        centred=one_of(config, "apply_b_dec_to_input", SWITCH | {None: True}, path),
        latents_by_norm=one_of(config, "rescale_acts_by_decoder_norm", SWITCH, path),
        l0=number(metadata, "l0"),
        sparsity=number(metadata, "sparsity")
        or number(config, "l1_coefficient")
        or number(mapping(metadata, "training_architecture_details"), "l1_coefficient"),
        settings=metadata | untied,
    )
    _normalise_(weights, found, config)
    if weights.centred and "apply_b_dec_to_input" not in config:
        weights.assumed.append("The config does not say so: the encoder reads x - b_dec.")
    if architecture == "topk":
        weights.k = whole(config.get("k", mapping(config, "activation_fn_kwargs").get("k")))
    if weights.scale != 1.0:
        weights.assumed.append(
            f"{MID_TRAINING}its scale of {weights.scale:.6g} lay beside it in {SCALER} and is "
            "folded into the weights."
        )
    if found.strange:
        weights.assumed.append(
            f"Left out, for a {found.architecture} SAE of SAELens reads no such tensors: "
            f"{', '.join(name[:60] for name in found.strange[:8])}."
        )
    if found.format == "sae_lens_legacy" and architecture == "gated":
        _refuse_if_folded_wrongly(tensors, found, config)
    return weights


def _normalise_(weights: Weights, found: FoundSAE, config: Config) -> None:
    """Note what activations go through first: nothing, where it is folded into the weights."""
    norm = config.get("normalize_activations")
    # 5 and older wrote a bool: true is scaling by the mean norm.
    norm = MEAN_NORM if norm is True else norm or "none"
    known = ("none", MEAN_NORM, WHITENING, *get_args(InputNorm))
    beside = found.weights.with_name(SCALER)
    scaler = read_object(beside) if beside.is_file() else {}
    factor = number(scaler, "scaling_factor")
    lies_there = (factor is not None, bool(scaler.get("has_whitening")))
    if norm not in known or lies_there != (norm == MEAN_NORM, norm == WHITENING):
        there = f"{SCALER} with {str(scaler)[:80]}" if scaler else f"no {SCALER}"
        raise InputError(
            f"expected normalize_activations of {', '.join(known)} for {found.weights}, and "
            f"{SCALER} beside it to agree, found {str(norm)[:40]!r} and {there}; copy the whole "
            "checkpoint again, or export its folded form"
        )
    weights.scale = factor or 1.0
    weights.input_norm = next((each for each in get_args(InputNorm) if each == norm), None)
    if norm == WHITENING:
        weights.whitening = _whitening(found, d_in=weights.tensors["b_dec"].numel())
        weights.assumed.append(
            f"{MID_TRAINING}the whitening in {WHITENER} is folded into the weights."
        )


def _whitening(found: FoundSAE, *, d_in: int) -> Tensors:
    path = found.weights.with_name(WHITENER)
    shapes = {"mean": [d_in], "matrix": [d_in, d_in], "inverse_matrix": [d_in, d_in]}
    held = contents_of(path) if path.is_file() else None
    readable = held is not None and held.kind == "safetensors"
    tensors = load_values(path, shapes) if readable else {}
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
        there = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items()))
        raise InputError(
            f"expected mean, matrix and inverse_matrix for {d_in} activations in {path}, found "
            f"{there or 'none'}; copy the whole checkpoint again"
        )
    as_float32(tensors, path)  # refuses what is not a finite number
    return tensors


def _take_scaling_factor_(
    weights: Weights, factors: Tensor | None, found: FoundSAE, config: Config
) -> None:
    """Fold a factor for each latent, learnt after training, into its direction."""
    if factors is None or bool((factors == 1).all()):
        return
    if config.get("finetuning_scaling_factor") is not True:
        raise InputError(
            f"expected finetuning_scaling_factor to be true for the scaling_factor in "
            f"{found.weights}, found it false or missing; whether it applies is not known"
        )
    if factors.shape != weights.tensors["W_dec"].shape[:1]:
        raise InputError(
            f"expected a scaling_factor for each latent in {found.weights}, found shape "
            f"{list(factors.shape)}"
        )
    weights.tensors["W_dec"] = weights.tensors["W_dec"] * factors[:, None]
    weights.assumed.append(
        "A factor for each latent, learnt after training, is folded into its direction; latents "
        "are those before it."
    )


def _refuse_if_folded_wrongly(tensors: Tensors, found: FoundSAE, config: Config) -> None:
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


# dictionary_learning and SAEBench

BY_TOKEN = {"AutoEncoderTopK", "topk"}
BY_BATCH = {"BatchTopKSAE", "MatryoshkaBatchTopKSAE", "batch_topk", "matryoshka_batch_topk"}
UNCENTRED = {"JumpReluAutoEncoder", "AutoEncoderNew"}


def _read_dictionary_learning(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    trainer = mapping(config, "trainer")
    centred = found.architecture not in UNCENTRED
    weights = Weights("relu", tensors, centred=centred, sparsity=number(trainer, "l1_penalty"))
    k = whole(config.get("k", trainer.get("k")))
    if "b_gate" in tensors:
        weights.architecture = "gated"
    elif k is not None:
        weights.k = k
        _tell_topk_(weights, found)
    elif "threshold" in tensors:
        weights.architecture = "jumprelu"
        weights.sparsity = number(trainer, "sparsity_penalty")
    weights.assumed.append(
        "Takes raw activations, as all of SAEBench's do."
        if found.format == "sae_bench"
        else "Takes raw activations: the library folds its normalisation into the biases and "
        "records no factor."
    )
    return weights


def _tell_topk_(weights: Weights, found: FoundSAE) -> None:
    """Tell TopK, which counts within a token, from BatchTopK, which has a threshold by then.

    Both store k and a threshold, and their names are the same.
    """
    if found.architecture in BY_TOKEN or "threshold" not in weights.tensors:
        weights.architecture = "topk"
        weights.assumed.append(SAME_K)
        return
    if found.architecture not in BY_BATCH or found.config is None:
        raise InputError(
            f"expected a config.json beside {found.weights} that says TopK or BatchTopK, whose "
            "tensors have the same names, found none; copy it too"
        )
    weights.architecture = "jumprelu"
    weights.assumed.append(
        "BatchTopK at inference is a JumpReLU SAE with one threshold, kept while training."
    )
    if bool((weights.tensors["threshold"] < 0).any()):
        weights.assumed.append(
            "The threshold is negative: it was never set, and every positive latent fires."
        )


def _read_gemma_scope(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read either release."""
    if "architecture" in config:
        one_of(config, "architecture", {"jump_relu": "jumprelu"}, found.config or found.weights)
    stated = re.search(r"average_l0_(\d{1,6})", found.weights.as_posix())
    weights = Weights("jumprelu", tensors, centred=False, l0=float(stated[1]) if stated else None)
    weights.assumed.append("Takes raw activations: the release has folded its normalisation.")
    if found.format == "gemma_scope" and "embedding" in found.weights.absolute().parts:
        # Trained on embeddings divided by sqrt(d_model), where the model multiplies by it.
        root = math.sqrt(tensors["W_dec"].shape[-1])
        weights.tensors |= {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root}
        weights.assumed.append("An SAE of the embeddings: its weights are scaled by sqrt(d_in).")
    return weights


def _read_llama_scope(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read one threshold, in units in which E|x| = sqrt(d_in)."""
    threshold = config.get("jump_relu_threshold")
    mean_norm = number(mapping(config, "dataset_average_activation_norm"), "in")
    if mean_norm is None or not isinstance(threshold, int | float):
        raise InputError(
            "expected jump_relu_threshold and dataset_average_activation_norm in "
            f"{found.config or found.weights}, found {', '.join(config)}"
        )
    tensors = tensors | {"threshold": tensors["W_dec"].new_tensor(float(threshold))}
    return _scaled_to_the_root(Weights("jumprelu", tensors, centred=False), mean_norm)


def _scaled_to_the_root(weights: Weights, mean_norm: float) -> Weights:
    weights.scale = math.sqrt(weights.tensors["W_dec"].shape[-1]) / mean_norm
    weights.assumed.append(
        f"Trained on activations scaled by {weights.scale:.6g} to a mean norm of sqrt(d_in); "
        "folded into the weights, so that latents keep the release's units."
    )
    return weights


def _read_llama_scope_r1(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read a threshold for each latent; the mean norm of activations lies among the tensors."""
    path = found.config or found.weights
    one_of(config, "act_fn", dict.fromkeys((None, "jumprelu")), path)
    one_of(config, "apply_decoder_bias_to_pre_encoder", dict.fromkeys((None, False)), path)
    norms = {None: True, "dataset-wise": True, "inference": False}
    tensors = tensors | {"threshold": tensors["log_jumprelu_threshold"].exp()}
    weights = Weights("jumprelu", tensors, centred=False)
    unit = bool((tensors["W_dec"].norm(dim=-1) - 1).abs().max() < 1e-3)
    if config.get("sparsity_include_decoder_norm") and not unit:
        weights.assumed.append(
            "The config has thresholds count decoder norms, which are not one; they are left as "
            "they are, as SAELens' loader leaves them."
        )
    if not one_of(config, "norm_activation", norms, path):
        return weights
    keys = [f"{MEAN_NORMS}{hook}" for hook in (config["hook_point_in"], "in")]
    mean_norm = next((tensors[key] for key in keys if key in tensors), torch.tensor(0.0))
    if mean_norm.numel() != 1 or not float(mean_norm) > 0:
        raise InputError(
            f"expected the mean norm of activations, one number above 0, as {' or '.join(keys)} in "
            f"{found.weights}, found {', '.join(sorted(tensors))}; take the release's own file"
        )
    return _scaled_to_the_root(weights, float(mean_norm))


# Of lm-saes, before the name of a hook point, or `in`.
MEAN_NORMS = "dataset_average_activation_norm."


def _read_qwen_scope(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read matrices that are transposes of ours; the repository's name alone says k."""
    named = re.search(r"SAE-Res-[^/]+-W\d+K-L0_(\d{1,6})", found.weights.absolute().as_posix())
    if named is None:
        raise InputError(
            "expected a folder named as the release's repository, such as "
            f"SAE-Res-Qwen3-8B-Base-W64K-L0_50, around {found.weights}, for nothing else says its "
            "k; rename the folder"
        )
    tensors = tensors | {name: tensors[name].T for name in ("W_enc", "W_dec")}
    said = [RAW, "One of the k largest that is below zero counts as none, as in SAELens."]
    return Weights("topk", tensors, centred=False, k=int(named[1]), assumed=said)


RAW = "Takes raw activations, as SAELens' loader has it; the file says nothing of it."


def _read_unstated_relu(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    return Weights("relu", tensors, centred=False, assumed=[RAW])


def _read_hook_z(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    sparsity = number(config, "l1_coeff")
    said = "Takes raw activations of all heads of attention, one head after the other."
    return Weights("relu", tensors, centred=True, sparsity=sparsity, assumed=[said])


def _read_openai(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    activation = str(config.get("activation", "ReLU"))
    if activation not in ("ReLU", "TopK"):
        raise InputError(
            f"expected the activation ReLU or TopK in {found.weights}, found {activation[:40]!r}"
        )
    if activation == "ReLU":
        said = [
            "Takes raw activations: nothing in the file says so, but the library normalises for "
            "TopK alone."
        ]
        if "activation" not in config:
            said.append("The file names no activation function: ReLU, the library's default.")
        return Weights("relu", tensors, centred=True, assumed=said)
    settings = mapping(config, "activation_state_dict")
    one_of(settings, "postact_fn", {None: "relu", "ReLU": "relu"}, found.weights)
    said = ["The library normalises for TopK, and for TopK alone; nothing in the file says so."]
    if "postact_fn" not in settings:
        said.append("The file does not say what follows the choice of k: ReLU.")
    k = whole(settings.get("k"))
    return Weights("topk", tensors, centred=True, k=k, input_norm="layer_norm", assumed=said)


BATCH_TOPK_KINDS = {"vanilla": "relu"} | {kind: kind for kind in ("topk", "jumprelu", "batchtopk")}


def _read_batch_topk(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    kind = one_of(config, "sae_type", BATCH_TOPK_KINDS, found.config or found.weights)
    if kind == "batchtopk":
        raise InputError(
            f"expected an SAE whose latents depend on one token in {found.weights}, found a "
            "BatchTopK SAE without a threshold, whose latents depend on the batch they are in; set "
            "a threshold and save it as JumpReLU"
        )
    centred = kind != "jumprelu"
    weights = Weights(kind, dict(tensors), centred=centred, sparsity=number(config, "l1_coeff"))
    if config.get("input_unit_norm") not in (False, None, "False"):
        # Despite its name: less the mean, over the deviation.
        weights.input_norm = "layer_norm"
    if kind == "jumprelu":
        if "jumprelu.log_threshold" not in tensors:
            raise InputError(
                f"expected jumprelu.log_threshold in {found.weights}, as its config says, found "
                f"{', '.join(sorted(tensors))}"
            )
        weights.tensors["threshold"] = tensors["jumprelu.log_threshold"].exp()
    if kind == "topk":
        weights.k = whole(config.get("top_k"))
        # In the file, and unused by the code that trained it.
        weights.tensors["b_enc"] = tensors["b_enc"] * 0
        weights.assumed.append(
            "The file's b_enc is left out, as its library leaves it out of TopK."
        )
    return weights


def _read_sparsify(found: FoundSAE, tensors: Tensors, config: Config) -> Weights:
    """Read `W_dec` as it is; `num_latents` is 0 where the width is a multiple of d_in."""
    path = found.config or found.weights
    if config.get("signed"):
        raise InputError(f"expected latents of at least zero in {path}, found signed ones")
    one_of(config, "activation", {None: "topk", "topk": "topk"}, path)
    said = ["Takes raw activations, less b_dec.", SAME_K]
    return Weights("topk", tensors, centred=True, k=whole(config.get("k")), assumed=said)


READERS: dict[Format, Callable[[FoundSAE, Tensors, Config], Weights]] = {
    "gsae_core": _read_sae_lens,
    "sae_lens": _read_sae_lens,
    "sae_lens_legacy": _read_sae_lens,
    "dictionary_learning": _read_dictionary_learning,
    "sae_bench": _read_dictionary_learning,
    "sparsify": _read_sparsify,
    "gemma_scope": _read_gemma_scope,
    "gemma_scope_2": _read_gemma_scope,
    "llama_scope": _read_llama_scope,
    "llama_scope_r1": _read_llama_scope_r1,
    "qwen_scope": _read_qwen_scope,
    "goodfire": _read_unstated_relu,
    "deepseek_r1": _read_unstated_relu,
    "hook_z": _read_hook_z,
    "openai": _read_openai,
    "batch_topk": _read_batch_topk,
}
