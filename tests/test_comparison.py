"""The statistics of paired labels: p by counting signs, BCa limits by an exact bootstrap."""

import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.paired_comparison import PairedComparison, compare
from gsae_core.errors import InputError


def pairs(*differences: int) -> tuple[list[int], list[int]]:
    """Return labels, baseline first, that differ by these numbers."""
    return [max(0, -d) for d in differences], [max(0, d) for d in differences]


def repeated(counts: dict[int, int]) -> list[int]:
    return [difference for difference, n in counts.items() for _ in range(n)]


# Differences of 171 pairs, the number of the paper's study.
STUDY = repeated({-2: 8, -1: 30, 0: 80, 1: 40, 2: 13})


def enumerated_p(differences: list[int]) -> float:
    """Return the Wilcoxon-Pratt p by trying every pattern of signs."""
    ranks = stats.rankdata(np.abs(differences))[np.array(differences) != 0]
    signs = np.array([d > 0 for d in differences if d != 0])
    patterns = np.array(list(itertools.product([0, 1], repeat=len(ranks))))
    return float((patterns @ ranks >= signs @ ranks).mean())


def scipys_p(differences: list[int]) -> float:
    result: Any = stats.wilcoxon(differences, zero_method="pratt", alternative="greater")
    return float(result.pvalue)


def exact_bca(differences: list[int]) -> tuple[float, float]:
    """Return the 90 % BCa limits of the mean from *all* n^n resamples, by convolution.

    Efron & Tibshirani 1993, Eq. 14.9-14.15: z0 from the share of resampled means below the
    observed one (ties count half), the acceleration from the jackknife.
    """
    d, n, normal = np.array(differences, dtype=float), len(differences), NormalDist()
    one_draw = np.bincount(np.array(differences) + 2, minlength=5) / n
    mass = np.array([1.0])
    for _ in range(n):
        mass = np.convolve(mass, one_draw)
    means = (np.arange(4 * n + 1) - 2 * n) / n
    z_0 = normal.inv_cdf(
        mass[means < d.mean() - 1e-9].sum() + mass[abs(means - d.mean()) < 1e-9].sum() / 2
    )
    without = (d.sum() - d) / (n - 1)
    apart = without.mean() - without
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    limits = []
    for z in (normal.inv_cdf(0.05), normal.inv_cdf(0.95)):
        level = normal.cdf(z_0 + (z_0 + z) / (1 - acceleration * (z_0 + z)))
        limits.append(float(means[np.searchsorted(mass.cumsum(), level)]))
    return limits[0], limits[1]


def test_the_differences_are_gated_minus_baseline() -> None:
    # Differences 2, 1, 0, 0, -1: mean 2/5.
    result = compare([0, 1, 1, 2, 1], [2, 2, 1, 2, 0])
    assert (result.n, result.n_better, result.n_equal, result.n_worse) == (5, 2, 2, 1)
    assert result.mean_difference == pytest.approx(0.4)


def test_p_is_the_share_of_sign_patterns_at_least_as_good() -> None:
    # Differences 0, 1, 1, -2. Pratt ranks the zero first: ranks 1; 2.5, 2.5; 4, and W = 5.
    # Of the 8 patterns of three signs, W >= 5 for ++- (5), +-+ and -++ (6.5), +++ (9): 4/8.
    # Without the zero (Wilcoxon's own treatment) the ranks are 1.5, 1.5, 3 and W = 3, which --+
    # reaches as well: 5/8.
    assert compare(*pairs(0, 1, 1, -2)).p_value == pytest.approx(1 / 2)


def test_four_better_pairs_among_equal_ones_have_p_of_one_in_sixteen() -> None:
    # Only ++++ reaches W, whatever the zeros; the normal curve says 1 - Phi(2) = 0.023.
    assert compare(*pairs(*[0] * 10, 1, 1, 1, 1)).p_value == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    "differences",
    [
        [2, -1],
        [-2, -2, 1],
        [0, 0, 0, 2, -1],
        [1, 1, 1, -1, 2, 2, -2, 0, 0],
        [2, 2, -2, 2, 0, 0],
        [1, -1, 1, 1, 0, 0, 1, -1, 2, 2, -2, 1],
    ],
    ids=str,
)
def test_p_is_what_enumerating_signs_and_scipy_find(differences: list[int]) -> None:
    p_value = compare(*pairs(*differences)).p_value
    assert p_value == pytest.approx(enumerated_p(differences))
    # scipy enumerates too, up to 13 pairs.
    assert p_value == pytest.approx(scipys_p(differences))


def test_p_at_the_size_of_the_study_is_near_scipys_normal_approximation() -> None:
    # 0.0559 against 0.0535: W lies on a coarse grid of two ranks, and the curve cuts its step in
    # half. Flipping 400 000 patterns of coins gave 0.0561 with a standard error of 0.0004.
    assert compare(*pairs(*STUDY)).p_value == pytest.approx(0.0561, abs=0.001)
    assert scipys_p(STUDY) == pytest.approx(0.0561, abs=0.004)


