"""What fires in a batch, and what nearly did, for every kind of SAE, from one encoder product.

A margin says how far a latent is from firing, in the units of the pre-activation that decides: it
fires where its margin is above 0. Of the margins at or below 0 a band is kept, as wide for each
latent as it takes to hold some tokens at any scale (`near_band`).
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.files import NEAR_KEPT
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.metrics import sum_dtype
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import (
    Products,
    SparseCodes,
    chunk_rows,
    codes_of,
    gates,
    numpy,
    products_above,
    weighted_sums,
)
from gsae_core.threads import over_rows


class Rules(NamedTuple):
    """How each latent's product h with the encoder decides.

    A gate is open where h > opens; then f = gain h + bias, which counts above `least`. Of what does
    not fire, that is near whose margin min(h - edge, 0) > band.
    """

    opens: Float[Tensor, " d_sae"]
    gain: Float[Tensor, " d_sae"]
    bias: Float[Tensor, " d_sae"]
    least: Float[Tensor, " d_sae"]
    edge: Float[Tensor, " d_sae"]
    band: Float[Tensor, " d_sae"]


class Entries:
    """Entries of batches; threads may share one.

    Args:
        W: the encoder.
        bound: products above it are looked at; no higher than any rule needs.
        rules: what decides then.
        gated: whether `opens` is a gate's.
    """

    def __init__(
        self,
        W: Float[Tensor, "d_in d_sae"],
        bound: Float[Tensor, " d_sae"],
        rules: Rules,
        gated: bool,
    ) -> None:
        self._W, self._bound, self._gated = W.detach().contiguous(), numpy(bound), gated
        self._rules = tuple(numpy(rule) for rule in rules)
        self._spare: list[_Scratch] = []

    def of(
        self, xc: Float[Tensor, "rows d_in"]
    ) -> tuple[SparseCodes, Tensor, Tensor, Tensor, Tensor | None]:
        """Return active codes, the near misses' rows, latents and margins, and how often gates were
        open (None without a gate).
        """
        d_sae = self._W.shape[1]
        rows = chunk_rows(d_sae)
        counts, gate_open = np.empty(len(xc), np.int64), np.zeros(d_sae, np.int64)
        scratch = self._spare.pop() if self._spare else _Scratch(rows, self._W)
        parts = [
            self._chunk(xc[at : at + rows], at, scratch, counts[at : at + rows], gate_open)
            for at in range(0, len(xc), rows)
        ]
        self._spare.append(scratch)
        latent, f, *near = (
            torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)
        )
        offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
        opened = torch.from_numpy(gate_open) if self._gated else None
        return SparseCodes(offsets, latent, f, f), near[0], near[1], near[2], opened

    def _chunk(
        self,
        xc: Float[Tensor, "rows d_in"],
        first: int,
        scratch: "_Scratch",
        counts: np.ndarray,
        gate_open: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        h = torch.mm(xc, self._W, out=scratch.h[: len(xc)])
        latent, value, *near = scratch.room
        ends = np.empty(len(xc), np.int64)
        loops.pick_above(h.numpy(), self._bound, latent, value, ends)
        n, n_near = index_loops.split(
            ends, latent, value, first, self._rules, counts, *near, gate_open
        )
        return latent[:n].copy(), value[:n].copy(), *(each[:n_near].copy() for each in near)


class _Scratch:
    """Room for a chunk's products and for every entry it could have; used again and again."""

    def __init__(self, rows: int, like: Float[Tensor, "d_in d_sae"]) -> None:
        self.h = like.new_empty(rows, like.shape[1])
        n, kind = self.h.numel(), self.h.numpy().dtype
        # What is never written to costs no memory.
        self.room = tuple(np.empty(n, each) for each in (np.int64, kind, np.int64, np.int64, kind))


def narrow(d_sae: int) -> Any:
    """Return the dtype in which files hold a latent's number."""
    return np.uint16 if d_sae <= 2**16 else np.uint32


class Compared(NamedTuple):
    """A batch beside its reconstruction."""

    toward: Float[np.ndarray, " nnz"]
    """<u - u_hat, W_dec_i> of each active entry; mostly u is x: see `SAE.normalised`."""
    x_sum: Float64[np.ndarray, " d_in"]
    sums: Float64[np.ndarray, " sums"]


def compare(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> Compared:
    """Return how far reconstructions are from their activations, along each active entry."""
    if x.device.type != "cpu" or sae.input_norm is not None:
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
    return Compared(toward, x_sum, sums[:, kept].sum(0))


def _compare_elsewhere(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> Compared:
    seen = sae.normalised(x)
    with torch.enable_grad():
        f = codes.magnitude.detach().requires_grad_()
        decoded = weighted_sums(sae.W_dec.detach(), codes.latent, f, codes.row_offsets)
    u_hat = decoded.detach() + sae.b_dec
    # The product's derivative to its weights is the sampled product <., W_dec_i>.
    (toward,) = torch.autograd.grad(decoded, f, seen.u - u_hat)
    x_hat = seen.undo(u_hat)
    dtype = sum_dtype(x.device)
    pairs = [(x, x), (x_hat, x_hat), (x, x_hat), (x - x_hat, x - x_hat)]
    sums = torch.stack([(a * b).sum(1).to(dtype).sum() for a, b in pairs])
    x_sum = x.to(dtype).sum(0)
    return Compared(toward.cpu().numpy(), *(each.double().cpu().numpy() for each in (x_sum, sums)))


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
