"""The screened encode: a bfloat16 product finds candidates, exact float32 decides among them.

Nearly every product xc @ W_gate is computed only to find that the gate stays shut. Rounded to
bfloat16, which many CPUs multiply several times as fast, a product is off by a bound that can be
computed beforehand:

    |<x, w> - <x', w'>| <= |x| |w - w'| + |x - x'| |w'|          (Cauchy-Schwarz; ' is rounded)

plus the rounding of sums and of the result. All that may lie above its threshold by that bound is
computed again in float32, so that no gate that opens is missed and none that is shut opens.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.sae import loops, screen_loops
from gsae_core.sae.picking import Products, chunk_rows, joined
from gsae_core.threads import over_rows, spread


class Screened(NamedTuple):
    """The entries found, and how many candidates they were picked from."""

    products: Products
    n_candidates: int


class _Rounded(NamedTuple):
    """The encoder, latent by latent: exact, rounded, and how far apart the two are."""

    rows: Float[Tensor, "d_sae d_in"]
    half: Float[Tensor, "d_sae d_in"]
    off: Float[Tensor, " d_sae"]
    length: Float[Tensor, " d_sae"]


@torch.no_grad()
def screened_products_above(
    xc: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_in d_sae"], above: Float[Tensor, " d_sae"]
) -> Screened:
    """Return what `products_above` does, up to the order of float32 sums, on the CPU in float32."""
    rounded = _rounded(W.detach().contiguous())
    rows = min(chunk_rows(W.shape[1]), max(len(xc), 1))
    thresholds = above.detach().numpy()
    spare: list[_Scratch] = []

    def chunk(k: int) -> Screened:
        scratch = spare.pop() if spare else _Scratch(rows, W.shape[1])
        found = _screen(xc[k * rows : (k + 1) * rows], rounded, thresholds, scratch)
        spare.append(scratch)
        return found

    parts = spread(chunk, -(-len(xc) // rows))
    return Screened(
        products=joined([part.products for part in parts], xc),
        n_candidates=sum(part.n_candidates for part in parts),
    )


class _Scratch:
    """Room for a chunk's rounded products and for every candidate it could have."""

    def __init__(self, rows: int, d_sae: int) -> None:
        self.h = torch.empty(rows, d_sae, dtype=torch.bfloat16)
        self.latent = np.empty(rows * d_sae, np.int64)
        self.value = np.empty(rows * d_sae, np.float32)


def _rounded(W: Float[Tensor, "d_in d_sae"]) -> _Rounded:
    d_in, d_sae = W.shape
    out = _Rounded(
        rows=W.new_empty(d_sae, d_in),
        half=torch.empty(d_sae, d_in, dtype=torch.bfloat16),
        off=W.new_empty(d_sae),
        length=W.new_empty(d_sae),
    )
    rows = out.rows.numpy()
    half = out.half.view(torch.uint16).numpy()
    arrays = (W.numpy(), rows, rows.view(np.uint32), half, out.off.numpy(), out.length.numpy())
    over_rows(d_sae, lambda first, last: screen_loops.round_columns(first, last, *arrays))
    return out


def _screen(
    part: Float[Tensor, "rows d_in"], rounded: _Rounded, above: np.ndarray, scratch: _Scratch
) -> Screened:
    half = part.bfloat16()
    lengths = torch.linalg.vector_norm(part, dim=1)
    # Each of d_in additions in float32 rounds by at most 2^-24 of |x| |w|; twice that is ample.
    rounding = part.shape[1] * 2**-23 * lengths
    off = torch.linalg.vector_norm(part - half.float(), dim=1) + rounding
    h = torch.mm(half, rounded.half.T, out=scratch.h[: len(part)])
    latent, value = scratch.latent, scratch.value
    offsets = np.zeros(len(part) + 1, np.int64)
    n_candidates = screen_loops.pick_candidates(
        h.view(torch.uint16).numpy(),
        above,
        *(each.numpy() for each in (lengths, off, rounded.off, rounded.length)),
        latent,
        offsets[1:],
    )
    x, W = part.numpy(), rounded.rows.numpy()
    loops.dot_rows(0, len(part), offsets, latent, x, W, value)
    n = screen_loops.keep_above(offsets[1:], latent, value, above)
    found = (offsets, latent[:n].copy(), value[:n].copy())
    return Screened(Products(*map(torch.from_numpy, found)), n_candidates)
