"""Each loss as its paper writes it, dense and left to autograd: the reference for faster steps."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE, Count, Inputs, Latents, Mask, Rows, Scalar
from gsae_core.sae.jumprelu import JumpReluSAE, in_window, jump, step
from gsae_core.sae.metrics import BatchStats, stats_from_counts
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE, largest


class LossParts(NamedTuple):
    """The terms of a loss: each summed over coordinates, then averaged over the batch."""

    reconstruction: Scalar
    """|x - x_hat|^2."""
    sparsity: Scalar
    """The L1 term, or the L0 term of a JumpReLU SAE, lambda included; 0 for a TopK SAE."""
    auxiliary: Scalar
    """|x - x_hat_aux|^2 of a Gated SAE, x_hat_aux being decoded from relu(pi_gate); of a TopK SAE
    1/32 of what its dead latents leave of the error; else 0."""

    @property
    def total(self) -> Scalar:
        """The loss: the sum of the three."""
        return self.reconstruction + self.sparsity + self.auxiliary


class StepResult(NamedTuple):
    """What one forward and backward pass leaves besides the gradients in `.grad`."""

    loss: LossParts
    stats: BatchStats
    n_entries: Count
    """(Input, latent) pairs that cost work: open gates, a JumpReLU SAE's latents above or within
    the window below their thresholds, a TopK SAE's largest and its largest dead ones."""
    n_candidates: int | None = None
    """Products a screened encode computed again in float32; None without a screen."""
    overflowed: Bool[Tensor, ""] | None = None
    """Whether a GPU's buffers were too small for them: then all else and `.grad` mean nothing, and
    the dense step is to be taken. None where that cannot be."""
    capacity: int = 0
    """Entries that those buffers had room for."""
    kl: Scalar | None = None
    """KL(clean || spliced) in nats a prediction, of the end-to-end loss alone."""


class Forward(NamedTuple):
    """The terms of the loss, and what the statistics are gathered from."""

    loss: LossParts
    f: Latents
    x_hat: Inputs
    pi_gate: Latents | None = None
    x_hat_aux: Inputs | None = None
    n_spare: Count | int = 0
    """Entries that cost work and are not in `f`: near a threshold, or of dead latents."""


def gated_loss(sae: GatedSAE, x: Inputs, sparsity_coeff: float) -> Forward:
    """Return the terms of arXiv:2404.16014v2, Eq. 8.

        reconstruction = |x - x_hat|^2
        sparsity       = lambda * |relu(pi_gate)|_1
        auxiliary      = |x - (relu(pi_gate) @ W_dec_copy + b_dec_copy)|^2

    The frozen copies let the auxiliary term train the gate and never the dictionary. As in the
    paper's pseudo-code, `b_dec` still learns from the last two terms through the centred input,
    unless the SAE has `detach_b_dec`. Recipes A and B change the L1 weight and the copies.
    """
    pi_gate, pi_mag = sae.pre_activations(x)
    f = (pi_gate > 0) * torch.relu(pi_mag)
    if sae.detach_b_dec:
        # The same values again, on a path without a gradient to b_dec.
        pi_gate = (x - sae.b_dec.detach()) @ sae.W_gate + sae.b_gate
    x_hat, g = sae.decode(f), torch.relu(pi_gate)
    x_hat_aux, auxiliary = None, x.new_zeros(())
    if sae.objective.aux != "off":
        W, b = sae.W_dec, sae.b_dec
        if sae.objective.aux == "frozen":
            W, b = W.detach(), b.detach()
        x_hat_aux = g @ W + b
        auxiliary = squared_error(x, x_hat_aux)
    parts = LossParts(squared_error(x, x_hat), sparsity_coeff * l1(sae, g), auxiliary)
    return Forward(parts, f, x_hat, pi_gate, x_hat_aux)


def relu_loss(sae: ReluSAE, x: Inputs, sparsity_coeff: float) -> Forward:
    """Return the terms of arXiv:2404.16014v2, Eq. 4: |x - x_hat|^2 + lambda |f|_1.

    Under recipe A each latent's share of the L1 term is weighted by the norm of its direction.
    """
    f = sae.encode(x)
    x_hat = sae.decode(f)
    parts = LossParts(squared_error(x, x_hat), sparsity_coeff * l1(sae, f), x.new_zeros(()))
    return Forward(parts, f, x_hat)


