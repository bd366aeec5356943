"""One SAE in training: its step, its optimiser, its counters, and when it has to stop."""

import logging
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import sum_dtype
from gsae_core.training.optim import DictionaryAdam, lr_factor, sparsity_factor
from gsae_core.training.report import DeadCounts, SAEReport, slim
from gsae_core.training.revive import dead_latents, revive_
from gsae_core.training.steps import Attempt, Stepper

logger = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """What a step turned out to be, as numbers."""

    loss: float
    norm: float
    n_open: int
    overflowed: bool


class Pupil:
    """One SAE and everything its next step depends on, the batch left out.

    Args:
        sae: learns in place.
        cfg: the recipe.
        lr: peak learning rate of this SAE.
        sparsity: final lambda of this SAE.
        crossover: density of open gates from which its dense step is the faster one.
    """

    def __init__(
        self,
        sae: SAE,
        cfg: TrainConfig,
        *,
        lr: float,
        sparsity: float,
        crossover: float,
    ) -> None:
        self.sae, self.cfg, self.lr, self.sparsity = sae, cfg, lr, sparsity
        self._stepper = Stepper(sae, crossover=crossover, screened=cfg.screened)
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
            n_candidates=None if result is None else result.n_candidates,
            stopped=self.stopped,
        )

    def _learn(
        self, x: Float[Tensor, "batch d_in"], *, lr: float, sparsity_coeff: float, steps_done: int
    ) -> StepResult | None:
        attempt = self._stepper.attempt(
            x, sparsity_coeff=sparsity_coeff, density=self.density, dead=self._silent()
        )
        seen = self._read(attempt)
        if seen.overflowed:
            logger.info("%s", attempt.overflow_note(seen.n_open))
            attempt = self._stepper.dense(x, sparsity_coeff=sparsity_coeff, dead=self._silent())
            seen = self._read(attempt)
        result, stats = attempt.result, attempt.result.stats
        opened = stats.fired if stats.gate_open is None else stats.gate_open
        if not math.isfinite(seen.loss) or not math.isfinite(seen.norm):
            self.stopped = f"step {steps_done + 1}: {_cause(self.sae, x, result)}"
            self.sae.zero_grad(set_to_none=True)
            logger.warning("an SAE has stopped learning at %s", self.stopped)
            return None
        self.adam.step(lr)
        self.density = seen.n_open / (x.shape[0] * self.sae.d_sae)
        self.since_fired.add_(1).masked_fill_(stats.fired > 0, 0)
        self.since_open.add_(1).masked_fill_(opened > 0, 0)
        return result

    def _read(self, attempt: Attempt) -> _Seen:
        """Return everything the CPU has to know of a step, after one wait for the device."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        total = attempt.result.loss.total
        # float32 counts exactly only up to 2^24.
        values = (total, norm, attempt.n_open, attempt.overflowed)
        loss, norm, n_open, overflowed = torch.stack(
            [value.to(sum_dtype(total.device)) for value in values]
        ).tolist()
        return _Seen(loss=loss, norm=norm, n_open=int(n_open), overflowed=bool(overflowed))

    def _silent(self) -> Bool[Tensor, " d_sae"]:
        """Return which latents did not fire within the window; a TopK SAE asks for them."""
        return self.since_fired >= self.cfg.revive_window

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
            # Another number here would round some later step differently.
            "crossover": self._stepper.crossover,
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
        # Earlier states have none.
        self._stepper.crossover = state.get("crossover", self._stepper.crossover)
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
