"""Inference-time optimisation: latents chosen for a dictionary without asking its encoder.

The error they leave says how good the dictionary is; the gap to the encoder's own latents says how
good the encoder is (arXiv:2404.16014v2, Appendix A).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE, Scalar
from gsae_core.sae.losses import dense_step


@torch.no_grad()
def pursue(sae: SAE, x: Float[Tensor, "batch width"], *, k: int) -> Float[Tensor, "batch d_sae"]:
    """Return alpha >= 0 with at most `k` entries a token and a small |x - sae.decode(alpha)|^2.

    Gradient pursuit (Blumensath & Davies 2008) kept non-negative, as arXiv:2404.16014v2,
    Appendix A. Each of `k` rounds takes one direction more, perhaps one taken before, and then one
    step, of the length that minimises the error, down the gradient over all taken so far:

        r     = x - b_dec - alpha @ W_dec
        S     = S + argmax_i d_i . r               the largest signed product
        g     = (r @ W_dec.T) restricted to S
        c     = g @ W_dec
        alpha = relu(alpha + (c . r) / (c . c) * g)

    Directions compete by their unit vectors: what is decoded does not depend on their norms, and a
    row of zeros is never used. Of an SAE with `input_norm`, alpha decodes to u_hat.
    """
    sae.check_width(x)
    if not 1 <= k <= sae.d_sae:
        raise InputError(
            f"expected k from 1 to d_sae={sae.d_sae}, got {k}; k is how many latents a token may "
            "use"
        )
    W_dec = sae.W_dec
    tiny = torch.finfo(W_dec.dtype).tiny  # A row of zeros stays one instead of becoming NaN.
    norms = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(tiny)
    units = F.normalize(W_dec, dim=1, eps=tiny)
    xc = sae.normalised(x).u - sae.b_dec
    alpha = xc.new_zeros(len(xc), sae.d_sae)
    taken = torch.zeros_like(alpha, dtype=torch.bool)
    for _ in range(k):
        r = xc - alpha @ units
        products = r @ units.T
        taken.scatter_(1, products.argmax(dim=1, keepdim=True), True)
        g = products * taken
        c = g @ units
        c_dot_c = c.square().sum(dim=1, keepdim=True)
        # c . r = sum_i g_i d_i . r = g . g, which rounding cannot make negative. Where c is zero
        # nothing taken can lower the error: the token is solved, or points away from everything.
        step = torch.where(c_dot_c > 0, g.square().sum(dim=1, keepdim=True) / c_dot_c, 0.0)
        alpha = torch.relu(alpha + step * g)
    return alpha / norms


LEARNS = ("b_mag", "r_mag")  # All others of a rescaled baseline are frozen.


@torch.no_grad()
def rescale_and_shift(baseline: ReluSAE) -> GatedSAE:
    """Return a Gated SAE that begins as a copy of `baseline`; only its `r_mag` and `b_mag` learn.

        pi_gate = (x - b_dec) @ W_enc + b_enc                     the baseline's, frozen
        pi_mag  = (x - b_dec) @ W_enc * exp(r_mag) + b_mag        from r_mag = 0, b_mag = b_enc

    Latents and reconstructions start as the baseline's, bit for bit, and L0 can fall and never
    rise. The paper's comparison (section 5.2) takes a baseline as wide as the Gated SAE.
    """
    baseline.check_trains()
    # Nothing trains the gate, so an auxiliary term would be work without an effect.
    sae = GatedSAE(baseline.d_in, baseline.d_sae, recipe=baseline.recipe, aux="off")
    sae.to(baseline.W_enc)
    assert sae.r_mag is not None  # the default tie has one, and it starts at zero
    sae.W_gate.copy_(baseline.W_enc)
    sae.b_gate.copy_(baseline.b_enc)
    sae.b_mag.copy_(baseline.b_enc)
    sae.W_dec.copy_(baseline.W_dec)
    sae.b_dec.copy_(baseline.b_dec)
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(name in LEARNS)
    return sae


def rescale_step(sae: GatedSAE, x: Float[Tensor, "batch width"]) -> Scalar:
    """Leave the gradients of |x - x_hat|^2 in `.grad`, fresh, and return that loss without a graph.

    `sae` comes from `rescale_and_shift`, and `x` is in the units the baseline was trained in. Adam
    over the parameters that require a gradient takes the step. No sparsity term is needed: the
    frozen gate decides what is active.
    """
    learning = sorted(name for name, p in sae.named_parameters() if p.requires_grad)
    if learning != list(LEARNS):
        raise InputError(
            f"expected an SAE of rescale_and_shift(baseline), got one in which {learning} learn"
        )
    return dense_step(sae, x, sparsity_coeff=0.0).loss.reconstruction
