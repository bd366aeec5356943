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
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.footprint import default_chunk_vectors
from gsae_core.lm.corpus import SequenceSet

log = logging.getLogger(__name__)


# Tokens in one forward pass. A CPU wants its caches and its allocator left alone: the bundled model
# harvests 11,000 tokens a CPU-second by 2,048 at a time, 6,800 by 16,384. A GPU wants work.
CPU_FORWARD_TOKENS, FORWARD_TOKENS = 2**11, 2**15

# E|x|^2 is measured on about so many vectors: the relative error is well below a percent.
SCALE_VECTORS = 2**15

# Keeps the seeds of permutations and of chunks apart, whatever the run's seed.
SEQUENCES, VECTORS = 1, 2


@runtime_checkable
class Harvester(Protocol):
    """What a stream needs of a language model."""

    def width(self, site: Site) -> int: ...

    def harvest(self, ids: Tensor, *, layer: int, site: Site) -> Tensor: ...

    @property
    def device(self) -> torch.device: ...


class _Epoch(NamedTuple):
    """Where everything is in one pass over the sequences."""

    order: np.ndarray
    """Sequences in the order in which they are harvested."""

    sequence_edges: np.ndarray
    """Chunk k is `order[sequence_edges[k] : sequence_edges[k + 1]]`."""

    vector_edges: np.ndarray
    """Chunk k is the epoch's vectors `vector_edges[k]` to `vector_edges[k + 1] - 1`."""


