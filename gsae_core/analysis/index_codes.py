"""What fires in a batch, and what nearly did, for every kind of SAE, from one encoder product.

A margin says how far a latent is from firing, in the units of the pre-activation that decides: it
fires where its margin is above 0. Of the margins at or below 0 a band is kept, as wide for each
latent as it takes to hold some tokens whatever its scale (`near_band`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.index_files import NEAR_KEPT
from gsae_core.sae import loops
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import SparseCodes, codes_of, gates, weighted_sums
from gsae_core.sae.metrics import sum_dtype
from gsae_core.sae.picking import Products, products_above
from gsae_core.threads import over_rows

CALIBRATION_TOKENS = 2**12
"""Tokens that set the width of the band."""
BAND_TOKENS = 2 * NEAR_KEPT
"""Tokens that the band holds on average; the nearest `NEAR_KEPT` are kept."""
DENSE_ROWS = 2**8
"""Rows of pre-activations that exist at once where all are looked at."""


class Found(NamedTuple):
    """A batch: its active entries, row by row, and its near misses, as arrays of the CPU."""

    counts: Int64[np.ndarray, " rows"]
    """Active entries of each row."""
    latent: Int64[np.ndarray, " nnz"]
    value: Float32[np.ndarray, " nnz"]
    near_row: Int64[np.ndarray, " near"]
    near_latent: Int64[np.ndarray, " near"]
    near_margin: Float32[np.ndarray, " near"]
    gate_open: Int64[np.ndarray, " d_sae"]
    """Rows on which each latent's pi_gate > 0; without a gate, those on which it fires."""
    toward: Float64[np.ndarray, " d_sae"]
    """Sum over rows of f_i d_i . (x - x_hat)."""
    x_sum: Float64[np.ndarray, " d_in"]
    sums: Float64[np.ndarray, " sums"]
    """Over rows: 1, |x|^2, |x_hat|^2, x . x_hat, |x - x_hat|^2."""


class _Split(NamedTuple):
    """A batch's active codes, its near misses, and how often gates were open."""

    active: SparseCodes
    near_row: Int64[Tensor, " near"]
    near_latent: Int64[Tensor, " near"]
    near_margin: Float[Tensor, " near"]
    gate_open: Int64[Tensor, " d_sae"] | None


@torch.no_grad()
def find(sae: SAE, x: Float[Tensor, "rows d_in"], band: Float[Tensor, " d_sae"]) -> Found:
    """Return what fires on each row, and what nearly did.

    Args:
        sae: takes raw activations.
        x: activations.
        band: of `near_band`: the margin above which a silent latent counts as a near miss.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    split = _whole_rows(sae, x, band) if isinstance(sae, TopKSAE) else _by_product(sae, x, band)
    codes = split.active
    came = _compare(sae, x, codes)
    latent, value = codes.latent.cpu().numpy(), codes.magnitude.float().cpu().numpy()
    fired = np.bincount(latent, minlength=sae.d_sae)
    return Found(
        counts=codes.row_offsets.diff().cpu().numpy(),
        latent=latent,
        value=value,
        near_row=split.near_row.cpu().numpy(),
        near_latent=split.near_latent.cpu().numpy(),
        near_margin=split.near_margin.float().cpu().numpy(),
        gate_open=fired if split.gate_open is None else split.gate_open.cpu().numpy(),
        # Of no entries at all, NumPy's sums are integers.
        toward=np.bincount(latent, weights=value * came.toward, minlength=sae.d_sae) + 0.0,
        x_sum=came.x_sum,
        sums=np.array([len(x), *came.sums]),
    )


@torch.no_grad()
def near_band(
    sae: SAE, batches: Iterator[Float[Tensor, "rows d_in"]], *, n_sample: int, n_tokens: int
) -> Float[Tensor, " d_sae"]:
    """Return for each latent the margin above which about `BAND_TOKENS` of `n_tokens` lie.

    It is the r-th largest margin of a silent token in the sample, with r / n_sample equal to
    BAND_TOKENS / n_tokens (and r at least 2): tokens are as likely to lie above it as below,
    whatever the latent's scale. -inf where the sample has fewer: the band then holds all.

    Args:
        batches: activations of the sample, `n_sample` in all.
    """
    rank = min(max(2, round(BAND_TOKENS * n_sample / n_tokens)), n_sample)
    best = sae.W_dec.new_full((rank, sae.d_sae), -torch.inf)
    for batch in batches:
        for x in batch.split(DENSE_ROWS):
            margin, fires = margins(sae, x)
            both = torch.cat([best, margin.masked_fill_(fires, -torch.inf)])
            best = both.topk(rank, dim=0, sorted=True).values
    return best[-1]


@torch.no_grad()
def margins(
    sae: SAE, x: Float[Tensor, "rows d_in"]
) -> tuple[Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return every margin of a batch, and where latents fire; dense: for few rows."""
    if isinstance(sae, TopKSAE):
        z, kept, edge = _topk(sae, x)
        return (z - edge).masked_fill_(z <= 0, -torch.inf), kept
    W, threshold = _thresholds(sae)
    margin = (x - sae.b_dec) @ W - threshold
    return margin, margin > 0


