"""Tokens -> shuffled batches of activations; batch i is a pure function of (config, i).

The order of everything is known before the language model runs, from the masks alone:

- An epoch holds every counted token once, in a seeded permutation of the sequences. It is cut, at
  ends of sequences, into chunks of about equal size: at most `chunk_vectors` and one sequence.
- A chunk is harvested whole and shuffled by a generator seeded with (seed, epoch, chunk).
- Shuffled chunks set end to end, epoch after epoch, are one line of vectors; batch i is its vectors
  i B to (i + 1) B - 1. A batch may straddle chunks, so no vector is left over between them.
- A further epoch has its own permutation. The last one takes only as many sequences as are needed.

So nothing but `i` needs to be saved to resume, and two runs with one config see the same data.
"""

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from functools import cached_property
from typing import Literal, NamedTuple
from weakref import ref

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import NO_PLACE, Place
from gsae_core.errors import InputError
from gsae_core.lm.harvest import Harvest
from gsae_core.norms import Lengths, lengths, longer
from gsae_core.text import WORDS

log: logging.Logger = logging.getLogger(__name__)

# E|x|^2 is measured on about so many vectors: the relative error is well below a percent.
SCALE_VECTORS = 2**15

# Keeps the seeds of permutations, of chunks and of what takes the places of outliers apart, for
# every seed of a run.
SEQUENCES, VECTORS, STAND_INS = 1, 2, 3

# 2^20 vectors mix thousands of sequences; 2 GiB of them leave room for the rest on a laptop.
MAX_CHUNK_VECTORS, MAX_CHUNK_BYTES = 2**20, 2**31

# A short run is cut into 8 chunks, so that its first step need not wait for half of its harvest,
# but never below 2^16 vectors: 16 of the usual batches, a few hundred sequences.
CHUNKS_PER_RUN, MIN_CHUNK_VECTORS = 8, 2**16


