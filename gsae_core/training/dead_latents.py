"""Dead latents: count them, start them again from badly reconstructed inputs, reset their moments.

Neuron resampling of Bricken et al. 2023, which arXiv:2404.16014v2, D.1.1 follows. The paper leaves
open `b_gate`, `b_mag` and `r_mag`; all become 0, so that a latent is a plain ReLU latent again.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from gsae_core.config import Start, TrainRecipe
from gsae_core.sae.base import SAE, Count, Mask, Rows
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.metrics import BatchStats
from gsae_core.training.optimizer import DictionaryAdam
from gsae_core.training.start import sparse_biases_

# Norm of a resampled encoder direction, as a share of the alive mean (Bricken).
ENCODER_SHARE = 0.2
MIN_POOL = 2**14  # Inputs that compete for a resampling, at least.
CHUNK_ENTRIES = 2**22  # Latents computed at once while the pool is scored: 16 MiB of float32.
ENCODERS = ("W_gate", "W_mag", "W_enc")  # Latents lie along axis 1 here, elsewhere along axis 0.


def is_resampling(steps_done: int, cfg: TrainRecipe) -> bool:
    """Return whether dead latents are resampled after so many steps."""
    first, cfg = cfg.stage(steps_done - 1)
    steps_done, every = steps_done - first, cfg.schedule.revive_every
    due = every > 0 and steps_done > 0 and steps_done % every == 0
    return due and steps_done <= cfg.revive_until * cfg.n_steps


def joins_pool(steps_done: int, cfg: TrainRecipe, *, widest: int) -> bool:
    """Return whether the batch of the last step joins the pool of inputs.

    The pool is the last whole batches up to a resampling: as many as make 2^14 inputs, and one for
    each of the `widest` SAE's latents, so that no two need the same. In between none is kept.
    """
    first, cfg = cfg.stage(steps_done - 1)
    steps_done, every = steps_done - first, cfg.schedule.revive_every
    if every == 0:
        return False
    n_batches = -(-max(MIN_POOL, widest) // cfg.batch_size)
    until_next = -steps_done % every
    return until_next < n_batches and is_resampling(steps_done + until_next, cfg)


@torch.no_grad()
def resample_(
    sae: SAE,
    adam: DictionaryAdam,
    *,
    dead: Int64[Tensor, " dead"],
    pool: Rows,
    seed: int,
    start: Start = "zero",
) -> Int64[Tensor, " resampled"]:
    """Start dead latents again, in place, and return the indices of those that were.

    Each takes one input of the pool, drawn with probability proportional to its squared loss:

    - `W_dec` row: the input, less `b_dec`, scaled to norm one. Directions add up to x - b_dec, so
      an uncentred input would mostly teach every resampled latent the mean activation.
    - encoder column: the same direction, at 0.2 of the mean norm over alive latents.
    - `b_gate`, `b_mag`, `b_enc`, `r_mag`: 0; `threshold`: what it began with.
      After a sparse `start` biases are those of `sparse_biases_` on the pool.
    - Adam's moments of exactly these entries: 0.

    Inputs, in the units the SAE trains in, are drawn without replacement (twins would have the same
    gradients for ever), so where dead latents outnumber inputs with any loss, the last ones wait
    for the next time. Other latents and `b_dec` keep their bits.
    """
    inputs = draw(input_losses(sae, pool), n=len(dead), seed=seed).to(pool.device)
    latents = dead[: len(inputs)]
    directions = pool[inputs] - sae.b_dec
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    starts = {"threshold": sae.start} if isinstance(sae, JumpReluSAE) else {}
    for name, parameter in sae.named_parameters():
        if name == "b_dec":
            continue
        axis = 1 if name in ENCODERS else 0
        if name == "W_dec":
            parameter.index_copy_(axis, latents, directions)
        elif name in ENCODERS:
            norms = torch.linalg.vector_norm(parameter[:, alive], dim=0)
            # With nothing alive there is no mean; 1 is the norm of every direction at the start.
            length = ENCODER_SHARE * (norms.mean() if len(norms) else 1.0)
            parameter.index_copy_(axis, latents, (length * directions).T)
        else:
            parameter.index_fill_(axis, latents, starts.get(name, 0.0))
        for key, moment in adam.moments(name).items():
            # The step count is the whole tensor's and stays, so bias correction does not see that
            # these moments are new: first updates are 1 / sqrt(1 - beta2), some 30 times, too
            # large. A new warm-up from a tenth of the learning rate makes up for that.
            if key != "step":
                moment.index_fill_(axis, latents, 0.0)
    if start != "zero":
        sparse_biases_(sae, pool, latents)
    return latents


@torch.no_grad()
def input_losses(sae: SAE, pool: Rows) -> Float[Tensor, " pool"]:
    """Return |x - x_hat|^2 of each input; 0 for an input equal to `b_dec`, which has no direction.

    An L1 term would be largest where many latents already fire.
    """
    rows = max(1, CHUNK_ENTRIES // sae.d_sae)
    losses = torch.cat([(x - sae(x)).square().sum(1) for x in pool.split(rows)])
    return losses * (pool != sae.b_dec).any(dim=1)


def draw(losses: Float[Tensor, " pool"], *, n: int, seed: int) -> Int64[Tensor, " drawn"]:
    """Return indices of `n` different inputs, P proportional to loss^2; fewer if losses are zero.

    Drawn on the CPU, so that the result does not depend on the device's random numbers.
    """
    weights = losses.cpu().double()
    weights = (weights / weights.max()).square()  # scaled first: a square cannot overflow
    n = min(n, int((weights > 0).sum()))
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.multinomial(weights, n, generator=torch.Generator().manual_seed(seed))


class DeadCounts(NamedTuple):
    """Latents that did not fire within the window, by what kept them from it."""

    gate: Count
    """It never opened (a ReLU SAE's encoder counts as its gate)."""
    magnitude: Count
    """The gate opened, onto a magnitude of zero every time."""


class DeadLatentCounter:
    """Steps since each latent fired and its gate opened; silent for `window` steps, it is dead."""

    def __init__(self, sae: SAE, *, window: int) -> None:
        self.window: int = window
        since = torch.zeros(2, sae.d_sae, dtype=torch.int32, device=sae.b_dec.device)
        self.since_fired: Int32[Tensor, " d_sae"] = since[0]
        self.since_open: Int32[Tensor, " d_sae"] = since[1]

    def count(self, stats: BatchStats) -> None:
        """Count a step, by which latents fired and which gates opened in it."""
        self.since_fired.add_(1).masked_fill_(stats.fired > 0, 0)
        self.since_open.add_(1).masked_fill_(stats.opened > 0, 0)

    def restart(self, latents: Int64[Tensor, " resampled"]) -> None:
        """Count these latents from 0 again, as if they had just fired."""
        self.since_fired[latents] = 0
        self.since_open[latents] = 0

    @property
    def mask(self) -> Mask:
        """Which latents are dead."""
        return self.since_fired >= self.window

    @property
    def counts(self) -> DeadCounts:
        """How many latents are dead, by what kept them from firing."""
        shut = self.since_open >= self.window
        return DeadCounts(gate=shut.sum(), magnitude=(self.mask & ~shut).sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of both counts on the CPU."""
        names = ("since_fired", "since_open")
        return {name: getattr(self, name).to("cpu", copy=True) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved counts."""
        self.since_fired.copy_(state["since_fired"])
        self.since_open.copy_(state["since_open"])
