"""What fires in a batch, and what nearly did, for every kind of SAE, from one encoder product.

A margin says how far a latent is from firing, in the units of the pre-activation that decides: it
fires where its margin is above 0. Of the margins at or below 0 a band is kept, as wide for each
latent as it takes to hold some tokens at any scale (`near_band`).
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis import index_loops
from gsae_core.analysis.index_compare import compare
from gsae_core.analysis.index_entries import Entries, Rules, narrow
from gsae_core.analysis.index_files import NEAR_KEPT
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import SparseCodes, codes_of, gates
from gsae_core.sae.picking import Products, products_above

CALIBRATION_TOKENS = 2**12
"""Tokens that set the width of the band."""
BAND_TOKENS = 2 * NEAR_KEPT
"""Tokens that the band holds on average; the nearest `NEAR_KEPT` are kept."""
DENSE_ROWS, DENSE_ELEMENTS = 2**8, 2**22
"""Most rows, and numbers, of pre-activations that exist at once where all are looked at."""


class Found(NamedTuple):
    """A batch: its active entries, row by row, and its near misses, as arrays of the CPU."""

    counts: Int64[np.ndarray, " rows"]
    """Active entries of each row."""
    latent: Integer[np.ndarray, " nnz"]
    value: Float32[np.ndarray, " nnz"]
    near_row: Int64[np.ndarray, " near"]
    near_latent: Integer[np.ndarray, " near"]
    near_margin: Float32[np.ndarray, " near"]
    gate_open: Int64[np.ndarray, " d_sae"]
    """Rows on which each latent's pi_gate > 0; without a gate, those on which it fires."""
    toward: Float64[np.ndarray, " d_sae"]
    """Sum over rows of f_i d_i . (x - x_hat), as the SAE sees x: see `SAE.normalised`."""
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


Finder = Callable[[Float[Tensor, "rows d_in"]], Found]


@torch.no_grad()
def finder(sae: SAE, band: Float[Tensor, " d_sae"]) -> Finder:
    """Return the function from activations to what fires on each row, and what nearly does.

    Threads may call it side by side.

    Args:
        sae: takes raw activations.
        band: of `near_band`: the margin above which a silent latent counts as a near miss.
    """
    on_cpu = band.is_cpu and band.dtype in (torch.float32, torch.float64)
    compiled = on_cpu and not isinstance(sae, TopKSAE) and not _untied(sae)
    entries = Entries(*_rules(sae, band)) if compiled else None

    @torch.no_grad()
    def find(x: Float[Tensor, "rows d_in"]) -> Found:
        x = x.to(band.device)
        if isinstance(sae, TopKSAE):
            split = _whole_rows(sae, x, band)
        elif entries is None:
            split = _by_product(sae, x, band)
        else:
            split = _Split(*entries.of(sae.normalised(x).u - sae.b_dec))
        return _found(sae, x, split)

    return find


def _found(sae: SAE, x: Float[Tensor, "rows d_in"], split: "_Split") -> Found:
    codes = split.active
    came = compare(sae, x, codes)
    latent, value = codes.latent.cpu().numpy(), codes.magnitude.float().cpu().numpy()
    if split.gate_open is None:
        gate_open = np.bincount(latent, minlength=sae.d_sae)
    else:
        gate_open = split.gate_open.cpu().numpy()
    return Found(
        counts=codes.row_offsets.diff().cpu().numpy(),
        latent=latent.astype(narrow(sae.d_sae)),
        value=value,
        near_row=split.near_row.cpu().numpy(),
        near_latent=split.near_latent.cpu().numpy().astype(narrow(sae.d_sae)),
        near_margin=split.near_margin.float().cpu().numpy(),
        gate_open=gate_open,
        # Of no entries at all, NumPy's sums are integers.
        toward=np.bincount(latent, weights=value * came.toward, minlength=sae.d_sae) + 0.0,
        x_sum=came.x_sum,
        sums=np.array([len(x), *came.sums]),
    )


class NearBand:
    """For each latent the margin above which about `BAND_TOKENS` of `n_tokens` lie.

    It is the r-th largest margin of a silent token in the sample, with r / n_sample equal to
    BAND_TOKENS / n_tokens (and r at least 2): tokens are as likely to lie above it as below,
    at any scale of the latent. -inf where the sample has fewer: the band then holds all.

    Args:
        n_sample: tokens that will be added.
    """

    def __init__(self, sae: SAE, *, n_sample: int, n_tokens: int) -> None:
        rank = min(max(2, round(BAND_TOKENS * n_sample / n_tokens)), n_sample)
        self._sae, self._lock = sae, threading.Lock()
        self._best = sae.W_dec.detach().new_full((sae.d_sae, rank), -torch.inf)
        self.width = self._best[:, 0].clone()

    @torch.no_grad()
    def add(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Look at activations; threads may add theirs side by side, in any order."""
        x = x.to(self.width.device)
        for rows in x.split(max(1, min(DENSE_ROWS, DENSE_ELEMENTS // self._sae.d_sae))):
            margin, fires = margins(self._sae, rows)
            margin = margin.masked_fill_(fires, -torch.inf)
            with self._lock:
                if self.width.is_cpu and self.width.dtype != torch.bfloat16:
                    arrays = (margin, self._best, self.width)
                    index_loops.keep_largest(*(each.numpy() for each in arrays))
                else:
                    both = torch.cat([self._best, margin.T], dim=1)
                    self._best = both.topk(self._best.shape[1], dim=1, sorted=True).values
                    self.width = self._best[:, -1].contiguous()


@torch.no_grad()
def margins(
    sae: SAE, x: Float[Tensor, "rows d_in"]
) -> tuple[Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return every margin of a batch, and where latents fire; dense: for few rows."""
    if isinstance(sae, TopKSAE):
        z, kept, edge = _topk(sae, x)
        return (z - edge).masked_fill_(z <= 0, -torch.inf), kept
    W, threshold = _thresholds(sae)
    margin = (sae.normalised(x).u - sae.b_dec) @ W - threshold
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


def _rules(sae: SAE, band: Float[Tensor, " d_sae"]) -> tuple[Tensor, Tensor, Rules, bool]:
    """Return what `Entries` takes."""
    W, edge = _thresholds(sae)
    always, ones = torch.full_like(edge, -torch.inf), torch.ones_like(edge)
    match sae:
        case GatedSAE():
            gain = ones if sae.r_mag is None else sae.r_mag.exp()
            rules = Rules(gates(sae)[1], gain, sae.b_mag, torch.zeros_like(edge), edge, band)
        case ReluSAE():
            rules = Rules(gates(sae)[1], ones, sae.b_enc, torch.zeros_like(edge), edge, band)
        case JumpReluSAE():
            slack = 8 * torch.finfo(edge.dtype).eps * (sae.threshold + sae.b_enc.abs())
            rules = Rules(always, ones, sae.b_enc, sae.threshold, edge, band)
            return W, edge + band - slack, rules, False
        case _:
            raise TypeError(f"no thresholds are known for {type(sae).__name__}")
    # Every open gate counts, also one that opens onto no magnitude.
    return W, torch.minimum(edge + band, rules.opens), rules, True


def _by_product(sae: SAE, x: Float[Tensor, "rows d_in"], band: Float[Tensor, " d_sae"]) -> _Split:
    """Find entries by a threshold on the product that each latent has of its own."""
    xc = sae.normalised(x).u - sae.b_dec
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
