"""The loop over one or many SAEs that learn from one stream of activations."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsae_core.config import TrainConfig, shortfalls
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE
from gsae_core.threads import spread
from gsae_core.training.dead_latents import is_resampling, joins_pool
from gsae_core.training.end_to_end import Batch, SequenceBatch, rows_of
from gsae_core.training.learner import Learner, SAEReport

logger: logging.Logger = logging.getLogger(__name__)


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


class Trainer:
    """SAEs of any architectures, with their optimisers, on one stream.

    Each learns in place, as it would alone: nothing passes between them.

    Args:
        cfg: its `sparsity` and `lrs` hold one number for all, or one for each.
        measure: without effect; an earlier version timed its ways of computing a step.
        reads: for each SAE the number, from 0, of the batch it learns from, where a step brings
            several, one of each place; None: there is one.

    Attributes:
        steps_done: steps so far, over resumes.
        seconds: wall-clock time spent inside them.

    Raises:
        InputError: if there are no SAEs, one comes twice, one normalises every token or those that
            read one batch differ in `d_in`; if `cfg` holds no whole batch, or neither one lambda
            nor one for each.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        cfg: TrainConfig,
        *,
        measure: bool = False,
        reads: Sequence[int] | None = None,
    ) -> None:
        if not saes:
            raise InputError("expected at least one SAE, got none; pass a list of SAEs")
        if len({id(sae) for sae in saes}) < len(saes):
            raise InputError(
                "expected different SAEs, got the same one twice; copy.deepcopy() makes another"
            )
        for sae in saes:
            sae.check_trains()
        self._reads: tuple[int, ...] = tuple(reads or [0] * len(saes))
        self._n_batches: int = max(self._reads) + 1
        if len(self._reads) != len(saes) or {*self._reads} != {*range(self._n_batches)}:
            raise InputError(
                f"expected the number of a batch from 0 for each of {len(saes)} SAEs, and every "
                f"batch read, got reads={list(self._reads)}"
            )
        for batch in range(self._n_batches):
            pairs = zip(saes, self._reads, strict=True)
            widths = sorted({sae.d_in for sae, read in pairs if read == batch})
            if len(widths) > 1:
                raise InputError(
                    f"expected SAEs of one d_in, got {' and '.join(map(str, widths))}; "
                    "SAEs that read different activations are trained apart"
                )
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
        self.steps_done: int = 0
        self.seconds: float = 0.0  # spent inside steps, over resumes
        settings = zip(saes, lrs, sparsity, strict=True)
        self._learners = [Learner(sae, cfg, lr=lr, sparsity=coeff) for sae, lr, coeff in settings]
        self._pools: list[list[Tensor]] = [[] for _ in range(self._n_batches)]

    @property
    def saes(self) -> tuple[SAE, ...]:
        """The SAEs, in the order in which they were given."""
        return tuple(learner.sae for learner in self._learners)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or every SAE has stopped."""
        return self.steps_done >= self.cfg.n_steps or all(self.stopped)

    @property
    def stopped(self) -> tuple[str | None, ...]:
        """Why and when each SAE stopped; None for those that learn."""
        return tuple(learner.stopped for learner in self._learners)

    def step(self, x: Batch | tuple[Batch, ...]) -> StepReport:
        """Let every SAE learn from its batch, then resample dead latents where that is due.

        `x` is a batch, or one for each number in `reads`. From a `SequenceBatch`, of about
        `batch_size` rows, SAEs learn by the end-to-end loss. An SAE whose loss or gradients are not
        finite stops, its weights as they were; others go on.
        """
        started = time.perf_counter()
        batches = x if isinstance(x, tuple) else (x,)
        number, learners = self.steps_done + 1, self._learners
        pools = self._pooled(batches, number)
        seen = [(batches[read], pools[read]) for read in self._reads]
        if rows_of(batches[0]).is_cpu:
            # Two SAEs on a core each are faster than one on two: much of a step (counters, small
            # sums) does not spread over cores. One stacked encoder product for all would save
            # nothing: one SAE's runs at full rate.
            def step(i: int) -> SAEReport:
                x, pool = seen[i]
                return learners[i].finish(learners[i].launch(x, number), x, number, pool=pool)

            saes = spread(step, len(learners))
        else:
            # All are launched before one is waited for, so the device is never without work.
            launched = [each.launch(x, number) for each, (x, _) in zip(learners, seen, strict=True)]
            saes = [
                learner.finish(its, x, number, pool=pool)
                for learner, its, (x, pool) in zip(learners, launched, seen, strict=True)
            ]
        self.steps_done = number
        self.seconds += time.perf_counter() - started
        return StepReport(
            step=number,
            n_steps=self.cfg.n_steps,
            tokens=number * self.cfg.batch_size,
            seconds=self.seconds,
            saes=tuple(saes),
        )

    def _pooled(self, batches: tuple[Batch, ...], number: int) -> list[Tensor | None]:
        """Add the batches of a step to the pools that are due; return the full ones, emptied."""
        if len(batches) != self._n_batches:
            raise InputError(
                f"expected {self._n_batches} batches a step, one for each place, got {len(batches)}"
            )
        full: list[Tensor | None] = []
        for read, batch in enumerate(batches):
            readers = [s for s, own in zip(self.saes, self._reads, strict=True) if own == read]
            x = rows_of(batch)
            n_rows = len(x) if isinstance(batch, SequenceBatch) else self.cfg.batch_size
            expected = (n_rows, readers[0].d_in)
            if tuple(x.shape) != expected:
                raise InputError(
                    f"expected batches of shape (batch_size, d_in) = {expected}, got "
                    f"{tuple(x.shape)}; leave out an incomplete last batch, or change batch_size"
                )
            pool = self._pools[read]
            if joins_pool(number, self.cfg, widest=max(sae.d_sae for sae in readers)):
                pool.append(x.detach().clone())
            due = is_resampling(number, self.cfg)
            full.append(torch.cat(pool) if due else None)
            if due:
                pool.clear()
        return full

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, batches left out: copies, on the CPU.

        Tensors, numbers, strings, lists and dicts only, so that it loads with `weights_only`.
        """
        return {
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "pool": _copies(self._pools[0], "cpu"),
            "pools_beside": [_copies(pool, "cpu") for pool in self._pools[1:]],
            "saes": [learner.state_dict() for learner in self._learners],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state to the same bits; nothing has changed after an InputError."""
        if len(state["saes"]) != len(self._learners):
            raise InputError(
                f"expected a state of {len(self._learners)} SAEs, got one of {len(state['saes'])}; "
                "build the trainer from the config of the run that saved it"
            )
        pairs = list(zip(self._learners, state["saes"], strict=True))
        for i, (learner, saved) in enumerate(pairs):
            learner.check_state(saved, i)
        for learner, saved in pairs:
            learner.load_state_dict(saved)
        device = self.saes[0].b_dec.device
        # Earlier versions read one place alone.
        pools = [state["pool"], *state.get("pools_beside", [])]
        self._pools = [_copies(pool, device) for pool in pools]
        self.steps_done, self.seconds = state["steps_done"], state["seconds"]


def train(
    saes: Sequence[SAE],
    batches: Iterable[Batch] | Iterable[tuple[Batch, ...]],
    cfg: TrainConfig,
    *,
    trainer: Trainer | None = None,
) -> Iterator[StepReport]:
    """Train SAEs in place and yield a report a step, until `cfg.n_steps` or until all have stopped.

        for report in train([sae], batches, cfg):
            if report.step % 100 == 0:
                print(report.step, report.saes[0].l0)

    They learn only while the iterator is read. No more batches, of shape (batch_size, d_in), are
    taken than there are steps; InputError if they run out. A `trainer` is made from the same `saes`
    and `cfg`, its state loaded; `batches` then begin with the one after its last step.
    """
    trainer = trainer or Trainer(saes, cfg)
    if [*map(id, trainer.saes)] != [*map(id, saes)] or trainer.cfg != cfg:
        raise InputError(
            "expected a trainer made from these SAEs and this config, got one made from others; "
            "make it with Trainer(saes, cfg)"
        )
    return _steps(trainer, iter(batches))


def _steps(trainer: Trainer, batches: Iterator[Batch | tuple[Batch, ...]]) -> Iterator[StepReport]:
    first, n_steps = trainer.steps_done, trainer.cfg.n_steps
    while not trainer.finished:
        x = next(batches, None)
        if x is None:
            raise InputError(
                f"expected {n_steps - first} batches of {trainer.cfg.batch_size}, got "
                f"{trainer.steps_done - first}; give more data, or lower n_tokens"
            )
        yield trainer.step(x)


def _copies(pool: list[Tensor], device: torch.device | str) -> list[Tensor]:
    return [x.to(device, copy=True) for x in pool]


def _one_each(name: str, values: Sequence[float], *, n_saes: int) -> tuple[float, ...]:
    if len(values) not in (1, n_saes):
        raise InputError(
            f"expected {name} to hold one number, or one for each of {n_saes} SAEs, "
            f"got {len(values)}"
        )
    return tuple(values) * (n_saes // len(values))
