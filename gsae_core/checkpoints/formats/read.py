"""Files -> an SAE of ours that computes the same, and a record of how that was known."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.checkpoints.formats import libraries
from gsae_core.checkpoints.formats.detect import SIGNATURES, config_of, detect, find_saes
from gsae_core.checkpoints.formats.found import Found, Provenance
from gsae_core.checkpoints.formats.parts import as_float32, build, load_values, number
from gsae_core.errors import InputError
from gsae_core.files import sha256
from gsae_core.sae.architectures import GatedSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE

READERS = {
    "sae_lens": libraries.read_sae_lens,
    "sae_lens_legacy": libraries.read_sae_lens,
    "dictionary_learning": libraries.read_dictionary_learning,
    "sae_bench": libraries.read_bench,
    "sparsify": libraries.read_sparsify,
    "gemma_scope": libraries.read_gemma_scope,
    "gemma_scope_2": libraries.read_gemma_scope,
    "llama_scope": libraries.read_llama_scope,
    "openai": libraries.read_openai,
    "batch_topk": libraries.read_batch_topk,
}
NEEDED = {
    "sae_lens": libraries.SAE_LENS_NEEDED,
    "sae_lens_legacy": libraries.SAE_LENS_NEEDED,
    "sparsify": libraries.SPARSIFY_NEEDED,
    "batch_topk": libraries.BATCH_TOPK_NEEDED,
    "llama_scope": "its threshold",
}
COUNTS = {"k", "group_sizes", "stats_last_nonzero"}


class Foreign(NamedTuple):
    """An SAE that takes raw activations, and where it came from."""

    sae: SAE
    source: Provenance


def read_sae(path: Path | str, *, name: str | None = None) -> Foreign:
    """Return the SAE in a file or folder, written by any of the libraries known here.

    Args:
        path: of the weights, or the folder around them.
        name: which one, where the folder holds several: a `Found.name`.

    Raises:
        InputError: one sentence, if there is none, several, or none that can be read exactly.
    """
    if name is None:
        return read_found(detect(path))
    found = find_saes(path)
    for sae in found:
        if sae.name == name:
            return read_found(sae)
    names = ", ".join(sae.name for sae in found[:8])
    raise InputError(f"expected one of the SAEs in {path} ({names}), got {name!r}")


def read_found(found: Found) -> Foreign:
    """Return the SAE that was found.

    Raises:
        InputError: if its files are damaged or contradict each other, or it computes what no SAE
            here does.
    """
    config = config_of(found, needed=NEEDED.get(found.format, ""))
    if found.format == "gsae_core":
        return _ours(found, config)
    values = load_values(found.weights, _names(found))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    counts = {name: tensors.pop(name) for name in COUNTS & tensors.keys()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    tensors = as_float32(tensors, found.weights)
    plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    _refuse_if_missing(found, tensors, counts)
    with torch.no_grad():
        parts = READERS[found.format](found, tensors | counts, config | plain)
        sae = build(parts, found.weights)
    assumed = [*parts.assumed, *_about_numbers(dtypes, sae)]
    return Foreign(sae, _provenance(found, assumed, sparsity=parts.sparsity, l0=parts.l0))


def _ours(found: Found, config: dict[str, Any]) -> Foreign:
    sae = load_sae(found.weights.parent)
    metadata = config.get("metadata") or {}
    source = _provenance(found, [], sparsity=number(metadata, "sparsity"), l0=None)
    return Foreign(sae, source)


def _names(found: Found) -> set[str]:
    same = [s for s in SIGNATURES if s.format == found.format.removesuffix("_legacy")]
    return {name for signature in same for name in signature.required | signature.optional}


def _refuse_if_missing(found: Found, tensors: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    """Check that one of the format's SAEs is complete: a pickle's names may be other things."""
    names = tensors.keys() | counts.keys()
    same = [s for s in SIGNATURES if s.format == found.format.removesuffix("_legacy")]
    if not any(signature.required <= names for signature in same):
        raise InputError(
            f"expected the tensors of a {found.library} SAE in {found.weights}, found "
            f"{', '.join(sorted(names)) or 'none'}"
        )


def _about_numbers(dtypes: set[torch.dtype], sae: SAE) -> list[str]:
    said = []
    if torch.float64 in dtypes:
        said.append("Weights in float64 are rounded to float32.")
    elif dtypes - {torch.float32}:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        said.append(f"Weights in {kinds} are held in float32, which has them all exactly.")
    if isinstance(sae, JumpReluSAE):
        said.append("A latent fires where z > threshold; exactly at it, none does.")
    if isinstance(sae, GatedSAE):
        said.append("A latent fires where the gate's pre-activation is above zero.")
    if isinstance(sae, TopKSAE):
        said.append("Of the k largest, only those above zero fire.")
    return said


def _provenance(
    found: Found, assumed: list[str], *, sparsity: float | None, l0: float | None
) -> Provenance:
    return Provenance(
        format=found.format,
        library=found.library,
        architecture=found.architecture,
        place=found.place,
        files=tuple((file.name, sha256(file)) for file in found.files),
        assumed=tuple(assumed),
        sparsity=sparsity,
        l0=l0,
    )
