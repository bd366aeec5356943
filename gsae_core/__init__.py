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
    "analysis.attach": ["Attached", "attach"],
    "analysis.features.index": ["open_index"],
    "checkpoints.checkpoint": ["load_sae"],
    "checkpoints.formats.read": ["read_sae"],
    "lm.model": ["load_model"],
    "runs.run": ["open_run"],
    "runs.work.publish": ["push_sae"],
    "sae.architectures": ["GatedSAE", "JumpReluSAE", "ReluSAE", "TopKSAE"],
    "sae.base": ["SAE"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gsae_core.{home}"), name)
    raise AttributeError(f"module 'gsae_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