def default_chunk_vectors(d_in: int, n_vectors: int) -> int:
    """Return how many of a run's vectors to shuffle at a time, on any machine.

    `d_in` is that of the widest place, for any number of places: where all are as wide, each
    is shuffled as it would be alone.
    """
    fitting = max(1, MAX_CHUNK_BYTES // (4 * d_in))
    share = max(MIN_CHUNK_VECTORS, n_vectors // CHUNKS_PER_RUN)
    return min(MAX_CHUNK_VECTORS, fitting, share)


Chunk = tuple[Tensor, ...]
"""Of each place, float32 (vectors, d_in)."""


class _Plan(NamedTuple):
    """A chunk: all that its bits depend on besides the harvest."""

    start: int
    """Its first vector, counted from the beginning of the run."""
    n_vectors: int
    sequences: np.ndarray
    """Sorted, so that a mapped file is read in one direction."""
    seed: tuple[int, ...]


class ActivationStream:
    """Shuffled, scaled batches of a language model's activations.

    Where the harvest is of several places, one pass fills the chunks of all, in the same order.

    Args:
        harvest: of the training split; at least one batch of counted tokens. On CUDA it runs in a
            stream of its own, so that most of its seconds pass beside training.
        n_batches: batches in the run; more than the sequences hold means more epochs.
        scale: `unit` multiplies by one scalar, for each place, so that E|x|^2 = 1; `none` by 1.
        max_norm_ratio: leave vectors out that are longer than so many medians of their place.
        scale_of: whose E|x|^2 is 1: that of `ordinary` vectors, which are no outliers, or of `all`,
            as earlier versions had it.
        chunk_vectors: most vectors to shuffle at a time, on which the batches depend; None:
            `default_chunk_vectors`.

    Attributes:
        ahead: whether the next chunk is filled while this one is used: on CUDA.
        scale: what raw activations are multiplied by, at the first place.
        scales: the same, of each place.
        limits: the length above which vectors are left out, of each place; infinite if none are.
        seconds: wall-clock time that harvesting the chunks took which were asked for so far.
        tokens_per_epoch: counted tokens of all sequences.
    """

    def __init__(
        self,
        harvest: Harvest,
        *,
        batch_size: int,
        seed: int,
        n_batches: int,
        scale: Literal["unit", "none"] = "unit",
        chunk_vectors: int | None = None,
        max_norm_ratio: float | None = None,
        scale_of: Literal["ordinary", "all"] = "ordinary",
    ) -> None:
        self.harvest: Harvest = harvest
        self.n_batches: int = n_batches
        self._counts, self._batch_size, self._seed = harvest.sequences.counts, batch_size, seed
        self.tokens_per_epoch: int = harvest.sequences.n_tokens
        if self.tokens_per_epoch < batch_size:
            raise InputError(
                f"expected at least one batch of {batch_size} training {harvest.unit}s, got "
                f"{self.tokens_per_epoch}: give more {WORDS[harvest.unit].read} or a smaller "
                "batch_size"
            )
        self._n_vectors = n_batches * batch_size
        usual = default_chunk_vectors(max(harvest.widths), self._n_vectors)
        self.chunk_vectors: int = chunk_vectors or usual
        self.max_norm_ratio: float | None = max_norm_ratio
        self.scale_of: Literal["ordinary", "all"] = scale_of
        self._epoch: tuple[int, list[_Plan]] | None = None
        self._chunk: tuple[int, Chunk] | None = None
        self._next: tuple[int, Future[tuple[Chunk, float]]] | None = None
        self.seconds: float = 0.0
        self.ahead: bool = harvest.device.type == "cuda"
        self._cuda_stream = torch.cuda.Stream(harvest.device) if self.ahead else None
        if self._cuda_stream is not None:
            # The weights may still be on their way.
            self._cuda_stream.wait_stream(torch.cuda.current_stream(harvest.device))
        self.scales: tuple[float, ...] = (1.0,) * len(harvest.places)
        if scale == "unit":
            for place, power in zip(harvest.places, self.mean_square_norms, strict=True):
                if place == NO_PLACE and power == 0:
                    raise InputError(
                        "expected vectors with a length above 0, got E|x|^2 = 0: check what wrote "
                        "the folder"
                    )
                if not 0 < power < float("inf"):
                    raise InputError(
                        "expected activations with a finite length above 0 at "
                        f"{place.site} of layer {place.layer}, got E|x|^2 = {power}: choose "
                        "another site, or float32 for the model"
                    )
            self.scales = tuple(power**-0.5 for power in self.mean_square_norms)
        self.scale: float = self.scales[0]
        self.limits: tuple[float, ...] = (float("inf"),) * len(self.scales)
        if max_norm_ratio is not None:
            self.limits = tuple(max_norm_ratio * each.median for each in self.lengths)
        epochs = self._n_vectors / self.tokens_per_epoch
        log.info(
            f"{n_batches} batches of {batch_size}: {epochs:.2f} epochs of {self.tokens_per_epoch} "
            f"{harvest.unit}s, shuffled {self.chunk_vectors} at a time, scaled by "
            f"{', '.join(f'{each:g}' for each in self.scales)}"
        )

    @property
    def mean_square_norm(self) -> float:
        """The first of `mean_square_norms`."""
        return self.mean_square_norms[0]

    @property
    def mean_square_norms(self) -> tuple[float, ...]:
        """E|x|^2 of raw activations at each place, of those that set its scale."""
        by_all = self.scale_of == "all"
        return tuple(each.mean_square if by_all else each.ordinary for each in self.lengths)

    @cached_property
    def lengths(self) -> tuple[Lengths, ...]:
        """What the first sequences of the first epoch (2^15 vectors) say of |x| at each place."""
        ratio = self.max_norm_ratio
        return tuple(lengths(x, max_ratio=ratio) for x in self.first(SCALE_VECTORS))

    def first(self, n: int) -> list[Tensor]:
        """Return raw activations of the first epoch's first sequences, at least `n` of each place.

        Fewer where there are no more. They are on the CPU.
        """
        order = self._order(0)
        enough = np.searchsorted(np.cumsum(self._counts[order]), n) + 1
        found = [[x.cpu() for x in xs] for xs in self.harvest.parts(np.sort(order[:enough]))]
        return [torch.cat(xs) for xs in zip(*found, strict=True)]

    def batch(self, i: int) -> Float[Tensor, "batch d_in"]:
        """Return batch `i`: scaled, float32, contiguous, on the model's device, the caller's own.

        It is the first place's. Cheap in order; out of order, each batch may harvest a chunk.
        """
        return self.batch_of_each(i)[0]

    def batch_of_each(self, i: int) -> tuple[Float[Tensor, "batch _"], ...]:
        """Return batch `i` of every place: row for row activations of the same tokens."""
        if not 0 <= i < self.n_batches:
            raise IndexError(f"expected a batch from 0 to {self.n_batches - 1}, got {i}")
        start, stop = i * self._batch_size, (i + 1) * self._batch_size
        parts = []
        while start < stop:
            plan = self._plan(start)
            first = start - plan.start
            pairs = zip(self._filled(plan), self.scales, strict=True)
            parts.append([x[first : first + stop - start] * scale for x, scale in pairs])
            start += len(parts[-1][0])
        return tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Return an iterator over batches `start` to `n_batches - 1` in order."""
        return map(self.batch, range(start, self.n_batches))

    def batches_of_each(self, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Return an iterator over the same batches of every place."""
        return map(self.batch_of_each, range(start, self.n_batches))

    # The order of everything

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch, 0, SEQUENCES])
        return rng.permutation(len(self._counts))

    def _plans(self, epoch: int) -> list[_Plan]:
        if self._epoch is None or self._epoch[0] != epoch:
            order, start = self._order(epoch), epoch * self.tokens_per_epoch
            ends = np.cumsum(self._counts[order])
            left = self._n_vectors - start
            if left < self.tokens_per_epoch:
                n = int(np.searchsorted(ends, left)) + 1
                order, ends = order[:n], ends[:n]
            n_chunks = -(-int(ends[-1]) // self.chunk_vectors)
            targets = ends[-1] * np.arange(1, n_chunks + 1) // n_chunks
            # Two targets may fall into one sequence, which is then a chunk by itself.
            stops = np.unique(np.searchsorted(ends, targets) + 1)
            edges, plans = [start, *(start + ends[stops - 1]).tolist()], []
            for k, which in enumerate(np.split(order, stops)[: len(stops)]):
                seed = (self._seed, epoch, k, VECTORS)
                n_vectors = edges[k + 1] - edges[k]
                plans.append(_Plan(edges[k], n_vectors, np.sort(which), seed))
            self._epoch = epoch, plans
        return self._epoch[1]

    def _plan(self, i: int) -> _Plan:
        """Return the chunk with the run's vector `i`."""
        plans = self._plans(i // self.tokens_per_epoch)
        return plans[bisect_right(plans, i, key=lambda plan: plan.start) - 1]

    # The chunk that was asked for last, and the one after it

    def _filled(self, plan: _Plan) -> Chunk:
        """Return the raw vectors of a chunk in their final order."""
        if self._chunk is None or self._chunk[0] != plan.start:
            self._chunk = None  # frees its memory before the next one is filled
            self._chunk = plan.start, self._fetch(plan)
            after = plan.start + plan.n_vectors
            if self.ahead and after < self._n_vectors:
                self._next = after, self._beside(self._plan(after))
        return self._chunk[1]

    def _fetch(self, plan: _Plan) -> Chunk:
        if self.ahead:
            if self._next is None or self._next[0] != plan.start:
                self._next = plan.start, self._beside(plan)
            chunk, seconds = self._next[1].result()
            self._next = None
            for x in chunk:
                if x.is_cuda:
                    # Its memory belongs to the other stream, which must not have it back too early.
                    x.record_stream(torch.cuda.current_stream(x.device))
        else:
            chunk, seconds = _fill(self.harvest, plan, self.limits)
        self.seconds += seconds
        return chunk

    def _beside(self, plan: _Plan) -> Future[tuple[Chunk, float]]:
        """Return what `_fill` will, called in a thread and on CUDA in a stream of its own.

        The thread holds neither `self` nor the future, and ends early once that is dropped.
        """
        future: Future[tuple[Chunk, float]] = Future()
        wanted, harvest, stream = ref(future), self.harvest, self._cuda_stream
        limits = self.limits

        def check() -> None:
            # Threads are waited for when Python ends; this chunk is not needed then.
            if wanted() is None or not threading.main_thread().is_alive():
                raise CancelledError

        def fill() -> None:
            try:
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    done = _fill(harvest, plan, limits, check)
            except BaseException as error:
                if (waiting := wanted()) is not None:
                    waiting.set_exception(error)
            else:
                if (waiting := wanted()) is not None:
                    waiting.set_result(done)

        threading.Thread(target=fill, name="harvest").start()
        return future


def _fill(
    harvest: Harvest,
    plan: _Plan,
    limits: tuple[float, ...],
    check: Callable[[], None] = lambda: None,
) -> tuple[Chunk, float]:
    """Return a chunk and the seconds it took; `check` is called before each pass is kept.

    `limits`: see `ActivationStream`.
    """
    began = time.perf_counter()
    rows = torch.from_numpy(np.random.default_rng(plan.seed).permutation(plan.n_vectors))
    chunk: Chunk = ()
    done = 0
    for found in harvest.parts(plan.sequences):
        check()
        chunk = chunk or tuple(x.new_empty(plan.n_vectors, x.shape[1]) for x in found)
        mine = rows[done : done + len(found[0])]
        done += len(mine)
        for of_place, x in zip(chunk, found, strict=True):
            if x.device.type == "cpu":
                # torch would wake a team of threads for each pass, which then spin for work on the
                # cores that the next passes run on: a quarter of the processor time of a harvest.
                of_place.numpy()[mine.numpy()] = x.numpy()
            else:
                of_place[mine.to(x.device)] = x
    assert chunk
    assert done == plan.n_vectors
    for x, limit, place in zip(chunk, limits, harvest.places, strict=True):
        if limit < float("inf"):
            _leave_out_(x, limit, place, (*plan.seed[:-1], STAND_INS))
    if chunk[0].is_cuda:
        torch.cuda.current_stream(chunk[0].device).synchronize()
    return chunk, time.perf_counter() - began


def _leave_out_(
    x: Float[Tensor, "vectors d_in"], limit: float, place: Place, seed: tuple[int, ...]
) -> None:
    """Put other vectors of a chunk, drawn by its own seed, where some are longer than `limit`.

    How many there are is not known before the model runs, and the order of all others must be.
    """
    long = longer(x, limit)
    n, kept = int(long.sum()), (~long).nonzero()[:, 0]
    if not len(kept):
        raise InputError(
            f"expected activations of a length up to {limit:g} at {place.hook_name}, got none "
            f"among {n:,} in a row: raise max_norm_ratio"
        )
    drawn = torch.from_numpy(np.random.default_rng(seed).integers(len(kept), size=n))
    x[long] = x[kept[drawn.to(kept.device)]]
