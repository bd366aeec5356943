"""What the longest activations of an evaluation hold, and how well all others are reconstructed."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.config import OUTLIER_RATIO
from gsae_core.norms import longer
from gsae_core.sae.metrics import BatchStats, Metrics, stats_from_counts, sum_dtype


class Outliers(NamedTuple):
    """Tokens whose activations are longer than `ratio` times the median."""

    ratio: float
    n: int
    share: float
    """Their share of the sum of |x|^2 over all counted tokens."""
    fvu: float
    """FVU of all other tokens."""


class OutlierCount:
    """Tells outliers from other activations of a site, and counts them.

    Args:
        median_norm: of |x| at the site; None: no token is an outlier.
        max_norm_ratio: outliers are longer than so many medians, and `left_out` of what is
            measured; None: than `OUTLIER_RATIO`, and measured like all others.
    """

    def __init__(
        self, median_norm: float | int | None = None, max_norm_ratio: float | int | None = None
    ) -> None:
        self.ratio: float = float(max_norm_ratio or OUTLIER_RATIO)
        self.limit: float = math.inf if median_norm is None else self.ratio * median_norm
        self.left_out: bool = median_norm is not None and max_norm_ratio is not None
        self._known = median_norm is not None
        self._n, self._power, self._total = 0, 0.0, 0.0

    def see(self, x: Float[Tensor, "tokens d_in"]) -> Bool[Tensor, " tokens"]:
        """Return which activations of a batch are outliers."""
        long = longer(x, self.limit)
        if self._known:
            power = x.to(sum_dtype(x.device)).square().sum(1)
            self._n += int(long.sum())
            self._power += float(power[long].sum())
            self._total += float(power.sum())
        return long

    def told(self, every: Metrics, some: Metrics) -> Outliers | None:
        """Return what there is to say of an SAE's metrics, of which those of outliers are `some`.

        None without a median.
        """
        if not self._known:
            return None
        share = self._power / self._total if self._total else 0.0
        return Outliers(self.ratio, self._n, share, _fvu_without(every, some))


def stats_of(*, x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> BatchStats:
    """Return the sums of a batch that need no latents."""
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return stats_from_counts(x=x, x_hat=x_hat, x_hat_gate=None, fired=none, gate_open=None)


def _fvu_without(every: Metrics, some: Metrics) -> float:
    if every.sums is None or some.sums is None:
        return every.fvu
    names = ("n_tokens", "squared_error", "x_sum", "x_power")
    rest = {name: getattr(every.sums, name) - getattr(some.sums, name) for name in names}
    return Metrics(every.sums._replace(**rest)).fvu
