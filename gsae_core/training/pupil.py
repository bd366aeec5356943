"""One SAE in training: its step, its optimiser, its counters, and when it has to stop."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.dense import manual_dense_step
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse import sparse_step
from gsae_core.training.optim import DictionaryAdam, lr_factor, sparsity_factor
from gsae_core.training.report import DeadCounts, SAEReport, slim
from gsae_core.training.revive import dead_latents, revive_

logger = logging.getLogger(__name__)


# Share of open gates below which the sparse step is the faster one. Measured on one core with
# d_in = 256: they cost the same at 11 % for 1024 latents, Gated and ReLU alike, and at 8.5 % for a
# Gated SAE of 3072; at 2 % the sparse step takes 0.4 to 0.5 of the time.
CROSSOVER = 0.08


def choose_step(density: float | None, device: torch.device) -> Callable[..., StepResult]:
    """Return the fastest way to compute the next step; all give equal gradients up to rounding.

    Args:
        density: share of (input, latent) pairs with an open gate in the last step; None before it.
        device: where the SAE is. Off the CPU it is autograd's dense step: the other two are
            blocked for a CPU's caches.
    """
    if device.type != "cpu":
        return dense_step
    return sparse_step if density is not None and density < CROSSOVER else manual_dense_step


class Pupil:
    """One SAE and everything its next step depends on, the batch left out.

    Args:
        sae: learns in place.
        cfg: the recipe.
        lr: peak learning rate of this SAE.
        sparsity: final lambda of this SAE.
    """

    def __init__(self, sae: SAE, cfg: TrainConfig, *, lr: float, sparsity: float) -> None:
        self.sae, self.cfg, self.lr, self.sparsity = sae, cfg, lr, sparsity
        self.adam = DictionaryAdam(sae, beta1=cfg.beta1, beta2=cfg.beta2)
        # Steps since a latent fired, and since its gate opened.
        self.since_fired = torch.zeros(sae.d_sae, dtype=torch.int32, device=sae.b_dec.device)
        self.since_open = torch.zeros_like(self.since_fired)
        self.warmup_start = 0
        self.density: float | None = None
        self.stopped: str | None = None

    def step(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        steps_done: int,
        pool: Float[Tensor, "pool d_in"] | None,
    ) -> SAEReport:
        """Learn from one batch, then revive dead latents if there is a pool to revive them from.

        Args:
            x: activations.
            steps_done: steps before this one.
            pool: recent inputs at a step that ends with a revival, else None.
        """
        lr = self.lr * lr_factor(steps_done, self.cfg, warmup_start=self.warmup_start)
        coeff = self.sparsity * sparsity_factor(steps_done, self.cfg)
        result = None
        n_revived = 0
        if self.stopped is None:
            result = self._learn(x, lr=lr, sparsity_coeff=coeff, steps_done=steps_done)
        dead = self._dead()
        if result is not None and pool is not None:
            n_revived = self._revive(pool, steps_done=steps_done + 1)
        return SAEReport(
            lr=lr,
            sparsity_coeff=coeff,
            d_sae=self.sae.d_sae,
            loss=None if result is None else result.loss,
            stats=None if result is None else slim(result.stats),
            dead=dead,
            n_revived=n_revived,
            stopped=self.stopped,
        )

    def _learn(
        self, x: Float[Tensor, "batch d_in"], *, lr: float, sparsity_coeff: float, steps_done: int
    ) -> StepResult | None:
        if isinstance(self.sae, GatedSAE | ReluSAE):
            take_step = choose_step(self.density, x.device)
            result = take_step(self.sae, x, sparsity_coeff=sparsity_coeff)
        else:
            # Autograd's step: the only one that knows the comparison set.
            dead = self.since_fired >= self.cfg.revive_window
            result = dense_step(self.sae, x, sparsity_coeff=sparsity_coeff, dead=dead)
        stats = result.stats
        opened = stats.fired if stats.gate_open is None else stats.gate_open
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        # Everything the CPU has to know of this step, in one wait for the device.
        loss, norm, n_open = torch.stack(
            [
                value.to(result.loss.total)
                for value in (
                    result.loss.total,
                    torch.nn.utils.get_total_norm(gradients),
                    opened.sum(),
                )
            ]
        ).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.stopped = f"step {steps_done + 1}: {_cause(self.sae, x, result)}"
            self.sae.zero_grad(set_to_none=True)
            logger.warning("an SAE has stopped learning at %s", self.stopped)
            return None
        self.adam.step(lr)
        self.density = n_open / (x.shape[0] * self.sae.d_sae)
        self.since_fired.add_(1).masked_fill_(stats.fired > 0, 0)
        self.since_open.add_(1).masked_fill_(opened > 0, 0)
        return result

    def _dead(self) -> DeadCounts:
        window = self.cfg.revive_window
        shut = self.since_open >= window
        return DeadCounts(gate=shut.sum(), magnitude=((self.since_fired >= window) & ~shut).sum())

    def _revive(self, pool: Float[Tensor, "pool d_in"], *, steps_done: int) -> int:
        dead = dead_latents(self.since_fired, window=self.cfg.revive_window)
        if len(dead) == 0:
            return 0  # and no warm-up again: nothing here is young
        revived = revive_(self.sae, self.adam, dead=dead, pool=pool, seed=steps_done)
        self.since_fired[revived] = 0
        self.since_open[revived] = 0
        if len(revived):
            self.warmup_start = steps_done
        return len(revived)

    def state_dict(self) -> dict[str, Any]:
        """Return copies, on the CPU, of everything the next step depends on."""
        return {
            "weights": {k: v.to("cpu", copy=True) for k, v in self.sae.state_dict().items()},
            "moments": self.adam.state_dict(),
            "since_fired": self.since_fired.to("cpu", copy=True),
            "since_open": self.since_open.to("cpu", copy=True),
            "warmup_start": self.warmup_start,
            "density": self.density,
            "stopped": self.stopped,
        }

    def check(self, state: dict[str, Any], index: int) -> None:
        """Raise InputError unless `state` is of an SAE with these parameters and shapes."""
        ours = {name: tuple(p.shape) for name, p in self.sae.named_parameters()}
        saved = {name: tuple(w.shape) for name, w in state["weights"].items()}
        if ours != saved:
            raise InputError(
                f"expected SAE {index} of the state to have {_shapes(ours)}, got {_shapes(saved)}; "
                "build the trainer from the config of the run that saved it"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check` has passed."""
        self.sae.load_state_dict(state["weights"])
        self.adam.load_state_dict(state["moments"])
        self.since_fired.copy_(state["since_fired"])
        self.since_open.copy_(state["since_open"])
        self.warmup_start = state["warmup_start"]
        self.density = state["density"]
        self.stopped = state["stopped"]


def _cause(sae: SAE, x: Float[Tensor, "batch d_in"], result: StepResult) -> str:
    if not bool(x.isfinite().all()):
        return "the activations are not finite"
    for name, term in zip(result.loss._fields, result.loss, strict=True):
        if not bool(term.isfinite()):
            return f"the {name} loss is not finite"
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name} is not finite"
    return "the gradients are too large to be squared"


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
