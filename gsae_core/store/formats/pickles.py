"""Pickles looked at without being run: which names they hold, and what they would call.

A pickle is a program. Its instructions are listed here, never carried out; torch's restricted
reader gets it only if it calls for nothing but tensors.
"""

import pickletools
import re
from pathlib import Path

from gsae_core.errors import InputError

# What rebuilds a tensor, a dictionary that keeps its order, and a type in a saved config.
HARMLESS = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|collections OrderedDict"
    r"|torch (\w+Storage|device|float32|float64|float16|bfloat16|Size)"
)
STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8"}
UNREADABLE_CALLS = {"INST", "OBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def names_in(data: bytes, path: Path) -> list[str]:
    """Return every string in a pickle, each once, in order.

    Raises:
        InputError: if it is no pickle, or would call anything that makes no tensor.
    """
    names: dict[str, None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in STRINGS:
                names[str(argument)] = None
            elif opcode.name == "GLOBAL" and HARMLESS.fullmatch(str(argument)) is None:
                _refuse(str(argument).replace(" ", "."), path)
            elif opcode.name in UNREADABLE_CALLS:
                _refuse(opcode.name, path)
    except InputError:
        raise
    except Exception as error:
        # pickletools reads untrusted bytes with int(), decode() and struct: it raises what they do.
        raise InputError(
            f"expected a pickle of tensors in {path}, found a damaged one ({str(error)[:120]}); "
            "copy the file again"
        ) from None
    return list(names)


def _refuse(what: str, path: Path) -> None:
    raise InputError(
        f"expected a pickle of tensors and plain values in {path}, found one that calls "
        f"{what[:80]!r}; it was not run: do not trust this file, or save it again as safetensors"
    )
