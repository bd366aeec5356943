"""Live charts: a specification that no data change, and slim data that keep a line's look."""

import numpy as np
import pandas as pd
import pytest
from synthetic import config, metric_lines, two_places

from gsae_core.plots.live import (
    CHART_POINTS,
    Line,
    Track,
    ceiling,
    line_chart,
    lines_of,
    plane,
    thin,
    tracks,
)
from gsae_core.plots.palette import Theme

CONFIG = config()
LINES = lines_of({"a": CONFIG.saes}, "light")


def logged(share: float, lines: tuple[Line, ...] = LINES) -> list[Track]:
    return tracks({"a": pd.DataFrame(metric_lines(CONFIG, share=share))}, lines)


def test_a_thinned_line_keeps_its_ends_and_its_extremes() -> None:
    values = np.zeros(1001)
    values[[333, 777]] = [9.0, -9.0]
    places = thin(values, 100)
    assert len(places) <= 100
    assert {0, 333, 777, 1000} <= set(places.tolist())
    assert (np.diff(places) > 0).all()


def test_a_short_line_is_drawn_whole() -> None:
    assert thin(np.arange(5.0), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_chart_of_many_long_lines_stays_small() -> None:
    n = 100_000
    long = {"step": np.arange(n, dtype="float64"), "l0": np.sin(np.arange(n)) + 2}
    chart = line_chart(LINES, [long] * 8, "l0", x="step")
    assert len(chart.data) <= CHART_POINTS
    assert set(chart.data["line"]) == set(range(8))


def test_smoothing_is_causal_and_unbiased_at_the_start() -> None:
    # Weight 0.5: 2; (4 + 2/2) / (1 + 1/2) = 10/3; (8 + 4/2 + 2/4) / (1 + 1/2 + 1/4) = 6.
    part = {"step": np.arange(3.0), "l0": np.array([2.0, 4.0, 8.0])}
    chart = line_chart(LINES[:1], [part], "l0", x="step", smoothing=0.5)
    assert chart.data["value"].to_list() == pytest.approx([2, 10 / 3, 6])


def test_a_smoothed_line_keeps_the_raw_one_beneath_it() -> None:
    plain = line_chart(LINES, logged(0.2), "l0", x="tokens")
    smooth = line_chart(LINES, logged(0.2), "l0", x="tokens", smoothing=0.5)
    assert len(smooth.spec["layer"]) == len(plain.spec["layer"]) + 1
    assert smooth.data["raw"].equals(plain.data["raw"])
    faint, main = (layer["mark"].get("opacity", 1) for layer in smooth.spec["layer"])
    assert faint < main


def test_the_axis_of_gamma_is_made_for_what_comes_after_the_first_steps() -> None:
    assert ceiling([np.array([4.0, 3.0, 0.9, 0.8])]) == 1.5
    assert ceiling([np.array([4.0, 3.0, 0.9, 0.8]), np.array([1.0, 2.0])]) == 3.0
    assert ceiling([np.array([1.0, 50.0])]) is None
    assert ceiling([]) == 1.5


@pytest.mark.parametrize("column", ["l0", "loss", "gamma", "lr", "dead_gate"])
def test_new_data_leave_the_specification_alone(column: str) -> None:
    # A specification that changed would be a new chart, and the zoom would be gone.
    early = line_chart(LINES, logged(0.1), column, x="tokens", log=column == "l0")
    late = line_chart(LINES, logged(0.9), column, x="tokens", log=column == "l0")
    assert early.spec == late.spec
    assert len(early.data) < len(late.data)
    assert plane(LINES, logged(0.1)).spec == plane(LINES, logged(0.9), finished=["a"]).spec


def test_a_chart_drops_what_was_not_measured() -> None:
    chart = line_chart(LINES, logged(0.2), "gamma_gate", x="step")
    # The first four SAEs are gated; a baseline has no gate.
    assert set(chart.data["line"]) == {0, 1, 2, 3}


def test_a_log_axis_leaves_out_what_it_cannot_show() -> None:
    part = {"step": np.array([1.0, 2.0, 3.0]), "l0": np.array([0.0, np.nan, 5.0])}
    chart = line_chart(LINES[:1], [part], "l0", x="step", log=True)
    assert chart.data["raw"].to_list() == [5.0]
    both = line_chart(LINES[:1], [part], "l0", x="step")
    assert both.data["raw"].to_list() == [0.0, 5.0]


def test_a_marker_is_solid_when_its_run_is_finished() -> None:
    # The last point of each path is 1, hollow, or 2, solid; the way there is 0.
    hollow, solid = (plane(LINES, logged(0.2), finished=done).data for done in ([], ["a"]))
    assert set(hollow["now"]) == {0, 1}
    assert set(solid["now"]) == {0, 2}
    assert hollow["now"].to_list().count(1) == len(LINES)


def test_nothing_logged_is_an_empty_chart() -> None:
    nothing = tracks({"a": pd.DataFrame()}, LINES)
    assert line_chart(LINES, nothing, "l0", x="step").data.empty
    assert plane(LINES, nothing).data.empty


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_runs_laid_over_each_other_differ_in_hue_and_architectures_in_dash(theme: Theme) -> None:
    lines = lines_of({"a": CONFIG.saes, "b": CONFIG.saes}, theme)
    for run in ("a", "b"):
        assert len({line.colour for line in lines if line.run == run}) == 1
        assert len({line.dash for line in lines if line.run == run}) == 2
    assert len({line.colour for line in lines}) == 2
    assert len({line.label for line in lines}) == len(lines) == 16


def test_a_run_without_an_sae_of_another_is_drawn_with_what_it_has() -> None:
    lines = lines_of({"a": CONFIG.saes, "b": CONFIG.saes[:1]}, "light")
    frames = {"a": pd.DataFrame(metric_lines(CONFIG, share=0.1)), "b": pd.DataFrame()}
    assert [bool(part) for part in tracks(frames, lines)] == [False] + [True] * 8


def test_streamlit_gets_the_data_in_single_precision() -> None:
    chart = line_chart(LINES, logged(0.1), "fvu", x="step")
    table = chart.arrow()
    assert table.column_names == list(chart.data.columns)
    assert chart.data["x"].dtype == "float64"
    pd.testing.assert_frame_equal(table.to_pandas(), chart.data.astype({"x": "float32"}))


def test_places_differ_in_hue_and_architectures_in_dash() -> None:
    both = two_places()
    lines = lines_of({"a": both.saes}, "light", lambda _run, spec: f"layer {spec.layer}")
    by_group = {
        line.group: {each.colour for each in lines if each.group == line.group} for line in lines
    }
    assert {len(colours) for colours in by_group.values()} == {1}
    assert set(by_group) == {"layer 1", "layer 3"}
    assert len({line.colour for line in lines}) == 2
    assert lines[-1].group == "layer 1"
    assert lines[-1].label.endswith(" · layer 1")
    over = lines_of(
        {"a": both.saes, "b": CONFIG.saes}, "light", lambda run, _spec: "x" * (run == "a")
    )
    assert {line.group for line in over} == {"x · a", "b"}
