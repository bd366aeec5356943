"""The losses and their exact gradients through SparseCodes: one matrix product where dense needs 8.

f, relu(pi_gate) and the gradients at both pre-activations are zero wherever pi_gate <= 0, so after
the encoder's product all else costs O(active entries * d_in), and no matrix of batch x d_sae ever
exists. Each architecture's step is written once, on the `Loops` of a CPU or `gpu.step.Kernels`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE
from gsae_core.sae.base import SAE, Count, Counts, Mask, PerEntry, PerLatent, Rows, Scalar
from gsae_core.sae.jumprelu import JumpReluSAE, in_window
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import AUX_ERROR_POWER, ERROR_POWER, N_ROW_SUMS, stats_from_rows
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import (
    ByLatent,
    SparseCodes,
    Wanted,
    by_latent,
    codes_of,
    gates,
    largest_codes,
    numpy,
    products_above,
)
from gsae_core.sae.sparse.dense import StepSums, check_by_hand, gain, l1_weights, leave_gradients
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE
from gsae_core.threads import over_rows


class Active(NamedTuple):
    """The active entries of a batch, by row and by latent."""

    codes: SparseCodes
    entries: ByLatent
    n_entries: Count
    n_candidates: int | None = None
    overflowed: Bool[Tensor, ""] | None = None
    """Whether a GPU's buffers had no room for them: there are none then, and n_entries is right."""


class Decoded(NamedTuple):
    """The errors of both reconstructions, and the gradients at the entries."""

    error: Rows
    """scale (x_hat - x)."""
    aux_error: Rows | None
    """scale (x_hat_aux - x), if the dictionary learns from it."""
    mag_slope: PerEntry
    """<error, W_dec_i> on the entries."""
    aux_slope: PerEntry | None
    """The same of the auxiliary error; None without such a term."""
    row_sums: Float64[Tensor, "batch sums"]
    """What each row adds to the loss and the statistics: the columns of `stats_from_rows`."""

    def mean(self, column: int) -> Scalar:
        """Return a column of `row_sums` averaged over rows."""
        return self.row_sums[:, column].sum().to(self.error.dtype) / len(self.error)

    def error_sum(self) -> Float[Tensor, " d_in"]:
        """Return both errors summed over rows: the gradient of `b_dec` through the decoder."""
        total = self.error.sum(0)
        return total if self.aux_error is None else total + self.aux_error.sum(0)


def undecoded(sae: BuiltinSAE, codes: SparseCodes, x: Rows) -> Decoded:
    """Return room for what `Loops.decode` returns, zeros where nothing will be written."""
    aux = sae.objective.aux
    return Decoded(
        error=torch.empty_like(x),
        aux_error=torch.empty_like(x) if aux == "unfrozen" else None,
        mag_slope=torch.empty_like(codes.gate),
        aux_slope=None if aux == "off" else torch.empty_like(codes.gate),
        row_sums=torch.zeros(len(x), N_ROW_SUMS, dtype=torch.float64, device=x.device),
    )


