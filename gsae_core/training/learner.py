"""One SAE in training: its step and the way to compute it, its optimizer, why it stopped.

A step has two phases. `launch` gives the device all that the gradients take and waits for nothing.
`finish` reads five numbers about them, and only then do the weights move. Where every SAE of a
sweep is launched first, a GPU computes the others' gradients while one's numbers are read.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, TopKSAE, has_fast_step
from gsae_core.sae.base import SAE, Mask, Rows
from gsae_core.sae.gpu import step as kernels
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import LossParts, StepResult, dense_step
from gsae_core.sae.metrics import BatchStats, Metrics, sum_dtype
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training.dead_latents import DeadCounts, DeadLatentCounter, resample_
from gsae_core.training.end_to_end import Batch, SequenceBatch, end_to_end_step, rows_of
from gsae_core.training.optimizer import DictionaryAdam, lr_factor, sparsity_factor, threshold_lr

logger: logging.Logger = logging.getLogger(__name__)

# Density of open gates from which a dense step is the faster one, by kind of device. Constants,
# not timed while training: a run has the same bits on a faster machine and after a resume.
# A CPU: of 512 x 16384 a sparse step costs 1.3 encoder products at L0 32 and 3.1 to 3.4 at L0 1024,
# a dense one by hand 7 to 9 (docs/scaling.json), so the two meet at 0.15 to 0.22.
# CUDA: no GPU has been timed. By bytes and operations (an H200, float32, 4096 x 2560 x 131072) the
# seven products a sparse step saves take as long as going through 0.07 of all pairs does.
CROSSOVER = {"cpu": 0.15, "cuda": 0.07}


@dataclass(frozen=True)
class SAEReport:
    """One SAE at one step. Reading a number waits for the device; an unread report does not."""

    lr: float
    sparsity_coeff: float
    """lambda of this step, against squared error summed over d_in."""
    d_sae: int
    dead: DeadCounts
    """Latents that did not fire within the window, before a resampling gave some a new one."""
    loss: LossParts | None = None
    """Batch means before the step; None for an SAE that has stopped."""
    stats: BatchStats | None = None
    """Sums of this batch, counts already summed over latents; None for a stopped SAE."""
    n_candidates: int | None = None
    """Products a screened encode computed again in float32; None for a step without one."""
    kl: Tensor | None = None
    """KL(clean || spliced) in nats a prediction; None unless the loss is end-to-end."""
    n_resampled: int = 0
    """Dead latents started again after this step."""
    stopped: str | None = None
    """Why and when this SAE stopped learning; None while it learns."""

    # Metrics of this batch, NaN once stopped; `gamma_gate` also without a gate.

    @property
    def l0(self) -> float:
        """Firing latents per token."""
        return Metrics(self.stats).l0

    @property
    def fvu(self) -> float:
        """Residual sum of squares over total sum of squares about the batch's mean activation."""
        return Metrics(self.stats).fvu

    @property
    def gamma(self) -> float:
        """E|x_hat|^2 / E[x . x_hat]; below 1 reconstructions are too short (Eq. 10 of v2)."""
        return Metrics(self.stats).gamma

    @property
    def gamma_gate(self) -> float:
        """The same of x_hat_aux, which the gate path alone reconstructs."""
        return Metrics(self.stats).gamma_gate

    @property
    def screen_ratio(self) -> float:
        """Products computed again in float32 for each gate that opened; NaN without a screen.

        1 is a perfect screen; far above 1, computing again costs more than the screen saves.
        """
        if self.n_candidates is None or self.stats is None:
            return math.nan
        return self.n_candidates / max(int(self.stats.opened.sum()), 1)

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


class StepCheck(NamedTuple):
    """What decides whether a step reaches the weights, and how the next one is computed."""

    loss: float
    grad_norm: float
    n_open: float
    overflowed: float
    max_steps_since_fired: float
    """Of any latent, when the step began."""


