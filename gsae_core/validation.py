"""Configs that cannot be changed, JSON as we write it, and mistakes in both as sentences."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gsae_core.errors import InputError


class Config(BaseModel):
    """Base of every config: unknown keys are errors, nothing is written back."""

    # Not as class arguments: type checkers would want `frozen` repeated by every config.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


ConfigKind = TypeVar("ConfigKind", bound=Config)


def validated(
    kind: type[ConfigKind], fields: dict[str, Any], called: Mapping[str, str] | None = None
) -> ConfigKind:
    """Return `kind(**fields)`.

    Args:
        called: what the caller calls a field, where that is not its name: a flag, a widget's label.

    Raises:
        InputError: one sentence that names the first wrong field, what it takes and what came.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__
        where = (called or {}).get(where, where)
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] == "extra_forbidden":
            message = f"no such setting; {kind.__name__} has {', '.join(kind.model_fields)}"
            raise InputError(f"{where}: {message}") from None
        message = re.sub("^expected (greater|less)", r"expected a number \1", message)
        came = "" if isinstance(first["input"], dict | Config) else f", got {first['input']!r}"
        raise InputError(f"{where}: {message[0].lower()}{message[1:]}{came}") from None


def first_of(error: ValidationError, *, may_lack: Collection[str] = ()) -> str | None:
    """Return what came first in the wrong place, and where: `'three' as saes.gated.alive`.

    Args:
        may_lack: keys that need not be there; None comes back where nothing else is wrong.
    """
    wrong = (
        each
        for each in error.errors()
        if each["type"] != "missing" or each["loc"][-1] not in may_lack
    )
    first = next(wrong, None)
    if first is None:
        return None
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"no {where}"
    came = first["input"]
    shown = type(came).__name__ if isinstance(came, dict | list) else repr(came)
    return f"{shown} as {where}"


MOST = 2**63
"""What no number in our files reaches; arrays, charts and process ids could not take it."""


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says, UTF-8 if it comes as bytes.

    Raises:
        ValueError: for anything that no file of ours holds: other encodings, numbers beyond 2^63,
            half a surrogate pair, nesting deeper than Python follows.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # some editors begin a file with a mark
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_real)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= MOST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]}, which is too large")
    return value
