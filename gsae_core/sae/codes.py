"""SparseCodes: the active entries of a batch, row by row, instead of a matrix of mostly zeros."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.sae import latent_loops
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.picking import (
    Products,
    Wanted,
    largest_products,
    products_above,
    sampled_products,
)


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


@torch.no_grad()
def encode_sparse(sae: SAE, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
    """Return the active entries of `x`, exactly those that `sae.encode` would compute.

    Never more than `chunk_rows(d_sae)` rows of pre-activations exist at once on a core.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    xc = sae.normalised(x).u - sae.b_dec
    match sae:
        case GatedSAE() | ReluSAE():
            return codes_of(sae, xc, products_above(xc, *gates(sae)))
        case JumpReluSAE():
            return _jumprelu_codes(sae, products_above(xc, *thresholds(sae, below=0.0)))
        case TopKSAE():
            (kept,) = largest_products(xc, sae.W_enc, [Wanted(sae.b_enc, sae.k)])
            return kept_codes(kept)
    raise TypeError(f"no codes are known for {type(sae).__name__}")


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


@torch.no_grad()
def thresholds(
    sae: JumpReluSAE, *, below: float
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
    """Return the encoder, and above what product z may reach theta - below.

    No product above it is left out by rounding; a few just short of theta - below are let in.
    """
    theta, b = sae.threshold, sae.b_enc
    # Here the sum h + b is compared with a number that is not 0, so that each side rounds.
    rounding = 8 * torch.finfo(b.dtype).eps * (theta + below + b.abs())
    return sae.W_enc, theta - below - b - rounding


def kept_codes(found: Products) -> SparseCodes:
    """Return the codes of latents without a gate; `found` holds them in place of products."""
    return SparseCodes(found.row_offsets, found.latent, gate=found.h, magnitude=found.h)


def _jumprelu_codes(sae: JumpReluSAE, found: Products) -> SparseCodes:
    offsets, latent, h = found
    z = h + sae.b_enc.take(latent)
    fires = z > sae.threshold.take(latent)
    before = F.pad(fires.cumsum(0), (1, 0))
    return kept_codes(Products(before.take(offsets), latent[fires], z[fires]))


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
    latent_loops.sort_by_latent(*arrays)
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
