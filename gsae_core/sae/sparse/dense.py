"""The gradients written out by hand, and the step of Gated and ReLU SAEs that many latents fire in.

That step takes seven matrix products (five without a gate) where autograd runs eight, in blocks of
rows that stay in cache: neither latents nor their gradients ever exist for a whole batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, has_fast_step
from gsae_core.sae.base import SAE, Counts, Dictionary, Encoder, Mask, PerLatent, Rows, Scalar
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import LossParts, StepResult, squared_error
from gsae_core.sae.metrics import stats_from_counts
from gsae_core.sae.sparse.codes import chunk_rows


@dataclass
class StepSums:
    """Sums over a batch, from which the gradients follow.

    With S the entries where pi_gate > 0, e = x_hat - x and e' = x_hat_aux - x, a batch of B rows:

        dm = 1[m > 0] <2e/B, W_dec_i>                      gradient at pi_mag
        dg = lambda w_i / B + <2e'/B, W_dec_i>             gradient at pi_gate, on S

    For a ReLU SAE the gate is the magnitude: m = g = f and its gradient is dm + dg, e' left out.
    A JumpReLU or TopK SAE has no term of a gate: its gradient at z is dm.
    """

    W_dec: Dictionary
    """Sum of f (2e/B); with the auxiliary decoder unfrozen also of relu(pi_gate) (2e'/B)."""
    W_enc: Encoder
    """Sum of xc dh, dh = gain dm + dg: the gradient of W_gate, if there is one."""
    dm: PerLatent
    dm_m: PerLatent | None
    """Sum of dm times m, where there is an r_mag to learn from it."""
    dg: PerLatent | None
    gate: PerLatent | None
    """Sum of relu(pi_gate)."""
    fired: Counts
    gate_open: Counts
    """Inputs on which pi_gate > 0; entries of a latent, where there is no gate."""
    window: tuple[PerLatent, PerLatent] | None = None
    """Of a JumpReLU SAE: df, the sum of <2e/B, W_dec_i> over the inputs in the window around a
    threshold, and their number."""

    def l1_term(self, sae: BuiltinSAE, l1_slope: float) -> Scalar:
        """Return the L1 term; `l1_slope` is lambda / B."""
        assert self.gate is not None  # JumpReLU and TopK SAEs have no such term
        weights = l1_weights(sae)
        return (self.gate.sum() if weights is None else torch.dot(self.gate, weights)) * l1_slope


def check_by_hand(sae: SAE, x: Rows) -> None:
    """Raise InputError unless this SAE's gradients are written out by hand, and fit `x`."""
    sae.check_width(x)
    sae.check_trains()
    if not has_fast_step(sae):
        raise InputError(
            "expected a Gated SAE with tie 'r_mag' or 'none', a ReLU, JumpReLU or TopK SAE, got "
            f"{sae}; take dense_step"
        )


@torch.no_grad()
def l1_weights(sae: BuiltinSAE) -> PerLatent | None:
    """Return what multiplies each latent in the L1 term; None for ones."""
    return None if sae.objective.l1_weight == "none" else sae.W_dec.norm(dim=1)


@torch.no_grad()
def gain(sae: BuiltinSAE) -> PerLatent | None:
    """Return the slope of pi_mag in h = xc @ W_gate; None for ones."""
    return sae.r_mag.exp() if isinstance(sae, GatedSAE) and sae.r_mag is not None else None


def leave_gradients(
    sae: BuiltinSAE, sums: StepSums, *, error: Float[Tensor, " d_in"], l1_slope: float = 0.0
) -> None:
    """Leave the gradient of every parameter in `.grad`; uses up the sums.

    `error` is the gradient of b_dec through the decoder, `l1_slope` lambda / B. A threshold's is
    -(theta df + lambda / B) / eps, summed over the inputs where |z - theta| < eps / 2.
    """
    if isinstance(sae, JumpReluSAE):
        assert sums.window is not None
        df, n_near = sums.window
        sae.threshold.grad = (sae.threshold * df + l1_slope * n_near) / -sae.eps
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
        sae.b_dec.grad = error - sae.W_enc @ dz
        return
    assert sums.dg is not None
    slope = gain(sae)
    through_h = sums.dm if slope is None else sums.dm * slope
    if not sae.detach_b_dec:
        through_h = through_h + sums.dg
    sae.W_gate.grad, sae.b_gate.grad, sae.b_mag.grad = sums.W_enc, sums.dg, sums.dm
    sae.b_dec.grad = error - sae.W_gate @ through_h
    if sae.r_mag is not None:
        assert sums.dm_m is not None
        # d pi_mag / d r_mag = exp(r_mag) h = pi_mag - b_mag, and pi_mag = m wherever dm is not 0.
        sae.r_mag.grad = sums.dm_m - sae.b_mag * sums.dm


@torch.no_grad()
def manual_dense_step(
    sae: BuiltinSAE, x: Rows, *, sparsity_coeff: float, dead: Mask | None = None
) -> StepResult:
    """Do as `dense_step`, up to rounding."""
    check_by_hand(sae, x)
    if not isinstance(sae, GatedSAE | ReluSAE):
        raise InputError(f"expected a Gated or ReLU SAE, got {sae}; take dense_step")
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

    def error_of(latents: Tensor, rows: slice, x_hat: Tensor) -> Tensor:
        """Return 2 (x_hat - x) / B of these rows, with x_hat written to `x_hat`."""
        decoded = torch.addmm(sae.b_dec, latents, sae.W_dec)
        x_hat[rows] = decoded
        return decoded.sub_(x[rows]).mul_(2 / len(x))

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
        error = error_of(m, rows, x_hat)
        error_sum += error.sum(0)
        W_dec_sum.addmm_(m.T, error)
        dm = (error @ sae.W_dec.T).mul_(fires)
        dm_sum += dm.sum(0)
        if slope is not None:
            dm_m_sum += m.mul_(dm).sum(0)
        if x_hat_aux is None:
            dg = opened * l1_slopes
        else:
            error = error_of(g, rows, x_hat_aux)
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
        fired=fired.long(),
        gate_open=gate_open.long(),
    )
    leave_gradients(sae, sums, error=error_sum, l1_slope=l1_slope)
    opens = sums.gate_open if gated else None
    stats = stats_from_counts(
        x=x, x_hat=x_hat, x_hat_gate=x_hat_aux, fired=sums.fired, gate_open=opens
    )
    reconstruction = (stats.squared_error / len(x)).to(x.dtype)
    auxiliary = x.new_zeros(()) if x_hat_aux is None else squared_error(x, x_hat_aux)
    parts = LossParts(reconstruction, sums.l1_term(sae, l1_slope), auxiliary)
    return StepResult(parts, stats, n_entries=sums.gate_open.sum())
