"""Baseline + rescale & shift: shrinkage undone and nothing else, to ask whether that is enough.

The paper's answer is no: gamma returns to 1, and most of the gap to a Gated SAE remains
(arXiv:2404.16014v2, section 5.2).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.losses import loss

LEARNS = ("b_mag", "r_mag")
"""The only parameters of a rescaled baseline that are not frozen."""


@torch.no_grad()
def rescale_and_shift(baseline: ReluSAE) -> GatedSAE:
    """Return a Gated SAE that begins as `baseline`, and in which only `r_mag` and `b_mag` learn.

        pi_gate = (x - b_dec) @ W_enc + b_enc                     the baseline's, frozen
        pi_mag  = (x - b_dec) @ W_enc * exp(r_mag) + b_mag        from r_mag = 0, b_mag = b_enc

    Latents and reconstructions start as the baseline's, bit for bit. The gate stays the baseline's,
    so each token's active latents stay among the baseline's: L0 can fall and never rise. The
    comparison in the paper (section 5.2) takes a baseline as wide as the Gated SAE it is held
    against. `baseline` is copied and stays as it is.

    Raises:
        InputError: if it normalises every token.
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


def rescale_step(sae: GatedSAE, x: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """Leave the gradients of |x - x_hat|^2 in `.grad`, fresh, and return that loss without a graph.

        adam = torch.optim.Adam(p for p in sae.parameters() if p.requires_grad)
        for x in batches:
            rescale_step(sae, x)
            adam.step()

    No sparsity term is needed: what is active is the frozen gate's to say.

    Args:
        sae: what `rescale_and_shift` returned.
        x: activations, in the units the baseline was trained in.

    Raises:
        InputError: if other parameters than `r_mag` and `b_mag` learn, or the last axis of `x` is
            not `d_in`.
    """
    learning = sorted(name for name, p in sae.named_parameters() if p.requires_grad)
    if learning != list(LEARNS):
        raise InputError(
            f"expected an SAE in which only {' and '.join(LEARNS)} learn, got one in which "
            f"{', '.join(learning) or 'nothing'} does; make it with rescale_and_shift(baseline)"
        )
    sae.zero_grad(set_to_none=True)
    reconstruction = loss(sae, x, sparsity_coeff=0.0).reconstruction
    reconstruction.backward()
    return reconstruction.detach()