class Launched(NamedTuple):
    """A step whose gradients the device was given to compute."""

    result: StepResult
    numbers: Float[Tensor, "5"]
    """The fields of `StepCheck`, on the CPU once they have arrived."""
    arrived: torch.cuda.Event | None

    def check(self) -> StepCheck:
        """Return the numbers, waiting for these gradients and no others."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return StepCheck(*self.numbers.tolist())


class Learner:
    """One SAE and everything its next step depends on, the batch left out.

    `lr` is its peak learning rate and `sparsity` its final lambda.
    """

    def __init__(self, sae: SAE, cfg: TrainConfig, *, lr: float, sparsity: float) -> None:
        self.sae: SAE = sae
        self._cfg, self._lr, self._sparsity = cfg, lr, sparsity
        self._stepper = Stepper(sae, screened=cfg.screened)
        self._optimizer = DictionaryAdam(sae, beta1=cfg.beta1, beta2=cfg.beta2)
        self._dead = DeadLatentCounter(sae, window=cfg.schedule.revive_window)
        self._warmup_start = 0
        # Both of the last step; None before there is one.
        self._last_density: float | None = None
        self._max_steps_since_fired: int | None = None
        self.stopped: str | None = None

    def launch(self, batch: Batch, number: int) -> Launched | None:
        """Give the device step `number`, from 1, without waiting; None once the SAE has stopped."""
        if self.stopped is not None:
            return None
        if number == 1 and isinstance(self.sae, JumpReluSAE):
            self.sae.measure_unit_(rows_of(batch))
        # A loss that hears dead latents costs as much where there are none, unless that is known.
        longest = self._max_steps_since_fired
        window = self._dead.window = self._cfg.stage(number - 1).recipe.schedule.revive_window
        none_dead = longest is not None and longest + 1 < window
        dead = None if none_dead else self._dead.mask
        coeff, density = self._sparsity_coeff(number), self._last_density
        if isinstance(batch, SequenceBatch):
            result = end_to_end_step(self.sae, batch, sparsity_coeff=coeff, dead=dead)
        else:
            result = self._stepper.attempt(batch, sparsity_coeff=coeff, density=density, dead=dead)
        return self._launched(result)

    def finish(
        self,
        launched: Launched | None,
        batch: Batch,
        number: int,
        *,
        pool: Float[Tensor, "pool d_in"] | None,
    ) -> SAEReport:
        """Move the weights, or stop for good; then resample dead latents if there is a pool.

        `launched` is what `launch` returned for this batch and number; `pool` holds recent inputs.
        """
        lr_share = lr_factor(number - 1, self._cfg, warmup_start=self._warmup_start)
        lr, coeff, x = self._lr * lr_share, self._sparsity_coeff(number), rows_of(batch)
        report = partial(SAEReport, lr=lr, sparsity_coeff=coeff, d_sae=self.sae.d_sae)
        result = None if launched is None else self._result(launched, x, number)
        if result is None:
            return report(dead=self._dead.counts, stopped=self.stopped)
        threshold = threshold_lr(self._lr, self._cfg, step=number - 1)
        self._optimizer.step(lr, threshold_lr=threshold * lr_share)
        self._dead.count(result.stats)
        return report(
            dead=self._dead.counts,
            loss=result.loss,
            stats=result.stats.without_latents(),
            n_candidates=result.n_candidates,
            kl=result.kl,
            n_resampled=0 if pool is None else self._resample(pool, number),
        )

    def _launched(self, result: StepResult) -> Launched:
        """Start sending the numbers of a step to the CPU."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        total, norm = result.loss.total, torch.nn.utils.get_total_norm(gradients)
        if (overflowed := result.overflowed) is None:
            overflowed = torch.zeros_like(result.n_entries)
        values = (total, norm, result.n_entries, overflowed, self._dead.since_fired.max())
        # float32 counts exactly only up to 2^24.
        numbers = torch.stack([value.to(sum_dtype(total.device)) for value in values])
        if not numbers.is_cuda:
            return Launched(result, numbers, None)
        # Pinned by `to`, or the copy would wait for the device.
        numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(total.device))
        return Launched(result, numbers, arrived)

    def _result(self, launched: Launched, x: Rows, number: int) -> StepResult | None:
        """Return what a step came to; None if its gradients must not reach the weights."""
        result, check = launched.result, launched.check()
        if check.overflowed:
            logger.info(
                f"expected at most {result.capacity} open gates, got {check.n_open:.0f}: this step "
                "was taken again by the dense way, with the same gradients"
            )
            coeff = self._sparsity_coeff(number)
            result = dense_step(self.sae, x, sparsity_coeff=coeff, dead=self._dead.mask)
            # The room that was too little is the room to ask for next: a dense step counts less.
            check = self._launched(result).check()._replace(n_open=check.n_open)
        if not (math.isfinite(check.loss) and math.isfinite(check.grad_norm)):
            self.stopped = f"step {number}: {nonfinite_cause(self.sae, x, result)}"
            self.sae.zero_grad(set_to_none=True)
            logger.warning("an SAE has stopped learning at %s", self.stopped)
            return None
        self._last_density = check.n_open / (len(x) * self.sae.d_sae)
        self._max_steps_since_fired = int(check.max_steps_since_fired)
        return result

    def _resample(self, pool: Rows, number: int) -> int:
        dead = self._dead.mask.nonzero().squeeze(1)
        if len(dead) == 0:
            return 0
        start = self._cfg.start
        resampled = resample_(
            self.sae, self._optimizer, dead=dead, pool=pool, seed=number, start=start
        )
        if len(resampled):  # else no moment was reset, and there is no new warm-up
            self._dead.restart(resampled)
            self._warmup_start = number
        return len(resampled)

    def _sparsity_coeff(self, number: int) -> float:
        return self._sparsity * sparsity_factor(number - 1, self._cfg)

    def state_dict(self) -> dict[str, Any]:
        """Return copies, on the CPU, of everything the next step depends on."""
        return {
            "weights": {k: v.to("cpu", copy=True) for k, v in self.sae.state_dict().items()},
            "moments": self._optimizer.state_dict(),
            **self._dead.state_dict(),
            "warmup_start": self._warmup_start,
            "density": self._last_density,
            "max_steps_since_fired": self._max_steps_since_fired,
            "stopped": self.stopped,
            "threshold_unit": getattr(self.sae, "threshold_unit", None),
        }

    def check_state(self, state: dict[str, Any], index: int) -> None:
        """Raise InputError unless `state` is of an SAE with these parameters and shapes."""
        if "log_threshold" in state["weights"]:
            raise InputError(
                f"expected SAE {index} of the state to have learnt its thresholds, got one of an "
                "earlier version, which learnt their logarithms and cannot go on here; start a new "
                "run (train --config with the run's config.json, and --init-threshold 0.1 "
                "--bandwidth 0.1, which are today's)"
            )
        ours, saved = (
            ", ".join(sorted(f"{name} {'x'.join(map(str, p.shape))}" for name, p in parameters))
            for parameters in (self.sae.named_parameters(), state["weights"].items())
        )
        if ours != saved:
            raise InputError(
                f"expected SAE {index} of the state to have {ours}, got {saved}; build the trainer "
                "from the config of the run that saved it"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check_state` has passed."""
        self.sae.load_state_dict(state["weights"])
        if isinstance(self.sae, JumpReluSAE):
            self.sae.threshold_unit = state["threshold_unit"]
        self._optimizer.load_state_dict(state["moments"])
        self._dead.load_state_dict(state)
        self._warmup_start = state["warmup_start"]
        self._last_density = state["density"]
        # Unknown of a state of version 0.1; the next step tells.
        self._max_steps_since_fired = state.get("max_steps_since_fired")
        self.stopped = state["stopped"]


class Stepper:
    """Takes each step of one SAE, which stays on its device, by the fastest way."""

    def __init__(self, sae: SAE, *, screened: bool) -> None:
        device = sae.W_dec.device
        self._sae, self._screened = sae, screened
        self._kernels = device.type == "cuda" and has_fast_step(sae)
        if self._kernels and (refusal := kernels.available(device, sae)) is not None:
            logger.warning("every step is a dense one: %s", refusal)
            self._kernels = False

    def attempt(
        self, x: Rows, *, sparsity_coeff: float, density: float | None, dead: Mask | None
    ) -> StepResult:
        """Leave gradients in `.grad`, on a GPU without waiting for them.

        `density` is the share of open gates in the last step, None before there is one.
        """
        sae = self._sae
        if density is None and isinstance(sae, TopKSAE):
            density = sae.k / sae.d_sae  # known beforehand; no latent counts as dead that early
        if self._kernels and density is not None and density < CROSSOVER["cuda"]:
            assert isinstance(sae, BuiltinSAE)  # the kernels refuse others
            # What does not fit is taken again by the dense way.
            room = min(kernels.capacity_for(density * len(x) * sae.d_sae), kernels.MAX_CAPACITY)
            try:
                return kernels.kernel_step(
                    sae, x, sparsity_coeff=sparsity_coeff, capacity=room, dead=dead
                )
            except kernels.LaunchError as error:
                logger.warning("%s; every further step is a dense one", error)
                self._kernels = False
        step = choose_step(sae, density, screened=self._screened)
        return step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead)


def choose_step(sae: SAE, density: float | None, *, screened: bool) -> Callable[..., StepResult]:
    """Return the fastest step without kernels, for the `density` of the last step, if any."""
    exact = sae.W_dec.dtype in (torch.float32, torch.float64)
    if not (has_fast_step(sae) and sae.W_dec.is_cpu and exact):
        return dense_step
    if density is None or density >= CROSSOVER["cpu"]:
        return manual_dense_step if isinstance(sae, GatedSAE | ReluSAE) else dense_step
    return partial(sparse_step, screened=True) if screened else sparse_step


SPOILT = "the activations are not finite"
"""The cause that no SAE and no recipe is to blame for."""


def nonfinite_cause(sae: SAE, x: Rows, result: StepResult) -> str:
    """Return what is not finite about a step whose gradients are in `.grad`."""
    if not bool(x.isfinite().all()):
        return SPOILT
    for name, term in result.loss._asdict().items():
        if not bool(term.isfinite()):
            return f"the {name} loss is not finite"
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name} is not finite"
    return "the gradients are too large to be squared"
