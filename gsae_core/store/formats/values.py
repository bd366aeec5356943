"""Single values out of somebody's config: of the expected type, or a sentence that says which."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError


def one_of(config: Mapping[str, Any], key: str, choices: Mapping[Any, Any], path: Path) -> Any:
    """Return what `choices` has for a config's value; a missing key is None.

    Raises:
        InputError: if the value is none of the choices.
    """
    value = config.get(key)
    try:
        return choices[value]
    except (KeyError, TypeError):
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise InputError(
            f"expected {key} to be one of {known} in {path}, found {str(value)[:80]!r}; an SAE "
            "with another one computes what no SAE here can"
        ) from None


def number(config: Mapping[str, Any], *keys: str) -> float | None:
    """Return the first positive finite number under the keys; None where there is none."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        # A whole number of JSON may be longer than any float.
        if 0 < value < 1e300:
            return float(value)
    return None


def whole(value: Any) -> int | None:
    """Return a number or a tensor of one entry as an int; None for anything else."""
    try:
        # A tensor of one whole number, or the number.
        found = value.item() if hasattr(value, "item") else value
    except RuntimeError:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return int(found) if math.isfinite(found) and found == math.floor(found) else None


def mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside a config; empty where there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}
