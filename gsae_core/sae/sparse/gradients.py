"""The gradients of both losses, written out by hand from sums that sparse and dense code share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE, has_fast_step
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import LossParts
from gsae_core.sae.metrics import BatchStats
from gsae_core.sae.sparse import loops


@dataclass
class StepSums:
    """What a batch leaves behind on its way through the loss; sums over the batch, in place.

    With S the entries where pi_gate > 0, e = x_hat - x and e' = x_hat_aux - x, a batch of B rows:

        dm = 1[m > 0] <2e/B, W_dec_i>                      gradient at pi_mag
        dg = lambda w_i / B + <2e'/B, W_dec_i>             gradient at pi_gate, on S

    For a ReLU SAE the gate is the magnitude: m = g = f and its gradient is dm + dg, e' left out.
    """

    W_dec: Float[Tensor, "d_sae d_in"]
    """Sum of f (2e/B); with the auxiliary decoder unfrozen also of relu(pi_gate) (2e'/B)."""
    W_gate: Float[Tensor, "d_in d_sae"]
    """Sum of xc dh, dh = gain dm + dg."""
    dm: Float[Tensor, " d_sae"]
    dm_m: Float[Tensor, " d_sae"] | None
    """Sum of dm times m, where there is an r_mag to learn from it."""
    dg: Float[Tensor, " d_sae"]
    gate: Float[Tensor, " d_sae"]
    """Sum of relu(pi_gate)."""
    error: Float[Tensor, " d_in"]
    """Sum of 2e/B; with the auxiliary decoder unfrozen also of 2e'/B."""


def check_by_hand(sae: SAE, x: Float[Tensor, "batch d_in"]) -> None:
    """Check that the gradients of this SAE are written out by hand, and that x is of its width.

    Raises:
        InputError: if the last axis of `x` is not `d_in`, the SAE normalises every token, or its
            paths are untied.
    """
    sae.check_width(x)
    sae.check_trains()
    if not has_fast_step(sae):
        raise InputError(
            "expected a Gated SAE with tie 'r_mag' or 'none', a ReLU, JumpReLU or TopK SAE, got "
            f"{sae}; take dense_step"
        )


@torch.no_grad()
def l1_weights(sae: GatedSAE | ReluSAE) -> Float[Tensor, " d_sae"] | None:
    """Return what multiplies each latent in the L1 term; None for ones."""
    return None if sae.objective.l1_weight == "none" else sae.W_dec.norm(dim=1)


@torch.no_grad()
def gain(sae: GatedSAE | ReluSAE) -> Float[Tensor, " d_sae"] | None:
    """Return the slope of pi_mag in h = xc @ W_gate; None for ones."""
    return sae.r_mag.exp() if isinstance(sae, GatedSAE) and sae.r_mag is not None else None


@torch.no_grad()
def leave_gradients(sae: GatedSAE | ReluSAE, sums: StepSums, l1_slope: float) -> None:
    """Put the gradient of every parameter in `.grad`, in place of what was there.

    Args:
        sae: whose parameters they are.
        sums: of the batch; taken over, not copied.
        l1_slope: lambda / B.
    """
    if sae.objective.l1_weight == "norm":
        norms = sae.W_dec.norm(dim=1)
        # A direction of length zero has no slope; autograd takes 0 there as well.
        slopes = torch.where(norms > 0, l1_slope * sums.gate / norms, 0.0)
        sums.W_dec.addcmul_(slopes[:, None], sae.W_dec)
    if isinstance(sae, ReluSAE):
        leave_plain_gradients(
            sae, W_dec=sums.W_dec, W_enc=sums.W_gate, b_enc=sums.dm + sums.dg, error=sums.error
        )
        return
    slope = gain(sae)
    through_mag = sums.dm if slope is None else sums.dm * slope
    # b_dec moves x_hat and, the other way, the centred input of both paths.
    hears_gate = not sae.detach_b_dec
    sae.W_dec.grad = sums.W_dec
    sae.W_gate.grad, sae.b_gate.grad, sae.b_mag.grad = sums.W_gate, sums.dg, sums.dm
    through_h = through_mag + sums.dg if hears_gate else through_mag
    sae.b_dec.grad = sums.error - sae.W_gate @ through_h
    if sae.r_mag is not None:
        assert sums.dm_m is not None
        # d pi_mag / d r_mag = exp(r_mag) h = pi_mag - b_mag, and pi_mag = m wherever dm is not 0.
        sae.r_mag.grad = sums.dm_m - sae.b_mag * sums.dm


@torch.no_grad()
def leave_plain_gradients(
    sae: ReluSAE | JumpReluSAE | TopKSAE,
    *,
    W_dec: Float[Tensor, "d_sae d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    error: Float[Tensor, " d_in"],
) -> None:
    """Put the gradients of an SAE with a single encoder path in `.grad`: taken over, not copied.

    Args:
        sae: whose parameters they are; a threshold's gradient is left as it is.
        W_dec: of the dictionary.
        W_enc: of the encoder.
        b_enc: of its bias: the sum over the batch of the gradient at the pre-activations.
        error: sum over the batch of the gradient at x_hat.
    """
    sae.W_dec.grad, sae.W_enc.grad, sae.b_enc.grad = W_dec, W_enc, b_enc
    # b_dec moves x_hat and, the other way, the centred input.
    sae.b_dec.grad = error - sae.W_enc @ b_enc


@torch.no_grad()
def threshold_gradient(
    sae: JumpReluSAE,
    *,
    slope: Float[Tensor, " d_sae"],
    n_near: Float[Tensor, " d_sae"],
    l0_slope: float,
) -> Float[Tensor, " d_sae"]:
    """Return the gradient at theta of both terms of a JumpReLU SAE's loss.

        dtheta = -(1 / eps) sum over the window of (theta df + lambda / B)

    Args:
        sae: whose thresholds they are.
        slope: for each latent the sum, over the inputs in its window, of the gradient at f.
        n_near: how many inputs are in its window.
        l0_slope: lambda / B.
    """
    return (sae.threshold * slope + l0_slope * n_near) / -sae.eps


@torch.no_grad()
def loss_parts(
    sae: GatedSAE | ReluSAE,
    *,
    reconstruction: Float[Tensor, ""],
    auxiliary: Float[Tensor, ""],
    gate: Float[Tensor, " d_sae"],
    l1_slope: float,
) -> LossParts:
    """Return the terms of the loss.

    Args:
        sae: whose recipe weights the L1 term.
        reconstruction: mean of |e|^2.
        auxiliary: mean of |e'|^2; 0 without such a term.
        gate: sum of relu(pi_gate) for each latent.
        l1_slope: lambda / B.
    """
    weights = l1_weights(sae)
    activity = gate.sum() if weights is None else torch.dot(gate, weights)
    return LossParts(
        reconstruction=reconstruction, sparsity=activity * l1_slope, auxiliary=auxiliary
    )


@torch.no_grad()
def stats_from_rows(
    *,
    x: Float[Tensor, "batch d_in"],
    row_sums: Float64[Tensor, "batch sums"],
    aux: bool,
    fired: Int64[Tensor, " d_sae"],
    gate_open: Int64[Tensor, " d_sae"] | None,
) -> BatchStats:
    """Return the sums of a batch that `loops.decode_rows`, or its like on a GPU, went through.

    Args:
        x: activations.
        row_sums: what the loop added up for each row.
        aux: whether there was a second reconstruction, from relu(pi_gate).
        fired: tokens on which each latent's f > 0.
        gate_open: tokens on which each gate was open; None for a ReLU SAE.
    """
    if x.device.type == "cpu":
        x_sum = torch.zeros(x.shape[1], dtype=torch.float64)
        loops.sum_columns(x.numpy(), x_sum.numpy())
    else:
        x_sum = x.sum(0, dtype=torch.float64)
    power, hat, along = (
        row_sums[:, k] for k in (loops.X_POWER, loops.X_HAT_POWER, loops.X_DOT_X_HAT)
    )
    lengths = (power * hat).sqrt()
    cosines = torch.where(lengths > 0, along / lengths, 0.0)
    totals = row_sums.sum(0)
    return BatchStats(
        n_tokens=torch.full((), x.shape[0], dtype=torch.int64, device=x.device),
        squared_error=totals[loops.ERROR_POWER],
        x_sum=x_sum,
        x_power=totals[loops.X_POWER],
        x_hat_power=totals[loops.X_HAT_POWER],
        x_dot_x_hat=totals[loops.X_DOT_X_HAT],
        cosine=cosines.sum(),
        fired=fired,
        gate_open=gate_open,
        gate_power=totals[loops.AUX_POWER] if aux else None,
        x_dot_gate=totals[loops.X_DOT_AUX] if aux else None,
    )
