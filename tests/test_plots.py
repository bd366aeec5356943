"""Figures say what the data say: checked on the objects, since pixels prove little."""

import numpy as np
import pandas as pd
import pytest
from synthetic import evaluation

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.analysis.results import (
    PaperSite,
    evaluation_frame,
    nearest_pair,
    published,
    several_runs,
)
from gsae_core.config import SAESpec, sweep
from gsae_core.plots.palette import LOOKS, NEUTRAL, THIRD, Theme, hover_name, round_values, shades
from gsae_core.plots.pareto import RUN_LOOKS, best, placed, traces, tradeoff
from gsae_core.plots.shrinkage import (
    BIN,
    MAX_BINS,
    FeatureGamma,
    common_bins,
    features_in_bin,
    gamma_against_density,
    gamma_histogram,
    gamma_over_sweep,
    histogram_table,
    lengths_by_decile,
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
    colours = shades(sweep(list(LOOKS), [1, 2, 3, 4, 5], 8), theme)
    assert len(colours) == 4 * 5
    for colour in [*colours.values(), NEUTRAL, THIRD]:
        assert contrast(colour, page) >= 2.7, colour  # WCAG asks 3 of what must be told apart


def test_architectures_differ_in_more_than_colour() -> None:
    for trait in ("label", "colour", "shape", "dash"):
        assert len({getattr(look, trait) for look in LOOKS.values()}) == 4, trait


def test_the_sparsest_sae_of_each_architecture_is_drawn_strongest() -> None:
    colours = shades(sweep(["gated", "topk"], [2, 4], 8), "light")
    assert luminance(colours["gated-4"]) < luminance(colours["gated-2"])
    assert luminance(colours["topk-2"]) < luminance(colours["topk-4"])  # a small k is sparse


def test_an_sae_is_named_by_what_sets_it_apart() -> None:
    spec = SAESpec(name="a", architecture="relu", d_sae=3, sparsity=0.25)
    assert hover_name(spec) == "ReLU baseline, λ 0.25"
    spec = SAESpec(name="a", architecture="topk", d_sae=64, sparsity=32)
    assert hover_name(spec) == "TopK, k 32"


def test_ticks_of_a_log_axis_are_round() -> None:
    assert round_values([9.0, 210.0]) == [10, 20, 50, 100, 200]
    # 96 to 300 holds 100 and 200 only: too few, so finer digits.
    assert round_values([120.0, 240.0]) == [100, 150, 200, 250, 300]
    # Two points close together, such as a Gated SAE and its baseline: an axis from 6.3 to 7.8.
    assert round_values([6.3, 7.8]) == [5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5]
    assert round_values([53.3, 62.5]) == [45, 50, 55, 60, 65, 70, 75]
    assert [tick for tick in round_values([53.3, 55.4]) if 53.3 <= tick <= 55.4] == [54, 55]
    assert round_values([7.0]) == [6, 7, 8]
    # Not 90, 95, 100 and then none up to 150.
    assert round_values([87.7, 144.5]) == [80, 100, 120, 140, 160, 180]
    assert 2 <= len(round_values([100.0, 100.0001])) < 30
    assert round_values([0.0]) == []


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
    (lines,) = [t for t in traces(figure) if t.legendgroup == "matched" and t.mode == "lines"]
    ends = [(pair.l0_gated, pair.l0_baseline, None) for pair in matched.pairs]
    assert lines.x == tuple(end for pair in ends for end in pair)
    # An end that could be hovered would steal the click from the SAE it lies on.
    assert lines.hoverinfo == "skip"


def test_several_runs_differ_in_more_than_the_legend() -> None:
    evals = several_runs({"a": EVALS, "b": EVALS})
    drawn = [t for t in traces(tradeoff(evals)) if t.mode == "markers"]
    assert [t.name for t in drawn] == [
        "Gated · a",
        "ReLU baseline · a",
        "Gated · b",
        "ReLU baseline · b",
    ]
    assert [t.marker.symbol for t in drawn] == ["circle", "diamond", "circle-open", "diamond-open"]
    looks = [(look.suffix, look.size) for look in RUN_LOOKS]
    assert len(set(looks)) == len(looks)


def test_each_run_has_its_own_frontiers() -> None:
    worse = EVALS.assign(loss_recovered=EVALS["loss_recovered"] - 0.5)
    lines = [
        t for t in traces(tradeoff(several_runs({"a": EVALS, "b": worse}))) if t.mode == "lines"
    ]
    assert [len(t.x) for t in lines] == [2, 2, 2, 2]


def test_any_measure_goes_on_either_axis() -> None:
    # FVU falls as KL falls in these runs, so the frontier of two things to keep small is a point.
    figure = tradeoff(EVALS, "kl", x="fvu", log_x=False)
    assert (
        figure.to_dict()["layout"]["xaxis"]["title"]["text"] == "fraction of variance unexplained"
    )
    lines = [t for t in traces(figure) if t.mode == "lines"]
    assert [len(t.x) for t in lines] == [1, 1]


def test_what_a_log_axis_has_no_place_for_is_left_out() -> None:
    rows = EVALS.assign(l0=[0.0, 5.0, -1.0, 7.0])
    assert len(placed(rows, "l0", "kl", log_x=True)) == 2
    assert len(placed(rows, "l0", "kl", log_x=False)) == 4
    rows = EVALS.assign(kl=[np.nan, 1.0, 1.0, 1.0])
    assert len(placed(rows, "l0", "kl", log_x=False)) == 3


def test_what_is_picked_wears_a_numbered_ring() -> None:
    figure = tradeoff(EVALS, picked=["relu-0.1", "not here"])
    (ring,) = [t for t in traces(figure) if t.name == "picked"]
    assert ring.text == ("1",)
    assert ring.x == (160.0,)  # 16 / 0.1
    assert ring.hoverinfo == "skip"


def test_the_papers_runs_are_fainter_and_take_no_clicks() -> None:
    place = PaperSite("gemma-7b", "resid_post", 20)
    figure = tradeoff(EVALS, paper=published(place))
    faint = [t for t in traces(figure) if t.opacity is not None]
    assert {t.name for t in faint if t.mode == "markers"} == {
        "Gated, published",
        "ReLU baseline, published",
    }
    assert all(t.customdata is None and t.opacity < 1 for t in faint)
    # Ten Gated and eleven baseline runs in Tables 1 and 3.
    assert sorted(len(t.x) for t in faint if t.mode == "markers") == [10, 11]
    assert 0 < max(y for t in faint for y in t.y) <= 1
    # They have no KL.
    assert not [t for t in traces(tradeoff(EVALS, "kl", paper=published(place))) if t.opacity]


def test_published_rows_without_a_place_on_a_log_axis_are_not_drawn() -> None:
    # Table 3: MLP of block 20 has one row with L0 -91.1.
    paper = published(PaperSite("gemma-7b", "mlp_out", 20))
    for figure in (tradeoff(EVALS, paper=paper), gamma_over_sweep(EVALS, paper=paper)):
        drawn = [x for t in traces(figure) if t.name == "Gated, published" for x in t.x]
        assert len(drawn) == 9
        assert min(drawn) > 0


def test_lengths_are_drawn_from_the_shortest_tenth_to_the_longest() -> None:
    table = pd.DataFrame(
        {"decile": range(1, 11), "norm": 2.0, "ratio": np.linspace(0.5, 0.95, 10), "gamma": 1.0}
    )
    (line,) = traces(lengths_by_decile([(SAES[0], table)]))
    assert list(line.x) == list(range(1, 11))
    assert line.y[0] == 0.5
    (line,) = traces(lengths_by_decile([(SAES[0], table)], "gamma"))
    assert set(line.y) == {1.0}


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
    assert chosen.n_features == 5
    assert chosen.sentence(10) == (
        "Gated, λ 0.1: 2 of 5 features fired on 10 tokens or more; the median of their own γ is "
        "1.000."
    )


def features(gamma: list[float], *, spec: SAESpec = SAES[0]) -> FeatureGamma:
    return select_features(spec, stats([50] * len(gamma), gamma), min_fired=1)


def test_bins_are_common_and_hold_one() -> None:
    bins = common_bins([features([0.5, 0.6]), features([0.9])])
    assert bins.edges[0] <= 0.5
    assert bins.edges[-1] > 1.0
    assert np.diff(bins.edges) == pytest.approx(BIN)


def test_bins_widen_until_a_pointer_can_hit_them() -> None:
    bins = common_bins([features([-3.0, 9.0] * 100)])
    # 12 wide: 0.025 takes 480 bins, 0.2 takes 60.
    assert bins.width == pytest.approx(0.2)
    assert len(bins.labels) <= MAX_BINS


def test_a_bin_lists_the_features_that_its_bar_counts() -> None:
    # Edges are multiples of 0.025 from 0.95 to 1.05, one bin beyond either end.
    shown = [features([0.99, 1.01, 1.02, 0.976]), features([1.012], spec=SAES[2])]
    bins = common_bins(shown)
    table = histogram_table(shown, bins).set_index("γ")
    assert table.loc["1.000 to 1.025"].to_dict() == {"gated-0.1": 2, "relu-0.1": 1}
    found = features_in_bin(shown, bins, "1.000 to 1.025")
    pairs = zip(found["sae"], found["latent"], strict=True)
    assert set(pairs) == {("gated-0.1", 1), ("gated-0.1", 2), ("relu-0.1", 0)}


def test_the_last_bin_says_that_it_holds_what_lies_beyond() -> None:
    shown = [features([1.0] * 999 + [46.0])]
    bins = common_bins(shown)
    assert bins.labels[-1].endswith("or more")
    assert bins.labels[0].startswith("below")
    assert features_in_bin(shown, bins, bins.labels[-1])["gamma"].to_list() == [46.0]


def test_a_feature_list_begins_with_what_fired_most() -> None:
    shown = [select_features(SAES[0], stats([5, 90, 40], [1.01] * 3), min_fired=1)]
    found = features_in_bin(shown, common_bins(shown), "1.000 to 1.025")
    assert found["latent"].to_list() == [1, 2, 0]


def test_a_limit_that_hides_everything_says_so() -> None:
    hidden = select_features(SAES[0], stats([0, 5, 9], [np.nan, 1.0, 1.0]), min_fired=10)
    assert hidden.sentence(10) == "Gated, λ 0.1: 0 of 3 features fired on 10 tokens or more."


def test_histogram_bars_are_shares_of_what_is_shown() -> None:
    gated = select_features(SAES[0], stats([50, 50, 50, 0], [0.99, 1.01, 1.01, 0.1]), min_fired=1)
    relu = select_features(SAES[2], stats([50], [0.8]), min_fired=1)
    figure = gamma_histogram([gated, relu], bins=common_bins([gated, relu]))
    first, second = traces(figure)
    assert sum(first.y) == pytest.approx(1)
    assert max(first.y) == pytest.approx(2 / 3)
    assert first.x == second.x
    assert first.name == "Gated, λ 0.1 (N = 3)"


def test_a_click_on_a_bar_reports_its_bin_and_a_chosen_bin_is_marked() -> None:
    shown = [features([0.99, 1.01])]
    bins = common_bins(shown)
    figure = gamma_histogram(shown, bins=bins, chosen="1.000 to 1.025")
    assert [row[0] for row in traces(figure)[0].customdata] == bins.labels
    (mark,) = [shape for shape in figure.to_dict()["layout"]["shapes"] if shape["type"] == "rect"]
    assert (mark["x0"], mark["x1"]) == pytest.approx((1.0, 1.025))


def test_dots_are_thinned_and_carry_their_latent() -> None:
    table = stats([50] * 2001, [46.0] + [1.0] * 2000)
    figure = gamma_against_density([select_features(SAES[0], table, min_fired=1)])
    (trace,) = traces(figure)
    # 2001 dots over at most 1000: every third. What is beyond is counted among all.
    assert list(trace.customdata[:3]) == [0, 3, 6]
    (note,) = figure.to_dict()["layout"]["annotations"]
    assert note["text"] == "beyond the axis: 1<br>one feature in 3 drawn"


def test_of_few_features_a_runaway_does_not_flatten_the_others() -> None:
    # Of 101 gammas one is within 99 %.
    few = [0.9, 1.1] * 50
    bins = common_bins([features([*few, 3000.0])])
    assert bins.width == pytest.approx(0.05)
    assert bins.edges[-1] < 4
    assert common_bins([features([-3.0, *few])]).edges[0] > -2


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
    assert nearest_pair(rows) == {"gated": "g2", "base": "r2"}
    assert nearest_pair(rows.head(2)) == {"gated": "g2"}
    assert nearest_pair(rows.tail(2)) == {"base": "r2"}


def test_where_no_relu_sae_is_another_serves_as_the_baseline() -> None:
    rows = pd.DataFrame(
        {"name": ["g", "j"], "architecture": ["gated", "jumprelu"], "l0": [10.0, 30.0]}
    )
    assert nearest_pair(rows) == {"gated": "g", "base": "j"}