@dataclass(kw_only=True)
class Loops:
    """What a device does of a step: here the loops compiled for a CPU."""

    screened: bool = False

    def active(self, sae: GatedSAE | ReluSAE | JumpReluSAE, xc: Rows) -> Active:
        """Return the entries with an open gate; of a JumpReLU SAE those above theta - eps / 2."""
        below = sae.eps / 2 if isinstance(sae, JumpReluSAE) else 0.0
        found = products_above(xc, *gates(sae, below=below), screened=self.screened)
        codes = codes_of(sae, xc, found)
        n_entries = torch.tensor(codes.latent.numel())
        return Active(codes, by_latent(codes, sae.d_sae), n_entries, found.n_candidates)

    def largest(self, sae: TopKSAE, xc: Rows, wanted: Wanted) -> list[SparseCodes]:
        """Return, for each (bias, k), k entries of a row: on a CPU those above 0 alone."""
        return largest_codes(xc, sae.W_enc, wanted)

    def decode(
        self, sae: BuiltinSAE, codes: SparseCodes, x: Rows, *, bias: Tensor, scale: float
    ) -> Decoded:
        """Return the errors of the reconstructions, and what each entry would change about them.

        `magnitude` makes x_hat, and `gate` x_hat_aux; both start from `bias`.
        """
        decoded = undecoded(sae, codes, x)
        arrays = [codes.row_offsets, codes.latent, codes.magnitude, codes.gate, sae.W_dec, bias, x]
        aux_error = x[:0] if decoded.aux_error is None else decoded.aux_error
        aux_slope = codes.gate[:0] if decoded.aux_slope is None else decoded.aux_slope
        results = [decoded.error, aux_error, decoded.mag_slope, aux_slope, decoded.row_sums]
        inputs, outputs = map(numpy, arrays), [each.numpy() for each in results]
        arguments = (*inputs, outputs[0].dtype.type(scale), decoded.aux_slope is not None, *outputs)
        over_rows(len(x), lambda first, last: loops.decode_rows(first, last, *arguments))
        return decoded

    def sums(
        self, sae: BuiltinSAE, active: Active, decoded: Decoded, xc: Rows, l1_slope: float | None
    ) -> StepSums:
        """Return the sums, using up `mag_slope`; `l1_slope` is lambda / B, None without L1 term."""
        (codes, entries), latent = active[:2], active.codes.latent
        window = None
        if isinstance(sae, JumpReluSAE):
            near = in_window(codes.gate, sae.threshold.take(latent), sae.eps)
            n_near = per_latent(entries, near).to(decoded.mag_slope.dtype)
            window = per_latent(entries, decoded.mag_slope * near), n_near
        fires = codes.magnitude > 0
        dm = decoded.mag_slope.mul_(fires)
        slope, dg, dh = gain(sae), None, dm
        if l1_slope is not None:
            weights, dg = l1_weights(sae), torch.full_like(dm, l1_slope)
            if weights is not None:
                dg = weights.take(latent) * l1_slope
            if decoded.aux_slope is not None:
                dg += decoded.aux_slope
            dh = dm + dg if slope is None else torch.addcmul(dg, dm, slope.take(latent))
        W_dec = weight_sums(entries, codes.magnitude, decoded.error)
        if decoded.aux_error is not None:
            weight_sums(entries, codes.gate, decoded.aux_error, add_to=W_dec)
        return StepSums(
            W_dec=W_dec,
            W_enc=weight_sums(entries, dh, xc, columns=True),
            dm=per_latent(entries, dm),
            dm_m=None if slope is None else per_latent(entries, dm * codes.magnitude),
            dg=None if dg is None else per_latent(entries, dg),
            gate=None if dg is None else per_latent(entries, codes.gate),
            fired=per_latent(entries, fires),
            gate_open=entries.offsets.diff(),
            window=window,
        )


def column_sums(x: Rows) -> Float64[Tensor, " d_in"]:
    """Return the sum over rows, in float64."""
    # On a CPU torch takes ten times as long as numpy.
    return x.sum(0, dtype=torch.float64) if x.is_cuda else torch.from_numpy(numpy(x).sum(0, float))


def per_latent(entries: ByLatent, value: PerEntry | Bool[Tensor, " nnz"]) -> PerLatent | Counts:
    """Return each latent's sum of `value`; a count of truth values."""
    kind = torch.int64 if value.dtype == torch.bool else value.dtype
    out = torch.empty(entries.offsets.numel() - 1, dtype=kind)
    loops.sum_entries(*map(numpy, (entries.offsets, entries.order, value, out)))
    return out


@torch.no_grad()
def take_step(
    engine: Loops, sae: BuiltinSAE, x: Rows, sparsity_coeff: float, dead: Mask | None
) -> StepResult:
    """Return `sparse_step`'s result by this engine, for a contiguous x."""
    if isinstance(sae, TopKSAE):
        return _topk_step(sae, x, dead, engine)
    xc, slope = x - sae.b_dec, sparsity_coeff / len(x)
    active = engine.active(sae, xc)
    decoded = engine.decode(sae, active.codes, x, bias=sae.b_dec, scale=2 / len(x))
    jumps = isinstance(sae, JumpReluSAE)
    sums = engine.sums(sae, active, decoded, xc, None if jumps else slope)
    leave_gradients(sae, sums, error=decoded.error_sum(), l1_slope=slope)
    sparsity = slope * sums.fired.sum().to(x.dtype) if jumps else sums.l1_term(sae, slope)
    parts = LossParts(decoded.mean(ERROR_POWER), sparsity, decoded.mean(AUX_ERROR_POWER))
    gate_open = sums.gate_open if isinstance(sae, GatedSAE) else None
    x_sum, aux = column_sums(x), decoded.aux_slope is not None
    stats = stats_from_rows(
        x_sum=x_sum, row_sums=decoded.row_sums, fired=sums.fired, gate_open=gate_open, aux=aux
    )
    return StepResult(parts, stats, active.n_entries, active.n_candidates, active.overflowed)


