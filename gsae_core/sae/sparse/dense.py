"""The losses of Gated and ReLU SAEs by hand, for batches in which much of the dictionary fires.

Seven matrix products (one shared encoder, two decoders, two gradients at the latents, two at the
weights) where autograd runs eight, five without a gate, and rows in blocks that stay in cache, so
that neither the latents nor their gradients ever exist for a whole batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.losses import StepResult, squared_error
from gsae_core.sae.metrics import stats_from_counts
from gsae_core.sae.sparse.codes import chunk_rows
from gsae_core.sae.sparse.gradients import (
    StepSums,
    check_by_hand,
    gain,
    l1_weights,
    leave_gradients,
    loss_parts,
)


@torch.no_grad()
def manual_dense_step(
    sae: GatedSAE | ReluSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, without autograd, for every recipe and auxiliary decoder
    of tied paths. Arguments and errors are those of `sparse_step`.
    """
    check_by_hand(sae, x)
    gated = isinstance(sae, GatedSAE)
    aux = sae.objective.aux
    l1_slope, slope = sparsity_coeff / len(x), gain(sae)
    weights = l1_weights(sae)
    x_hat, x_hat_aux = torch.empty_like(x), None if aux == "off" else torch.empty_like(x)
    # Counted in floating point, where a column sum is one vectorised pass; exact to 2^24 rows.
    fired, gate_open = x.new_zeros(2, sae.d_sae)
    dm, dm_m, dg, gate = x.new_zeros(4, sae.d_sae)
    sums = StepSums(
        W_dec=torch.zeros_like(sae.W_dec),
        W_gate=torch.zeros_like(sae.W_gate if gated else sae.W_enc),
        dm=dm,
        dm_m=None if slope is None else dm_m,
        dg=dg,
        gate=gate,
        error=x.new_zeros(sae.d_in),
    )
    W, b_gate = (sae.W_gate, sae.b_gate) if gated else (sae.W_enc, sae.b_enc)
    for start in range(0, len(x), chunk_rows(sae.d_sae)):
        rows = slice(start, start + chunk_rows(sae.d_sae))
        xc = x[rows] - sae.b_dec
        h = xc @ W
        g = torch.relu_(h + b_gate)
        opened = g.sign()
        gate_open += opened.sum(0)
        sums.gate += g.sum(0)
        m = g
        if gated:
            h = h if slope is None else h.mul_(slope)
            m = torch.relu_(h.add_(sae.b_mag)).mul_(opened)
        fires = m.sign() if gated else opened
        fired += fires.sum(0)

        error = _error(sae, m, x, rows, x_hat)
        sums.error += error.sum(0)
        sums.W_dec.addmm_(m.T, error)
        dm = (error @ sae.W_dec.T).mul_(fires)
        sums.dm += dm.sum(0)
        if sums.dm_m is not None:
            sums.dm_m += m.mul_(dm).sum(0)
        l1 = l1_slope if weights is None else weights * l1_slope
        if x_hat_aux is None:
            dg = opened * l1
        else:
            error = _error(sae, g, x, rows, x_hat_aux)
            if aux == "unfrozen":
                sums.error += error.sum(0)
                sums.W_dec.addmm_(g.T, error)
            dg = (error @ sae.W_dec.T).add_(l1).mul_(opened)
        sums.dg += dg.sum(0)
        sums.W_gate.addmm_(xc.T, dg.add_(dm if slope is None else dm.mul_(slope)))

    leave_gradients(sae, sums, l1_slope)
    stats = stats_from_counts(
        x=x,
        x_hat=x_hat,
        x_hat_gate=x_hat_aux,
        fired=fired.long(),
        gate_open=gate_open.long() if gated else None,
    )
    loss = loss_parts(
        sae,
        reconstruction=(stats.squared_error / len(x)).to(x.dtype),
        auxiliary=x.new_zeros(()) if x_hat_aux is None else squared_error(x, x_hat_aux),
        gate=sums.gate,
        l1_slope=l1_slope,
    )
    return StepResult(loss, stats)


def _error(
    sae: GatedSAE | ReluSAE,
    latents: Float[Tensor, "rows d_sae"],
    x: Float[Tensor, "batch d_in"],
    rows: slice,
    x_hat: Float[Tensor, "batch d_in"],
) -> Float[Tensor, "rows d_in"]:
    """Return 2 (x_hat - x) / B of these rows, and leave x_hat itself in `x_hat`."""
    decoded = torch.addmm(sae.b_dec, latents, sae.W_dec)
    x_hat[rows] = decoded
    return decoded.sub_(x[rows]).mul_(2 / len(x))
