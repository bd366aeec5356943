"""SparseCodes: the active entries of a batch, row by row, instead of a matrix of mostly zeros."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.sae.architectures import GatedSAE, ReluSAE

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
    """pi_gate > 0; for a ReLU SAE its latent f, as if the gate were the magnitude."""
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


def chunk_rows(d_sae: int) -> int:
    """Return how many rows to encode at a time."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // d_sae)


@torch.no_grad()
def encode_sparse(sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return the active entries of `x`, exactly those that `sae.encode` would compute.

    Never more than `chunk_rows(d_sae)` rows of pre-activations exist at once.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    return encode_centred(sae, x - sae.b_dec)


@torch.no_grad()
def encode_centred(sae: GatedSAE | ReluSAE, xc: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return `encode_sparse(sae, x)` from xc = x - b_dec, which gradients need too."""
    W, bias = (sae.W_gate, sae.b_gate) if isinstance(sae, GatedSAE) else (sae.W_enc, sae.b_enc)
    W_mag = sae.W_mag if isinstance(sae, GatedSAE) else None
    n_rows, d_sae = xc.shape[0], sae.d_sae
    rows = min(chunk_rows(d_sae), max(n_rows, 1))
    block, opened = xc.new_empty(rows, d_sae), torch.empty(rows, d_sae, dtype=torch.bool)
    opened = opened.to(xc.device)
    places, products, mag_products = [], [], []
    for start in range(0, n_rows, rows):
        part = xc[start : start + rows]
        h, mask = block[: len(part)], opened[: len(part)]
        torch.mm(part, W, out=h)
        # h > -b exactly where the rounded sum h + b > 0, so the matrix is read once, not written.
        torch.gt(h, -bias, out=mask)
        here = _nonzero(mask)
        products.append(h.view(-1).take(here))
        if W_mag is not None:
            mag_products.append(torch.mm(part, W_mag, out=h).view(-1).take(here))
        places.append(here.add_(start * d_sae))
    place = torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device=xc.device)
    h = torch.cat(products) if products else xc.new_empty(0)
    bounds = torch.arange(n_rows + 1, device=xc.device) * d_sae
    offsets = torch.searchsorted(place, bounds)
    latent = place - bounds[:-1].repeat_interleave(offsets.diff(), output_size=place.numel())
    gate = h + bias.take(latent)
    if not isinstance(sae, GatedSAE):
        return SparseCodes(row_offsets=offsets, latent=latent, gate=gate, magnitude=gate)
    if W_mag is not None:
        h = torch.cat(mag_products) if mag_products else h
    elif sae.r_mag is not None:
        h = h * sae.r_mag.exp().take(latent)
    magnitude = torch.relu_(h + sae.b_mag.take(latent))
    return SparseCodes(row_offsets=offsets, latent=latent, gate=gate, magnitude=magnitude)


def by_latent(codes: SparseCodes, d_sae: int) -> ByLatent:
    """Return the transpose of `codes`: what weight gradients and the feature index walk along."""
    # PyTorch sorts 16-bit keys in half the time of 32-bit ones, and those in half that of 64.
    key = codes.latent.to(torch.int16 if d_sae <= 2**15 else torch.int32)
    order = torch.sort(key, stable=True).indices
    counts = torch.bincount(codes.latent, minlength=d_sae)
    return ByLatent(
        offsets=F.pad(counts.cumsum(0), (1, 0)), order=order, row=codes.rows().take(order)
    )


def weighted_sums(
    dense: Float[Tensor, "pool width"],
    index: Int64[Tensor, " nnz"],
    weight: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " bags_and_end"],
) -> Float[Tensor, "bags width"]:
    """Return sparse @ dense: for each bag the sum of weight * dense[index] over its entries.

    `embedding_bag` is this product on every device. On the CPU it takes 0.8x the time of
    `torch.sparse` (MKL), and its derivative to `weight` is the sampled product <grad, dense[index]>
    in the time of `torch.sparse.sampled_addmm`.
    """
    return F.embedding_bag(
        index, dense, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _nonzero(mask: Bool[Tensor, "rows d_sae"]) -> Int64[Tensor, " nnz"]:
    if mask.device.type == "cpu":
        # NumPy skips zeros eight at a time: a third of PyTorch's time at 3 % density.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)
