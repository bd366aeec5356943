"""SparseCodes: the active entries of a batch, row by row, instead of a matrix of mostly zeros."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.sae import loops
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.threads import over_rows, spread

# A block of pre-activations should stay in cache until its active entries are picked out, yet each
# matrix product packs the encoder afresh: below 256 rows that packing costs a third of the product.
CHUNK_ELEMENTS = 2**19
CHUNK_ROWS = 256


class SparseCodes(NamedTuple):
    """Entries of a batch where pi_gate > 0, rows in order, latents ascending within a row (CSR).

    Everything else about a batch follows: f is zero elsewhere, and so are both gradients.
    """

    row_offsets: Int64[Tensor, " rows_and_end"]
    """Row t owns entries row_offsets[t] to row_offsets[t + 1]; one more number than rows."""
    latent: Int64[Tensor, " nnz"]
    """Which latent each entry is, 0 to d_sae - 1."""
    gate: Float[Tensor, " nnz"]
    """pi_gate > 0; for an SAE without a gate its latent f, as if the gate were the magnitude."""
    magnitude: Float[Tensor, " nnz"]
    """f = relu(pi_mag): 0 where a gate opens onto nothing."""

    def rows(self) -> Int64[Tensor, " nnz"]:
        """Return which row each entry is in."""
        n_rows = self.row_offsets.numel() - 1
        every = torch.arange(n_rows, device=self.latent.device)
        return every.repeat_interleave(self.row_offsets.diff(), output_size=self.latent.numel())


class ByLatent(NamedTuple):
    """The transpose: the same entries, latent by latent, rows ascending within a latent."""

    offsets: Int64[Tensor, " d_sae_and_end"]
    """Latent i owns entries offsets[i] to offsets[i + 1]."""
    order: Int64[Tensor, " nnz"]
    """Place of each entry in the SparseCodes it was made from."""
    row: Int64[Tensor, " nnz"]
    """Which row each entry is in."""


class Products(NamedTuple):
    """Entries of a batch with h = <xc, W_gate_i> above their latent's threshold."""

    row_offsets: Int64[Tensor, " rows_and_end"]
    latent: Int64[Tensor, " nnz"]
    h: Float[Tensor, " nnz"]


def chunk_rows(d_sae: int) -> int:
    """Return how many rows to encode at a time."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // d_sae)


@torch.no_grad()
def encode_sparse(sae: SAE, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return the active entries of `x`, exactly those that `sae.encode` would compute.

    Never more than `chunk_rows(d_sae)` rows of pre-activations exist at once on a core.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    if isinstance(sae, GatedSAE | ReluSAE):
        return encode_centred(sae, x - sae.b_dec)
    return _encode_whole_rows(sae, x)


@torch.no_grad()
def encode_centred(sae: GatedSAE | ReluSAE, xc: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return `encode_sparse(sae, x)` from xc = x - b_dec, which gradients need too."""
    return codes_of(sae, xc, products_above(xc, *gates(sae)))


