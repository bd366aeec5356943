"""What the CPU has to know of a step, and how it gets there with or without waiting."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from gsae_core.sae.base import SAE
from gsae_core.sae.losses import StepResult
from gsae_core.sae.metrics import sum_dtype
from gsae_core.training.steps import Attempt


class Seen(NamedTuple):
    """What a step turned out to be, as numbers."""

    loss: float
    norm: float
    n_open: int
    overflowed: bool
    silent: int
    """Steps that some latent had not fired for when this one began, none longer."""

    @property
    def finite(self) -> bool:
        """Whether the step may reach the weights, unless it overflowed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def weigh(sae: SAE, attempt: Attempt, *, silent: Int32[Tensor, ""]) -> Float[Tensor, "5"]:
    """Return the numbers of a step that was not counted yet, on its device."""
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    total = attempt.result.loss.total
    # float32 counts exactly only up to 2^24.
    values = (total, norm, attempt.n_open, attempt.overflowed, silent)
    return torch.stack([value.to(sum_dtype(total.device)) for value in values])


def spoilt(weighed: Float[Tensor, "5"]) -> Bool[Tensor, ""]:
    """Return, on the device, whether a step must not reach the weights."""
    return ~weighed[:2].isfinite().all() | (weighed[3] != 0)


def read(weighed: Float[Tensor, "5"]) -> Seen:
    """Return the numbers of a step, after one wait for the device."""
    return _seen(*weighed.tolist())


class Courier:
    """Brings the numbers of one step after the other to the CPU while the device works on.

    Args:
        device: where steps are taken.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Pinned: a copy to any other memory would wait.
        self._room = torch.zeros(5, dtype=sum_dtype(device), pin_memory=on_cuda)
        self._numbers = self._room.numpy()  # the same memory
        self._arrived = torch.cuda.Event() if on_cuda else None

    def send(self, weighed: Float[Tensor, "5"]) -> None:
        """Copy the numbers once the device has them; those sent before are gone then."""
        self._room.copy_(weighed, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(weighed.device))

    def read(self) -> Seen:
        """Return the numbers that were sent last, as soon as they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return _seen(*self._numbers.tolist())


def cause(sae: SAE, x: Float[Tensor, "batch d_in"], result: StepResult) -> str:
    """Return what is not finite about a step whose gradients are in `.grad`."""
    if not bool(x.isfinite().all()):
        return "the activations are not finite"
    for name, term in zip(result.loss._fields, result.loss, strict=True):
        if not bool(term.isfinite()):
            return f"the {name} loss is not finite"
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name} is not finite"
    return "the gradients are too large to be squared"


def _seen(loss: float, norm: float, n_open: float, overflowed: float, silent: float) -> Seen:
    return Seen(loss, norm, int(n_open), overflowed=bool(overflowed), silent=int(silent))
