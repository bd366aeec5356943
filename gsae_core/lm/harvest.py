"""Sequences -> the activation vectors of their counted tokens, a forward pass at a time.

On a CPU the passes run one on each core: a pass whose products are spread over the cores waits at
every layer norm and softmax. Each pass has one thread to itself, however many there are, so the
number of cores changes no bit.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.threads import one_thread_a_core

# Tokens in one forward pass. On a CPU the activations of a pass should stay in a core's cache: on
# two cores the bundled model harvests 22,700 tokens a second by 512 at a time, 21,800 by 2,048,
# 18,600 by 4,096. A GPU wants work; no GPU has been timed, and so many rows fill any for a product.
CPU_PASS_TOKENS, PASS_TOKENS = 2**9, 2**15

Item = TypeVar("Item")
Result = TypeVar("Result")


@runtime_checkable
class Harvester(Protocol):
    """What a harvest needs of a language model; `harvest` may be called from threads at once."""

    def width(self, site: Site) -> int: ...

    def harvest(self, ids: Tensor, *, layer: int, site: Site) -> Tensor: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def check_finite(
    x: Float[Tensor, "vectors d_in"], *, layer: int, site: Site, dtype: torch.dtype
) -> None:
    """Raise InputError if a vector is not finite; it waits for the device. `dtype`: the model's."""
    _refuse(int(_n_not_finite(x)), len(x), layer=layer, site=site, dtype=dtype)


def _n_not_finite(x: Float[Tensor, "vectors d_in"]) -> Int64[Tensor, ""]:
    return (~x.isfinite().all(dim=1)).sum()


def _refuse(n: int, of: int, *, layer: int, site: Site, dtype: torch.dtype) -> None:
    """Raise InputError if `n`, of so many vectors those that are not finite, is not 0."""
    if not n:
        return
    why = f"the language model computes in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        why += f", which overflows above {most:,.0f}; use float32 or bfloat16 for it (--dtype)"
    else:
        why += "; check its weights, or choose another layer or site"
    raise InputError(
        f"expected finite activations at {site} of layer {layer}, got {n:,} of {of:,} vectors "
        f"with infinite or NaN entries: {why}"
    )


class Stopwatch:
    """Seconds that blocks took: on the clock, or of a CUDA stream without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda, self._seconds = device.type == "cuda", 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block; on CUDA, what the current stream is given in it."""
        if not self._on_cuda:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        stop.record()
        self._marks.append((start, stop))

    @property
    def seconds(self) -> float:
        """Seconds so far; on CUDA, of the blocks the device has finished."""
        # Another thread may be appending: marks are taken off one by one, from the old end.
        while self._marks and self._marks[0][1].query():
            start, stop = self._marks.popleft()
            self._seconds += start.elapsed_time(stop) / 1000
        return self._seconds


class Harvest:
    """The counted vectors of sequences at one place of a language model.

    Args:
        layer: block number, from 0.
        rows: sequences in a forward pass; None: `default_rows`. Rounding may depend on it.
    """

    def __init__(
        self,
        model: Harvester,
        sequences: SequenceSet,
        *,
        layer: int,
        site: Site,
        rows: int | None = None,
    ) -> None:
        self._model, self.sequences, self.layer = model, sequences, layer
        self.site: Site = site
        self.rows = rows or default_rows(sequences.n_ctx, model.device)
        self.d_in, self.device = model.width(site), model.device
        self._watch = Stopwatch(model.device)

    @property
    def seconds(self) -> float:
        """Seconds spent in the language model, or waiting for it, so far."""
        return self._watch.seconds

    def vectors(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield the counted vectors of sequences, float32, in order, a part at a time."""
        return self.through(lambda x: x, which)

    def through(
        self, work: Callable[[Float[Tensor, "vectors d_in"]], Result], which: np.ndarray
    ) -> Iterator[Result]:
        """Yield what `work` makes of the vectors of each pass, in order.

        It runs where the pass ran: on a CPU in a thread that has one core, several at once.

        Raises:
            InputError: once all is read, if a vector is not finite: do not keep what was yielded
                before. On a CPU, `work` is not called on passes with such a vector.
        """
        on_cpu = self.device.type == "cpu"
        groups = (which[start : start + self.rows] for start in range(0, len(which), self.rows))

        def task(group: np.ndarray) -> tuple[int, Int64[Tensor, ""], list[Result]]:
            ids, mask = self.sequences[group]
            counted = mask.flatten().nonzero().squeeze(1)
            x = torch.empty(0, self.d_in, device=self.device)
            if len(counted):
                x = self._model.harvest(ids, layer=self.layer, site=self.site).flatten(0, 1)
                x = x.index_select(0, counted.to(x.device)).float()
            bad = _n_not_finite(x)
            # On a GPU, to look at the number would be to wait for the pass.
            spoilt = on_cpu and bool(bad)
            return len(x), bad, [work(x)] if len(x) and not spoilt else []

        # A generator cannot be timed by `with`: its time runs on while it is not asked.
        results = _side_by_side(task, groups, torch.get_num_threads() if on_cpu else 0)
        n, n_bad = 0, torch.zeros((), dtype=torch.int64)
        while True:
            with self._watch.running():
                read = next(results, None)
            if read is None:
                break
            n_read, bad, made = read
            n, n_bad = n + n_read, n_bad.to(bad.device) + bad
            yield from made
        _refuse(int(n_bad), n, layer=self.layer, site=self.site, dtype=self._model.dtype)


def default_rows(n_ctx: int, device: torch.device) -> int:
    """Return how many sequences a forward pass takes."""
    return max(1, (CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS) // n_ctx)


def _side_by_side(
    task: Callable[[Item], Result], items: Iterable[Item], n_threads: int
) -> Iterator[Result]:
    """Yield task(item) in order: `n_threads` at once, each with one thread; 0: here, one by one."""
    if n_threads == 0:
        yield from map(task, items)
        return
    # Two for each thread: one under way, and one to go on with while a result is being used.
    ahead = 2 * n_threads
    items, waiting = iter(items), deque[Future[Result]]()
    pool = one_thread_a_core(n_threads, os.getpid())
    try:
        waiting.extend(pool.submit(task, item) for item in itertools.islice(items, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(task, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
