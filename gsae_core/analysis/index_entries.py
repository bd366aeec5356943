"""What fires and what nearly does, from one encoder product, compiled for the CPU.

Everything runs in the thread that asks: an operator of torch over a whole batch would wake a team
of threads that spin for work while passes of the language model want the cores.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.analysis import index_loops
from gsae_core.sae import loops
from gsae_core.sae.codes import SparseCodes
from gsae_core.sae.picking import chunk_rows, numpy


class Rules(NamedTuple):
    """How each latent's product h with the encoder decides.

    A gate is open where h > opens; then f = gain h + bias, which counts above `least`. Of what does
    not fire, that is near whose margin min(h - edge, 0) > band.
    """

    opens: Float[Tensor, " d_sae"]
    gain: Float[Tensor, " d_sae"]
    bias: Float[Tensor, " d_sae"]
    least: Float[Tensor, " d_sae"]
    edge: Float[Tensor, " d_sae"]
    band: Float[Tensor, " d_sae"]


class Entries:
    """Entries of batches; threads may share one.

    Args:
        W: the encoder.
        bound: products above it are looked at; no higher than any rule needs.
        rules: what decides then.
        gated: whether `opens` is a gate's.
    """

    def __init__(
        self,
        W: Float[Tensor, "d_in d_sae"],
        bound: Float[Tensor, " d_sae"],
        rules: Rules,
        gated: bool,
    ) -> None:
        self._W, self._bound, self._gated = W.detach().contiguous(), numpy(bound), gated
        self._rules = tuple(numpy(rule) for rule in rules)
        self._spare: list[_Scratch] = []

    def of(
        self, xc: Float[Tensor, "rows d_in"]
    ) -> tuple[SparseCodes, Tensor, Tensor, Tensor, Tensor | None]:
        """Return active codes, the near misses' rows, latents and margins, and how often gates were
        open (None without a gate).
        """
        d_sae = self._W.shape[1]
        rows = chunk_rows(d_sae)
        counts, gate_open = np.empty(len(xc), np.int64), np.zeros(d_sae, np.int64)
        scratch = self._spare.pop() if self._spare else _Scratch(rows, self._W)
        parts = [
            self._chunk(xc[at : at + rows], at, scratch, counts[at : at + rows], gate_open)
            for at in range(0, len(xc), rows)
        ]
        self._spare.append(scratch)
        latent, f, *near = (
            torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)
        )
        offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
        opened = torch.from_numpy(gate_open) if self._gated else None
        return SparseCodes(offsets, latent, f, f), near[0], near[1], near[2], opened

    def _chunk(
        self,
        xc: Float[Tensor, "rows d_in"],
        first: int,
        scratch: "_Scratch",
        counts: np.ndarray,
        gate_open: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        h = torch.mm(xc, self._W, out=scratch.h[: len(xc)])
        latent, value, *near = scratch.room
        ends = np.empty(len(xc), np.int64)
        loops.pick_above(h.numpy(), self._bound, latent, value, ends)
        n, n_near = index_loops.split(
            ends, latent, value, first, self._rules, counts, *near, gate_open
        )
        return latent[:n].copy(), value[:n].copy(), *(each[:n_near].copy() for each in near)


class _Scratch:
    """Room for a chunk's products and for every entry it could have; used again and again."""

    def __init__(self, rows: int, like: Float[Tensor, "d_in d_sae"]) -> None:
        self.h = like.new_empty(rows, like.shape[1])
        n, kind = self.h.numel(), self.h.numpy().dtype
        # What is never written to costs no memory.
        self.room = tuple(np.empty(n, each) for each in (np.int64, kind, np.int64, np.int64, kind))


def narrow(d_sae: int) -> Any:
    """Return the dtype in which files hold a latent's number."""
    return np.uint16 if d_sae <= 2**16 else np.uint32
