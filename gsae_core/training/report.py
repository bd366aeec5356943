"""What a training step has to say; numbers are computed when they are read."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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


class Outcome(NamedTuple):
    """What a step turned out to be; fields of the same name as in `SAEReport`."""

    loss: LossParts | None
    stats: BatchStats | None
    n_candidates: int | None
    dead: DeadCounts
    stopped: str | None


class Answer:
    """The outcome of one step, which may still be on its way from the device.

    Args:
        settle: makes what took the step `give` its outcome; None where that is about to be done.
    """

    def __init__(self, settle: Callable[[], None] | None) -> None:
        self._settle = settle
        self.known: Outcome | None = None
        """The outcome, if it can be had without waiting."""

    def give(self, outcome: Outcome) -> None:
        # A kept report must not keep an SAE and its moments.
        self.known, self._settle = outcome, None

    def read(self) -> Outcome:
        """Return the outcome, waiting for the device where it is not known yet."""
        if self.known is None and self._settle is not None:
            self._settle()
        assert self.known is not None
        return self.known


@dataclass(frozen=True)
class SAEReport:
    """One SAE at one step. Reading a property waits for the device; an unread report does not.

    Where the trainer does not wait for its steps (CUDA), reading also settles the last one, which
    may have to be taken again: let the thread that trains do it.
    """

    lr: float
    """Learning rate of this step."""

    sparsity_coeff: float
    """lambda of this step, against squared error summed over d_in."""

    d_sae: int

    n_revived: int
    """Latents started again after this step."""

    answer: Answer = field(repr=False)

    @property
    def loss(self) -> LossParts | None:
        """Batch means before the step; None for an SAE that has stopped."""
        return self.answer.read().loss

    @property
    def stats(self) -> BatchStats | None:
        """Sums of this batch, counts already summed over latents; None for a stopped SAE."""
        return self.answer.read().stats

    @property
    def n_candidates(self) -> int | None:
        """Products a screened encode computed again in float32; None for a step without one."""
        return self.answer.read().n_candidates

    @property
    def dead(self) -> DeadCounts:
        """Latents that did not fire within the window, as the step left them."""
        return self.answer.read().dead

    @property
    def stopped(self) -> str | None:
        """Why and when this SAE stopped learning; None while it learns, as far as is known.

        It never waits for the device: on CUDA the step at which an SAE stopped says so once it is
        settled, which is when the next step is taken, when its loss is read, or when it was the
        last one.
        """
        return None if self.answer.known is None else self.answer.known.stopped

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