class ActivationStream:
    """Shuffled, scaled batches of a language model's activations.

    Args:
        model: the language model.
        sequences: the training split; at least one batch of counted tokens.
        layer: block number, from 0.
        site: where in the block.
        batch_size: vectors in a batch.
        seed: of the order.
        n_batches: batches in the run; more than the sequences hold means more epochs.
        scale: `unit` multiplies by one scalar so that E|x|^2 = 1; `none` by 1.
        chunk_vectors: most vectors to shuffle at a time; None: `default_chunk_vectors`.

    Attributes:
        d_in: width of a vector.
        scale: what raw activations are multiplied by.
        chunk_vectors: as given or derived; part of what decides the batches.
        tokens_per_epoch: counted tokens of all sequences.
        seconds_harvesting: time spent in the language model so far.

    Raises:
        InputError: if the sequences hold less than one batch, or cannot be scaled to unit length.
    """

    def __init__(
        self,
        model: Harvester,
        sequences: SequenceSet,
        *,
        layer: int,
        site: Site,
        batch_size: int,
        seed: int,
        n_batches: int,
        scale: Literal["unit", "none"] = "unit",
        chunk_vectors: int | None = None,
    ) -> None:
        self._model, self._sequences, self._layer = model, sequences, layer
        self._site: Site = site
        self._batch_size, self._seed, self.n_batches = batch_size, seed, n_batches
        self.d_in = model.width(site)
        self.tokens_per_epoch = sequences.n_tokens
        if self.tokens_per_epoch < batch_size:
            raise InputError(
                f"expected at least one batch of {batch_size} training tokens, got "
                f"{self.tokens_per_epoch}: give more text or a smaller batch_size"
            )
        n_vectors = n_batches * batch_size
        self.chunk_vectors = chunk_vectors or default_chunk_vectors(self.d_in, n_vectors)
        self.seconds_harvesting = 0.0
        self._epoch: tuple[int, _Epoch] | None = None
        self._chunk: tuple[tuple[int, int], Tensor] | None = None
        self.scale = 1.0 if scale == "none" else self._unit_scale()
        log.info(
            "%d batches of %d: %.2f epochs of %d tokens, shuffled %d at a time, scaled by %g",
            n_batches,
            batch_size,
            n_vectors / self.tokens_per_epoch,
            self.tokens_per_epoch,
            self.chunk_vectors,
            self.scale,
        )

    @cached_property
    def mean_square_norm(self) -> float:
        """E|x|^2 of raw activations, over the first sequences of the first epoch (2^15 vectors)."""
        order = self._order(0)
        enough = np.searchsorted(np.cumsum(self._sequences.counts[order]), SCALE_VECTORS) + 1
        total, n = 0.0, 0
        for x in self._harvest(np.sort(order[:enough])):
            total += float(x.double().square().sum())
            n += len(x)
        return total / n

    def batch(self, i: int) -> Float[Tensor, "batch d_in"]:
        """Return batch `i`: scaled, float32, contiguous, on the model's device, the caller's own.

        Cheap in order; out of order, each batch may harvest a chunk.

        Raises:
            IndexError: if `i` is not from 0 to `n_batches - 1`.
        """
        if not 0 <= i < self.n_batches:
            raise IndexError(f"expected a batch from 0 to {self.n_batches - 1}, got {i}")
        start, stop = i * self._batch_size, (i + 1) * self._batch_size
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            edges = self._plan(epoch).vector_edges
            k = int(np.searchsorted(edges, offset, side="right")) - 1
            taken = min(stop - start, int(edges[k + 1]) - offset)
            first = offset - int(edges[k])
            parts.append(self._shuffled_chunk(epoch, k)[first : first + taken] * self.scale)
            start += taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Yield batches `start` to `n_batches - 1` in order."""
        for i in range(start, self.n_batches):
            yield self.batch(i)

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch, 0, SEQUENCES])
        return rng.permutation(len(self._sequences))

    def _plan(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            order = self._order(epoch)
            ends = np.cumsum(self._sequences.counts[order])
            left = self.n_batches * self._batch_size - epoch * self.tokens_per_epoch
            if left < self.tokens_per_epoch:
                n = int(np.searchsorted(ends, left)) + 1
                order, ends = order[:n], ends[:n]
            n_chunks = -(-int(ends[-1]) // self.chunk_vectors)
            targets = ends[-1] * np.arange(1, n_chunks + 1) // n_chunks
            # Two targets may fall into one sequence, which is then a chunk by itself.
            stops = np.unique(np.searchsorted(ends, targets) + 1)
            edges = np.concatenate([[0], stops])
            self._epoch = epoch, _Epoch(order, edges, np.concatenate([[0], ends[stops - 1]]))
        return self._epoch[1]

    def _shuffled_chunk(self, epoch: int, k: int) -> Float[Tensor, "vectors d_in"]:
        """Return the raw vectors of a chunk in their final order; one chunk is kept."""
        if self._chunk is None or self._chunk[0] != (epoch, k):
            self._chunk = None  # frees its memory before the next one is filled
            plan = self._plan(epoch)
            which = plan.order[plan.sequence_edges[k] : plan.sequence_edges[k + 1]]
            n = int(plan.vector_edges[k + 1] - plan.vector_edges[k])
            rng = np.random.default_rng([self._seed, epoch, k, VECTORS])
            places = torch.from_numpy(rng.permutation(n))
            chunk: Tensor | None = None
            done = 0
            # Sorted, so that a mapped file is read in one direction.
            for x in self._harvest(np.sort(which)):
                if chunk is None:
                    chunk = x.new_empty(n, self.d_in)
                chunk[places[done : done + len(x)].to(x.device)] = x
                done += len(x)
            assert chunk is not None
            assert done == n
            self._chunk = (epoch, k), chunk
        return self._chunk[1]

    def _harvest(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield the counted vectors of sequences, float32, a forward pass at a time."""
        on_cpu = self._model.device.type == "cpu"
        rows = max(1, (CPU_FORWARD_TOKENS if on_cpu else FORWARD_TOKENS) // self._sequences.n_ctx)
        for start in range(0, len(which), rows):
            ids, mask = self._sequences[which[start : start + rows]]
            counted = mask.flatten().nonzero().squeeze(1)
            if not len(counted):
                continue
            began = time.perf_counter()
            x = self._model.harvest(ids, layer=self._layer, site=self._site).flatten(0, 1)
            x = x.index_select(0, counted.to(x.device)).float()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)  # or the time would be that of the next step
            self.seconds_harvesting += time.perf_counter() - began
            yield x

    def _unit_scale(self) -> float:
        if not 0 < self.mean_square_norm < float("inf"):
            raise InputError(
                f"expected activations with a finite length above 0 at {self._site} of layer "
                f"{self._layer}, got E|x|^2 = {self.mean_square_norm}: choose another site, or "
                "float32 for the model"
            )
        return self.mean_square_norm**-0.5
