"""How long each latent has been silent, counted where it learns."""

from typing import Any

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from gsae_core.sae.base import SAE
from gsae_core.sae.metrics import BatchStats
from gsae_core.training.report import DeadCounts


class Silence:
    """Steps since each latent of an SAE fired, and since its gate opened.

    Args:
        sae: whose latents they are.
        window: steps of silence after which a latent counts as dead.
    """

    def __init__(self, sae: SAE, *, window: int) -> None:
        self._window = window
        device = sae.b_dec.device
        self.since_fired: Int32[Tensor, " d_sae"] = torch.zeros(
            sae.d_sae, dtype=torch.int32, device=device
        )
        self.since_open: Int32[Tensor, " d_sae"] = torch.zeros_like(self.since_fired)

    def count(self, stats: BatchStats, *, unless: Bool[Tensor, ""] | None = None) -> None:
        """Count a step; where `unless` is true, on the device, none was taken."""
        opened = stats.fired if stats.gate_open is None else stats.gate_open
        for since, woken in ((self.since_fired, stats.fired > 0), (self.since_open, opened > 0)):
            if unless is None:
                since.add_(1).masked_fill_(woken, 0)
            else:
                since.add_(~unless).masked_fill_(woken & ~unless, 0)

    def restart(self, latents: Int64[Tensor, " revived"]) -> None:
        """Give latents a whole window again."""
        self.since_fired[latents] = 0
        self.since_open[latents] = 0

    @property
    def longest(self) -> Int32[Tensor, ""]:
        """Steps since the latent that has not fired for longest did."""
        return self.since_fired.max()

    @property
    def over(self) -> Bool[Tensor, " d_sae"]:
        """Which latents did not fire within the window; a TopK SAE asks for them."""
        return self.since_fired >= self._window

    @property
    def dead(self) -> DeadCounts:
        """How many of them there are, by what kept them silent."""
        shut = self.since_open >= self._window
        return DeadCounts(gate=shut.sum(), magnitude=(self.over & ~shut).sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies, on the CPU."""
        return {
            "since_fired": self.since_fired.to("cpu", copy=True),
            "since_open": self.since_open.to("cpu", copy=True),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; other keys are left alone."""
        self.since_fired.copy_(state["since_fired"])
        self.since_open.copy_(state["since_open"])
