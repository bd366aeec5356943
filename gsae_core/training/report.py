"""What a training step has to say; numbers are computed when they are read."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Int64
from torch import Tensor

from gsae_core.sae.losses import LossParts
from gsae_core.sae.metrics import BatchStats, Metrics


class DeadCounts(NamedTuple):
    """Latents that did not fire within the window, by what kept them silent."""

    gate: Int64[Tensor, ""]
    """The gate never opened (a ReLU SAE's encoder counts as its gate)."""

    magnitude: Int64[Tensor, ""]
    """The gate opened, onto a magnitude of zero every time."""


@dataclass(frozen=True)
class SAEReport:
    """One SAE at one step. Reading a property waits for the device; an unread report does not."""

    lr: float
    """Learning rate of this step."""

    sparsity_coeff: float
    """lambda of this step, against squared error summed over d_in."""

    d_sae: int

    loss: LossParts | None
    """Batch means before the step; None for an SAE that has stopped."""

    stats: BatchStats | None
    """Sums of this batch, counts already summed over latents; None for an SAE that has stopped."""

    dead: DeadCounts

    n_revived: int
    """Latents started again after this step."""

    n_candidates: int | None
    """Products a screened encode computed again in float32; None for a step without a screen."""

    stopped: str | None
    """Why and when this SAE stopped learning; None while it learns."""

    @property
    def l0(self) -> float:
        """Latents that fire on an average input of this batch; NaN once stopped."""
        return Metrics(self.stats).l0

    @property
    def fvu(self) -> float:
        """Fraction of this batch's variance unexplained; NaN once stopped."""
        return Metrics(self.stats).fvu

    @property
    def gamma(self) -> float:
        """Relative reconstruction bias on this batch; NaN once stopped."""
        return Metrics(self.stats).gamma

    @property
    def gamma_gate(self) -> float:
        """The same bias when latents are read off the gate; NaN without a gate or once stopped."""
        return Metrics(self.stats).gamma_gate

    @property
    def screen_ratio(self) -> float:
        """Products computed again in float32 for each gate that opened; NaN without a screen.

        1 would be a screen that let nothing through in vain: what it exceeds 1 by is how often
        the bound on bfloat16's rounding was needed.
        """
        if self.n_candidates is None or self.stats is None:
            return math.nan
        opened = self.stats.fired if self.stats.gate_open is None else self.stats.gate_open
        return self.n_candidates / max(int(opened.sum()), 1)

    @property
    def gate_dead_fraction(self) -> float:
        """Share of latents whose gate did not open within the window."""
        return int(self.dead.gate) / self.d_sae

    @property
    def magnitude_dead_fraction(self) -> float:
        """Share of latents whose gate opened within the window, but only onto a magnitude of 0."""
        return int(self.dead.magnitude) / self.d_sae

    @property
    def dead_fraction(self) -> float:
        """Share of latents that did not fire within the window: the sum of the two."""
        return self.gate_dead_fraction + self.magnitude_dead_fraction


class StepReport(NamedTuple):
    """One step of all SAEs."""

    step: int
    """Steps done, this one included."""

    n_steps: int
    """Steps in the whole run."""

    tokens: int
    """Activation vectors seen, this step's included."""

    seconds: float
    """Wall-clock seconds spent inside steps so far, over resumes; making batches is not counted."""

    saes: tuple[SAEReport, ...]
    """In the order in which the SAEs were given."""


def slim(stats: BatchStats) -> BatchStats:
    """Return the sums without their per-latent detail, which would fill memory in kept reports."""
    return stats._replace(
        fired=stats.fired.sum()[None],
        gate_open=None if stats.gate_open is None else stats.gate_open.sum()[None],
        latent_power=None,
        latent_aligned=None,
    )
