"""SparseCodes: the active entries of a batch, row by row, instead of a matrix of mostly zeros."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, Encoder, PerEntry, PerLatent, Rows
from gsae_core.sae.sparse import loops
from gsae_core.sae.topk import largest
from gsae_core.threads import over_rows, spread

# A block of pre-activations should stay in cache until its active entries are picked out, yet each
# matrix product packs the encoder afresh: below 256 rows that packing costs a third of the product.
CHUNK_ELEMENTS = 2**19
CHUNK_ROWS = 256


class SparseCodes(NamedTuple):
    """Entries of a batch where pi_gate > 0, rows in order, latents ascending within a row (CSR).

    Indices are int64 on a CPU; the GPU's kernels have int32, and room behind the last entry.
    """

    row_offsets: Int[Tensor, " rows_and_end"]
    """Row t owns entries row_offsets[t] to row_offsets[t + 1]."""
    latent: Int[Tensor, " nnz"]
    gate: PerEntry
    """pi_gate > 0; for an SAE without a gate its latent f, as if the gate were the magnitude."""
    magnitude: PerEntry
    """f = relu(pi_mag): 0 where a gate opens onto nothing."""

    def rows(self) -> Int[Tensor, " nnz"]:
        """Return which row each entry is in."""
        n_rows = self.row_offsets.numel() - 1
        every = torch.arange(n_rows, dtype=self.latent.dtype, device=self.latent.device)
        return every.repeat_interleave(self.row_offsets.diff(), output_size=self.latent.numel())


class ByLatent(NamedTuple):
    """The transpose: the same entries, latent by latent, rows ascending within a latent."""

    offsets: Int[Tensor, " d_sae_and_end"]
    """Latent i owns entries offsets[i] to offsets[i + 1]."""
    order: Int[Tensor, " nnz"]
    """Place of each entry in the SparseCodes."""
    row: Int[Tensor, " nnz"]


class Products(NamedTuple):
    """Entries of a batch with h = <xc, W_gate_i> above their latent's threshold."""

    row_offsets: Int64[Tensor, " rows_and_end"]
    latent: Int64[Tensor, " nnz"]
    h: PerEntry
    n_candidates: int | None = None
    """How many candidates a bfloat16 screen picked them from; None without a screen."""


Wanted = list[tuple[PerLatent, int]]
"""Of each row: how many of the largest latents, by which bias."""


