"""How many sequences a GPU takes in a forward pass: measured once for each machine and model.

How products are cut into tiles depends on the size of a pass, and with it their rounding. So a
run records the number it began with and keeps it when it is resumed; on a CPU, where measurements
are disturbed more easily than they are wrong, the number is a constant (`default_rows`).
"""

import time
from collections.abc import Callable

import torch

from gsae_core.config import Site
from gsae_core.lm.harvest import PASS_TOKENS, default_rows
from gsae_core.lm.model import LanguageModel
from gsae_core.measured import remembered

CANDIDATE_TOKENS = (2**12, 2**13, 2**14, 2**15, 2**16, 2**17)
# The SAEs come onto the GPU afterwards: a pass that takes more of its memory is not worth it.
MEMORY_SHARE = 1 / 8
# What counts as faster; smaller passes leave more memory.
WORTH_IT = 1.03


def rows_per_pass(model: LanguageModel, *, layer: int, site: Site, n_ctx: int) -> int:
    """Return how many sequences of `n_ctx` tokens a pass to a site takes; remembered on disk."""
    if model.device.type != "cuda":
        return default_rows(n_ctx, model.device)
    config = getattr(model.hf, "config", None)
    what = (
        torch.cuda.get_device_name(model.device),
        torch.__version__,
        repr(config.to_dict()) if config is not None else model.name,
        layer,
        site,
        n_ctx,
    )

    def measure() -> float:
        candidates = sorted({max(1, tokens // n_ctx) for tokens in CANDIDATE_TOKENS})
        rows = fastest(candidates, lambda n: _seconds_per_row(model, n, n_ctx, layer, site))
        return float(rows or max(1, PASS_TOKENS // n_ctx))

    return int(remembered("rows", what, measure))


def fastest(candidates: list[int], seconds_per_row: Callable[[int], float | None]) -> int | None:
    """Return the smallest of the candidates, ascending, that hardly another beats.

    Args:
        seconds_per_row: returns None where a candidate does not fit; larger ones are not tried.
    """
    best: tuple[float, int] | None = None
    for rows in candidates:
        seconds = seconds_per_row(rows)
        if seconds is None:
            break
        if best is None or seconds * WORTH_IT < best[0]:
            best = seconds, rows
    return None if best is None else best[1]


def _seconds_per_row(
    model: LanguageModel, rows: int, n_ctx: int, layer: int, site: Site
) -> float | None:
    """Return the median of five passes after one that warms up; None if it takes much memory."""
    ids = torch.randint(model.d_vocab, (rows, n_ctx), generator=torch.Generator().manual_seed(0))
    total = torch.cuda.get_device_properties(model.device).total_memory
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    taken = []
    try:
        for _ in range(6):
            began = time.perf_counter()
            model.harvest(ids, layer=layer, site=site)
            torch.cuda.synchronize(model.device)
            taken.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return None
    if torch.cuda.max_memory_allocated(model.device) - before > MEMORY_SHARE * total:
        return None
    return sorted(taken[1:])[2] / rows
