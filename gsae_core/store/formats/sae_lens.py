"""SAELens, 6 and older: `cfg.json` and safetensors; some are unfolded, some folded wrongly."""

from typing import Any, get_args

import torch
from torch import Tensor

from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.sae.input_norm import InputNorm
from gsae_core.store.formats.containers import look
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import BIASES, Parts, Whitening
from gsae_core.store.formats.safe_json import read_object
from gsae_core.store.formats.tensors import as_float32, load_values
from gsae_core.store.formats.values import mapping, number, one_of, whole

SCALER = "activation_scaler.json"
MEAN_NORM = "expected_average_only_in"
WHITENER = "activation_whitening.safetensors"
WHITENING = "covariance_whitening"

NEEDED = "its architecture and its input normalisation"
ARCHITECTURES: dict[Any, Architecture] = {
    None: "relu",
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
}
ACTIVATIONS = {None: "relu", "relu": "relu", "topk": "topk"}


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    path = found.config or found.weights
    legacy = found.format == "sae_lens_legacy"
    architecture: Architecture = one_of(config, "architecture", ARCHITECTURES, path)
    arguments = mapping(config, "activation_fn_kwargs")
    key = "activation_fn_str" if "activation_fn_str" in config else "activation_fn"
    if one_of(config, key, ACTIVATIONS, path) == "topk":
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