def _topk_step(sae: TopKSAE, x: Rows, dead: Mask | None, engine: Loops) -> StepResult:
    """Take the step of `losses.topk_loss`.

    The dead latents' entries follow like those of B more rows, with the same xc and the error that
    the others leave for target.
    """
    n_rows, xc = len(x), x - sae.b_dec
    wanted: Wanted = [(sae.b_enc, sae.k)]
    if dead is not None:
        wanted.append((sae.b_enc.masked_fill(~dead, -torch.inf), min(sae.k_aux, sae.d_sae)))
    kept, *others = engine.largest(sae, xc, wanted)
    decoded = engine.decode(sae, kept, x, bias=sae.b_dec, scale=2 / n_rows)
    codes, both, auxiliary = kept, decoded, x.new_zeros(())
    if dead is not None:
        (spare,), left = others, decoded.error * (-n_rows / 2)
        bias, scale = torch.zeros_like(sae.b_dec), 2 * AUX_WEIGHT / n_rows
        aux = engine.decode(sae, spare, left, bias=bias, scale=scale)
        # Without a dead latent there is no such term.
        auxiliary = torch.where(dead.any(), AUX_WEIGHT * aux.mean(ERROR_POWER), auxiliary)
        pairs = zip(kept[1:], spare[1:], strict=True)
        offsets = torch.cat([kept.row_offsets, spare.row_offsets[1:] + kept.latent.numel()])
        codes, xc = SparseCodes(offsets, *map(torch.cat, pairs)), torch.cat([xc, xc])
        mag_slope = torch.cat([decoded.mag_slope, aux.mag_slope])
        both = decoded._replace(error=torch.cat([decoded.error, aux.error]), mag_slope=mag_slope)
    n_entries = x.new_full((), codes.latent.numel(), dtype=torch.int64)
    active = Active(codes, by_latent(codes, sae.d_sae), n_entries)
    sums = engine.sums(sae, active, both, xc, None)
    # What the dead latents are to explain is a constant: it moves b_dec through xc alone.
    leave_gradients(sae, sums, error=decoded.error.sum(0))
    parts = LossParts(decoded.mean(ERROR_POWER), x.new_zeros(()), auxiliary)
    # Those of the batch's own rows.
    fired = sums.fired.new_zeros(sae.d_sae).index_add_(0, kept.latent, (kept.magnitude > 0).long())
    stats = stats_from_rows(x_sum=column_sums(x), row_sums=decoded.row_sums, fired=fired)
    return StepResult(parts, stats, n_entries)


def weight_sums(
    entries: ByLatent,
    weight: PerEntry,
    dense: Float[Tensor, "rows d_in"],
    *,
    add_to: Float[Tensor, "a b"] | None = None,
    columns: bool = False,
) -> Float[Tensor, "a b"]:
    """Return each latent's sum of weight * dense[row], (d_sae, d_in), or with `columns` transposed.

    `weight` is in the order of the codes. The sum is added to `add_to` where that is given.
    """
    d_sae, d_in = entries.offsets.numel() - 1, dense.shape[1]
    out = dense.new_empty((d_in, d_sae) if columns else (d_sae, d_in)) if add_to is None else add_to
    weight = weight.take(entries.order)
    arrays = [numpy(each) for each in (entries.offsets, entries.row, weight, dense, out)]
    if columns:
        over_rows(d_sae, lambda i, end: loops.sum_rows_into_columns(i, end, *arrays))
    else:
        over_rows(d_sae, lambda i, end: loops.sum_rows(i, end, *arrays, add_to is not None))
    return out


@torch.no_grad()
def sparse_step(
    sae: SAE, x: Rows, *, sparsity_coeff: float, dead: Mask | None = None, screened: bool = False
) -> StepResult:
    """Do as `dense_step`, up to rounding, for every architecture and objective of tied paths.

    The SAE is on the CPU, in float32 or float64. For `screened` see `products_above`; of no effect
    on a TopK SAE, whose latents have no threshold to be screened against.
    """
    check_by_hand(sae, x)
    assert isinstance(sae, BuiltinSAE)
    dead = dead if dead is not None and dead.any() else None  # there is no term to compute
    return take_step(Loops(screened=screened), sae, x.contiguous(), sparsity_coeff, dead)
