"""The losses of Gated and ReLU SAEs by hand, for batches in which much of the dictionary fires.

Seven matrix products (one shared encoder, two decoders, two gradients at the latents, two at the
weights) where autograd runs eight, five without a gate, and rows in blocks that stay in cache, so
that neither the latents nor their gradients ever exist for a whole batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.losses import LossParts, StepResult, squared_error
from gsae_core.sae.metrics import stats_from_counts
from gsae_core.sae.sparse.codes import chunk_rows
from gsae_core.sae.sparse.gradients import (
    StepSums,
    check_by_hand,
    gain,
    l1_term,
    l1_weights,
    leave_gradients,
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
    l1_slope, slope = sparsity_coeff / len(x), gain(sae)
    l1_slopes = l1_slope if (weights := l1_weights(sae)) is None else weights * l1_slope
    x_hat = torch.empty_like(x)
    x_hat_aux = None if sae.objective.aux == "off" else torch.empty_like(x)
    W, b_gate = (sae.W_gate, sae.b_gate) if gated else (sae.W_enc, sae.b_enc)
    # Counted in floating point, where a column sum is one vectorised pass; exact to 2^24 rows.
    fired, gate_open, dm_sum, dm_m_sum, dg_sum, gate_sum = x.new_zeros(6, sae.d_sae)
    W_dec_sum, W_enc_sum = torch.zeros_like(sae.W_dec), torch.zeros_like(W)
    error_sum = x.new_zeros(sae.d_in)
    for start in range(0, len(x), chunk_rows(sae.d_sae)):
        rows = slice(start, start + chunk_rows(sae.d_sae))
        xc = x[rows] - sae.b_dec
        h = xc @ W
        g = torch.relu_(h + b_gate)
        opened = g.sign()
        gate_open += opened.sum(0)
        gate_sum += g.sum(0)
        m = g
        if gated:
            h = h if slope is None else h.mul_(slope)
            m = torch.relu_(h.add_(sae.b_mag)).mul_(opened)
        fires = m.sign() if gated else opened
        fired += fires.sum(0)
        error = _error(sae, m, x, rows, x_hat)
        error_sum += error.sum(0)
        W_dec_sum.addmm_(m.T, error)
        dm = (error @ sae.W_dec.T).mul_(fires)
        dm_sum += dm.sum(0)
        if slope is not None:
            dm_m_sum += m.mul_(dm).sum(0)
        if x_hat_aux is None:
            dg = opened * l1_slopes
        else:
            error = _error(sae, g, x, rows, x_hat_aux)
            if sae.objective.aux == "unfrozen":
                error_sum += error.sum(0)
                W_dec_sum.addmm_(g.T, error)
            dg = (error @ sae.W_dec.T).add_(l1_slopes).mul_(opened)
        dg_sum += dg.sum(0)
        W_enc_sum.addmm_(xc.T, dg.add_(dm if slope is None else dm.mul_(slope)))

    sums = StepSums(
        W_dec=W_dec_sum,
        W_enc=W_enc_sum,
        dm=dm_sum,
        dm_m=None if slope is None else dm_m_sum,
        dg=dg_sum,
        gate=gate_sum,
        error=error_sum,
        fired=fired.long(),
        gate_open=gate_open.long(),
    )
    leave_gradients(sae, sums, l1_slope)
    opens = sums.gate_open if gated else None
    stats = stats_from_counts(
        x=x, x_hat=x_hat, x_hat_gate=x_hat_aux, fired=sums.fired, gate_open=opens
    )
    parts = LossParts(
        reconstruction=(stats.squared_error / len(x)).to(x.dtype),
        sparsity=l1_term(sae, gate_sum, l1_slope),
        auxiliary=x.new_zeros(()) if x_hat_aux is None else squared_error(x, x_hat_aux),
    )
    return StepResult(parts, stats, n_entries=sums.gate_open.sum())


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
