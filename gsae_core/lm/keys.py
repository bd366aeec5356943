"""Do the weights of a checkpoint fit the model? What transformers fills in at random is refused."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gsae_core.errors import InputError

WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Parts of keys that a wrapper around a model, or around part of it, leaves in them."""

# Masks, positions and rotary tables that earlier versions of transformers saved with the weights;
# it knows most of them itself.
_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|position_ids|inv_freq|original_inv_freq|cos_cached|sin_cached)$"
)
SHOWN = 3


def check_keys(name: str, hf: Any, loaded: Mapping[str, Any]) -> None:
    """Check that every weight of a model came from its checkpoint, and that none was left over.

    Args:
        name: what the model was loaded from.
        hf: the Hugging Face causal LM.
        loaded: what `from_pretrained(..., output_loading_info=True)` says of it; weights that are
            tied to others are not missing there.

    Raises:
        InputError: with the keys that do not fit.
    """
    missing = sorted(loaded["missing_keys"])
    unexpected = sorted(key for key in loaded["unexpected_keys"] if not _BUFFERS.search(key))
    mismatched = sorted(loaded["mismatched_keys"])
    if not (missing or unexpected or mismatched):
        return
    found = []
    if missing:
        found.append(f"none for {_counted(missing)} of its own")
    if mismatched:
        shapes = [f"{key}: {tuple(came)}, not {tuple(want)}" for key, came, want in mismatched]
        found.append(f"another shape for {_counted(shapes)}")
    if unexpected:
        found.append(f"{_counted(unexpected)} that it does not have")
    raise InputError(
        f"expected the weights of a {type(hf).__name__} in {name!r}, found "
        f"{' and '.join(found)}; {_advice(hf, missing, unexpected, mismatched)}"
    )


def _counted(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else ""
    return f"{len(keys):,} key{'s' * (len(keys) > 1)} ({', '.join(keys[:SHOWN])}{more})"


def _advice(
    hf: Any, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[Any]
) -> str:
    """Return what to do about keys that do not fit."""
    known = set(hf.state_dict())
    known |= {key.removeprefix(f"{hf.base_model_prefix}.") for key in known}
    if wrappers := _wrappers(unexpected, known):
        parts = " and ".join(f"'{part}.' of {WRAPPERS[part]}" for part in wrappers)
        return f"save the model that is inside the wrapper, or take {parts} out of the keys"
    if prefix := _prefix(unexpected, known):
        return f"take {prefix!r} out of the keys"
    if not missing and not mismatched:
        return (
            f"save the model again as a {type(hf).__name__} alone, with adapters merged, or let "
            "its config.json say what it is"
        )
    head = set(hf.get_output_embeddings().parameters())
    own = {key for key, weight in hf.named_parameters(remove_duplicate=False) if weight in head}
    if own.issuperset(missing) and not mismatched:
        return "choose a checkpoint that has the output layer, for it predicts the next token"
    return "save the model again with save_pretrained(), weights and config.json together"


def _wrappers(unexpected: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the wrappers without whose names the keys would be the model's."""
    found: dict[str, None] = {}
    for key in unexpected:
        parts = key.split(".")
        if ".".join(part for part in parts if part not in WRAPPERS) in known:
            found |= dict.fromkeys(part for part in parts if part in WRAPPERS)
    return list(found)


def _prefix(unexpected: Sequence[str], known: Collection[str]) -> str:
    """Return what every key has before one of the model's own; nothing if they do not agree."""
    prefixes = set()
    for key in unexpected:
        parts = key.split(".")
        n = next((n for n in range(1, len(parts)) if ".".join(parts[n:]) in known), 0)
        prefixes.add("".join(f"{part}." for part in parts[:n]))
    return prefixes.pop() if len(prefixes) == 1 else ""
