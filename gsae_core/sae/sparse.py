"""The losses and their exact gradients through SparseCodes: one matrix product where dense needs 8.

The gate decides everything. f, relu(pi_gate) and the gradients at both pre-activations are zero
wherever pi_gate <= 0, so after one dense product for the encoder all else costs
O(active entries * d_in). No matrix of batch x d_sae exists at any time. Thresholds and ranks decide
as gates do: `sparse_jumprelu.py`, `sparse_topk.py`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import SparseCodes, by_latent, codes_of, gates
from gsae_core.sae.gradients import StepSums, gain, l1_weights, leave_gradients, loss_parts
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import stats_from_rows
from gsae_core.sae.passes import decode, encoder_sums, find, per_latent, weight_sums
from gsae_core.sae.sparse_jumprelu import sparse_jumprelu_step
from gsae_core.sae.sparse_topk import sparse_topk_step


@torch.no_grad()
def sparse_step(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
    screened: bool = False,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, for every architecture, recipe, tie and auxiliary decoder
    (arXiv:2404.16014v2, Eq. 8 for a Gated SAE, Eq. 4 for a ReLU SAE; arXiv:2407.14435, section 3;
    arXiv:2406.04093).

    Args:
        sae: on the CPU, in float32 or float64; learns later, when an optimiser reads `.grad`; its
            parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.
        screened: look for entries by a bfloat16 product first (`screened.py`); of no effect in
            float64, and on a TopK SAE, whose latents have no threshold to be screened against.

    Raises:
        InputError: if the last axis of `x` is not `d_in`, or the SAE normalises every token.
    """
    sae.check_width(x)
    sae.check_trains()
    x = x.contiguous()
    match sae:
        case GatedSAE() | ReluSAE():
            return _gated_step(sae, x, sparsity_coeff / len(x), screened=screened)
        case JumpReluSAE():
            return sparse_jumprelu_step(sae, x, l0_slope=sparsity_coeff / len(x), screened=screened)
        case TopKSAE():
            return sparse_topk_step(sae, x, dead=dead)
    raise TypeError(f"no sparse step is known for {type(sae).__name__}")


def _gated_step(
    sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"], l1_slope: float, *, screened: bool
) -> StepResult:
    """Return `sparse_step` of an SAE with a gate, or of one whose gate is its magnitude.

    Args:
        l1_slope: lambda / B.
    """
    xc = x - sae.b_dec
    found = find(xc, *gates(sae), screened=screened)
    codes = codes_of(sae, xc, found.products)
    entries = by_latent(codes, sae.d_sae)
    decoded = decode(
        codes,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        x=x,
        scale=2 / len(x),
        aux=sae.objective.aux,
    )

    fires = codes.magnitude > 0
    dm = decoded.mag_slope.mul_(fires)
    weights = l1_weights(sae)
    dg = torch.full_like(dm, l1_slope) if weights is None else weights.take(codes.latent) * l1_slope
    if decoded.aux_slope is not None:
        dg += decoded.aux_slope

    gated = isinstance(sae, GatedSAE)
    sums = StepSums(
        W_dec=weight_sums(entries, codes.magnitude, decoded.error),
        W_gate=encoder_sums(entries, _slope_of_h(sae, codes, dm, dg), xc),
        W_mag=encoder_sums(entries, dm, xc) if _untied(sae) else None,
        dm=per_latent(entries, dm),
        dm_m=None if gain(sae) is None else per_latent(entries, dm * codes.magnitude),
        dg=per_latent(entries, dg),
        gate=per_latent(entries, codes.gate),
        error=decoded.error.sum(0),
    )
    if decoded.aux_error is not None:
        weight_sums(entries, codes.gate, decoded.aux_error, add_to=sums.W_dec)
        sums.error += decoded.aux_error.sum(0)
    leave_gradients(sae, sums, l1_slope)

    opened = entries.offsets.diff()
    return StepResult(
        loss=loss_parts(
            sae,
            reconstruction=decoded.total(loops.ERROR_POWER) / len(x),
            auxiliary=decoded.total(loops.AUX_ERROR_POWER) / len(x),
            gate=sums.gate,
            l1_slope=l1_slope,
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=decoded.aux_slope is not None,
            fired=per_latent(entries, fires) if gated else opened,
            gate_open=opened if gated else None,
        ),
        n_candidates=found.n_candidates,
    )


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
