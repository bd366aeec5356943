"""Train, compare and look inside Gated Sparse Autoencoders (arXiv:2404.16014).

The names below load with the module they live in, on first use, so that importing the package
costs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsae_core.analysis.attach import Attached, attach
    from gsae_core.analysis.features.index import open_index
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.checkpoints.formats.read import read_sae
    from gsae_core.lm.model import load_model
    from gsae_core.runs.run import open_run
    from gsae_core.runs.work.publish import push_sae
    from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
    from gsae_core.sae.base import SAE

__all__ = [
    "SAE",
    "Attached",
    "GatedSAE",
    "JumpReluSAE",
    "ReluSAE",
    "TopKSAE",
    "attach",
    "load_model",
    "load_sae",
    "open_index",
    "open_run",
    "push_sae",
    "read_sae",
]

_HOMES = {
    "SAE": "gsae_core.sae.base",
    "Attached": "gsae_core.analysis.attach",
    "GatedSAE": "gsae_core.sae.architectures",
    "JumpReluSAE": "gsae_core.sae.architectures",
    "ReluSAE": "gsae_core.sae.architectures",
    "TopKSAE": "gsae_core.sae.architectures",
    "attach": "gsae_core.analysis.attach",
    "load_model": "gsae_core.lm.model",
    "load_sae": "gsae_core.checkpoints.checkpoint",
    "open_index": "gsae_core.analysis.features.index",
    "open_run": "gsae_core.runs.run",
    "push_sae": "gsae_core.runs.work.publish",
    "read_sae": "gsae_core.checkpoints.formats.read",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gsae_core' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
