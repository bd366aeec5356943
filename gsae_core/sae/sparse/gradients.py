"""The gradients of every loss, written out by hand from the sums that a batch leaves behind."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, has_fast_step
from gsae_core.sae.base import SAE


@dataclass
class StepSums:
    """What a batch leaves behind on its way through the loss; sums over the batch, in place.

    With S the entries where pi_gate > 0, e = x_hat - x and e' = x_hat_aux - x, a batch of B rows:

        dm = 1[m > 0] <2e/B, W_dec_i>                      gradient at pi_mag
        dg = lambda w_i / B + <2e'/B, W_dec_i>             gradient at pi_gate, on S

    For a ReLU SAE the gate is the magnitude: m = g = f and its gradient is dm + dg, e' left out.
    A JumpReLU or TopK SAE has no term of a gate: its gradient at z is dm.
    """

    W_dec: Float[Tensor, "d_sae d_in"]
    """Sum of f (2e/B); with the auxiliary decoder unfrozen also of relu(pi_gate) (2e'/B)."""
    W_enc: Float[Tensor, "d_in d_sae"]
    """Sum of xc dh, dh = gain dm + dg: of W_gate, if there is one."""
    dm: Float[Tensor, " d_sae"]
    dm_m: Float[Tensor, " d_sae"] | None
    """Sum of dm times m, where there is an r_mag to learn from it."""
    dg: Float[Tensor, " d_sae"] | None
    gate: Float[Tensor, " d_sae"] | None
    """Sum of relu(pi_gate)."""
    error: Float[Tensor, " d_in"]
    """Sum of 2e/B; with the auxiliary decoder unfrozen also of 2e'/B."""
    fired: Int64[Tensor, " d_sae"]
    """Inputs on which f > 0."""
    gate_open: Int64[Tensor, " d_sae"]
    """Inputs on which pi_gate > 0; entries of a latent, where there is no gate."""


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
def l1_weights(sae: BuiltinSAE) -> Float[Tensor, " d_sae"] | None:
    """Return what multiplies each latent in the L1 term; None for ones."""
    return None if sae.objective.l1_weight == "none" else sae.W_dec.norm(dim=1)


@torch.no_grad()
def gain(sae: BuiltinSAE) -> Float[Tensor, " d_sae"] | None:
    """Return the slope of pi_mag in h = xc @ W_gate; None for ones."""
    return sae.r_mag.exp() if isinstance(sae, GatedSAE) and sae.r_mag is not None else None


@torch.no_grad()
def l1_term(
    sae: GatedSAE | ReluSAE, gate: Float[Tensor, " d_sae"], l1_slope: float
) -> Float[Tensor, ""]:
    """Return the L1 term from each latent's sum of relu(pi_gate); `l1_slope` is lambda / B."""
    weights = l1_weights(sae)
    return (gate.sum() if weights is None else torch.dot(gate, weights)) * l1_slope


@torch.no_grad()
def leave_gradients(sae: BuiltinSAE, sums: StepSums, l1_slope: float = 0.0) -> None:
    """Put the gradient of every parameter but a threshold in `.grad`, in place of what was there.

    Args:
        sae: whose parameters they are.
        sums: of the batch; taken over, not copied.
        l1_slope: lambda / B, of an L1 term.
    """
    if sae.objective.l1_weight == "norm":
        assert sums.gate is not None  # only a gate's activity is weighted
        norms = sae.W_dec.norm(dim=1)
        # A direction of length zero has no slope; autograd takes 0 there as well.
        slopes = torch.where(norms > 0, l1_slope * sums.gate / norms, 0.0)
        sums.W_dec.addcmul_(slopes[:, None], sae.W_dec)
    sae.W_dec.grad = sums.W_dec
    if not isinstance(sae, GatedSAE):
        dz = sums.dm if sums.dg is None else sums.dm + sums.dg
        sae.W_enc.grad, sae.b_enc.grad = sums.W_enc, dz
        # b_dec moves x_hat and, the other way, the centred input.
        sae.b_dec.grad = sums.error - sae.W_enc @ dz
        return
    assert sums.dg is not None
    slope = gain(sae)
    through_h = sums.dm if slope is None else sums.dm * slope
    if not sae.detach_b_dec:
        through_h = through_h + sums.dg
    sae.W_gate.grad, sae.b_gate.grad, sae.b_mag.grad = sums.W_enc, sums.dg, sums.dm
    sae.b_dec.grad = sums.error - sae.W_gate @ through_h
    if sae.r_mag is not None:
        assert sums.dm_m is not None
        # d pi_mag / d r_mag = exp(r_mag) h = pi_mag - b_mag, and pi_mag = m wherever dm is not 0.
        sae.r_mag.grad = sums.dm_m - sae.b_mag * sums.dm
