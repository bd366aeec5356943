"""SAEs in other libraries' files: recognised, read as ours, and written for them.

    detect(path) -> FoundSAE            what a file or folder holds; no torch
    find_saes(path) -> list[FoundSAE]   the same of a folder that holds several
    read_sae(path) -> Foreign           an SAE that takes raw activations, and where it came from
    write_sae(sae, folder) -> Exported

Reading and writing load torch on first use; the rest never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gsae_core.checkpoints.formats.detect import detect, find_saes, plain_name
from gsae_core.checkpoints.formats.libraries import (
    EXPORTS,
    FORMATS,
    Export,
    FoundSAE,
    HookPoint,
    Provenance,
)

if TYPE_CHECKING:
    from gsae_core.checkpoints.formats.read import Foreign, read_found, read_sae
    from gsae_core.checkpoints.formats.write import Exported, to_jumprelu, write_sae

_READ, _WRITE = ("Foreign", "read_found", "read_sae"), ("Exported", "to_jumprelu", "write_sae")

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Export",
    "Exported",
    "Foreign",
    "FoundSAE",
    "HookPoint",
    "Provenance",
    "detect",
    "find_saes",
    "plain_name",
    "read_found",
    "read_sae",
    "to_jumprelu",
    "write_sae",
]


def __getattr__(name: str) -> Any:
    if name not in (*_READ, *_WRITE):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "read" if name in _READ else "write"
    return getattr(import_module(f"{__name__}.{home}"), name)
