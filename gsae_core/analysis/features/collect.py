"""What fires in a batch, and what nearly does, for every kind of SAE, from one encoder product.

A latent fires where its margin is above 0; of those at or below 0 a band is kept (`NearBand`).
"""

import math
import threading
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.features.files import NEAR_KEPT, unsigned
from gsae_core.analysis.fidelity import decoded
from gsae_core.norms import longer
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, Encoder, PerEntry, PerLatent, Rows
from gsae_core.sae.metrics import ERROR_POWER, N_ROW_SUMS, sum_dtype
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import SparseCodes, codes_of, gates, numpy, products_above
from gsae_core.threads import over_rows

BAND_TOKENS = 2 * NEAR_KEPT  # that each latent's band holds on average
# Most rows, and numbers, of pre-activations that exist at once where all are looked at.
DENSE_ROWS, DENSE_ELEMENTS = 2**8, 2**22
# Whose latents decide one by one; those of a TopK SAE do not.
Thresholded = GatedSAE | ReluSAE | JumpReluSAE


class Collected(NamedTuple):
    """What fires in a batch, row by row, and its near misses, as arrays of the CPU."""

    counts: Int64[np.ndarray, " rows"]
    """Latents that fire on each row."""
    latent: Integer[np.ndarray, " nnz"]
    value: Float32[np.ndarray, " nnz"]
    near_row: Int64[np.ndarray, " near"]
    near_latent: Integer[np.ndarray, " near"]
    near_margin: Float32[np.ndarray, " near"]
    gate_open: Int64[np.ndarray, " d_sae"]
    """Rows on which each latent's pi_gate > 0; without a gate, those on which it fires."""
    toward: Float64[np.ndarray, " d_sae"]
    """Sum over rows of f_i d_i . (u - u_hat); mostly u is x (`SAE.normalised`)."""
    x_sum: Float64[np.ndarray, " d_in"]
    sums: Float64[np.ndarray, " sums"]
    """Over rows: 1, |x|^2, |x_hat|^2, x . x_hat, |x - x_hat|^2."""
    kept: Bool[np.ndarray, " given"]
    """Which of the activations given are rows: those that are not too long."""


# What fires; near misses, with margins for values; of an SAE with a gate, `gate_open`.
_Chosen = tuple[SparseCodes, SparseCodes, Tensor | None]


@torch.no_grad()
def thresholds(sae: SAE) -> tuple[Encoder, PerLatent]:
    """Return the encoder, and above what product h each latent fires: h less that is its margin.

    A Gated latent needs an open gate, h > -b_gate, and a magnitude above 0, exp(r_mag) h > -b_mag;
    where the magnitude reads a direction of its own, the gate alone counts.
    """
    assert isinstance(sae, Thresholded), f"no thresholds are known for {type(sae).__name__}"
    W, opens = gates(sae)
    if isinstance(sae, JumpReluSAE):
        return W, sae.threshold - sae.b_enc
    if isinstance(sae, ReluSAE) or sae.W_mag is not None:
        return W, opens
    gain = torch.ones_like(opens) if sae.r_mag is None else sae.r_mag.exp()
    return W, torch.maximum(opens, -sae.b_mag / gain)


class Collector:
    """Returns what fires in raw activations, and what nearly does; threads may share it.

    Those longer than `max_norm` are left out.
    """

    @torch.no_grad()
    def __init__(self, sae: SAE, band: PerLatent, *, max_norm: float = math.inf) -> None:
        self._sae, self._band, self._max_norm = sae, band, max_norm
        if isinstance(sae, Thresholded):
            self._W, self._edge = thresholds(sae)
            _, self._bound = gates(sae, below=-band)
            if not isinstance(sae, JumpReluSAE):
                # Every open gate counts, also one that opens onto no magnitude.
                self._bound = torch.minimum(self._edge + band, self._bound)

    @torch.no_grad()
    def __call__(self, x: Rows) -> Collected:
        sae, x = self._sae, x.to(self._band.device)
        kept = ~longer(x, self._max_norm)
        x = x if kept.all() else x[kept]
        if isinstance(sae, TopKSAE):
            codes, near, gate_open = self._by_rank(sae, x)
        else:
            assert isinstance(sae, Thresholded)
            codes, near, gate_open = self._by_threshold(sae, x)
        toward, x_sum, sums = _errors(sae, x, codes)
        latent, value = codes.latent.cpu().numpy(), codes.magnitude.float().cpu().numpy()
        fired = np.bincount(latent, minlength=sae.d_sae)
        return Collected(
            counts=codes.row_offsets.diff().cpu().numpy(),
            latent=latent.astype(unsigned(sae.d_sae)),
            value=value,
            near_row=near.rows().cpu().numpy(),
            near_latent=near.latent.cpu().numpy().astype(unsigned(sae.d_sae)),
            near_margin=near.magnitude.float().cpu().numpy(),
            gate_open=fired if gate_open is None else gate_open.cpu().numpy(),
            # Of no firings at all, NumPy's sums are integers.
            toward=np.bincount(latent, weights=value * toward, minlength=sae.d_sae) + 0.0,
            x_sum=x_sum,
            sums=np.array([len(x), *sums]),
            kept=kept.cpu().numpy(),
        )

    def _by_threshold(self, sae: Thresholded, x: Rows) -> _Chosen:
        xc = sae.normalised(x).u - sae.b_dec
        found = products_above(xc, self._W, self._bound)
        codes, latent = codes_of(sae, xc, found), found.latent
        passed = fires = codes.magnitude > 0
        gate_open = None
        if isinstance(sae, GatedSAE):
            is_open = codes.gate > 0
            gate_open = torch.bincount(latent, weights=is_open.double(), minlength=sae.d_sae).long()
            fires &= is_open
            # An open gate has no margin where the magnitude has directions of its own.
            passed = fires if sae.W_mag is None else is_open
        margin = (found.h - self._edge.take(latent)).clamp_(max=0)
        near = ~passed & (margin > self._band.take(latent))

        def only(keep: Bool[Tensor, " nnz"], value: PerEntry) -> SparseCodes:
            # Finding what is kept is half of all the time: once for each.
            at = keep.nonzero()[:, 0]
            kept = value.take(at)
            offsets = torch.searchsorted(at, found.row_offsets)
            return SparseCodes(offsets, latent.take(at), kept, kept)

        return only(fires, codes.magnitude), only(near, margin), gate_open

    def _by_rank(self, sae: TopKSAE, x: Rows) -> _Chosen:
        counts, parts = [], []
        for part in x.split(DENSE_ROWS):
            z, margin, fires = _topk(sae, part)
            near = ~fires & (margin > self._band)
            counts.append(torch.stack([fires.sum(1), near.sum(1)]))
            parts.append((fires.nonzero()[:, 1], z[fires], near.nonzero()[:, 1], margin[near]))
        latent, value, missed, short = (torch.cat(column) for column in zip(*parts, strict=True))
        offsets, near_offsets = F.pad(torch.cat(counts, 1).cumsum(1), (1, 0))
        active = SparseCodes(offsets, latent, value, value)
        return active, SparseCodes(near_offsets, missed, short, short), None


