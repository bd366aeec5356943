"""One SAE in training: its step, its optimiser, its counters, and when it has to stop.

Code that looks at a step's loss before its weights move waits for the device, which meanwhile has
nothing to do. On CUDA no code does. A step is *begun*: its gradients are computed, the device
itself keeps a step that overflowed or is not finite from weights, moments and counters, and a few
numbers set out for the CPU. It is *settled* when they are read, after the next step's gradients
have been given to the device: an overflowing step is taken again, the dense way, and the next one's
gradients after it; one that is not finite stops the SAE. Elsewhere a step is settled at once.
"""

import logging
import math
import time
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import sum_dtype
from gsae_core.training.dead_latents import Silence, dead_latents, revive_
from gsae_core.training.optimizer import DictionaryAdam, lr_factor, sparsity_factor, threshold_lr
from gsae_core.training.report import Answer, DeadCounts, Outcome, SAEReport, slim
from gsae_core.training.step_choice import Attempt, Stepper


class Seen(NamedTuple):
    """What a step turned out to be, as numbers."""

    loss: float
    norm: float
    n_open: int
    overflowed: bool
    silent: int
    """Steps that some latent had not fired for when this one began, none longer."""

    @property
    def finite(self) -> bool:
        """Whether the step may reach the weights, unless it overflowed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def weigh(sae: SAE, attempt: Attempt, *, silent: Int32[Tensor, ""]) -> Float[Tensor, "5"]:
    """Return the numbers of a step that was not counted yet, on its device."""
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    total = attempt.result.loss.total
    # float32 counts exactly only up to 2^24.
    values = (total, norm, attempt.n_open, attempt.overflowed, silent)
    return torch.stack([value.to(sum_dtype(total.device)) for value in values])


def spoilt(weighed: Float[Tensor, "5"]) -> Bool[Tensor, ""]:
    """Return, on the device, whether a step must not reach the weights."""
    return ~weighed[:2].isfinite().all() | (weighed[3] != 0)


def read(weighed: Float[Tensor, "5"]) -> Seen:
    """Return the numbers of a step, after one wait for the device."""
    return _seen(*weighed.tolist())


class Courier:
    """Brings the numbers of one step after the other to the CPU while the device works on.

    Args:
        device: where steps are taken.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Pinned: a copy to any other memory would wait.
        self._room = torch.zeros(5, dtype=sum_dtype(device), pin_memory=on_cuda)
        self._numbers = self._room.numpy()  # the same memory
        self._arrived = torch.cuda.Event() if on_cuda else None

    def send(self, weighed: Float[Tensor, "5"]) -> None:
        """Copy the numbers once the device has them; those sent before are gone then."""
        self._room.copy_(weighed, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(weighed.device))

    def read(self) -> Seen:
        """Return the numbers that were sent last, as soon as they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return _seen(*self._numbers.tolist())


def cause(sae: SAE, x: Float[Tensor, "batch d_in"], result: StepResult) -> str:
    """Return what is not finite about a step whose gradients are in `.grad`."""
    if not bool(x.isfinite().all()):
        return "the activations are not finite"
    for name, term in zip(result.loss._fields, result.loss, strict=True):
        if not bool(term.isfinite()):
            return f"the {name} loss is not finite"
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name} is not finite"
    return "the gradients are too large to be squared"


def _seen(loss: float, norm: float, n_open: float, overflowed: float, silent: float) -> Seen:
    return Seen(loss, norm, int(n_open), overflowed=bool(overflowed), silent=int(silent))


logger = logging.getLogger(__name__)

# Where steps are settled late: an event tells when a copy to pinned memory has arrived.
AHEAD_ON = ("cuda",)


class _Lesson(NamedTuple):
    """A step's batch, what it is taken with, and where its outcome goes."""

    x: Float[Tensor, "batch d_in"]
    number: int
    """Steps done, this one included."""
    lr: float
    threshold_lr: float
    sparsity_coeff: float
    answer: Answer


class _Known(NamedTuple):
    """What a step leaves for the choice of a later one's way."""

    density: float | None = None
    """Share of open gates; None before the first step."""
    silent: int | None = None
    """`Seen.silent`; None where it is not known."""


class _Begun(NamedTuple):
    """A step the device has been given; its numbers have not been read."""

    lesson: _Lesson
    attempt: Attempt
    known: _Known
    """What its way was chosen by."""
    dead: DeadCounts


