"""The losses and their exact gradients through SparseCodes: one matrix product where dense needs 8.

The gate decides everything. f, relu(pi_gate) and the gradients at both pre-activations are zero
wherever pi_gate <= 0, so after one dense product for the encoder all else costs
O(active entries * d_in). No matrix of batch x d_sae exists at any time.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.codes import (
    ByLatent,
    SparseCodes,
    by_latent,
    codes_of,
    gates,
    numpy,
    products_above,
)
from gsae_core.sae.gradients import StepSums, gain, l1_weights, leave_gradients, loss_parts
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import stats_from_rows
from gsae_core.sae.screened import screened_products_above
from gsae_core.threads import over_rows


@torch.no_grad()
def sparse_step(
    sae: GatedSAE | ReluSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    screened: bool = False,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, for every recipe, tie and auxiliary decoder
    (arXiv:2404.16014v2, Eq. 8 for a Gated SAE, Eq. 4 for a ReLU SAE).

    Args:
        sae: on the CPU, in float32 or float64; learns later, when an optimiser reads `.grad`; its
            parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in.
        screened: look for open gates by a bfloat16 product first (`screened.py`); of no effect
            in float64, for which the rounding would be too coarse a screen.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    l1_slope = sparsity_coeff / len(x)
    x = x.contiguous()
    xc = x - sae.b_dec
    W, above = gates(sae)
    n_candidates = None
    if screened and x.dtype == torch.float32:
        found, n_candidates = screened_products_above(xc, W, above)
    else:
        found = products_above(xc, W, above)
    codes = codes_of(sae, xc, found)
    entries = by_latent(codes, sae.d_sae)
    decoded = _decode(sae, codes, x)

    fires = codes.magnitude > 0
    dm = decoded.mag_slope.mul_(fires)
    weights = l1_weights(sae)
    dg = torch.full_like(dm, l1_slope) if weights is None else weights.take(codes.latent) * l1_slope
    if decoded.aux_slope is not None:
        dg += decoded.aux_slope

    gated = isinstance(sae, GatedSAE)
    sums = StepSums(
        W_dec=_weight_sums(entries, codes.magnitude, decoded.error),
        W_gate=_encoder_sums(entries, _slope_of_h(sae, codes, dm, dg), xc),
        W_mag=_encoder_sums(entries, dm, xc) if _untied(sae) else None,
        dm=_per_latent(entries, dm),
        dm_m=None if gain(sae) is None else _per_latent(entries, dm * codes.magnitude),
        dg=_per_latent(entries, dg),
        gate=_per_latent(entries, codes.gate),
        error=decoded.error.sum(0),
    )
    if decoded.aux_error is not None:
        _weight_sums(entries, codes.gate, decoded.aux_error, add_to=sums.W_dec)
        sums.error += decoded.aux_error.sum(0)
    leave_gradients(sae, sums, l1_slope)

    opened = entries.offsets.diff()
    totals = decoded.row_sums.sum(0).to(x.dtype)
    return StepResult(
        loss=loss_parts(
            sae,
            reconstruction=totals[loops.ERROR_POWER] / len(x),
            auxiliary=totals[loops.AUX_ERROR_POWER] / len(x),
            gate=sums.gate,
            l1_slope=l1_slope,
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=decoded.aux_slope is not None,
            fired=_per_latent(entries, fires) if gated else opened,
            gate_open=opened if gated else None,
        ),
        n_candidates=n_candidates,
    )


class _Decoded(NamedTuple):
    """Both reconstructions, there and back."""

    error: Float[Tensor, "batch d_in"]
    """2 (x_hat - x) / B."""
    aux_error: Float[Tensor, "batch d_in"] | None
    """2 (x_hat_aux - x) / B, if the dictionary learns from it."""
    mag_slope: Float[Tensor, " nnz"]
    """<error, W_dec_i> on the active entries."""
    aux_slope: Float[Tensor, " nnz"] | None
    """The same of the auxiliary error; None without such a term."""
    row_sums: Float64[Tensor, "batch sums"]
    """What `loops.decode_rows` adds up for the loss and the statistics."""


def _decode(
    sae: GatedSAE | ReluSAE, codes: SparseCodes, x: Float[Tensor, "batch d_in"]
) -> _Decoded:
    aux = sae.objective.aux
    decoded = _Decoded(
        error=torch.empty_like(x),
        aux_error=torch.empty_like(x) if aux == "unfrozen" else None,
        mag_slope=torch.empty_like(codes.magnitude),
        aux_slope=None if aux == "off" else torch.empty_like(codes.gate),
        row_sums=torch.empty(len(x), loops.N_ROW_SUMS, dtype=torch.float64),
    )
    arrays = [codes.row_offsets, codes.latent, codes.magnitude, codes.gate]
    arrays += [sae.W_dec, sae.b_dec, x]
    results = [
        decoded.error,
        x[:0] if decoded.aux_error is None else decoded.aux_error,
        decoded.mag_slope,
        codes.gate[:0] if decoded.aux_slope is None else decoded.aux_slope,
        decoded.row_sums,
    ]
    inputs, outputs = map(numpy, arrays), [each.numpy() for each in results]
    scale = outputs[0].dtype.type(2 / len(x))
    arguments = (*inputs, scale, aux != "off", *outputs)
    over_rows(len(x), lambda first, last: loops.decode_rows(first, last, *arguments))
    return decoded


def _slope_of_h(
    sae: GatedSAE | ReluSAE,
    codes: SparseCodes,
    dm: Float[Tensor, " nnz"],
    dg: Float[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Return the gradient at h = xc @ W_gate, which a tied magnitude path reads as well."""
    if _untied(sae):
        return dg
    slope = gain(sae)
    return dm + dg if slope is None else torch.addcmul(dg, dm, slope.take(codes.latent))


def _untied(sae: GatedSAE | ReluSAE) -> bool:
    return isinstance(sae, GatedSAE) and sae.W_mag is not None


def _weight_sums(
    entries: ByLatent,
    weight: Float[Tensor, " nnz"],
    dense: Float[Tensor, "batch d_in"],
    *,
    add_to: Float[Tensor, "d_sae d_in"] | None = None,
) -> Float[Tensor, "d_sae d_in"]:
    """Return, for each latent, the sum over its entries of weight * dense[row]."""
    d_sae = entries.offsets.numel() - 1
    out = dense.new_empty(d_sae, dense.shape[1]) if add_to is None else add_to
    arrays = tuple(numpy(each) for each in (*entries, weight, dense, out))
    over_rows(d_sae, lambda first, last: loops.sum_rows(first, last, *arrays, add_to is not None))
    return out


def _encoder_sums(
    entries: ByLatent, weight: Float[Tensor, " nnz"], xc: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_in d_sae"]:
    """Return the transpose of `_weight_sums`: gradients lie as their parameters do."""
    d_sae = entries.offsets.numel() - 1
    out = xc.new_empty(xc.shape[1], d_sae)
    arrays = tuple(numpy(each) for each in (*entries, weight, xc, out))
    over_rows(d_sae, lambda first, last: loops.sum_rows_into_columns(first, last, *arrays))
    return out


def _per_latent(entries: ByLatent, value: Tensor) -> Tensor:
    """Return each latent's sum of `value` (nnz,); a count where it is of truth values."""
    kind = torch.int64 if value.dtype == torch.bool else value.dtype
    out = torch.empty(entries.offsets.numel() - 1, dtype=kind)
    loops.sum_entries(entries.offsets.numpy(), entries.order.numpy(), numpy(value), out.numpy())
    return out