def test_two_pairs_have_the_interval_that_can_be_read_off() -> None:
    # Differences 0 and 1: the four resamples have means 0, 1/2, 1/2, 1. Half of them lie below 1/2
    # (ties half), so z0 = 0; two jackknife means lie symmetrically, so the acceleration is 0. The
    # limits are the 5 % and 95 % quantiles, where a quarter of the resamples sits at either end.
    result = compare(*pairs(0, 1))
    assert (result.low, result.high) == (0, 1)


@pytest.mark.parametrize(
    "differences",
    # In the last one plain percentiles put the lower limit at 108/62 instead of 100/62.
    [[0, 0, 0, 0, 1, 2], [-2, 0, 1, 1, 1, 1, 2], STUDY, repeated({2: 60, -2: 2})],
    ids=["six", "seven", "study", "rare loss"],
)
def test_the_interval_is_that_of_all_resamples_within_a_step(differences: list[int]) -> None:
    result = compare(*pairs(*differences))
    # A mean of n whole numbers moves in steps of 1/n, and 9999 resamples may miss a step.
    step = 1.001 / len(differences)
    assert (result.low, result.high) == pytest.approx(exact_bca(differences), abs=step)


def test_the_interval_is_bent_towards_the_long_tail() -> None:
    # 45 pairs equal, 5 better by two: the mean is 0.2, and its sampling distribution is skewed to
    # the right, so the upper limit lies further away than the lower one.
    result = compare(*pairs(*repeated({0: 45, 2: 5})))
    assert result.high - 0.2 > 1.3 * (0.2 - result.low)


def test_the_interval_is_mirrored_when_the_sides_are_swapped() -> None:
    baseline, gated = pairs(*STUDY)
    forth, back = compare(baseline, gated), compare(gated, baseline)
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    # Both tails hold the observed W itself, so together they are more than everything.
    assert 1 < forth.p_value + back.p_value < 1.01


def test_the_same_labels_give_the_same_limits() -> None:
    assert compare(*pairs(*STUDY)) == compare(*pairs(*STUDY))


def test_simulated_raters_who_prefer_gated_are_found() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.choice(3, size=171, p=[0.4, 0.3, 0.3])
    gated = rng.choice(3, size=171, p=[0.2, 0.3, 0.5])
    # Expected labels 0.9 and 1.3: a difference of 0.4, five standard errors of 0.09 or so.
    result = compare(baseline, gated)
    assert result.p_value < 0.01
    assert result.low > 0
    assert result.low < 0.4 < result.high


def test_where_nothing_differs_one_study_in_twenty_finds_something() -> None:
    rng = np.random.default_rng(0)
    studies = [compare(*rng.choice(3, size=(2, 60), p=[0.3, 0.3, 0.4])) for _ in range(100)]
    # Binomial(100, 0.05) exceeds 10 with probability 0.011, Binomial(100, 0.9) is below 82 with
    # 0.004; the seed is fixed.
    assert 1 <= sum(study.p_value < 0.05 for study in studies) <= 10
    assert 82 <= sum(study.low <= 0 <= study.high for study in studies) <= 98


def test_equal_labels_are_no_evidence_and_have_no_interval() -> None:
    result = compare([0, 1, 2], [0, 1, 2])
    assert result[:2] == (3, 0)
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert result.p_value == 1
    assert result.sentence == (
        "No interval and no evidence: both latents have one label in all 3 pairs"
    )


def test_pairs_that_all_differ_by_the_same_have_p_and_no_interval() -> None:
    result = compare([0, 1, 0, 1], [1, 2, 1, 2])
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    # Of 16 patterns of signs one is as good: p = 0.0625.
    assert result.sentence == (
        "Mean difference +1.00 over 4 pairs, no interval, since all pairs differ by the same, "
        "one-sided p = 0.062"
    )


def test_a_result_reads_as_the_paper_writes_it() -> None:
    # The overall numbers of arXiv:2404.16014v2, section 4.3.2.
    paper = PairedComparison(
        n=171,
        mean_difference=0.13,
        low=0,
        high=0.26,
        p_value=0.06,
        n_better=0,
        n_equal=0,
        n_worse=0,
    )
    assert paper.sentence == (
        "Mean difference +0.13 over 171 pairs, 90 % interval [0.00, 0.26], one-sided p = 0.060"
    )


def test_sides_of_unequal_length_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        compare([0, 1, 2], [0, 1])
    assert str(caught.value) == (
        "expected a Gated label for each baseline label, got 3 baseline and 2 Gated labels; "
        "leave out pairs with one side unlabelled"
    )


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_refused(n: int) -> None:
    with pytest.raises(InputError) as caught:
        compare([1] * n, [2] * n)
    assert str(caught.value) == f"expected two pairs or more, got {n}; label more latents"


@pytest.mark.parametrize("label", [3, -1, 0.5, math.nan])
def test_a_number_that_is_no_label_is_refused_with_its_place(label: float) -> None:
    with pytest.raises(InputError) as caught:
        compare([0, label, 1], [0, 1, 2])
    assert str(caught.value) == (
        f"expected labels 0 (No), 1 (Maybe) or 2 (Yes), got {label} as baseline label 2; "
        "code the answers, and leave out pairs without one"
    )
    with pytest.raises(InputError, match="as Gated label 1;"):
        compare([0, 1], [label, 1])