def _thresholds(sae: SAE) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
    """Return the encoder and the product above which a latent fires.

    A Gated latent needs an open gate, h > -b_gate, and a magnitude above 0, exp(r_mag) h > -b_mag;
    where the magnitude reads a direction of its own, the gate alone is asked.
    """
    match sae:
        case JumpReluSAE():
            return sae.W_enc, sae.threshold - sae.b_enc
        case GatedSAE():
            W, opens = gates(sae)
            if sae.W_mag is not None:
                return W, opens
            gain = 1.0 if sae.r_mag is None else sae.r_mag.exp()
            return W, torch.maximum(opens, -sae.b_mag / gain)
        case ReluSAE():
            return gates(sae)
    raise TypeError(f"no thresholds are known for {type(sae).__name__}")


def _by_product(sae: SAE, x: Float[Tensor, "rows d_in"], band: Float[Tensor, " d_sae"]) -> _Split:
    """Find entries by a threshold on the product that each latent has of its own."""
    xc = x - sae.b_dec
    W, threshold = _thresholds(sae)
    bound = threshold + band
    if isinstance(sae, GatedSAE | ReluSAE):
        # Every open gate counts, also one that opens onto no magnitude.
        opens = gates(sae)[1]
        found = products_above(xc, W, torch.minimum(bound, opens))
        is_open = found.h > opens.take(found.latent)
        codes = codes_of(sae, xc, _only(found, is_open))
        fires = codes.magnitude > 0
        active = torch.zeros_like(is_open).masked_scatter_(is_open, fires)
        gate_open = torch.bincount(codes.latent, minlength=sae.d_sae)
        value = codes.magnitude[fires]
        silent = ~is_open if sae.architecture == "gated" and _untied(sae) else ~active
    else:
        assert isinstance(sae, JumpReluSAE)  # there is no further kind
        slack = 8 * torch.finfo(x.dtype).eps * (sae.threshold + sae.b_enc.abs())
        found = products_above(xc, W, bound - slack)
        z = found.h + sae.b_enc.take(found.latent)
        active = z > sae.threshold.take(found.latent)
        gate_open, value, silent = None, z[active], ~active
    margin = (found.h - threshold.take(found.latent)).clamp_(max=0)
    near = silent & (margin > band.take(found.latent))
    rows = SparseCodes(found.row_offsets, found.latent, found.h, found.h).rows()
    kept = _only(found, active)
    return _Split(
        active=SparseCodes(kept.row_offsets, kept.latent, value, value),
        near_row=rows[near],
        near_latent=found.latent[near],
        near_margin=margin[near],
        gate_open=gate_open,
    )


def _untied(sae: SAE) -> bool:
    return isinstance(sae, GatedSAE) and sae.W_mag is not None


