"""The end-to-end loss: what the language model predicts from reconstructions is compared too.

Karvonen 2025 (arXiv:2503.17272) fine-tunes SAEs by the mean of squared error and KL, both counting
alike at every step; the idea of the KL term is Braun et al.'s (arXiv:2405.12241).

    alpha = |x - x_hat|^2 / KL(clean || spliced), a constant
    loss  = 1/2 (|x - x_hat|^2 + alpha KL(clean || spliced)) + sparsity + auxiliary

Its value is that of the usual loss, so lambda keeps its meaning; its gradient is another. Squared
error, sparsity and auxiliary terms are those of the architecture (`sae.losses`). That the Gated
SAE's auxiliary term stays, and listens to squared error alone, is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.sae.base import SAE, Mask, Rows, Scalar
from gsae_core.sae.losses import StepResult, loss_of, result_of


class Divergence(NamedTuple):
    """How far predictions drift where the language model reads reconstructions, and which way."""

    kl: Scalar
    """KL(clean || spliced) in nats, averaged over predictions."""
    slope: Rows
    """d kl / d x_hat."""


@dataclass(frozen=True)
class SequenceBatch:
    """Activations of whole sequences, as training scales them, and the model that they are of."""

    x: Rows
    divergence: Callable[[Rows], Divergence]
    """Takes reconstructions of `x`, row by row."""


# Those of several places in one step may differ in width.
Batch = Float[Tensor, "batch _"] | SequenceBatch


def rows_of(batch: Batch) -> Rows:
    """Return the activations of a batch."""
    return batch.x if isinstance(batch, SequenceBatch) else batch


def end_to_end_step(
    sae: SAE, batch: SequenceBatch, *, sparsity_coeff: float, dead: Mask | None = None
) -> StepResult:
    """Leave the gradients of the end-to-end loss in `.grad`, fresh; return results without a graph.

    Arguments as `dense_step`. The derivative through the language model reaches the SAE as that of
    <slope, x_hat>, so it takes the paths that a squared error takes: through the straight-through
    estimates of a JumpReLU SAE, and not through the step of a gate.
    """
    sae.zero_grad(set_to_none=True)
    out = loss_of(sae, batch.x, sparsity_coeff=sparsity_coeff, dead=dead)
    kl, slope = batch.divergence(out.x_hat.detach())
    error = out.loss.reconstruction
    # A KL of exactly 0, of a perfect reconstruction, has nothing to say.
    alpha = torch.where(kl > 0, error.detach() / kl, 0.0)
    downstream = alpha * (slope * out.x_hat).sum()
    ((error + downstream) / 2 + out.loss.sparsity + out.loss.auxiliary).backward()
    return result_of(batch.x, out)._replace(kl=kl)


def kl_divergence(
    clean: Float[Tensor, "predictions d_vocab"], spliced: Float[Tensor, "predictions d_vocab"]
) -> Scalar:
    """Return KL(clean || spliced) = sum p (ln p - ln q) of logits, in nats, summed over rows."""
    log_p, log_q = clean.log_softmax(-1), spliced.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
