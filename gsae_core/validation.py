"""Configs that cannot be changed, and mistakes in them as sentences."""

import re
from collections.abc import Mapping
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
