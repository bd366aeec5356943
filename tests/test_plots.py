"""Figures say what the data say: checked on the objects, since pixels prove little."""

import numpy as np
import pandas as pd
import pytest
from synthetic import config, evaluation, metric_lines

from gsae_core import glossary
from gsae_core.analysis.pareto import matched_ratio
from gsae_core.config import SAESpec, sweep
from gsae_core.plots.curves import best, evaluation_frame, traces, tradeoff
from gsae_core.plots.live import (
    MAX_POINTS,
    line_chart,
    metrics_frame,
    plane,
    smoothed,
)
from gsae_core.plots.palette import LOOKS, NEUTRAL, THIRD, Theme, hover_name, round_values, shades
from gsae_core.plots.shrinkage import (
    BIN,
    common_bins,
    gamma_against_density,
    gamma_histogram,
    gamma_over_sweep,
    nearest_pair,
    select_features,
)

SAES = sweep(["gated", "relu"], [0.1, 0.2], 8)
EVALS = evaluation_frame([evaluation(spec) for spec in SAES])


def luminance(colour: str) -> float:
    """Return relative luminance as WCAG 2 defines it."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "page"), [("light", "#ffffff"), ("dark", "#10151b")])
def test_every_line_stands_out_from_the_page(theme: Theme, page: str) -> None:
    k = [1, 2, 3, 4, 5]
    colours = shades(sweep(list(LOOKS), [0.1, 0.2, 0.3, 0.4, 0.5], 8, k=k), theme)
    assert len(colours) == 4 * 5
    for colour in [*colours.values(), NEUTRAL, THIRD]:
        assert contrast(colour, page) >= 2.7, colour  # WCAG asks 3 of what must be told apart


def test_architectures_differ_in_more_than_colour() -> None:
    for trait in ("label", "colour", "plotly_symbol", "vega_shape", "dash"):
        assert len({getattr(look, trait) for look in LOOKS.values()}) == 4, trait


def test_the_sparsest_sae_of_each_architecture_is_drawn_strongest() -> None:
    colours = shades(sweep(["gated", "topk"], [0.1, 0.2], 8, k=[2, 4]), "light")
    assert luminance(colours["gated-0.2"]) < luminance(colours["gated-0.1"])
    assert luminance(colours["topk-2"]) < luminance(colours["topk-4"])  # a small k is sparse


def test_an_sae_is_named_by_what_sets_it_apart() -> None:
    spec = SAESpec(name="a", architecture="relu", d_sae=3, sparsity=0.25)
    assert hover_name(spec) == "ReLU baseline, λ 0.25"
    spec = SAESpec(name="a", architecture="topk", d_sae=64, sparsity=32)
    assert hover_name(spec) == "TopK, k 32"


def test_long_runs_are_thinned_and_keep_their_last_step() -> None:
    lines = [{"step": step, "sae": "gated-0.1", "l0": 1.0} for step in range(1, 1001)]
    frame = metrics_frame(lines, SAES)
    # 1000 steps over at most 400 points: every third, counted from the end.
    assert len(frame) == 334
    assert len(frame) <= MAX_POINTS
    assert frame["step"].iloc[-1] == 1000


def test_only_the_saes_asked_for_are_drawn() -> None:
    lines = metric_lines(config(), share=0.1)
    frame = metrics_frame(lines, SAES[:1])
    assert set(frame["sae"]) == {"gated-0.1"}
    assert metrics_frame([], SAES).empty


def test_smoothing_is_causal_and_unbiased_at_the_start() -> None:
    frame = pd.DataFrame({"sae": ["a", "a", "b", "a"], "v": [2.0, 4.0, 100.0, 8.0]})
    # Weight 0.5: 2; (4 + 2/2) / (1 + 1/2) = 10/3; (8 + 4/2 + 2/4) / (1 + 1/2 + 1/4) = 6.
    assert smoothed(frame, "v", 0.5).to_list() == pytest.approx([2, 10 / 3, 100, 6])
    assert smoothed(frame, "v", 0.0).to_list() == [2, 4, 100, 8]


def test_a_smoothed_line_keeps_the_raw_one_beneath_it() -> None:
    frame = metrics_frame(metric_lines(config(), share=0.2), config().saes)
    plain = line_chart(frame, "l0", config().saes, x="tokens", theme="light")
    smooth = line_chart(frame, "l0", config().saes, x="tokens", theme="light", smoothing=0.5)
    assert len(smooth.to_dict()["layer"]) == len(plain.to_dict()["layer"]) + 1


def test_a_chart_drops_what_was_not_measured() -> None:
    frame = metrics_frame(metric_lines(config(), share=0.2), config().saes)
    chart = line_chart(frame, "gamma_gate", config().saes, x="step", theme="dark", rule=1.0)
    drawn = {
        row["sae"] for rows in chart.to_dict()["datasets"].values() for row in rows if "sae" in row
    }
    assert drawn == {"gated-0.1", "gated-0.2", "gated-0.4", "gated-0.8"}


def test_ticks_of_a_log_axis_are_round() -> None:
    assert round_values([9.0, 210.0]) == [10, 20, 50, 100, 200]
    # 96 to 300 holds 100 and 200 only: too few, so finer digits.
    assert round_values([120.0, 240.0]) == [100, 150, 200, 250, 300]
    assert round_values([0.0]) == []


@pytest.mark.parametrize("finished", [True, False])
def test_the_plane_is_hollow_until_the_run_is_finished(finished: bool) -> None:
    frame = metrics_frame(metric_lines(config(), share=0.2), config().saes)
    spec = plane(frame, config().saes, theme="light", finished=finished).to_dict()
    marks = [layer["mark"] for layer in spec["layer"] if layer["mark"]["type"] == "point"]
    assert [mark["filled"] for mark in marks] == [finished]


def test_delta_ce_is_the_cross_entropy_added() -> None:
    # Recovery at L0 120: 0.70 + 0.055 ln 120 = 0.96331; (1 - 0.96331) 6.5 nats = 0.2385.
    row = EVALS[EVALS["name"] == "gated-0.1"].iloc[0]
    assert row["delta_ce"] == pytest.approx(0.2385, abs=1e-4)


def test_the_frontier_leaves_out_what_another_beats_twice() -> None:
    rows = pd.DataFrame({"name": ["a", "b", "c"], "l0": [10.0, 20.0, 30.0], "fvu": [0.5, 0.6, 0.3]})
    assert best(rows, "fvu")["name"].to_list() == ["a", "c"]


def test_the_ratio_follows_from_the_two_curves() -> None:
    # ln L0 of the baseline exceeds the gated one's by 0.035 / 0.055 at equal recovery.
    assert matched_ratio(EVALS.to_dict("records")).median == pytest.approx(np.exp(0.035 / 0.055))


def test_a_click_on_a_point_reports_its_name() -> None:
    figure = tradeoff(EVALS, "kl").to_dict()
    markers = [trace for trace in figure["data"] if trace.get("customdata")]
    names = [row[0] for trace in markers for row in trace["customdata"]]
    assert sorted(names) == ["gated-0.1", "gated-0.2", "relu-0.1", "relu-0.2"]


def test_the_interpolation_is_drawn_between_the_frontiers() -> None:
    matched = matched_ratio(EVALS.to_dict("records"))
    figure = tradeoff(EVALS, "loss_recovered", matched=matched)
    lines = [t for t in traces(figure) if t.legendgroup == "matched" and t.mode == "lines"]
    segments = [tuple(t.x) for t in lines]
    assert segments == [(pair.l0_gated, pair.l0_baseline) for pair in matched.pairs]
    # An end that could be hovered would steal the click from the SAE it lies on.
    assert {t.hoverinfo for t in lines} == {"skip"}


def test_gamma_over_the_sweep_has_three_series_and_a_rule_at_one() -> None:
    figure = gamma_over_sweep(EVALS)
    assert [t.name for t in traces(figure)] == [
        "Gated, output",
        "Gated, gate path",
        "ReLU baseline",
    ]
    assert [(shape["y0"], shape["y1"]) for shape in figure.to_dict()["layout"]["shapes"]] == [
        (1, 1)
    ]


def stats(fired: list[int], gamma: list[float]) -> pd.DataFrame:
    density = [count / 100 for count in fired]
    return pd.DataFrame({"fired": fired, "gate_open": fired, "density": density, "gamma": gamma})


def test_rare_and_unmeasured_features_are_hidden_and_counted() -> None:
    table = stats([0, 5, 50, 60, 70], [np.nan, 0.2, 0.9, np.nan, 1.1])
    chosen = select_features(SAES[0], table, min_fired=10)
    assert chosen.stats.index.to_list() == [2, 4]
    assert (chosen.n_features, chosen.n_hidden) == (5, 3)
    assert chosen.median == pytest.approx(1.0)


def test_bins_are_common_and_hold_one() -> None:
    edges = common_bins([np.array([0.5, 0.6]), np.array([0.9])])
    assert edges[0] <= 0.5
    assert edges[-1] > 1.0
    assert np.diff(edges) == pytest.approx(BIN)


def test_histogram_bars_are_shares_of_what_is_shown() -> None:
    gated = select_features(SAES[0], stats([50, 50, 50, 0], [0.99, 1.01, 1.01, 0.1]), min_fired=1)
    relu = select_features(SAES[2], stats([50], [0.8]), min_fired=1)
    figure = gamma_histogram([gated, relu])
    first, second = traces(figure)
    assert sum(first.y) == pytest.approx(1)
    assert max(first.y) == pytest.approx(2 / 3)
    assert first.x == second.x
    assert first.name == "Gated, λ 0.1 (N = 3)"


def test_dots_are_thinned_and_carry_their_latent() -> None:
    table = stats([50] * 4001, [1.0] * 4001)
    (trace,) = traces(gamma_against_density([select_features(SAES[0], table, min_fired=1)]))
    # 4001 dots over at most 2000: every third.
    assert [row[0] for row in trace.customdata[:3]] == [0, 3, 6]


def test_a_runaway_feature_does_not_flatten_the_others() -> None:
    table = stats([50] * 1000, [1.0] * 999 + [46.0])
    figure = gamma_against_density([select_features(SAES[0], table, min_fired=1)])
    assert figure.to_dict()["layout"]["yaxis"]["range"][1] < 2
    assert [note["text"] for note in figure.to_dict()["layout"]["annotations"]] == [
        "beyond the axis: 1"
    ]


def test_the_pair_shown_first_is_nearest_in_l0() -> None:
    rows = pd.DataFrame(
        {
            "name": ["g1", "g2", "r1", "r2"],
            "architecture": ["gated", "gated", "relu", "relu"],
            "l0": [10.0, 100.0, 30.0, 90.0],
        }
    )
    assert nearest_pair(rows) == {"gated": "g2", "relu": "r2"}
    assert nearest_pair(rows.head(2)) == {"gated": "g2"}


@pytest.mark.parametrize("term", glossary.terms())
def test_every_term_has_its_definition_where_it_is_computed(term: str) -> None:
    assert len(glossary.definition(term)) > 20
