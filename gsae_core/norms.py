"""Lengths of activations, and the outliers that would set the scale of all others.

A few tokens of many language models, the first of a sequence or delimiters, have activations tens
to thousands of times as long as all others (massive activations, arXiv:2402.17762). One in a
hundred may hold nearly all of E|x|^2, and with it the scale of a run and its FVU.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.config import OUTLIER_RATIO

# Summed in parts of one size, for any size of a pass or of a file: not a bit depends on it.
PART = 2**12


class Lengths(NamedTuple):
    """What a sample of activations says of |x|, in the units of the activations."""

    median: float
    """Infinite where most activations are 0, which has no outliers."""
    mean_square: float
    """E|x|^2 of all of them."""
    ordinary: float
    """E|x|^2 of those that are neither outliers nor left out: what sets a run's scale."""
    n: int
    n_outliers: int
    """Those longer than so many medians as were asked for."""
    outlier_share: float
    """Their share of the sum of |x|^2."""


def lengths(x: Float[Tensor, "vectors d_in"], *, max_ratio: float | None = None) -> Lengths:
    """Return the lengths of activations, at least one; summed in float64, on the CPU.

    Outliers are longer than `max_ratio` medians, or without it than `OUTLIER_RATIO`.
    """
    # On the CPU, because Apple's GPUs know no float64.
    parts = (part.cpu().double().square() for part in x.split(PART))
    sums, powers = zip(*((float(part.sum()), part.sum(1)) for part in parts), strict=True)
    total, power = sum(sums), torch.cat(powers)
    middle, ratio = _median(power), max_ratio or OUTLIER_RATIO
    short = power <= min(ratio, OUTLIER_RATIO) ** 2 * middle
    long = power > ratio**2 * middle
    return Lengths(
        median=math.sqrt(middle),
        mean_square=total / len(power),
        ordinary=total / len(power) if bool(short.all()) else float(power[short].mean()),
        n=len(power),
        n_outliers=int(long.sum()),
        outlier_share=float(power[long].sum()) / total if total else 0.0,
    )


def ordinary(power: Float[Tensor, " vectors"]) -> Float[Tensor, " ordinary"]:
    """Return those of some |x|^2 that are no outliers among them."""
    return power[power <= OUTLIER_RATIO**2 * _median(power)]


def longer(x: Float[Tensor, "vectors d_in"], limit: float) -> Bool[Tensor, " vectors"]:
    """Return which activations are longer than `limit`."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) > limit


def _median(power: Float[Tensor, " vectors"]) -> float:
    return float(power.median()) or math.inf
