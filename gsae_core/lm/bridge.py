"""Sites that TransformerLens names: those of a `TransformerBridge`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from gsae_core.config import SITES, Site, hook_name
from gsae_core.lm.taps import BlockSites, Tap


def bridge_blocks(bridge: Any) -> list[BlockSites]:
    """Return the sites of every block of a TransformerBridge, as its own hook points name them.

    A hook point is a module that passes its input through, so a plain forward hook reads it and
    edits it in either mode of the bridge.
    """
    found = []
    for layer, block in enumerate(bridge.blocks):
        taps: dict[Site, Tap] = {}
        for site in SITES:
            if (point := bridge.hook_dict.get(hook_name(layer, site))) is not None:
                taps[site] = Tap(point, "output")
        # A bridge's hook points lie inside the modules whose output they show.
        parts = dict(block.named_children())  # an attention-only model has no mlp
        attn, mlp = ((parts[name],) if name in parts else () for name in ("attn", "mlp"))
        before: dict[Site, tuple[nn.Module, ...]] = {
            "mlp_hidden": attn,
            "mlp_out": attn,
            "resid_post": attn + mlp,
        }
        found.append(BlockSites(block, taps, before))
    return found


def find_sites(hf: Any, family: str) -> Sequence[BlockSites]:
    """Return further sites of every block of a Hugging Face causal LM, checked; empty: none."""
    return ()