@torch.no_grad()
def gates(
    sae: GatedSAE | ReluSAE,
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
    """Return the encoder, and above what product each latent's gate is open."""
    W, bias = (sae.W_gate, sae.b_gate) if isinstance(sae, GatedSAE) else (sae.W_enc, sae.b_enc)
    # h > -b exactly where the rounded sum h + b > 0, so products are read once, not written.
    return W, -bias


@torch.no_grad()
def codes_of(
    sae: GatedSAE | ReluSAE, xc: Float[Tensor, "batch d_in"], found: Products
) -> SparseCodes:
    """Return the codes whose products with the encoder are `found`."""
    if isinstance(sae, GatedSAE):
        gate = found.h + sae.b_gate.take(found.latent)
        magnitude = _magnitude(sae, xc, found)
    else:
        gate = magnitude = found.h + sae.b_enc.take(found.latent)
    return SparseCodes(found.row_offsets, found.latent, gate=gate, magnitude=magnitude)


def _encode_whole_rows(sae: SAE, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return `encode_sparse(sae, x)` where a latent's fate is not told by its own product alone."""
    rows = chunk_rows(sae.d_sae)

    def chunk(k: int) -> Products:
        return _above(sae.encode(x[k * rows : (k + 1) * rows]), x.new_zeros(sae.d_sae))

    found = joined(spread(chunk, -(-len(x) // rows)), x)
    return SparseCodes(found.row_offsets, found.latent, gate=found.h, magnitude=found.h)


@torch.no_grad()
def products_above(
    xc: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_in d_sae"], above: Float[Tensor, " d_sae"]
) -> Products:
    """Return the entries of xc @ W above `above`, a threshold for each latent."""
    W, above = W.detach(), above.detach()
    rows = min(chunk_rows(W.shape[1]), max(len(xc), 1))
    spare: list[_Scratch] = []

    def chunk(k: int) -> Products:
        part = xc[k * rows : (k + 1) * rows]
        if not xc.is_cpu:
            return _pick(part, W, above)
        scratch = spare.pop() if spare else _Scratch(rows, W)
        found = _pick_cpu(part, W, above, scratch)
        spare.append(scratch)
        return found

    return joined(spread(chunk, -(-len(xc) // rows)), xc)


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


def by_latent(codes: SparseCodes, d_sae: int) -> ByLatent:
    """Return the transpose of `codes`: what weight gradients and the feature index walk along."""
    latent = codes.latent
    if latent.device.type != "cpu":
        order = torch.sort(latent, stable=True).indices
        offsets = F.pad(torch.bincount(latent, minlength=d_sae).cumsum(0), (1, 0))
        return ByLatent(offsets, order, codes.rows().take(order))
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
    entries = ByLatent(offsets, torch.empty_like(latent), torch.empty_like(latent))
    arrays = (each.numpy() for each in (codes.row_offsets, latent, *entries))
    loops.sort_by_latent(*arrays)
    return entries


def weighted_sums(
    dense: Float[Tensor, "pool width"],
    index: Int64[Tensor, " nnz"],
    weight: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " bags_and_end"],
) -> Float[Tensor, "bags width"]:
    """Return sparse @ dense: for each bag the sum of weight * dense[index] over its entries.

    `embedding_bag` is this product on every device, and its derivative to `weight` is the sampled
    product <grad, dense[index]>.
    """
    return F.embedding_bag(
        index, dense, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _magnitude(
    sae: GatedSAE, xc: Float[Tensor, "batch d_in"], found: Products
) -> Float[Tensor, " nnz"]:
    """Return f on the entries."""
    h = found.h
    if sae.W_mag is not None and h.device.type == "cpu":
        h = sampled_products(xc, sae.W_mag, found.row_offsets, found.latent)
    elif sae.W_mag is not None:
        rows = SparseCodes(found.row_offsets, found.latent, h, h).rows()
        h = torch.linalg.vecdot(xc[rows], sae.W_mag.T[found.latent])
    elif sae.r_mag is not None:
        h = h * sae.r_mag.exp().take(found.latent)
    return torch.relu_(h + sae.b_mag.take(found.latent))


def _pick(
    part: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_in d_sae"], above: Float[Tensor, " d_sae"]
) -> Products:
    return _above(part @ W, above)


def _above(h: Float[Tensor, "rows d_sae"], above: Float[Tensor, " d_sae"]) -> Products:
    mask = h > above
    counts = mask.sum(1)
    return Products(F.pad(counts.cumsum(0), (1, 0)), mask.nonzero()[:, 1], h[mask])


class _Scratch:
    """Room for one chunk's products and for every entry it could have; used again and again.

    What is never written to costs no memory: the system gives out pages as they are reached.
    """

    def __init__(self, rows: int, like: Float[Tensor, "d_in d_sae"]) -> None:
        self.h = like.new_empty(rows, like.shape[1])
        self.latent = np.empty(self.h.numel(), np.int64)
        self.value = np.empty(self.h.numel(), self.h.numpy().dtype)


def _pick_cpu(
    part: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in d_sae"],
    above: Float[Tensor, " d_sae"],
    scratch: _Scratch,
) -> Products:
    h = torch.mm(part, W, out=scratch.h[: len(part)])
    latent, value = scratch.latent, scratch.value
    offsets = np.zeros(len(part) + 1, np.int64)
    n = loops.pick_above(h.numpy(), above.numpy(), latent, value, offsets[1:])
    found = (offsets, latent[:n].copy(), value[:n].copy())
    return Products(*map(torch.from_numpy, found))