def _topk(
    sae: TopKSAE, x: Rows
) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return z, margins (z less the row's k-th largest; -inf at z <= 0), and what fires."""
    z = sae.pre_activations(x)
    kept = z.topk(sae.k, dim=-1, sorted=True)
    fires = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, kept.indices, kept.values > 0)
    return z, (z - kept.values[:, -1:]).masked_fill_(z <= 0, -torch.inf), fires


def _errors(
    sae: SAE, x: Rows, codes: SparseCodes
) -> tuple[Float[np.ndarray, " nnz"], Float64[np.ndarray, " d_in"], Float64[np.ndarray, " sums"]]:
    """Return <u - u_hat, W_dec_i> of each active entry, `x_sum`, and `sums` but for the first."""
    if not x.is_cpu or sae.input_norm is not None:
        seen, dtype = sae.normalised(x), sum_dtype(x.device)
        u_hat, toward = decoded(sae, seen, codes)
        x_hat = seen.undo(u_hat)
        pairs = [(x, x), (x_hat, x_hat), (x, x_hat), (x - x_hat, x - x_hat)]
        sums = torch.stack([(a * b).sum(1).to(dtype).sum() for a, b in pairs])
        x_sum = x.to(dtype).sum(0)
        return toward.cpu().numpy(), x_sum.double().cpu().numpy(), sums.double().cpu().numpy()
    offsets, latent, f, W, b, rows = map(
        numpy, (codes.row_offsets, codes.latent, codes.magnitude, sae.W_dec, sae.b_dec, x)
    )
    error, toward = np.empty_like(rows), np.empty_like(f)
    sums = np.zeros((len(rows), N_ROW_SUMS))
    none, scale = np.empty((0, 0), rows.dtype), rows.dtype.type(-1)

    def decode(first: int, last: int) -> None:
        given = (first, last, offsets, latent, f, f, W, b, rows, scale, False)
        loops.decode_rows(*given, error, none, toward, toward, sums)

    over_rows(len(rows), decode)
    return toward, rows.sum(0, dtype=float), sums[:, : ERROR_POWER + 1].sum(0)


class NearBand:
    """`width`: for each latent the margin above which about `BAND_TOKENS` of `n_tokens` lie.

    It is the r-th largest margin of a silent token among the `n_sample` added, r / n_sample being
    BAND_TOKENS / n_tokens (and r at least 2); -inf, which holds all, where fewer are silent. Those
    longer than `max_norm` are left out.
    """

    def __init__(
        self, sae: SAE, *, n_sample: int, n_tokens: int, max_norm: float = math.inf
    ) -> None:
        rank = min(max(2, round(BAND_TOKENS * n_sample / n_tokens)), n_sample)
        self._sae, self._lock, self._max_norm = sae, threading.Lock(), max_norm
        self._best = sae.W_dec.detach().new_full((sae.d_sae, rank), -torch.inf)
        self.width: Tensor = self._best[:, 0].clone()

    @torch.no_grad()
    def add(self, x: Rows) -> None:
        """Add activations, in any order; threads may do so side by side."""
        x = x.to(self.width.device)
        x = x[~longer(x, self._max_norm)] if self._max_norm < math.inf else x
        for rows in x.split(max(1, min(DENSE_ROWS, DENSE_ELEMENTS // self._sae.d_sae))):
            margin, fires = margins(self._sae, rows)
            margin = margin.masked_fill_(fires, -torch.inf)
            with self._lock:
                both = torch.cat([self._best, margin.T], dim=1)
                self._best = both.topk(self._best.shape[1], dim=1, sorted=True).values
                self.width = self._best[:, -1].contiguous()


@torch.no_grad()
def margins(sae: SAE, x: Rows) -> tuple[Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return every margin of a batch, and where latents fire: dense, for few rows."""
    if isinstance(sae, TopKSAE):
        return _topk(sae, x)[1:]
    W, edge = thresholds(sae)
    margin = (sae.normalised(x).u - sae.b_dec) @ W - edge
    return margin, margin > 0
