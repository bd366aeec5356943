"""Frontiers and the matched-fidelity ratio, on small sums and on the paper's own rows."""

import math

import pytest

from gsae_core.analysis.pareto import (
    MatchedPair,
    Point,
    frontier,
    matched_l0_ratio,
    matched_ratio,
    ratio_sentences,
)

# arXiv:2404.16014v2, Tables 1 and 3: Gemma-7B, residual stream after block 20, L0 and % recovered.
BASELINE_L20 = [
    Point(10.4, 91.87),
    Point(13.8, 93.68),
    Point(16, 94.48),
    Point(25.2, 90.71),
    Point(21.3, 95.73),
    Point(27.8, 97.15),
    Point(39.1, 96.43),
    Point(46.4, 97.95),
    Point(49.4, 95.26),
    Point(50.3, 95.99),
    Point(124.8, 97.69),
]
GATED_L20 = [
    Point(8.2, 96.15),
    Point(10, 96.7),
    Point(12.3, 97.14),
    Point(15.6, 97.7),
    Point(29.3, 98.62),
    Point(28, 98.53),
    Point(28.5, 98.58),
    Point(67.3, 99.3),
    Point(123.4, 99.58),
    Point(212.1, 99.65),
]


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([Point(20, 0.9, "c"), Point(10, 0.8, "a"), Point(15, 0.7, "beaten by a")], ["a", "c"]),
        ([Point(10, 0.7, "low"), Point(10, 0.8, "tie"), Point(12, 0.8, "dense")], ["tie"]),
        ([Point(1, 1, "first"), Point(1, 1, "second")], ["first"]),
        ([], []),
    ],
)
def test_no_point_of_the_frontier_is_beaten_on_both_axes(
    points: list[Point], names: list[str]
) -> None:
    assert [p.name for p in frontier(points)] == names


@pytest.mark.parametrize("hole", [Point(math.nan, 1), Point(1, math.nan), Point(math.inf, 2)])
def test_a_point_without_numbers_is_left_out(hole: Point) -> None:
    assert frontier([hole, Point(3, 0.5)]) == [Point(3, 0.5)]


def test_the_papers_baseline_frontier_at_layer_20_has_six_runs() -> None:
    assert [p.l0 for p in frontier(BASELINE_L20)] == [10.4, 13.8, 16, 21.3, 27.8, 46.4]


def test_the_paper_at_97_95_percent_fires_46_4_against_18_6() -> None:
    # Gated between 15.6 at 97.7 and 28 at 98.53: t = 0.25 / 0.83 = 0.30120,
    # 15.6 * (28 / 15.6)^0.30120 = 15.6 * e^(0.58496 * 0.30120) = 15.6 * 1.19266 = 18.6055
    result = matched_l0_ratio(BASELINE_L20, GATED_L20)
    top = result.pairs[-1]
    assert (top.loss_recovered, top.l0_baseline) == (97.95, 46.4)
    assert top.l0_gated == pytest.approx(18.6055, abs=1e-4)
    assert top.ratio == pytest.approx(2.4939, abs=1e-4)  # 46.4 / 18.6055


def test_pairs_stand_at_the_heights_of_runs_that_both_frontiers_reach() -> None:
    # Both span 96.15 (lowest Gated) to 97.95 (highest baseline).
    heights = [pair.loss_recovered for pair in matched_l0_ratio(BASELINE_L20, GATED_L20).pairs]
    assert heights == [96.15, 96.7, 97.14, 97.15, 97.7, 97.95]


def test_log_l0_is_linear_between_runs_and_the_median_is_reported() -> None:
    # Half-way between 10 and 40 in the logarithm is 20. Pairs: at 0.6 20 / 5, at 0.7 40 / 8.
    baseline, gated = [Point(10, 0.5), Point(40, 0.7)], [Point(5, 0.6), Point(8, 0.7)]
    result = matched_l0_ratio(baseline, gated)
    assert [pair.ratio for pair in result.pairs] == pytest.approx([4, 5])
    assert result.median == pytest.approx(4.5)
    assert result.sentence == (
        "At equal loss recovered the baseline fires 4.5x as many features (2 matched points)"
    )


def test_one_run_each_at_one_height_still_compare() -> None:
    result = matched_l0_ratio([Point(30, 0.9)], [Point(10, 0.9)])
    assert result.pairs == (MatchedPair(0.9, 30, 10),)
    assert result.median == 3


def test_the_ratio_does_not_care_for_the_scale_of_loss_recovered() -> None:
    baseline, gated = (
        [p._replace(loss_recovered=p.loss_recovered / 100) for p in points]
        for points in (BASELINE_L20, GATED_L20)
    )
    percent = matched_l0_ratio(BASELINE_L20, GATED_L20).median
    assert matched_l0_ratio(baseline, gated).median == pytest.approx(percent)


def test_frontiers_that_do_not_overlap_say_so() -> None:
    result = matched_l0_ratio([Point(10, 0.5), Point(20, 0.6)], [Point(10, 0.7), Point(20, 0.8)])
    assert math.isnan(result.median)
    assert result.pairs == ()
    assert result.sentence == (
        "No ratio at equal loss recovered: the baseline's loss recovered (0.5 to 0.6) and the "
        "Gated SAEs' (0.7 to 0.8) do not overlap; train more values of lambda between them"
    )
    alone = matched_l0_ratio([Point(10, 0.5)], [Point(10, 0.7)]).sentence
    assert "the baseline's loss recovered (0.5) and the Gated SAEs' (0.7) do not" in alone


@pytest.mark.parametrize(
    ("baseline", "gated", "missing"),
    [
        ([], [Point(1, 1)], "baseline"),
        ([Point(1, 1)], [], "Gated"),
        ([Point(0, 1)], [], "baseline"),
    ],
)
def test_a_missing_architecture_is_named(
    baseline: list[Point], gated: list[Point], missing: str
) -> None:
    result = matched_l0_ratio(baseline, gated)
    assert math.isnan(result.median)
    assert result.sentence == f"No ratio at equal loss recovered: there is no {missing} run"


def test_one_evaluation_is_compared_by_architecture_and_what_was_not_measured_is_left_out() -> None:
    rows = [
        {"name": name, "architecture": name[:-2], "l0": l0, "loss_recovered": recovered}
        for name, l0, recovered in [
            ("relu-1", 40.0, 0.95),
            ("gated-1", 10.0, 0.95),
            ("gated-2", 1.0, None),
            ("gated-3", 1.0, math.nan),
        ]
    ]
    assert matched_ratio(rows).median == 4  # 40 / 10 at 0.95


def test_what_holds_at_every_place_is_said_once() -> None:
    only = {"architecture": "gated", "l0": 9.0, "loss_recovered": 0.9, "layer": 2}
    rows = [only | {"site": site} for site in ("resid_post", "mlp_out")]
    assert ratio_sentences(rows) == ["No ratio at equal loss recovered: there is no baseline run"]
    both = [*rows, rows[0] | {"architecture": "relu", "l0": 20.0}]
    assert [said.partition(":")[0] for said in ratio_sentences(both)] == [
        "blocks.2.hook_resid_post",
        "blocks.2.hook_mlp_out",
    ]
