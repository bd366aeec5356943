"""One thread a core, for work that torch and numba do outside the interpreter lock."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def spread(
    task: Callable[[int], Result], n: int, *, on: torch.device | None = None
) -> list[Result]:
    """Return task(0), ..., task(n - 1), side by side on as many threads as torch may use.

    Each runs torch on one thread: how work is split decides the rounding, the number of threads
    does not. `on` another device than a CPU, tasks run one after the other.
    """
    threads = torch.get_num_threads()
    if threads < 2 or n < 2 or (on is not None and on.type != "cpu"):
        return [task(i) for i in range(n)]
    grad = torch.is_grad_enabled()  # which each thread keeps for itself

    def run(i: int) -> Result:
        with torch.set_grad_enabled(grad):
            return task(i)

    return list(one_thread_a_core(threads, os.getpid()).map(run, range(n)))


def on_one_core(task: Callable[[], Result]) -> Result:
    """Return task(), computed by a thread like those of `spread`: with the bits it has there."""
    threads = torch.get_num_threads()
    if threads < 2:
        return task()
    return one_thread_a_core(threads, os.getpid()).submit(task).result()


def over_rows(n: int, loop: Callable[[int, int], None]) -> None:
    """Call loop(first, last) for pieces of 0 to n, side by side."""
    size = max(64, -(-n // (4 * torch.get_num_threads())))
    spread(lambda k: loop(k * size, min(n, (k + 1) * size)), -(-n // size))


class _OneThreadEach(ThreadPoolExecutor):
    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        def alone() -> Result:
            # Products would otherwise each wake threads of their own. Before every task: what
            # torch is told elsewhere later reaches threads that there are already.
            torch.set_num_threads(1)
            return fn(*args, **kwargs)

        return super().submit(alone)


@functools.cache
def one_thread_a_core(threads: int, pid: int) -> ThreadPoolExecutor:
    """Return this process's pool of so many threads; `pid` because no thread survives a fork."""
    return _OneThreadEach(threads, f"core-{pid}")
