"""Which entries of a batch count: products with the encoder, picked while they are in cache."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.sae import loops, topk_loops
from gsae_core.sae.topk import largest
from gsae_core.threads import over_rows, spread

# A block of pre-activations should stay in cache until its active entries are picked out, yet each
# matrix product packs the encoder afresh: below 256 rows that packing costs a third of the product.
CHUNK_ELEMENTS = 2**19
CHUNK_ROWS = 256


class Products(NamedTuple):
    """Entries of a batch with h = <xc, W_gate_i> above their latent's threshold."""

    row_offsets: Int64[Tensor, " rows_and_end"]
    latent: Int64[Tensor, " nnz"]
    h: Float[Tensor, " nnz"]


class Wanted(NamedTuple):
    """The k largest of h + bias in each row, as far as they are positive; -inf leaves one out."""

    bias: Float[Tensor, " d_sae"]
    k: int


def chunk_rows(d_sae: int) -> int:
    """Return how many rows to encode at a time."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // d_sae)


@torch.no_grad()
def products_above(
    xc: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_in d_sae"], above: Float[Tensor, " d_sae"]
) -> Products:
    """Return the entries of xc @ W above `above`, a threshold for each latent."""
    above = above.detach()

    def pick(h: Float[Tensor, "rows d_sae"], scratch: _Scratch) -> list[Products]:
        if scratch.latent is None:
            return [_above(h, above)]
        return [_picked(loops.pick_above, (h.numpy(), above.numpy()), scratch)]

    (found,) = _in_chunks(xc, W.detach(), pick, n_kinds=1)
    return found


@torch.no_grad()
def largest_products(
    xc: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_in d_sae"], wanted: Sequence[Wanted]
) -> list[Products]:
    """Return, for each of `wanted`, its entries: h + bias in place of h.

    Compiled, equal values go to the lower latent; by torch, to any.
    """
    kinds = [Wanted(bias.detach(), k) for bias, k in wanted]

    def pick(h: Float[Tensor, "rows d_sae"], scratch: _Scratch) -> list[Products]:
        if scratch.latent is None:
            return [_above(largest(h + bias, k=k), torch.zeros_like(bias)) for bias, k in kinds]
        return [
            _picked(topk_loops.pick_largest, (h.numpy(), bias.numpy(), k), scratch)
            for bias, k in kinds
        ]

    return _in_chunks(xc, W.detach(), pick, n_kinds=len(kinds))


def _in_chunks(
    xc: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_in d_sae"],
    pick: Callable[[Tensor, "_Scratch"], list[Products]],
    *,
    n_kinds: int,
) -> list[Products]:
    """Return what `pick` returns for xc @ W, a few rows of it at a time on each core."""
    rows = min(chunk_rows(W.shape[1]), max(len(xc), 1))
    spare: list[_Scratch] = []

    def chunk(k: int) -> list[Products]:
        part = xc[k * rows : (k + 1) * rows]
        scratch = spare.pop() if spare else _Scratch(rows, W)
        found = pick(torch.mm(part, W, out=scratch.h[: len(part)]), scratch)
        spare.append(scratch)
        return found

    parts = spread(chunk, -(-len(xc) // rows))
    return [joined([part[i] for part in parts], xc) for i in range(n_kinds)]


def joined(parts: list[Products], like: Float[Tensor, "batch d_in"]) -> Products:
    """Return the entries of consecutive chunks as those of one batch."""
    start = torch.zeros(1, dtype=torch.int64, device=like.device)
    if not parts:
        return Products(start, start[:0], like.new_empty(0))
    counts = torch.cat([part.row_offsets.diff() for part in parts])
    return Products(
        row_offsets=torch.cat([start, counts.cumsum(0)]),
        latent=torch.cat([part.latent for part in parts]),
        h=torch.cat([part.h for part in parts]),
    )


def sampled_products(
    x: Float[Tensor, "batch width"],
    W: Float[Tensor, "width d_sae"],
    row_offsets: Int64[Tensor, " rows_and_end"],
    latent: Int64[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Return <x_t, W_i> for the entries (t, i) alone, on the CPU."""
    out = x.new_empty(latent.numel())
    arrays = (row_offsets.numpy(), latent.numpy(), numpy(x), numpy(W.T), out.numpy())
    over_rows(len(x), lambda first, last: loops.dot_rows(first, last, *arrays))
    return out


def numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor of the CPU as an array in C order: the same memory where it can be."""
    return tensor.detach().contiguous().numpy()


def _above(h: Float[Tensor, "rows d_sae"], above: Float[Tensor, " d_sae"]) -> Products:
    mask = h > above
    counts = mask.sum(1)
    return Products(F.pad(counts.cumsum(0), (1, 0)), mask.nonzero()[:, 1], h[mask])


class _Scratch:
    """Room for one chunk's products and for every entry it could have; used again and again.

    What is never written to costs no memory: the system gives out pages as they are reached.
    """

    latent: np.ndarray | None
    """None where numba cannot go: on a GPU, in half precision."""

    def __init__(self, rows: int, like: Float[Tensor, "d_in d_sae"]) -> None:
        self.h = like.new_empty(rows, like.shape[1])
        self.latent = None
        if like.is_cpu and like.dtype in (torch.float32, torch.float64):
            self.latent = np.empty(self.h.numel(), np.int64)
            self.value = np.empty(self.h.numel(), self.h.numpy().dtype)


def _picked(loop: Callable[..., int], arguments: tuple[Any, ...], scratch: _Scratch) -> Products:
    """Return what a loop writes, whose first argument is the products."""
    assert scratch.latent is not None
    offsets = np.zeros(len(arguments[0]) + 1, np.int64)
    n = loop(*arguments, scratch.latent, scratch.value, offsets[1:])
    found = (offsets, scratch.latent[:n].copy(), scratch.value[:n].copy())
    return Products(*map(torch.from_numpy, found))