def _only(found: Products, keep: Bool[Tensor, " nnz"]) -> Products:
    before = F.pad(keep.cumsum(0), (1, 0))
    return Products(before.take(found.row_offsets), found.latent[keep], found.h[keep])


def _topk(
    sae: TopKSAE, x: Float[Tensor, "rows d_in"]
) -> tuple[Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"], Float[Tensor, "rows 1"]]:
    """Return z, where latents fire, and each row's k-th largest z."""
    z = sae.pre_activations(x)
    kept = z.topk(sae.k, dim=-1, sorted=True)
    fires = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, kept.indices, kept.values > 0)
    return z, fires, kept.values[:, -1:]


def _whole_rows(
    sae: TopKSAE, x: Float[Tensor, "rows d_in"], band: Float[Tensor, " d_sae"]
) -> _Split:
    """Find entries where a latent's fate hangs on the other latents of its row."""
    offsets, parts = [x.new_zeros(1, dtype=torch.int64)], []
    for start, part in zip(range(0, len(x), DENSE_ROWS), x.split(DENSE_ROWS), strict=True):
        z, fires, edge = _topk(sae, part)
        margin = (z - edge).clamp_(max=0)
        near = ~fires & (z > 0) & (margin > band)
        rows, latent = near.nonzero(as_tuple=True)
        offsets.append(offsets[-1][-1] + fires.sum(1).cumsum(0))
        parts.append((fires.nonzero()[:, 1], z[fires], rows + start, latent, margin[near]))
    latent, value, near_row, near_latent, near_margin = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    active = SparseCodes(torch.cat(offsets), latent, value, value)
    return _Split(active, near_row, near_latent, near_margin, None)


class _Compared(NamedTuple):
    """A batch beside its reconstruction."""

    toward: Float[np.ndarray, " nnz"]
    """<x - x_hat, W_dec_i> of each active entry."""
    x_sum: Float64[np.ndarray, " d_in"]
    sums: Float64[np.ndarray, " sums"]


def _compare(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> _Compared:
    if x.device.type != "cpu":
        return _compare_elsewhere(sae, x, codes)
    offsets, latent, f, W, b, rows = (
        each.detach().contiguous().numpy()
        for each in (codes.row_offsets, codes.latent, codes.magnitude, sae.W_dec, sae.b_dec, x)
    )
    error, toward = np.empty_like(rows), np.empty_like(f)
    sums, x_sum = np.zeros((len(rows), loops.N_ROW_SUMS)), np.zeros(rows.shape[1])
    none, scale = np.empty((0, 0), rows.dtype), rows.dtype.type(-1)

    def decode(first: int, last: int) -> None:
        entries = (first, last, offsets, latent, f, f, W, b, rows, scale, False)
        loops.decode_rows(*entries, error, none, toward, toward, sums)

    over_rows(len(rows), decode)
    loops.sum_columns(rows, x_sum)
    kept = [loops.X_POWER, loops.X_HAT_POWER, loops.X_DOT_X_HAT, loops.ERROR_POWER]
    return _Compared(toward, x_sum, sums[:, kept].sum(0))


def _compare_elsewhere(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> _Compared:
    with torch.enable_grad():
        f = codes.magnitude.detach().requires_grad_()
        decoded = weighted_sums(sae.W_dec.detach(), codes.latent, f, codes.row_offsets)
    x_hat = decoded.detach() + sae.b_dec
    # The product's derivative to its weights is the sampled product <., W_dec_i>.
    (toward,) = torch.autograd.grad(decoded, f, x - x_hat)
    dtype = sum_dtype(x.device)
    pairs = [(x, x), (x_hat, x_hat), (x, x_hat), (x - x_hat, x - x_hat)]
    sums = torch.stack([(a * b).sum(1).to(dtype).sum() for a, b in pairs])
    x_sum = x.to(dtype).sum(0)
    return _Compared(toward.cpu().numpy(), *(each.double().cpu().numpy() for each in (x_sum, sums)))