def jumprelu_loss(sae: JumpReluSAE, x: Inputs, sparsity_coeff: float) -> Forward:
    """Return the terms of arXiv:2407.14435, section 3: |x - x_hat|^2 + lambda |f|_0.

    The second moves thresholds alone.
    """
    z, theta, eps = sae.pre_activations(x), sae.threshold, sae.eps
    f = jump(z, theta, eps)
    x_hat = sae.decode(f)
    sparsity = sparsity_coeff * step(z, theta, eps).sum(-1).mean()
    parts = LossParts(squared_error(x, x_hat), sparsity, x.new_zeros(()))
    near = in_window(z, theta, eps) & (f == 0)
    return Forward(parts, f, x_hat, n_spare=near.sum())


def topk_loss(sae: TopKSAE, x: Inputs, dead: Mask | None) -> Forward:
    """Return the terms of arXiv:2406.04093: |x - x_hat|^2 + (1 / 32) |e - e_hat|^2.

        e     = x - x_hat, a constant: the auxiliary term moves nothing that made the error
        e_hat = relu(z) on the k_aux largest dead latents of a token, @ W_dec

    Both squared errors are in the same units, so the ratio of the weights is the paper's. `W_dec`
    is live in both terms. Without dead latents there is no auxiliary term.
    """
    z = sae.pre_activations(x)
    f = largest(z, k=sae.k)
    x_hat = sae.decode(f)
    auxiliary, n_spare = x.new_zeros(()), 0
    if dead is not None:
        # Where fewer are dead than are kept, the rest kept is relu(-inf) = 0. Asking how many are
        # dead would wait for the device.
        spare = largest(z.masked_fill(~dead, -torch.inf), k=min(sae.k_aux, sae.d_sae))
        e = (x - x_hat).detach()
        auxiliary = AUX_WEIGHT * squared_error(e, spare @ sae.W_dec) * dead.any()
        n_spare = (spare > 0).sum()
    parts = LossParts(squared_error(x, x_hat), x.new_zeros(()), auxiliary)
    return Forward(parts, f, x_hat, n_spare=n_spare)


def loss_of(sae: SAE, x: Inputs, *, sparsity_coeff: float, dead: Mask | None = None) -> Forward:
    """Return the loss of this SAE's architecture and recipe; `x` is in the units it trains in.

    `sparsity_coeff` is lambda, against squared error summed over d_in; a TopK SAE has none. `dead`
    are latents that have not fired for long, for a TopK SAE's auxiliary loss alone. Terms are
    summed over `d_in` or latents and averaged over tokens.
    """
    sae.check_trains()
    match sae:
        case GatedSAE():
            return gated_loss(sae, x, sparsity_coeff)
        case ReluSAE():
            return relu_loss(sae, x, sparsity_coeff)
        case JumpReluSAE():
            return jumprelu_loss(sae, x, sparsity_coeff)
        case TopKSAE():
            return topk_loss(sae, x, dead)
    raise TypeError(f"no loss is known for {type(sae).__name__}")


def dense_step(sae: SAE, x: Rows, *, sparsity_coeff: float, dead: Mask | None = None) -> StepResult:
    """Leave the gradients of `loss_of` in `.grad`, fresh; return results without a graph."""
    sae.zero_grad(set_to_none=True)
    out = loss_of(sae, x, sparsity_coeff=sparsity_coeff, dead=dead)
    out.loss.total.backward()
    return result_of(x, out)


def result_of(x: Rows, out: Forward) -> StepResult:
    """Return what a step reports of a dense pass, without a graph."""
    fired = (out.f > 0).sum(0)
    gate_open = None if out.pi_gate is None else (out.pi_gate > 0).sum(0)
    stats = stats_from_counts(
        x=x, x_hat=out.x_hat, x_hat_gate=out.x_hat_aux, fired=fired, gate_open=gate_open
    )
    terms = LossParts(*(term.detach() for term in out.loss))
    return StepResult(loss=terms, stats=stats, n_entries=stats.opened.sum() + out.n_spare)


def squared_error(x: Inputs, x_hat: Inputs) -> Scalar:
    """Return |x - x_hat|^2, summed over `d_in` and averaged over tokens."""
    return (x - x_hat).square().sum(-1).mean()


def l1(sae: GatedSAE | ReluSAE, activity: Latents) -> Scalar:
    """Return each token's sum of `activity`, weighted as the recipe says, averaged over tokens."""
    if sae.objective.l1_weight == "none":
        return activity.sum(-1).mean()
    norms = sae.W_dec if sae.objective.l1_weight == "norm" else sae.W_dec.detach()
    return (activity @ norms.norm(dim=1)).mean()