def chunk_rows(d_sae: int) -> int:
    """Return how many rows are encoded at once, so that their products stay small."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // d_sae)


@torch.no_grad()
def products_above(xc: Rows, W: Encoder, above: PerLatent, *, screened: bool = False) -> Products:
    """Return the entries of xc @ W above `above`, a threshold for each latent.

    `screened` looks by a bfloat16 product first, on a CPU, and computes again in float32 what may
    be above: the same entries, up to the order of float32 sums. Of no effect in float64, for
    which the rounding would be too coarse a screen.
    """
    W, above = W.detach(), above.detach()
    if screened and xc.dtype == torch.float32:
        return _screened(xc, W.contiguous(), above.numpy())

    def pick(part: Tensor, scratch: _Scratch) -> list[Products]:
        h = torch.mm(part, W, out=scratch.h[: len(part)])
        return [
            _above(h, above) if scratch.latent is None else scratch.pick(loops.pick_above, h, above)
        ]

    return _in_chunks(xc, W, pick, W.dtype)[0]


@torch.no_grad()
def largest_codes(xc: Rows, W: Encoder, wanted: Wanted) -> list[SparseCodes]:
    """Return, for each (bias, k), the k largest of h + bias in each row, as far as positive.

    A bias of -inf leaves a latent out. Of equal values loops take the lower latent, torch any.
    """
    kinds = [(bias.detach(), k) for bias, k in wanted]

    def pick(part: Tensor, scratch: _Scratch) -> list[Products]:
        h = torch.mm(part, W, out=scratch.h[: len(part)])
        if scratch.latent is None:
            return [_above(largest(h + bias, k=k), torch.zeros_like(bias)) for bias, k in kinds]
        return [scratch.pick(loops.pick_largest, h, bias, k) for bias, k in kinds]

    found = _in_chunks(xc, W, pick, W.dtype)
    return [SparseCodes(each.row_offsets, each.latent, each.h, each.h) for each in found]


def _screened(xc: Rows, W: Encoder, above: np.ndarray) -> Products:
    """Return the products in float32 that lie above, of those that may by a bfloat16 product."""
    d_in, d_sae = W.shape
    exact, off_length = W.new_empty(d_sae, d_in), W.new_empty(2, d_sae).numpy()
    rounded, rows = torch.empty(d_sae, d_in, dtype=torch.bfloat16), exact.numpy()
    bits = rounded.view(torch.uint16).numpy()
    arrays = (W.numpy(), rows, rows.view(np.uint32), bits, *off_length)
    over_rows(d_sae, lambda first, last: loops.round_columns(first, last, *arrays))

    def pick(part: Tensor, scratch: _Scratch) -> list[Products]:
        half, lengths = part.bfloat16(), torch.linalg.vector_norm(part, dim=1)
        # Each of d_in additions in float32 rounds by at most 2^-24 of |x| |w|; twice that is ample.
        rounding = d_in * 2**-23 * lengths
        off = torch.linalg.vector_norm(part - half.float(), dim=1) + rounding
        h = torch.mm(half, rounded.T, out=scratch.h[: len(part)]).view(torch.uint16)
        offsets = np.zeros(len(part) + 1, np.int64)
        found = scratch.latent, scratch.value
        slack = (lengths.numpy(), off.numpy(), *off_length)
        n_candidates = loops.pick_candidates(h.numpy(), above, *slack, found[0], offsets[1:])
        n = loops.keep_above(part.numpy(), rows, above, *found, offsets[1:])
        return [scratch.first(n, offsets, n_candidates)]

    return _in_chunks(xc, W, pick, torch.bfloat16)[0]


class _Scratch:
    """Room for one chunk's products and every entry it could have.

    What is never written takes no memory: the system gives pages out as they are written.
    """

    def __init__(self, rows: int, W: Encoder, product: torch.dtype) -> None:
        self.h = W.new_empty(rows, W.shape[1], dtype=product)
        self.latent: np.ndarray | None = None  # stays so where numba cannot go: GPU, half precision
        if W.is_cpu and W.dtype in (torch.float32, torch.float64):
            self.latent = np.empty(self.h.numel(), np.int64)
            self.value = np.empty(self.h.numel(), W.detach().numpy().dtype)

    def pick(self, loop: Callable[..., int], h: Tensor, bounds: PerLatent, *rest: int) -> Products:
        offsets = np.zeros(len(h) + 1, np.int64)
        n = loop(h.numpy(), bounds.numpy(), *rest, self.latent, self.value, offsets[1:])
        return self.first(n, offsets)

    def first(self, n: int, offsets: np.ndarray, n_candidates: int | None = None) -> Products:
        """Return the first n entries, in memory of their own."""
        assert self.latent is not None
        found = (offsets, self.latent[:n].copy(), self.value[:n].copy())
        return Products(*map(torch.from_numpy, found), n_candidates=n_candidates)


def _in_chunks(
    xc: Rows, W: Encoder, pick: Callable[[Tensor, _Scratch], list[Products]], product: torch.dtype
) -> list[Products]:
    """Return what `pick` returns for all of xc, a few rows of it at a time on each core."""
    rows = min(chunk_rows(W.shape[1]), max(len(xc), 1))
    spare: list[_Scratch] = []

    def chunk(k: int) -> list[Products]:
        scratch = spare.pop() if spare else _Scratch(rows, W, product)
        found = pick(xc[k * rows : (k + 1) * rows], scratch)
        spare.append(scratch)
        return found

    parts = spread(chunk, max(1, -(-len(xc) // rows)))
    return [_joined(kind) for kind in zip(*parts, strict=True)]


def _joined(parts: Sequence[Products]) -> Products:
    counts = torch.cat([part.row_offsets.diff() for part in parts])
    candidates = [part.n_candidates for part in parts if part.n_candidates is not None]
    return Products(
        row_offsets=F.pad(counts.cumsum(0), (1, 0)),
        latent=torch.cat([part.latent for part in parts]),
        h=torch.cat([part.h for part in parts]),
        n_candidates=sum(candidates) if candidates else None,
    )


def _above(h: Float[Tensor, "rows d_sae"], above: PerLatent) -> Products:
    mask = h > above
    return Products(F.pad(mask.sum(1).cumsum(0), (1, 0)), mask.nonzero()[:, 1], h[mask])


def numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor of the CPU as an array in C order: the same memory where it can be."""
    return tensor.detach().contiguous().numpy()


