"""Small SAEs whose numbers a person can redo."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import LossParts, loss_of
from gsae_core.sae.metrics import BatchStats, stats_from_counts


def set_(sae: SAE, **values: list) -> None:
    """Replace the named parameters by the given numbers."""
    for name, value in values.items():
        parameter = sae.get_parameter(name)
        parameter.data = torch.tensor(value, dtype=parameter.dtype).reshape(parameter.shape)


def perturb_(sae: SAE, seed: int = 1) -> None:
    """Move every parameter away from its start: no bias is zero, nothing is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise.to(parameter.dtype)
        if name == "threshold":
            parameter.data.clamp_(min=0)


def numbers(*shape: int, seed: int = 2) -> Tensor:
    """Return normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def worked_example(**options: Any) -> GatedSAE:
    """Three latents in the plane, one of each fate on x = (3, 1), that is, xc = (2, 1).

    h       = (2, 1, 2 - 1)              = (2, 1, 1)
    pi_gate = h + b_gate                 = (1, -1, 1)
    pi_mag  = (2 h_0, h_1, h_2) + b_mag  = (4.5, 6, -2)      exp(r_mag) = (2, 1, 1)
    f: fires; gate closed; gate open upon a negative magnitude
    """
    sae = GatedSAE(2, 3, **options).double()
    set_(
        sae,
        W_gate=[[1, 0, 1], [0, 1, -1]],
        b_gate=[-1, -2, 0],
        b_mag=[0.5, 5, -3],
        W_dec=[[0.6, 0.8], [1, 0], [0, 1]],
        b_dec=[1, 0],
    )
    if sae.r_mag is not None:
        set_(sae, r_mag=[math.log(2), 0, 0])
    return sae


def random_gated(**options: Any) -> GatedSAE:
    sae = GatedSAE(4, 7, **options).double()
    perturb_(sae)
    return sae


def random_relu(**options: Any) -> ReluSAE:
    sae = ReluSAE(4, 7, **options).double()
    perturb_(sae)
    return sae


def batch_stats(
    *,
    x: Tensor,
    x_hat: Tensor,
    f: Tensor,
    x_hat_gate: Tensor | None = None,
    pi_gate: Tensor | None = None,
    W_dec: Tensor | None = None,
) -> BatchStats:
    """Return the sums of a batch whose latents are dense; with `W_dec`, of single latents too."""
    stats = stats_from_counts(
        x=x,
        x_hat=x_hat,
        x_hat_gate=x_hat_gate,
        fired=(f > 0).sum(0),
        gate_open=None if pi_gate is None else (pi_gate > 0).sum(0),
    )
    if W_dec is None:
        return stats
    with torch.no_grad():
        power = f.square().sum(0, dtype=torch.float64) * W_dec.square().sum(1)
        cross = (f * ((x - x_hat) @ W_dec.T)).sum(0, dtype=torch.float64)
    return stats._replace(latent_power=power, latent_aligned=power + cross)


def loss(sae: SAE, x: Tensor, **settings: Any) -> LossParts:
    """Return the terms of the loss by autograd, with their graph."""
    return loss_of(sae, x, **settings).loss


def slopes(parameter: Tensor, value: Callable[[], float], n: int) -> list[float]:
    """Return finite differences of a value in the first `n` entries of a parameter."""
    found, entries = [], parameter.data.view(-1)
    for place in range(min(n, entries.numel())):
        was = entries[place].item()
        ends = []
        for moved in (was + 1e-6, was - 1e-6):
            entries[place] = moved
            ends.append(value())
        entries[place] = was
        found.append((ends[0] - ends[1]) / 2e-6)
    return found


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out
