"""JSON from elsewhere: bounded in size, no name twice, an object or a sentence why not."""

import json
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError
from gsae_core.store.files import readable

LARGEST_JSON = 16 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: if it is no JSON object, too large, or has a name twice.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise InputError(
            f"expected a config of at most {readable(LARGEST_JSON)} in {path}, found "
            f"{readable(size)}; is it another kind of file?"
        )
    return parse_object(path.read_bytes(), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the object that `data` is JSON of; `where` names it in a sentence."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise InputError(f"expected JSON in {where}, found brackets nested too deeply") from None
    except InputError as error:
        raise InputError(f"expected JSON with each name once in {where}, found {error}") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors.
        raise InputError(f"expected JSON in {where}, found something else ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {where}, found a {type(value).__name__}")
    return value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return found
