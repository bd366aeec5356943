"""Each loss as the paper writes it, dense and left to autograd: the reference for faster ways."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE, jump, step
from gsae_core.sae.metrics import BatchStats, batch_stats
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE, dead_latents_unread, largest


class LossParts(NamedTuple):
    """The terms of a loss: each summed over coordinates, then averaged over the batch."""

    reconstruction: Float[Tensor, ""]
    """|x - x_hat|^2, summed over d_in."""

    sparsity: Float[Tensor, ""]
    """The L1 term, or the L0 term of a JumpReLU SAE, lambda included; 0 for a TopK SAE."""

    auxiliary: Float[Tensor, ""]
    """|x - x_hat_aux|^2, x_hat_aux being decoded from relu(pi_gate); weight one; 0 if none.

    Of a TopK SAE: 1/32 of what its dead latents leave of the error; 0 if none is dead."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """What is minimised: the sum of the three."""
        return self.reconstruction + self.sparsity + self.auxiliary


class StepResult(NamedTuple):
    """What one forward and backward pass leaves besides the gradients in `.grad`."""

    loss: LossParts
    stats: BatchStats
    n_candidates: int | None = None
    """Products that a screened encode computed again in float32; None without a screen."""
    n_entries: int | None = None
    """(Input, latent) pairs that cost work, where they are not just those that fire."""


class _Forward(NamedTuple):
    """Everything a loss and the statistics need from one pass."""

    f: Float[Tensor, "*batch d_sae"]
    x_hat: Float[Tensor, "*batch d_in"]
    pi_gate: Float[Tensor, "*batch d_sae"] | None
    x_hat_aux: Float[Tensor, "*batch d_in"] | None
    z: Float[Tensor, "*batch d_sae"] | None = None
    """Pre-activations of a JumpReLU or TopK SAE, which have no gate."""


def loss(
    sae: SAE,
    x: Float[Tensor, "*batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
) -> LossParts:
    """Return the terms of the loss of this SAE's architecture and recipe.

    Args:
        sae: of any architecture: `gated_loss`, `relu_loss`, `jumprelu_loss` or `topk_loss`.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss alone.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    return _forward_and_parts(sae, x, sparsity_coeff, dead)[1]


def gated_loss(
    sae: GatedSAE, x: Float[Tensor, "*batch d_in"], *, sparsity_coeff: float
) -> LossParts:
    """Return the terms of arXiv:2404.16014v2, Eq. 8.

        reconstruction = |x - x_hat|^2
        sparsity       = lambda * |relu(pi_gate)|_1
        auxiliary      = |x - (relu(pi_gate) @ W_dec_copy + b_dec_copy)|^2

    The copies are frozen: the auxiliary term trains the gate and never the dictionary. As in the
    paper's pseudo-code, `b_dec` still hears the last two terms through the centred input, unless
    the SAE has `detach_b_dec`. Recipes A and B change the L1 weight and the copies (`recipes.py`).

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    return _gated_parts(sae, x, _gated_forward(sae, x), sparsity_coeff)


def relu_loss(sae: ReluSAE, x: Float[Tensor, "*batch d_in"], *, sparsity_coeff: float) -> LossParts:
    """Return the terms of arXiv:2404.16014v2, Eq. 4: |x - x_hat|^2 + lambda |f|_1; no auxiliary.

    Under recipe A each latent's share of the L1 term is weighted by the norm of its direction.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    return _relu_parts(sae, x, _relu_forward(sae, x), sparsity_coeff)


def jumprelu_loss(
    sae: JumpReluSAE, x: Float[Tensor, "*batch d_in"], *, sparsity_coeff: float
) -> LossParts:
    """Return the terms of arXiv:2407.14435, section 3: |x - x_hat|^2 + lambda |f|_0.

    The second term moves thresholds alone, and both move them by pseudo-derivatives
    (`jumprelu.jump`, `jumprelu.step`).

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    return _jumprelu_parts(sae, x, _jumprelu_forward(sae, x), sparsity_coeff)


def topk_loss(
    sae: TopKSAE, x: Float[Tensor, "*batch d_in"], *, dead: Bool[Tensor, " d_sae"] | None = None
) -> LossParts:
    """Return the terms of arXiv:2406.04093: |x - x_hat|^2 + (1 / 32) |e - e_hat|^2.

        e     = x - x_hat, a constant: the auxiliary term moves nothing that made the error
        e_hat = relu(z) on the k_aux largest dead latents of a token, @ W_dec

    Both squared errors are in the same units, so the ratio of the two weights is the paper's.

    Args:
        sae: its `W_dec` is live in both terms.
        x: activations, in the units the SAE trains in.
        dead: latents that have not fired for long; None leaves the auxiliary term out.

    Raises:
        InputError: if the last axis of `x` is not `d_in`.
    """
    return _topk_parts(sae, x, _topk_forward(sae, x), dead)


def dense_step(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    One forward pass serves all three. Returned tensors carry no graph.

    Args:
        sae: learns later, when an optimiser reads `.grad`; its parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.

    Raises:
        InputError: if the last axis of `x` is not `d_in`, or the SAE normalises every token.
    """
    sae.zero_grad(set_to_none=True)
    out, parts = _forward_and_parts(sae, x, sparsity_coeff, dead)
    parts.total.backward()
    detached = LossParts(*(term.detach() for term in parts))
    stats = batch_stats(
        x=x, x_hat=out.x_hat, x_hat_gate=out.x_hat_aux, f=out.f, pi_gate=out.pi_gate
    )
    return StepResult(loss=detached, stats=stats)


