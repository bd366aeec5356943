"""SAEs in other libraries' files: recognised, read as ours, and written for them.

    detect(path) -> Found            what a file or folder holds; no torch
    find_saes(path) -> list[Found]   the same of a folder that holds several
    read_sae(path) -> Foreign        an SAE that takes raw activations, and where it came from
    write_sae(sae, folder) -> Exported

Reading and writing load torch on first use; the rest never does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gsae_core.checkpoints.formats.detect import detect, find_saes, plain_name
from gsae_core.checkpoints.formats.found import EXPORTS, FORMATS, Export, Found, Place, Provenance

if TYPE_CHECKING:
    from gsae_core.checkpoints.formats.read import Foreign, read_found, read_sae
    from gsae_core.checkpoints.formats.write import Exported, to_jumprelu, write_sae

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Export",
    "Exported",
    "Foreign",
    "Found",
    "Place",
    "Provenance",
    "detect",
    "find_saes",
    "plain_name",
    "read_found",
    "read_sae",
    "to_jumprelu",
    "write_sae",
]

_HOMES = {
    "Foreign": "gsae_core.checkpoints.formats.read",
    "read_found": "gsae_core.checkpoints.formats.read",
    "read_sae": "gsae_core.checkpoints.formats.read",
    "Exported": "gsae_core.checkpoints.formats.write",
    "to_jumprelu": "gsae_core.checkpoints.formats.write",
    "write_sae": "gsae_core.checkpoints.formats.write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
