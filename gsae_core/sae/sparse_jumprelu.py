"""The sparse step of a JumpReLU SAE: what fires, and what lies in the window around a threshold.

Below its threshold a latent is silent, but within half a bandwidth of it the pseudo-derivatives are
not zero. So the entries reach down to theta - eps / 2; those that do not fire carry f = 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.codes import SparseCodes, by_latent, thresholds
from gsae_core.sae.gradients import leave_plain_gradients, threshold_gradient
from gsae_core.sae.jumprelu import JumpReluSAE, in_window
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import stats_from_rows
from gsae_core.sae.passes import decode, encoder_sums, find, per_latent, weight_sums


@torch.no_grad()
def sparse_jumprelu_step(
    sae: JumpReluSAE, x: Float[Tensor, "batch d_in"], *, l0_slope: float, screened: bool
) -> StepResult:
    """Leave the gradients of `losses.jumprelu_loss` in `.grad`, and return terms and statistics.

    With e = x_hat - x and df_i = <2e/B, W_dec_i>, sums over the batch:

        dz     = df where z > theta                         to W_enc and b_enc
        dtheta = -(theta df + lambda / B) / eps where |z - theta| < eps / 2

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations of the right width, contiguous.
        l0_slope: lambda / B.
        screened: whether to look for entries in bfloat16 first.
    """
    xc = x - sae.b_dec
    found = find(xc, *thresholds(sae, below=sae.eps / 2), screened=screened)
    offsets, latent, h = found.products
    z, theta = h + sae.b_enc.take(latent), sae.threshold.take(latent)
    fires, near = z > theta, in_window(z, theta, sae.eps)
    codes = SparseCodes(offsets, latent, gate=z, magnitude=z * fires)
    entries = by_latent(codes, sae.d_sae)
    decoded = decode(codes, W_dec=sae.W_dec, b_dec=sae.b_dec, x=x, scale=2 / len(x))

    df = decoded.mag_slope
    sae.threshold.grad = threshold_gradient(
        sae,
        slope=per_latent(entries, df * near),
        n_near=per_latent(entries, near).to(x.dtype),
        l0_slope=l0_slope,
    )
    dz = df * fires
    leave_plain_gradients(
        sae,
        W_dec=weight_sums(entries, codes.magnitude, decoded.error),
        W_enc=encoder_sums(entries, dz, xc),
        b_enc=per_latent(entries, dz),
        error=decoded.error.sum(0),
    )
    return StepResult(
        loss=LossParts(
            reconstruction=decoded.total(loops.ERROR_POWER) / len(x),
            sparsity=l0_slope * fires.sum().to(x.dtype),
            auxiliary=x.new_zeros(()),
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=False,
            fired=per_latent(entries, fires),
            gate_open=None,
        ),
        n_candidates=found.n_candidates,
        n_entries=latent.numel(),
    )