def _forward_and_parts(
    sae: SAE,
    x: Float[Tensor, "*batch d_in"],
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None,
) -> tuple[_Forward, LossParts]:
    match sae:
        case GatedSAE():
            out = _gated_forward(sae, x)
            return out, _gated_parts(sae, x, out, sparsity_coeff)
        case ReluSAE():
            out = _relu_forward(sae, x)
            return out, _relu_parts(sae, x, out, sparsity_coeff)
        case JumpReluSAE():
            out = _jumprelu_forward(sae, x)
            return out, _jumprelu_parts(sae, x, out, sparsity_coeff)
        case TopKSAE():
            out = _topk_forward(sae, x)
            return out, _topk_parts(sae, x, out, dead)
    raise TypeError(f"no loss is known for {type(sae).__name__}")


def _gated_forward(sae: GatedSAE, x: Float[Tensor, "*batch d_in"]) -> _Forward:
    sae.check_trains()
    pi_gate, pi_mag = sae.pre_activations(x)
    f = (pi_gate > 0) * torch.relu(pi_mag)
    if sae.detach_b_dec:
        # The same values again, on a path that b_dec does not hear.
        pi_gate = (x - sae.b_dec.detach()) @ sae.W_gate + sae.b_gate
    return _Forward(f=f, x_hat=sae.decode(f), pi_gate=pi_gate, x_hat_aux=_aux(sae, pi_gate))


def _aux(
    sae: GatedSAE, pi_gate: Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_in"] | None:
    match sae.objective.aux:
        case "frozen":
            # The auxiliary term may move the gate, never the dictionary (Eq. 8).
            return torch.relu(pi_gate) @ sae.W_dec.detach() + sae.b_dec.detach()
        case "unfrozen":
            return torch.relu(pi_gate) @ sae.W_dec + sae.b_dec
        case "off":
            return None


def _gated_parts(
    sae: GatedSAE, x: Float[Tensor, "*batch d_in"], out: _Forward, sparsity_coeff: float
) -> LossParts:
    assert out.pi_gate is not None  # a gated forward pass always has one
    return LossParts(
        reconstruction=_squared_error(x, out.x_hat),
        sparsity=sparsity_coeff * _l1(sae, torch.relu(out.pi_gate)),
        auxiliary=x.new_zeros(()) if out.x_hat_aux is None else _squared_error(x, out.x_hat_aux),
    )


def _relu_forward(sae: ReluSAE, x: Float[Tensor, "*batch d_in"]) -> _Forward:
    sae.check_trains()
    f = sae.encode(x)
    return _Forward(f=f, x_hat=sae.decode(f), pi_gate=None, x_hat_aux=None)


def _relu_parts(
    sae: ReluSAE, x: Float[Tensor, "*batch d_in"], out: _Forward, sparsity_coeff: float
) -> LossParts:
    return LossParts(
        reconstruction=_squared_error(x, out.x_hat),
        sparsity=sparsity_coeff * _l1(sae, out.f),
        auxiliary=x.new_zeros(()),
    )


def _jumprelu_forward(sae: JumpReluSAE, x: Float[Tensor, "*batch d_in"]) -> _Forward:
    sae.check_trains()
    z = sae.pre_activations(x)
    f = jump(z, sae.threshold, sae.eps)
    return _Forward(f=f, x_hat=sae.decode(f), pi_gate=None, x_hat_aux=None, z=z)


def _jumprelu_parts(
    sae: JumpReluSAE, x: Float[Tensor, "*batch d_in"], out: _Forward, sparsity_coeff: float
) -> LossParts:
    assert out.z is not None  # its forward pass always has one
    l0 = step(out.z, sae.threshold, sae.eps).sum(-1).mean()
    return LossParts(
        reconstruction=_squared_error(x, out.x_hat),
        sparsity=sparsity_coeff * l0,
        auxiliary=x.new_zeros(()),
    )


def _topk_forward(sae: TopKSAE, x: Float[Tensor, "*batch d_in"]) -> _Forward:
    sae.check_trains()
    z = sae.pre_activations(x)
    f = largest(z, k=sae.k)
    return _Forward(f=f, x_hat=sae.decode(f), pi_gate=None, x_hat_aux=None, z=z)


def _topk_parts(
    sae: TopKSAE,
    x: Float[Tensor, "*batch d_in"],
    out: _Forward,
    dead: Bool[Tensor, " d_sae"] | None,
) -> LossParts:
    assert out.z is not None  # its forward pass always has one
    auxiliary = x.new_zeros(())
    if dead is not None:
        error = (x - out.x_hat).detach()
        spare = dead_latents_unread(sae, out.z, dead)
        auxiliary = AUX_WEIGHT * _squared_error(error, spare @ sae.W_dec) * dead.any()
    return LossParts(
        reconstruction=_squared_error(x, out.x_hat),
        sparsity=x.new_zeros(()),
        auxiliary=auxiliary,
    )


def _squared_error(
    x: Float[Tensor, "*batch d_in"], x_hat: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, ""]:
    return (x - x_hat).square().sum(-1).mean()


def _l1(sae: GatedSAE | ReluSAE, activity: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, ""]:
    match sae.objective.l1_weight:
        case "none":
            return activity.sum(-1).mean()
        case "norm":
            return (activity @ sae.W_dec.norm(dim=1)).mean()
        case "detached_norm":
            return (activity @ sae.W_dec.detach().norm(dim=1)).mean()
