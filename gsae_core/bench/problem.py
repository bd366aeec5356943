"""One problem for every way of taking a step: a batch, and an SAE held at a given L0.

Torch and safetensors only: peers read it too.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Pre-activations looked at at once: 128 MB of them.
CHUNK = 2**25


class Problem(NamedTuple):
    """A batch and the weights that every way starts from, magnitude path and gate alike."""

    x: Tensor
    """(batch, d_in), E|x|^2 = 1."""
    W_dec: Tensor
    """(d_sae, d_in), unit rows; the encoder is its transpose."""
    bias: Tensor
    """(d_sae,), of the gate and of the magnitudes: what keeps L0 where it is wanted."""


def make_problem(*, batch: int, d_in: int, d_sae: int, l0: float, seed: int = 0) -> Problem:
    """Return Gaussian inputs, random directions, and the one bias at which L0 is `l0`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator) / d_in**0.5
    directions = torch.randn(d_sae, d_in, generator=generator)
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    # A sample where the batch is wide: tables show the L0 of the whole batch, measured.
    some = x[: max(1, CHUNK // d_sae)]
    pre = (some @ W_dec.T).flatten()
    n_open = min(max(1, round(l0 * len(some))), len(pre) - 1)
    # The largest value that stays shut.
    threshold = pre.kthvalue(len(pre) - n_open).values
    return Problem(x=x, W_dec=W_dec, bias=-threshold.expand(d_sae).clone())


def measured_l0(x: Tensor, W_gate: Tensor, b_gate: Tensor) -> float:
    """Return the mean number of open gates, b_dec being zero."""
    rows = max(1, CHUNK // len(b_gate))
    n_open = sum(int((part @ W_gate + b_gate > 0).sum()) for part in x.split(rows))
    return n_open / len(x)


def save_problem(problem: Problem, path: Path) -> None:
    save_file(problem._asdict(), path)


def load_problem(path: str, device: str) -> Problem:
    return Problem(**load_file(path, device=device))
