"""The losses and their exact gradients through SparseCodes: one matrix product where dense needs 8.

The gate decides everything. f, relu(pi_gate) and the gradients at both pre-activations are zero
wherever pi_gate <= 0, so after one dense product for the encoder all else costs
O(active entries * d_in). No matrix of batch x d_sae exists at any time.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.codes import ByLatent, SparseCodes, by_latent, encode_centred, weighted_sums
from gsae_core.sae.gradients import (
    StepSums,
    gain,
    l1_weights,
    leave_gradients,
    loss_parts,
    squared_norm,
)
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import stats_from_counts


@torch.no_grad()
def sparse_step(
    sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"], *, sparsity_coeff: float
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, for every recipe, tie and auxiliary decoder
    (arXiv:2404.16014v2, Eq. 8 for a Gated SAE, Eq. 4 for a ReLU SAE).

    Args:
        sae: learns later, when an optimiser reads `.grad`; its parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    sae.check_width(x)
    l1_slope = sparsity_coeff / len(x)
    xc = (x - sae.b_dec).contiguous()
    codes = encode_centred(sae, xc)
    entries = by_latent(codes, sae.d_sae)

    mag = _decode(sae, codes, value=codes.magnitude, x=x)
    aux = None if sae.objective.aux == "off" else _decode(sae, codes, value=codes.gate, x=x)
    fires = codes.magnitude > 0
    dm = mag.slope * fires
    weights = l1_weights(sae)
    dg = torch.full_like(dm, l1_slope) if weights is None else weights.take(codes.latent) * l1_slope
    if aux is not None:
        dg += aux.slope

    gate = _per_latent(codes, codes.gate, sae.d_sae)
    sums = StepSums(
        W_dec=_weight_sums(entries, codes.magnitude, mag.error),
        W_gate=_encoder_sums(entries, _slope_of_h(sae, codes, dm, dg), xc),
        W_mag=_encoder_sums(entries, dm, xc) if _untied(sae) else None,
        dm=_per_latent(codes, dm, sae.d_sae),
        dm_m=None if gain(sae) is None else _per_latent(codes, dm * codes.magnitude, sae.d_sae),
        dg=_per_latent(codes, dg, sae.d_sae),
        gate=gate,
        error=mag.error.sum(0),
    )
    if aux is not None and sae.objective.aux == "unfrozen":
        sums.W_dec += _weight_sums(entries, codes.gate, aux.error)
        sums.error += aux.error.sum(0)
    leave_gradients(sae, sums, l1_slope)

    gated = isinstance(sae, GatedSAE)
    counts = entries.offsets.diff()
    return StepResult(
        loss=loss_parts(
            sae,
            reconstruction=squared_norm(mag.error),
            auxiliary=x.new_zeros(()) if aux is None else squared_norm(aux.error),
            gate=gate,
            n_rows=len(x),
            l1_slope=l1_slope,
        ),
        stats=stats_from_counts(
            x=x,
            x_hat=mag.x_hat,
            x_hat_gate=None if aux is None else aux.x_hat,
            fired=torch.bincount(codes.latent[fires], minlength=sae.d_sae) if gated else counts,
            gate_open=counts if gated else None,
        ),
    )


class _Decoded(NamedTuple):
    """One of the two reconstructions, its error, and the gradient at what it was decoded from."""

    x_hat: Float[Tensor, "batch d_in"]
    error: Float[Tensor, "batch d_in"]
    """2 (x_hat - x) / B."""
    slope: Float[Tensor, " nnz"]
    """<error, W_dec_i> on the active entries."""


def _decode(
    sae: GatedSAE | ReluSAE,
    codes: SparseCodes,
    *,
    value: Float[Tensor, " nnz"],
    x: Float[Tensor, "batch d_in"],
) -> _Decoded:
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        decoded = weighted_sums(sae.W_dec.detach(), codes.latent, value, codes.row_offsets)
    x_hat = decoded.detach() + sae.b_dec
    error = (x_hat - x).mul_(2 / len(x))
    # The product's own derivative is the sampled product that is wanted here.
    (slope,) = torch.autograd.grad(decoded, value, error)
    return _Decoded(x_hat=x_hat, error=error, slope=slope)


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
    entries: ByLatent, weight: Float[Tensor, " nnz"], dense: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_sae d_in"]:
    return weighted_sums(dense, entries.row, weight.take(entries.order), entries.offsets)


def _encoder_sums(
    entries: ByLatent, weight: Float[Tensor, " nnz"], dense: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_in d_sae"]:
    # The fused optimiser wants gradients laid out as their parameters are.
    return _weight_sums(entries, weight, dense).T.contiguous()


def _per_latent(
    codes: SparseCodes, value: Float[Tensor, " nnz"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    return value.new_zeros(d_sae).index_add_(0, codes.latent, value)
