"""What fires in a batch, and what nearly does, for every kind of SAE, from one encoder product.

A latent fires where its margin is above 0; of those at or below 0 a band is kept (`NearBand`).
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.files import NEAR_KEPT, unsigned
from gsae_core.analysis.fidelity import decoded
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, Encoder, PerLatent, Rows
from gsae_core.sae.metrics import ERROR_POWER, N_ROW_SUMS, sum_dtype
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import (
    Products,
    SparseCodes,
    codes_of,
    gates,
    numpy,
    products_above,
)
from gsae_core.threads import over_rows

BAND_TOKENS = 2 * NEAR_KEPT  # that each latent's band holds on average
# Most rows, and numbers, of pre-activations that exist at once where all are looked at.
DENSE_ROWS, DENSE_ELEMENTS = 2**8, 2**22


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


class _Chosen(NamedTuple):
    active: SparseCodes
    near_row: Int64[Tensor, " near"]
    near_latent: Int64[Tensor, " near"]
    near_margin: Float[Tensor, " near"]
    gate_open: Int64[Tensor, " d_sae"] | None


class Rules(NamedTuple):
    """How each latent's product h with the encoder W decides.

    A gate is open where h > opens; then f = gain h + bias, and the latent fires where f > least. A
    latent that does not fire is near where its margin min(h - edge, 0) > band.
    """

    W: Encoder
    opens: PerLatent
    gain: PerLatent
    bias: PerLatent
    least: PerLatent
    edge: PerLatent


@torch.no_grad()
def rules_of(sae: SAE) -> Rules:
    """Return the rules of any SAE but a TopK one, whose latents do not decide one by one.

    A Gated latent needs an open gate, h > -b_gate, and a magnitude above 0, exp(r_mag) h > -b_mag;
    where the magnitude reads a direction of its own, the gate alone sets the edge.
    """
    match sae:
        case JumpReluSAE():
            edge = sae.threshold - sae.b_enc
            always, ones = torch.full_like(edge, -torch.inf), torch.ones_like(edge)
            return Rules(sae.W_enc, always, ones, sae.b_enc, sae.threshold, edge)
        case GatedSAE():
            W, opens = gates(sae)
            gain = torch.ones_like(opens) if sae.r_mag is None else sae.r_mag.exp()
            edge = torch.maximum(opens, -sae.b_mag / gain) if sae.W_mag is None else opens
            return Rules(W, opens, gain, sae.b_mag, torch.zeros_like(opens), edge)
        case ReluSAE():
            W, opens = gates(sae)
            ones, zeros = torch.ones_like(opens), torch.zeros_like(opens)
            return Rules(W, opens, ones, sae.b_enc, zeros, opens)
    raise TypeError(f"no thresholds are known for {type(sae).__name__}")


class Collector:
    """Returns what fires in raw activations, and what nearly does; threads may share it."""

    @torch.no_grad()
    def __init__(self, sae: SAE, band: PerLatent) -> None:
        self._sae, self._band = sae, band
        if isinstance(sae, TopKSAE):
            return
        self._rules = rules = rules_of(sae)
        if isinstance(sae, JumpReluSAE):
            _, self._bound = gates(sae, below=-band)
        else:
            # Every open gate counts, also one that opens onto no magnitude.
            self._bound = torch.minimum(rules.edge + band, rules.opens)
        self._untied = sae if isinstance(sae, GatedSAE) and sae.W_mag is not None else None
        on_cpu = band.is_cpu and band.dtype in (torch.float32, torch.float64)
        self._choose = self._compiled if on_cpu and self._untied is None else self._by_torch

    @torch.no_grad()
    def __call__(self, x: Rows) -> Collected:
        sae, x = self._sae, x.to(self._band.device)
        if isinstance(sae, TopKSAE):
            chosen = self._by_rank(sae, x)
        else:
            xc = sae.normalised(x).u - sae.b_dec
            chosen = self._choose(xc, products_above(xc, self._rules.W, self._bound))
        codes, gate_open = chosen.active, chosen.gate_open if isinstance(sae, GatedSAE) else None
        toward, x_sum, sums = _errors(sae, x, codes)
        latent, value = codes.latent.cpu().numpy(), codes.magnitude.float().cpu().numpy()
        fired = np.bincount(latent, minlength=sae.d_sae)
        return Collected(
            counts=codes.row_offsets.diff().cpu().numpy(),
            latent=latent.astype(unsigned(sae.d_sae)),
            value=value,
            near_row=chosen.near_row.cpu().numpy(),
            near_latent=chosen.near_latent.cpu().numpy().astype(unsigned(sae.d_sae)),
            near_margin=chosen.near_margin.float().cpu().numpy(),
            gate_open=fired if gate_open is None else gate_open.cpu().numpy(),
            # Of no firings at all, NumPy's sums are integers.
            toward=np.bincount(latent, weights=value * toward, minlength=sae.d_sae) + 0.0,
            x_sum=x_sum,
            sums=np.array([len(x), *sums]),
        )

    def _compiled(self, xc: Rows, found: Products) -> _Chosen:
        ends, latent, h = numpy(found.row_offsets[1:]), numpy(found.latent), numpy(found.h)
        counts, gate_open = np.empty(len(xc), np.int64), np.zeros(self._sae.d_sae, np.int64)
        near = np.empty_like(latent), np.empty_like(latent), np.empty_like(h)
        rules = tuple(numpy(rule) for rule in (*self._rules[1:], self._band))
        n, n_near = index_loops.split(ends, latent, h, rules, counts, *near, gate_open)
        kept = latent[:n], h[:n], *(each[:n_near] for each in near)
        # Copied: a shard keeps what is returned, and most of the products are neither.
        latent, f, *near = (torch.from_numpy(each.copy()) for each in kept)
        offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
        active = SparseCodes(offsets, latent, f, f)
        return _Chosen(active, *near, gate_open=torch.from_numpy(gate_open))

    def _by_torch(self, xc: Rows, found: Products) -> _Chosen:
        """Do the same on any device, also where the magnitudes have directions of their own."""
        h, latent = found.h, found.latent
        opens, gain, bias, least, edge, band = (
            each.take(latent) for each in (*self._rules[1:], self._band)
        )
        is_open = h > opens
        f = gain * h + bias
        if self._untied is not None:
            f.masked_scatter_(is_open, codes_of(self._untied, xc, _only(found, is_open)).magnitude)
        fires = is_open & (f > least)
        margin = (h - edge).clamp_(max=0)
        near = ~(fires if self._untied is None else is_open) & (margin > band)
        rows = SparseCodes(found.row_offsets, latent, h, h).rows()
        kept = _only(found, fires)
        active = SparseCodes(kept.row_offsets, kept.latent, f[fires], f[fires])
        gate_open = torch.bincount(latent[is_open], minlength=self._sae.d_sae)
        return _Chosen(active, rows[near], latent[near], margin[near], gate_open)

    def _by_rank(self, sae: TopKSAE, x: Rows) -> _Chosen:
        counts, parts = [], []
        for start, part in zip(range(0, len(x), DENSE_ROWS), x.split(DENSE_ROWS), strict=True):
            z, margin, fires = _topk(sae, part)
            near = ~fires & (margin > self._band)
            rows, latent = near.nonzero(as_tuple=True)
            counts.append(fires.sum(1))
            parts.append((fires.nonzero()[:, 1], z[fires], rows + start, latent, margin[near]))
        latent, value, *near = (torch.cat(column) for column in zip(*parts, strict=True))
        offsets = F.pad(torch.cat(counts).cumsum(0), (1, 0))
        return _Chosen(SparseCodes(offsets, latent, value, value), *near, gate_open=None)


def _only(found: Products, keep: Bool[Tensor, " nnz"]) -> Products:
    before = F.pad(keep.cumsum(0), (1, 0))
    return Products(before.take(found.row_offsets), found.latent[keep], found.h[keep])


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
    sums, x_sum = np.zeros((len(rows), N_ROW_SUMS)), np.zeros(rows.shape[1])
    none, scale = np.empty((0, 0), rows.dtype), rows.dtype.type(-1)

    def decode(first: int, last: int) -> None:
        given = (first, last, offsets, latent, f, f, W, b, rows, scale, False)
        loops.decode_rows(*given, error, none, toward, toward, sums)

    over_rows(len(rows), decode)
    loops.sum_columns(rows, x_sum)
    return toward, x_sum, sums[:, : ERROR_POWER + 1].sum(0)


class NearBand:
    """`width`: for each latent the margin above which about `BAND_TOKENS` of `n_tokens` lie.

    It is the r-th largest margin of a silent token among the `n_sample` added, r / n_sample being
    BAND_TOKENS / n_tokens (and r at least 2); -inf, which holds all, where fewer are silent.
    """

    def __init__(self, sae: SAE, *, n_sample: int, n_tokens: int) -> None:
        rank = min(max(2, round(BAND_TOKENS * n_sample / n_tokens)), n_sample)
        self._sae, self._lock = sae, threading.Lock()
        self._best = sae.W_dec.detach().new_full((sae.d_sae, rank), -torch.inf)
        self.width = self._best[:, 0].clone()

    @torch.no_grad()
    def add(self, x: Rows) -> None:
        """Add activations, in any order; threads may do so side by side."""
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
def margins(sae: SAE, x: Rows) -> tuple[Float[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return every margin of a batch, and where latents fire: dense, for few rows."""
    if isinstance(sae, TopKSAE):
        return _topk(sae, x)[1:]
    rules = rules_of(sae)
    margin = (sae.normalised(x).u - sae.b_dec) @ rules.W - rules.edge
    return margin, margin > 0
