"""Predictions against those of the untouched model: losses and divergences, token by token."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gsae_core.sae.metrics import sum_dtype

Losses = tuple[Tensor, Tensor]
"""Loss and divergence of every counted prediction of a batch, each (n,)."""


class RunningLosses:
    """Running float64 sums of losses and divergences; read once, at the end."""

    def __init__(self) -> None:
        # Floats, not tensors: tensors that outlive a batch pin the heap between its large blocks,
        # and an evaluation on 65 k tokens that needs 0.7 GB grew to 4.2 GB (glibc).
        self.n = 0
        self._ce: list[float] = []
        self._kl: list[float] = []

    def add(self, ce: Float[Tensor, " n"], kl: Float[Tensor, " n"] | None) -> None:
        self.n += len(ce)
        dtype = sum_dtype(ce.device)
        self._ce.append(ce.sum(dtype=dtype).item())
        if kl is not None:
            self._kl.append(kl.sum(dtype=dtype).item())

    @property
    def ce(self) -> float:
        return math.fsum(self._ce) / self.n

    @property
    def kl(self) -> float:
        return math.fsum(self._kl) / self.n


class Reference:
    """The clean predictions of a batch, with which spliced ones are compared."""

    @torch.inference_mode()
    def __init__(
        self,
        logits: Float[Tensor, "rows pos d_vocab"],
        ids: Int64[Tensor, "rows pos"],
        mask: Bool[Tensor, "rows pos"],
    ) -> None:
        self._counted = mask[:, :-1] & mask[:, 1:]
        self._targets = ids[:, 1:, None]
        self._log_p = logits[:, :-1].log_softmax(-1)
        self._p = self._log_p.exp()
        self._excess = _excess(self._p)
        self.losses = self._losses(self._log_p, self._excess)

    def _losses(
        self,
        log_q: Float[Tensor, "rows predictions d_vocab"],
        excess: Float[Tensor, "rows predictions"],
    ) -> Float[Tensor, " n"]:
        return (excess - log_q.gather(-1, self._targets)[..., 0])[self._counted]

    @torch.inference_mode()
    def compare(
        self, logits: Float[Tensor, "rows pos d_vocab"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the loss and KL(clean || these) of every counted prediction, in nats."""
        log_q = logits[:, :-1].log_softmax(-1)
        excess = _excess(log_q.exp())
        losses = self._losses(log_q, excess)
        # The difference before the product: equal predictions diverge by exactly 0. In place, for
        # a vocabulary's width of memory traffic costs as much as a block of the model.
        torch.sub(self._log_p, log_q, out=log_q)
        return losses, (log_q.mul_(self._p).sum(-1) + (excess - self._excess))[self._counted]


def _excess(p: Float[Tensor, "rows predictions d_vocab"]) -> Float[Tensor, "rows predictions"]:
    """Return ln of what probabilities add up to, which is 0 up to the rounding of their making.

    On a CPU log_softmax adds up terms that are small beside its largest one by one: where a model
    is sure of its guess it loses 6e-7 nats at 4,096 tokens and 3e-5 at 256,000, always with the
    same sign, so that no average removes it. `sum` adds in a tree. Taken off, 8e-8 are left.
    """
    return p.sum(-1).to(sum_dtype(p.device)).log()
