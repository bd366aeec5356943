"""Which tensors each library's files hold: how a file is recognised; its name does not count."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gsae_core.store.formats.containers import Held, Kind
from gsae_core.store.formats.found import FORMATS, Format

TORCH: frozenset[Kind] = frozenset({"safetensors", "pickle"})
SAFE: frozenset[Kind] = frozenset({"safetensors"})


class Signature(NamedTuple):
    """One architecture of one library."""

    format: Format
    architecture: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    kinds: frozenset[Kind] = TORCH
    marker: frozenset[str] = frozenset()
    """Names in the config beside it that tell this library from another with the same tensors."""

    marked: bool = False
    """Whether it is recognised only with that config."""


def _signature(format_: Format, architecture: str, required: str, **options: Any) -> Signature:
    sets = {name: frozenset(options.pop(name, "").split()) for name in ("optional", "marker")}
    return Signature(format_, architecture, frozenset(required.split()), **sets, **options)


_ENCODER_DECODER = "W_enc W_dec b_enc b_dec"
_LENS = {"kinds": SAFE, "marker": "d_in d_sae"}
_DL = {"marker": "trainer"}

SIGNATURES = (
    _signature(
        "sae_lens",
        "gated",
        "W_enc W_dec b_dec b_gate b_mag r_mag",
        optional="scaling_factor",
        **_LENS,
    ),
    _signature("sae_lens", "gated_untied", "W_enc W_mag W_dec b_dec b_gate b_mag", **_LENS),
    _signature("sae_lens", "standard", _ENCODER_DECODER, optional="scaling_factor", **_LENS),
    _signature(
        "sae_lens", "jumprelu", f"{_ENCODER_DECODER} threshold", optional="scaling_factor", **_LENS
    ),
    _signature(
        "dictionary_learning",
        "GatedAutoEncoder",
        "encoder.weight decoder.weight decoder_bias gate_bias mag_bias r_mag",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "AutoEncoder",
        "encoder.weight encoder.bias decoder.weight bias",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "AutoEncoderNew",
        "encoder.weight encoder.bias decoder.weight decoder.bias",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "BatchTopKSAE",
        "encoder.weight encoder.bias decoder.weight b_dec k",
        optional="threshold",
        **_DL,
    ),
    _signature(
        "dictionary_learning", "JumpReluAutoEncoder", f"{_ENCODER_DECODER} threshold", **_DL
    ),
    _signature(
        "dictionary_learning",
        "MatryoshkaBatchTopKSAE",
        f"{_ENCODER_DECODER} k threshold group_sizes",
        **_DL,
    ),
    _signature("sae_bench", "gated", "W_enc W_dec b_dec gate_bias b_mag r_mag"),
    _signature("sae_bench", "batch_topk", f"{_ENCODER_DECODER} k", optional="threshold"),
    _signature(
        "sparsify",
        "topk",
        "encoder.weight encoder.bias W_dec b_dec",
        optional="W_skip",
        marker="d_in k",
    ),
    _signature(
        "gemma_scope",
        "jumprelu",
        f"{_ENCODER_DECODER} threshold",
        optional="scaling_factor",
        kinds=frozenset({"npz"}),
    ),
    _signature(
        "gemma_scope",
        "jumprelu",
        "w_enc w_dec b_enc b_dec threshold",
        optional="scaling_factor",
        kinds=frozenset({"npz"}),
    ),
    _signature(
        "gemma_scope_2",
        "jump_relu",
        "w_enc w_dec b_enc b_dec threshold",
        optional="affine_skip_connection",
        kinds=SAFE,
        marker="architecture",
    ),
    _signature(
        "openai",
        "ReLU or TopK",
        "pre_bias encoder.weight latent_bias decoder.weight",
        optional="stats_last_nonzero latents_activation_frequency latents_mean_square "
        "activation activation_state_dict",
    ),
    _signature("batch_topk", "vanilla or topk", _ENCODER_DECODER, marker="sae_type", marked=True),
    _signature(
        "batch_topk", "jumprelu", f"{_ENCODER_DECODER} jumprelu.log_threshold", marker="sae_type"
    ),
    _signature(
        "llama_scope",
        "jumprelu",
        "encoder.weight encoder.bias decoder.weight decoder.bias",
        kinds=SAFE,
        marker="hook_point_in",
        marked=True,
    ),
)


def matches(held: Held, configs: Iterable[Mapping[str, Any]]) -> list[Signature]:
    """Return the signatures that a file's names fit, the likeliest first.

    A pickle also holds the words of its configs, so any names may come beside the required ones;
    elsewhere a name that the format does not know makes it another format.
    """
    names, configs = frozenset(held.shapes), list(configs)

    def fits(signature: Signature) -> bool:
        if held.kind not in signature.kinds or not signature.required <= names:
            return False
        if signature.marked and not _is_marked(signature, configs):
            return False
        return held.kind == "pickle" or names <= signature.required | signature.optional

    found = [signature for signature in SIGNATURES if fits(signature)]
    return sorted(found, key=lambda s: (_is_marked(s, configs), len(s.required)), reverse=True)


def _is_marked(signature: Signature, configs: list[Mapping[str, Any]]) -> bool:
    return bool(signature.marker) and any(signature.marker <= config.keys() for config in configs)


def nearest(names: Iterable[str]) -> tuple[str, list[str]]:
    """Return the format that shares most names with a file, for people, and what is missing."""
    names = frozenset(names)

    def likeness(signature: Signature) -> float:
        return len(signature.required & names) / len(signature.required | names)

    best = max(SIGNATURES, key=likeness)
    return f"{FORMATS[best.format]} {best.architecture}", sorted(best.required - names)
