"""The loop over one or many SAEs that learn from one stream of activations."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE
from gsae_core.schedule import shortfalls
from gsae_core.threads import spread
from gsae_core.training.dead_latents import collects, is_revival
from gsae_core.training.learner import Pupil
from gsae_core.training.report import StepReport
from gsae_core.training.step_choice import crossover

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Trainer:
    """SAEs of any architectures and widths, with their optimisers, on one stream.

    Args:
        saes: learn in place. Each learns as it would alone: nothing passes between them.
        cfg: the recipe; `sparsity` and `lrs` hold one number for all SAEs, or one for each.
        measure: whether to find out, in some seconds for each shape that is new to this machine,
            from which density of open gates on the dense step is the faster one.

    Raises:
        InputError: if there is no SAE, one is given twice or normalises every token, their `d_in`
            differ, `sparsity` or `lrs` fit neither way, or `n_tokens` is less than a batch.
    """

    def __init__(self, saes: Sequence[SAE], cfg: TrainConfig, *, measure: bool = False) -> None:
        _check_saes(saes)
        if cfg.n_steps == 0:
            raise InputError(
                f"expected n_tokens of at least one batch ({cfg.batch_size}), got {cfg.n_tokens}; "
                "train on more tokens or in smaller batches"
            )
        for sentence in shortfalls(cfg):
            logger.warning("%s", sentence)
        lrs = _one_each("lrs", cfg.lrs or (cfg.lr,), n_saes=len(saes))
        sparsity = _one_each("sparsity", cfg.sparsity, n_saes=len(saes))
        self.cfg = cfg
        self.steps_done = 0
        self._seconds = 0.0
        crossovers = _on_a_core_each(
            lambda sae: crossover(sae, cfg.batch_size, screened=cfg.screened, measure=measure),
            saes,
            on_cpu=saes[0].b_dec.is_cpu,
        )
        self._pupils = [
            Pupil(sae, cfg, lr=lr, sparsity=coeff, crossover=point)
            for sae, lr, coeff, point in zip(saes, lrs, sparsity, crossovers, strict=True)
        ]
        self._pool: list[Tensor] = []

    @property
    def saes(self) -> tuple[SAE, ...]:
        """The SAEs that learn, in the order in which they were given; asking settles the last step.

        On CUDA, an SAE held elsewhere may lack a step that has to be taken again until the next
        step, `settle`, or any number of its report.
        """
        self.settle()
        return tuple(pupil.sae for pupil in self._pupils)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or every SAE has stopped, as far as is known."""
        return self.steps_done >= self.cfg.n_steps or all(p.stopped for p in self._pupils)

    @property
    def stopped(self) -> tuple[str | None, ...]:
        """Why and when each SAE stopped, as far as is known without waiting for the device.

        On CUDA, known of the last step once it is settled.
        """
        return tuple(pupil.stopped for pupil in self._pupils)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent inside steps so far, and settling them, over resumes."""
        return self._seconds + sum(pupil.seconds_settling for pupil in self._pupils)

    def settle(self) -> None:
        """Wait for the device until the last step has reached the weights, or has been refused."""
        for pupil in self._pupils:
            pupil.settle()

    def step(self, x: Float[Tensor, "batch d_in"]) -> StepReport:
        """Let every SAE learn from one batch, then revive dead latents where that is due.

        An SAE whose loss or gradients are not finite stops with its weights as the step before left
        them; the others go on. On CUDA nothing here waits for this step, the last one and those
        that revive left out: `settle` does.

        Raises:
            InputError: if `x` is of another shape than `(batch_size, d_in)`.
        """
        started = time.perf_counter()
        expected = (self.cfg.batch_size, self._pupils[0].sae.d_in)
        if tuple(x.shape) != expected:
            raise InputError(
                f"expected batches of shape (batch_size, d_in) = {expected}, got "
                f"{tuple(x.shape)}; leave out an incomplete last batch, or change batch_size"
            )
        done = self.steps_done + 1
        if self._pupils[0].ahead:
            x = x.detach().clone()  # a stream may fill one buffer again and again
        if collects(done, self.cfg, widest=max(pupil.sae.d_sae for pupil in self._pupils)):
            self._pool.append(x.detach().clone())
        pool = torch.cat(self._pool) if is_revival(done, self.cfg) else None
        saes = _on_a_core_each(
            lambda pupil: pupil.step(x, steps_done=self.steps_done, pool=pool),
            self._pupils,
            on_cpu=x.is_cpu,
        )
        if pool is not None:
            self._pool.clear()
        self.steps_done = done
        self._seconds += time.perf_counter() - started
        return StepReport(
            step=done,
            n_steps=self.cfg.n_steps,
            tokens=done * self.cfg.batch_size,
            seconds=self.seconds,
            saes=saes,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, batches left out: copies, on the CPU.

        Tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only`.
        """
        saes = [pupil.state_dict() for pupil in self._pupils]
        return {
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "pool": [x.to("cpu", copy=True) for x in self._pool],
            "saes": saes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by `state_dict`: the next steps have the same bits.

        Raises:
            InputError: if it is of other SAEs than these; nothing has changed then.
        """
        if len(state["saes"]) != len(self._pupils):
            raise InputError(
                f"expected a state of {len(self._pupils)} SAEs, got one of {len(state['saes'])}; "
                "build the trainer from the config of the run that saved it"
            )
        for i, (pupil, saved) in enumerate(zip(self._pupils, state["saes"], strict=True)):
            pupil.check(saved, i)
        for pupil, saved in zip(self._pupils, state["saes"], strict=True):
            pupil.load_state_dict(saved)
            pupil.seconds_settling = 0.0
        device = self.saes[0].b_dec.device
        self._pool = [x.to(device, copy=True) for x in state["pool"]]
        self.steps_done, self._seconds = state["steps_done"], state["seconds"]


def train(
    saes: Sequence[SAE],
    batches: Iterable[Float[Tensor, "batch d_in"]],
    cfg: TrainConfig,
    *,
    trainer: Trainer | None = None,
) -> Iterator[StepReport]:
    """Train SAEs in place and yield a report a step, until `cfg.n_steps` or until all have stopped.

    Once the iterator has ended, or is closed, every step is in the weights. Between steps on CUDA
    the last one may not be; reading its report, or `trainer.saes`, makes sure.

        for report in train([sae], batches, cfg):
            if report.step % 100 == 0:
                print(report.step, report.saes[0].l0)

    Args:
        saes: learn in place, and only while the iterator is read.
        batches: activations of shape (batch_size, d_in); no more are taken than there are steps.
        cfg: the recipe.
        trainer: one made from `saes` and `cfg` whose state was loaded; `batches` then begin with
            the one after its last step.

    Raises:
        InputError: as `Trainer` does; if `trainer` is of other SAEs or another recipe; and, while
            iterating, if a batch has the wrong shape or the batches run out.
    """
    if trainer is None:
        trainer = Trainer(saes, cfg)
    same = len(trainer.saes) == len(saes) and all(map(is_, trainer.saes, saes))
    if not same or trainer.cfg != cfg:
        raise InputError(
            f"expected a trainer made from the same SAEs and config, got one of other "
            f"{'settings' if same else 'SAEs'}; make it with Trainer(saes, cfg)"
        )
    return _steps(trainer, iter(batches))


def _steps(trainer: Trainer, batches: Iterator[Tensor]) -> Iterator[StepReport]:
    first, n_steps = trainer.steps_done, trainer.cfg.n_steps
    while not trainer.finished:
        x = next(batches, None)
        if x is None:
            trainer.settle()
            if trainer.finished:
                return  # the last batch stopped them all
            raise InputError(
                f"expected {n_steps - first} batches of {trainer.cfg.batch_size}, got "
                f"{trainer.steps_done - first}; give more data, or lower n_tokens"
            )
        try:
            yield trainer.step(x)
        except GeneratorExit:
            trainer.settle()
            raise


def _on_a_core_each(
    task: Callable[[Item], Result], items: Sequence[Item], *, on_cpu: bool
) -> tuple[Result, ...]:
    """Return the task's result for each SAE.

    On a CPU, two SAEs on a core each are faster than one on two: much of a step (counters, small
    sums) does not spread over cores, and no SAE waits for another. One stacked encoder product for
    all of them would save nothing there: a product of one SAE's size runs at full rate.
    """
    if not on_cpu:
        return tuple(map(task, items))
    return tuple(spread(lambda i: task(items[i]), len(items)))


def _check_saes(saes: Sequence[SAE]) -> None:
    if not saes:
        raise InputError("expected at least one SAE, got none; pass a list of SAEs")
    if len({id(sae) for sae in saes}) < len(saes):
        raise InputError(
            "expected different SAEs, got the same one twice; copy.deepcopy() makes another"
        )
    for sae in saes:
        sae.check_trains()
    widths = sorted({sae.d_in for sae in saes})
    if len(widths) > 1:
        raise InputError(
            f"expected SAEs of one d_in, got {' and '.join(map(str, widths))}; "
            "SAEs that read different activations are trained apart"
        )


def _one_each(name: str, values: tuple[float, ...], *, n_saes: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values * n_saes
    if len(values) != n_saes:
        raise InputError(
            f"expected {name} to hold one number, or one for each of {n_saes} SAEs, "
            f"got {len(values)}"
        )
    return values