@torch.no_grad()
def encode_sparse(sae: SAE, x: Rows) -> SparseCodes:
    """Return the active entries of `x`, exactly those that `sae.encode` would compute.

    No more than `chunk_rows(d_sae)` rows of pre-activations exist at once on a core, but for the
    magnitudes of untied paths.
    """
    sae.check_width(x)
    xc = sae.normalised(x).u - sae.b_dec
    if isinstance(sae, TopKSAE):
        return largest_codes(xc, sae.W_enc, [(sae.b_enc, sae.k)])[0]
    assert isinstance(sae, GatedSAE | ReluSAE | JumpReluSAE)
    codes = codes_of(sae, xc, products_above(xc, *gates(sae)))
    if not isinstance(sae, JumpReluSAE):
        return codes
    offsets, latent, z, _ = codes
    fires = z > sae.threshold.take(latent)
    before = F.pad(fires.cumsum(0), (1, 0))
    return SparseCodes(before.take(offsets), latent[fires], z[fires], z[fires])


@torch.no_grad()
def gates(
    sae: GatedSAE | ReluSAE | JumpReluSAE, *, below: float | PerLatent = 0.0
) -> tuple[Encoder, PerLatent]:
    """Return the encoder, and above what product each latent's gate is open.

    Of a JumpReLU SAE: above what product z may reach theta - below. None is left out by rounding;
    a few just short of it are let in.
    """
    if isinstance(sae, JumpReluSAE):
        theta, b = sae.threshold, sae.b_enc
        # Here the sum h + b is compared with a number that is not 0, so that each side rounds.
        rounding = 8 * torch.finfo(b.dtype).eps * (theta + below + b.abs())
        return sae.W_enc, theta - below - b - rounding
    W, bias = (sae.W_gate, sae.b_gate) if isinstance(sae, GatedSAE) else (sae.W_enc, sae.b_enc)
    # h > -b exactly where the rounded sum h + b > 0, so products are read once, not written.
    return W, -bias


@torch.no_grad()
def codes_of(sae: GatedSAE | ReluSAE | JumpReluSAE, xc: Rows, found: Products) -> SparseCodes:
    """Return the codes of these products: of a JumpReLU SAE gate z, magnitude 0 if z <= theta."""
    offsets, latent, h, _ = found
    if not isinstance(sae, GatedSAE):
        z = h + sae.b_enc.take(latent)
        f = z * (z > sae.threshold.take(latent)) if isinstance(sae, JumpReluSAE) else z
        return SparseCodes(offsets, latent, gate=z, magnitude=f)
    gate = h + sae.b_gate.take(latent)
    if sae.W_mag is not None:
        h = (xc @ sae.W_mag)[SparseCodes(offsets, latent, h, h).rows(), latent]
    elif sae.r_mag is not None:
        h = h * sae.r_mag.exp().take(latent)
    return SparseCodes(offsets, latent, gate, torch.relu_(h + sae.b_mag.take(latent)))


def by_latent(codes: SparseCodes, d_sae: int) -> ByLatent:
    """Return the transpose of `codes`, for weight gradients and the feature index."""
    latent = codes.latent
    if latent.device.type != "cpu":
        ordered, order = torch.sort(latent, stable=True)
        every = torch.arange(d_sae + 1, dtype=latent.dtype, device=latent.device)
        # Not by counts: `bincount` would wait for the device.
        offsets = torch.searchsorted(ordered, every).to(latent.dtype)
        return ByLatent(offsets, order.to(latent.dtype), codes.rows().take(order))
    offsets = torch.zeros(d_sae + 1, dtype=latent.dtype)
    entries = ByLatent(offsets, torch.empty_like(latent), torch.empty_like(latent))
    loops.sort_by_latent(*(each.numpy() for each in (codes.row_offsets, latent, *entries)))
    return entries
