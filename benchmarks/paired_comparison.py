"""Is the Gated latent of a pair the more interpretable one? The statistics of the blinded study.

A pair is one latent of each architecture, alike in language model, layer, site and rater. Labels
are coded No = 0, Maybe = 1, Yes = 2, and every number is about the differences Gated - baseline
(arXiv:2404.16014v2, section 4.3.2 and Appendix H). The tests between groups of pairs in Appendix H
are one call of scipy.stats each: `mannwhitneyu` between language models, `friedmanchisquare`
across sites, `page_trend_test` over layers, `kruskal` over raters.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from scipy import stats

from gsae_core.errors import InputError

LABELS = ("No", "Maybe", "Yes")
"""What a rater answers; the place of an answer is its code."""

CONFIDENCE = 0.9
"""Level of the two-sided interval: the paper's."""

N_RESAMPLES = 9999
"""Bootstrap resamples: between eight seeds a limit at 171 pairs moved by 1/171 at most."""


class PairedComparison(NamedTuple):
    """How much more interpretable the Gated latents are; differences are Gated - baseline."""

    n: int
    """Pairs."""

    mean_difference: float
    """Mean of the differences, on a scale from -2 to 2; above 0 favours the Gated SAE."""

    low: float
    """Lower limit of the 90 % BCa interval of the mean; NaN where all differences are equal."""

    high: float
    """Upper limit of the same interval; NaN where all differences are equal."""

    p_value: float
    """One-sided, of the Wilcoxon signed-rank test with Pratt's zeros; 1 where no pair differs."""

    n_better: int
    """Pairs whose Gated latent has the higher label."""

    n_equal: int
    """Pairs with one label on both sides."""

    n_worse: int
    """Pairs whose baseline latent has the higher label."""

    @property
    def sentence(self) -> str:
        """The result in words, or why a part of it is missing."""
        if self.n_equal == self.n:
            return f"No interval and no evidence: both latents have one label in all {self.n} pairs"
        result = f"Mean difference {self.mean_difference:+.2f} over {self.n} pairs"
        interval = f"90 % interval [{self.low:.2f}, {self.high:.2f}]"
        if math.isnan(self.low):
            interval = "no interval, since all pairs differ by the same"
        return f"{result}, {interval}, one-sided p = {self.p_value:.3f}"


def compare(
    baseline: Iterable[int | float | np.number], gated: Iterable[int | float | np.number]
) -> PairedComparison:
    """Return whether Gated latents are more interpretable than the baseline's, pair by pair.

    The interval is a bootstrap over pairs with a fixed seed: the same labels give the same limits.

    Args:
        baseline: labels of the baseline's latents, each 0 (No), 1 (Maybe) or 2 (Yes).
        gated: labels of the Gated SAE's latents, in the same order of pairs.

    Raises:
        InputError: if the lengths differ, there are fewer than two pairs, or a label is no label.
    """
    difference = _coded(gated, "Gated")
    codes = _coded(baseline, "baseline")
    if len(codes) != len(difference):
        raise InputError(
            f"expected a Gated label for each baseline label, got {len(codes)} baseline and "
            f"{len(difference)} Gated labels; leave out pairs with one side unlabelled"
        )
    if len(codes) < 2:
        raise InputError(f"expected two pairs or more, got {len(codes)}; label more latents")
    difference = difference - codes
    low, high = _bca_interval(difference)
    return PairedComparison(
        n=len(difference),
        mean_difference=float(difference.mean()),
        low=low,
        high=high,
        p_value=_wilcoxon_pratt(difference),
        n_better=int((difference > 0).sum()),
        n_equal=int((difference == 0).sum()),
        n_worse=int((difference < 0).sum()),
    )


def _coded(labels: Iterable[int | float | np.number], side: str) -> Int64[np.ndarray, " pairs"]:
    labels = list(labels)
    codes = range(len(LABELS))
    for place, label in enumerate(labels, start=1):
        if label not in codes:
            raise InputError(
                f"expected labels 0 (No), 1 (Maybe) or 2 (Yes), got {label} as {side} label "
                f"{place}; code the answers, and leave out pairs without one"
            )
    return np.array(labels, dtype=np.int64)


def _wilcoxon_pratt(difference: Int64[np.ndarray, " pairs"]) -> float:
    """Return P(W >= observed W) where the sign of each difference is a fair coin.

    W is the sum of the ranks of the positive differences; zeros keep the lowest ranks and count
    for neither side (Pratt 1959). H0: Gated is at most as interpretable.
    """
    # Differences are 1 or 2 in size, so W has two ranks only and is a sum of two binomial counts:
    # exact at every n. scipy.stats.wilcoxon turns to the normal curve at 14 pairs, where four
    # better pairs among ten equal ones come out at p = 0.023 instead of 1/16; at the paper's 171
    # pairs the two differ by about 0.002.
    n_0, n_1, n_2 = (int((abs(difference) == size).sum()) for size in (0, 1, 2))
    # Twice the mid-rank is a whole number, so >= below is a comparison without rounding.
    rank_1 = 2 * n_0 + n_1 + 1
    rank_2 = 2 * (n_0 + n_1) + n_2 + 1
    observed = rank_1 * int((difference == 1).sum()) + rank_2 * int((difference == 2).sum())
    twos = np.arange(n_2 + 1)
    ones_needed = -((twos * rank_2 - observed) // rank_1)
    tail = stats.binom.pmf(twos, n_2, 0.5) * stats.binom.sf(ones_needed - 1, n_1, 0.5)
    return min(1.0, float(tail.sum()))


def _bca_interval(difference: Int64[np.ndarray, " pairs"]) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval of the mean (Efron 1987), or NaNs."""
    # Equal differences have equal resamples: the acceleration is 0/0, and nothing is known of
    # how far the mean would move.
    if (difference == difference[0]).all():
        return math.nan, math.nan
    result = stats.bootstrap(
        (difference.astype(np.float64),),
        np.mean,
        n_resamples=N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
