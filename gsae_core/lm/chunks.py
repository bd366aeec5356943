"""Shuffled chunks of vectors: one at a time, and on CUDA the next one while this one is used.

The next chunk is filled by a thread of its own on a CUDA stream of its own, so that the language
model works while SAEs train. On a CPU training keeps every core busy, and nothing is filled ahead.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.lm.harvest import VectorSource

# A chunk that takes more of a GPU's memory than this share is kept in pinned host memory: there
# are two of them when one is filled ahead, and the SAEs and the language model want room as well.
GPU_SHARE = 1 / 8


class ChunkPlan(NamedTuple):
    """What a chunk holds and in which order; all that its bits depend on besides the source."""

    epoch: int
    k: int
    sequences: np.ndarray
    """Sorted, so that a mapped file is read in one direction."""

    n: int
    """Counted vectors of the sequences."""

    seed: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.k


class Filled(NamedTuple):
    """A chunk, and on CUDA the event after which it is whole."""

    x: Tensor
    whole: torch.cuda.Event | None


class Chunks:
    """The chunk that was asked for last.

    Args:
        source: of the vectors.
        ahead: fill the next chunk in the background; None: on CUDA only.
    """

    def __init__(self, source: VectorSource, *, ahead: bool | None = None) -> None:
        self._source, self._device = source, source.device
        on_cuda = source.device.type == "cuda"
        self._ahead = on_cuda if ahead is None else ahead
        self._stream = torch.cuda.Stream(source.device) if on_cuda and self._ahead else None
        if self._stream is not None:
            # The weights may still be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(source.device))
        self._now: tuple[tuple[int, int], Tensor] | None = None
        self._next: _Background | None = None

    def get(
        self,
        key: tuple[int, int],
        plans: Callable[[int, int], tuple[ChunkPlan, ChunkPlan | None]],
    ) -> Float[Tensor, "vectors d_in"]:
        """Return the raw vectors of a chunk in their final order.

        Args:
            key: epoch and number of the chunk.
            plans: returns its plan and that of the chunk after it, if there is one.
        """
        if self._now is None or self._now[0] != key:
            self._now = None  # frees its memory before the next one is filled
            plan, following = plans(*key)
            self._now = key, self._fetch(plan)
            if self._ahead and following is not None:
                self._next = _Background(self._source, following, self._stream)
        return self._now[1]

    def _fetch(self, plan: ChunkPlan) -> Tensor:
        background, self._next = self._next, None
        if background is not None and background.plan.key != plan.key:
            background.stop()
            background = None
        if background is None and self._stream is not None:
            background = _Background(self._source, plan, self._stream)
        filled = fill(self._source, plan) if background is None else background.result()
        if filled.whole is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(filled.whole)
            if filled.x.is_cuda:
                # Its memory belongs to the other stream, which must not have it back too early.
                filled.x.record_stream(stream)
        return filled.x

    def __del__(self) -> None:
        if getattr(self, "_next", None) is not None:
            assert self._next is not None
            self._next.abandon()


class _Background:
    """A chunk that is being filled by a thread. It holds nothing that holds it: see `__del__`."""

    def __init__(
        self, source: VectorSource, plan: ChunkPlan, stream: torch.cuda.Stream | None
    ) -> None:
        self.plan = plan
        self._future: Future[Filled] = Future()
        self._unwanted = threading.Event()
        threading.Thread(
            target=_run, args=(self._future, source, plan, stream, self._unwanted), name="harvest"
        ).start()

    def result(self) -> Filled:
        return self._future.result()

    def abandon(self) -> None:
        """Let the thread end after the pass it is at."""
        self._unwanted.set()

    def stop(self) -> None:
        """Abandon it and wait for its end."""
        self.abandon()
        self._future.exception()


class _Unwanted(Exception):
    """Ends the filling of a chunk that will not be asked for."""


def _run(
    future: Future[Filled],
    source: VectorSource,
    plan: ChunkPlan,
    stream: torch.cuda.Stream | None,
    unwanted: threading.Event,
) -> None:
    def check() -> None:
        # Threads are waited for when Python ends; this chunk is not needed then.
        if unwanted.is_set() or not threading.main_thread().is_alive():
            raise _Unwanted

    try:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            filled = fill(source, plan, check)
            if stream is not None:
                filled = filled._replace(whole=stream.record_event())
        future.set_result(filled)
    except BaseException as error:
        future.set_exception(error)


def fill(source: VectorSource, plan: ChunkPlan, check: Callable[[], None] = lambda: None) -> Filled:
    """Return a chunk, filled on the current stream; `check` is called before each pass is kept."""
    places = torch.from_numpy(np.random.default_rng(plan.seed).permutation(plan.n))
    chunk: Tensor | None = None
    done = 0
    for x in source.vectors(plan.sequences):
        check()
        if chunk is None:
            chunk = _room(plan.n, x)
        _scatter(chunk, places[done : done + len(x)], x)
        done += len(x)
    assert chunk is not None
    assert done == plan.n
    return Filled(chunk, None)


def _scatter(
    chunk: Float[Tensor, "n d_in"],
    places: Int64[Tensor, " vectors"],
    x: Float[Tensor, "vectors d_in"],
) -> None:
    if chunk.device.type == "cpu" and x.device.type == "cpu":
        # torch would wake a team of threads for each pass, which then spin for work on the cores
        # that the next passes run on: a quarter of the processor time of a whole harvest.
        chunk.numpy()[places.numpy()] = x.numpy()
    else:
        # To pinned memory this waits for the pass, but for no other stream.
        chunk[places.to(chunk.device)] = x.to(chunk.device)


def _room(n: int, like: Float[Tensor, "vectors d_in"]) -> Float[Tensor, "{n} d_in"]:
    """Return memory for a chunk: beside the vectors, or pinned where it would crowd a GPU."""
    shape = (n, like.shape[1])
    if like.is_cuda:
        total = torch.cuda.get_device_properties(like.device).total_memory
        if n * like.shape[1] * like.element_size() > GPU_SHARE * total:
            return torch.empty(shape, pin_memory=True)
    return like.new_empty(shape)