class Pupil:
    """One SAE and everything its next step depends on, the batch left out.

    Args:
        sae: learns in place.
        cfg: the recipe.
        lr: peak learning rate of this SAE.
        sparsity: final lambda of this SAE.
        crossover: density of open gates from which its dense step is the faster one.

    Attributes:
        ahead: whether a step is settled after the next one has been begun.
        stopped: why and when it stopped, as far as is known; None while it learns.
        seconds_settling: seconds that settling took outside of steps.
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
        self.ahead = sae.b_dec.device.type in AHEAD_ON
        self._stepper = Stepper(sae, crossover=crossover, screened=cfg.screened)
        self.adam = DictionaryAdam(sae, beta1=cfg.beta1, beta2=cfg.beta2)
        self._silence = Silence(sae, window=cfg.schedule.revive_window)
        self._courier = Courier(sae.b_dec.device)
        self._begun: _Begun | None = None
        self.warmup_start = 0
        # Of the last step that was settled, and of the one before it.
        self._known = self._known_before = _Known()
        self.stopped: str | None = None
        self.seconds_settling = 0.0

    def step(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        steps_done: int,
        pool: Float[Tensor, "pool d_in"] | None,
    ) -> SAEReport:
        """Learn from one batch, then revive dead latents if there is a pool to revive them from.

        Args:
            x: activations; if `ahead`, no other code writes to them before the next step is over.
            steps_done: steps before this one.
            pool: recent inputs at a step that ends with a revival, else None.
        """
        factor = lr_factor(steps_done, self.cfg, warmup_start=self.warmup_start)
        lesson = _Lesson(
            x=x,
            number=steps_done + 1,
            lr=self.lr * factor,
            threshold_lr=threshold_lr(self.lr, self.cfg) * factor,
            sparsity_coeff=self.sparsity * sparsity_factor(steps_done, self.cfg),
            answer=Answer(self.settle if self.ahead else None),
        )
        if steps_done == 0 and isinstance(self.sae, JumpReluSAE):
            self.sae.measure_unit_(x)
        if self.stopped is not None:
            self._give_nothing(lesson)
        elif self.ahead:
            self._begin(lesson)
        else:
            self._learn(lesson)
        # What comes after the last step finds it settled.
        if pool is not None or lesson.number >= self.cfg.n_steps:
            self._settle()
        n_revived = 0
        if self.stopped is None and pool is not None:
            n_revived = self._revive(pool, steps_done=lesson.number)
        return SAEReport(
            lr=lesson.lr,
            sparsity_coeff=lesson.sparsity_coeff,
            d_sae=self.sae.d_sae,
            n_revived=n_revived,
            answer=lesson.answer,
        )

    def _learn(self, lesson: _Lesson) -> None:
        """Take a step and settle it at once."""
        attempt = self._attempt(lesson, self._known)
        seen = read(self._weigh(attempt))
        if seen.overflowed:
            logger.info("%s", attempt.overflow_note(seen.n_open))
            attempt = self._dense(lesson)
            seen = read(self._weigh(attempt))._replace(n_open=seen.n_open)
        if not seen.finite:
            self._stop(lesson, attempt.result)
            return
        self.adam.step(lesson.lr, threshold_lr=lesson.threshold_lr)
        self._silence.count(attempt.result.stats)
        self._conclude(lesson, attempt.result, seen, dead=self._silence.dead)

    def _begin(self, lesson: _Lesson) -> None:
        """Give the device a step, then settle the one before."""
        # Of step t - 2, no matter when step t - 1 was settled: a run saved or looked at in between
        # must not compute step t another way than one that was left alone.
        known = self._known_before if self._begun is None else self._known
        attempt = self._attempt(lesson, known)
        moved = self._settle()
        if self.stopped is not None:
            self._give_nothing(lesson)
            return
        if moved:
            known = self._known_before
            attempt = self._attempt(lesson, known)
        self._begun = self._guarded(lesson, attempt, known)

    def _guarded(self, lesson: _Lesson, attempt: Attempt, known: _Known) -> _Begun:
        """Take the rest of a step on the device, which leaves all as it was if it is spoilt."""
        weighed = self._weigh(attempt)
        self._courier.send(weighed)
        bad = spoilt(weighed)
        self.adam.step(lesson.lr, threshold_lr=lesson.threshold_lr, unless=bad)
        self._silence.count(attempt.result.stats, unless=bad)
        return _Begun(lesson, attempt, known, self._silence.dead)

    def settle(self) -> None:
        """Wait for the step that was begun last and draw its consequences; do nothing if none."""
        started = time.perf_counter()
        self._settle()
        self.seconds_settling += time.perf_counter() - started

    def _settle(self) -> bool:
        """Settle, and return whether weights moved: the step had to be taken again."""
        if self._begun is None:
            return False
        begun, seen = self._begun, self._courier.read()
        lesson = begun.lesson
        if again := seen.overflowed:
            logger.info("%s", begun.attempt.overflow_note(seen.n_open))
            begun = self._guarded(lesson, self._dense(lesson), begun.known)
            # What there was too little room for: a dense step counts what fires alone.
            seen = self._courier.read()._replace(n_open=seen.n_open)
        if seen.finite:
            self._conclude(lesson, begun.attempt.result, seen, dead=begun.dead)
            if again:
                # Where a step had too many gates the next one has them too, and may be told.
                self._known_before = self._known
        else:
            # For the gradients that tell the cause: others may be in their place by now.
            attempt = self._dense(lesson) if again else self._attempt(lesson, begun.known)
            self._stop(lesson, attempt.result)
        self._begun = None
        return again

    def _attempt(self, lesson: _Lesson, known: _Known) -> Attempt:
        # It has not been counted, and one more step may have followed it: two steps on at most. A
        # loss that hears dead latents costs as much where there are none, unless that is known.
        none_dead = known.silent is not None and known.silent + 2 < self.cfg.schedule.revive_window
        return self._stepper.attempt(
            lesson.x,
            sparsity_coeff=lesson.sparsity_coeff,
            density=known.density,
            dead=None if none_dead else self._silence.over,
        )

    def _dense(self, lesson: _Lesson) -> Attempt:
        return self._stepper.dense(
            lesson.x, sparsity_coeff=lesson.sparsity_coeff, dead=self._silence.over
        )

    def _weigh(self, attempt: Attempt) -> Float[Tensor, "5"]:
        return weigh(self.sae, attempt, silent=self._silence.longest)

    def _conclude(
        self, lesson: _Lesson, result: StepResult, seen: Seen, *, dead: DeadCounts
    ) -> None:
        density = seen.n_open / (lesson.x.shape[0] * self.sae.d_sae)
        self._known_before, self._known = self._known, _Known(density, seen.silent)
        outcome = Outcome(result.loss, slim(result.stats), result.n_candidates, dead, stopped=None)
        lesson.answer.give(outcome)

    def _stop(self, lesson: _Lesson, result: StepResult) -> None:
        """Stop for good, with the weights the step before left; its gradients tell the cause."""
        self.stopped = f"step {lesson.number}: {cause(self.sae, lesson.x, result)}"
        self.sae.zero_grad(set_to_none=True)
        logger.warning("an SAE has stopped learning at %s", self.stopped)
        self._give_nothing(lesson)

    def _give_nothing(self, lesson: _Lesson) -> None:
        lesson.answer.give(Outcome(None, None, None, self._silence.dead, self.stopped))

    def _revive(self, pool: Float[Tensor, "pool d_in"], *, steps_done: int) -> int:
        dead = dead_latents(self._silence.since_fired, window=self.cfg.schedule.revive_window)
        if len(dead) == 0:
            return 0  # and no warm-up again: nothing here is young
        revived = revive_(self.sae, self.adam, dead=dead, pool=pool, seed=steps_done)
        self._silence.restart(revived)
        if len(revived):
            self.warmup_start = steps_done
        return len(revived)

    def state_dict(self) -> dict[str, Any]:
        """Return copies, on the CPU, of everything the next step depends on; it settles first."""
        self.settle()
        return {
            "weights": {k: v.to("cpu", copy=True) for k, v in self.sae.state_dict().items()},
            "moments": self.adam.state_dict(),
            **self._silence.state_dict(),
            "warmup_start": self.warmup_start,
            "density": self._known.density,
            "silent": self._known.silent,
            "known_before": self._known_before._asdict(),
            # Another number here would round some later step differently.
            "crossover": self._stepper.crossover,
            "stopped": self.stopped,
            "threshold_unit": getattr(self.sae, "threshold_unit", None),
        }

    def check(self, state: dict[str, Any], index: int) -> None:
        """Raise InputError unless `state` is of an SAE with these parameters and shapes."""
        if "log_threshold" in state["weights"] and isinstance(self.sae, JumpReluSAE):
            raise InputError(
                f"expected SAE {index} of the state to have learnt its thresholds, got one of an "
                "earlier version, which learnt their logarithms and cannot go on here; start a new "
                "run (train --config with the run's config.json, and --init-threshold 0.1 "
                "--bandwidth 0.1, which are today's)"
            )
        ours = {name: tuple(p.shape) for name, p in self.sae.named_parameters()}
        saved = {name: tuple(w.shape) for name, w in state["weights"].items()}
        if ours != saved:
            raise InputError(
                f"expected SAE {index} of the state to have {_shapes(ours)}, got {_shapes(saved)}; "
                "build the trainer from the config of the run that saved it"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `check` has passed."""
        self.settle()  # for the reports that are still to be read
        self.sae.load_state_dict(state["weights"])
        if isinstance(self.sae, JumpReluSAE):
            self.sae.threshold_unit = state["threshold_unit"]
        self.adam.load_state_dict(state["moments"])
        self._silence.load_state_dict(state)
        self.warmup_start = state["warmup_start"]
        # Earlier states have neither "silent", "known_before" nor "crossover".
        self._known = _Known(state["density"], state.get("silent"))
        self._known_before = _Known(**state.get("known_before", self._known._asdict()))
        self._stepper.crossover = state.get("crossover", self._stepper.crossover)
        self.stopped = state["stopped"]


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
