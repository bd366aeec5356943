"""Scaling curves: points are kept as they come, and drawn to scale."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from refusals import refusal

from benchmarks import curves
from benchmarks.curves import Axes, Line, line_chart, tick_label
from benchmarks.flags import Curves, Step
from benchmarks.harness import Result, Say
from benchmarks.table import Table, machine_facts, rows_of

AXES = Axes(title="Time", subtitle="a < b", x="width", y="products", unit_line="one product")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that would have been measured; each takes 3 encoder products."""
    steps: list[Step] = []

    def measure(step: Step, say: Say) -> Table:
        steps.append(step)
        results = [
            Result("encoder product", (2.0,), 1, 1, {}),
            Result("our step", (6.0,), 1, 1, {}),
        ]
        return Table(
            title="",
            settings={
                name: getattr(step, name)
                for name in ("batch", "d_in", "d_sae", "l0", "saes", "rounds", "no_peers")
            },
            unit="encoder product",
            rows=rows_of(results, unit="encoder product"),
            notes=(),
            machine=machine_facts(threads=1, device=step.device),
        )

    monkeypatch.setattr(curves, "bench_step", measure)
    return steps


def flags(folder: Path, **fields: Any) -> Curves:
    values: dict[str, Any] = {
        "folder": folder,
        "d_sae": (64, 32),
        "l0": (2.0, 4.0),
        "saes": (1, 2),
        "at_d_sae": 64,
        "at_l0": 2.0,
        "threads": 1,
    }
    return Curves(**values | fields)


def silent(_: str) -> None:
    pass


def test_a_point_that_three_curves_share_is_measured_once(
    measured: list[Step], tmp_path: Path
) -> None:
    written = curves.bench_curves(flags(tmp_path), silent)
    # d_sae 32 and 64 at L0 2; L0 2 (the same) and 4; one SAE (the same again) and two.
    found = [(step.d_sae, step.l0, step.saes, step.no_peers) for step in measured]
    assert found == [(32, 2, 1, False), (64, 2, 1, False), (64, 4, 1, False), (64, 2, 2, True)]
    assert [path.name for path in written] == [
        "scaling.json",
        "scaling-width.svg",
        "scaling-l0.svg",
        "scaling-saes.svg",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_what_is_known_is_not_measured_again(measured: list[Step], tmp_path: Path) -> None:
    curves.bench_curves(flags(tmp_path), silent)
    measured.clear()
    curves.bench_curves(flags(tmp_path, l0=(2.0, 4.0, 8.0)), silent)
    assert [step.l0 for step in measured] == [8.0]
    measured.clear()
    curves.bench_curves(flags(tmp_path, fresh=True), silent)
    assert len(measured) == 4


def test_points_of_another_machine_are_not_ours(measured: list[Step], tmp_path: Path) -> None:
    curves.bench_curves(flags(tmp_path), silent)
    path = tmp_path / "scaling.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 9'))
    measured.clear()
    curves.bench_curves(flags(tmp_path), silent)
    assert len(measured) == 4


def test_an_interruption_keeps_the_points_before_it(
    measured: list[Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = curves.bench_step

    def interrupted(step: Step, say: Say) -> Table:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(step, say)

    monkeypatch.setattr(curves, "bench_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curves.bench_curves(flags(tmp_path), silent)
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [point["settings"]["d_sae"] for point in points] == [32, 64]


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"points": 3}', '{"points": [{}]}'])
def test_numbers_that_are_something_else_are_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(text)
    assert refusal(curves.bench_curves, flags(tmp_path), silent) == (
        f"expected points of an earlier run in {path}, got something else; begin anew with --fresh"
    )
    assert path.read_text() == text


def test_a_figure_draws_ratios_over_what_its_curve_runs_over(
    measured: list[Step], tmp_path: Path
) -> None:
    curves.bench_curves(flags(tmp_path), silent)
    text = (tmp_path / "scaling-width.svg").read_text()
    assert "ours: 3× at 32" in text
    assert "ours: 3× at 64" in text
    # Nobody else was measured, so nobody else is in the legend.
    assert "SAELens" not in text
    assert "time for each SAE" in (tmp_path / "scaling-saes.svg").read_text()


def drawn(*lines: Line) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, AXES))


def places(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Return where the markers of a figure are, in its frame."""
    marks = [mark for mark in root.iter(f"{SVG}path") if "× at " in mark.get("aria-label", "")]
    return [_moved(mark) for mark in marks]


def _moved(element: ElementTree.Element) -> tuple[float, float]:
    x, y = element.attrib["transform"].removeprefix("translate(").removesuffix(")").split(",")
    return float(x), float(y)


def test_equal_factors_are_equal_distances() -> None:
    points = ((1.0, 1.0), (2.0, 4.0), (4.0, 16.0))
    (x0, y0), (x1, y1), (x2, y2) = places(drawn(Line("a", points)))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x1 > x0
    assert y1 < y0  # up is more


def test_every_point_and_the_unit_lie_inside_the_picture() -> None:
    root = drawn(Line("a", ((8.0, 0.2), (131072.0, 40.0))), Line("b", ((8.0, 3.0),)))
    found = places(root)
    assert len(found) == 3
    assert all(0 <= x <= 560 and 0 <= y <= 300 for x, y in found)
    (unit,) = (each for each in root.iter(f"{SVG}line") if each.get("stroke-dasharray") == "5,4")
    assert 0 < _moved(unit)[1] < 300
    assert "one product" in [each.text for each in root.iter(f"{SVG}text")]


def test_a_line_without_points_keeps_its_colour_and_is_not_named() -> None:
    root = drawn(Line("a", ()), Line("b", ((1.0, 2.0),)))
    (mark,) = [each for each in root.iter(f"{SVG}path") if "× at" in each.get("aria-label", "")]
    assert mark.attrib["fill"] == curves.LOOKS[1][0]
    named = [each.text for each in root.iter(f"{SVG}text")]
    assert "b" in named
    assert "a" not in named


def test_text_is_escaped() -> None:
    root = drawn(Line("a & b", ((1.0, 2.0),)))
    assert "a & b" in [each.text for each in root.iter(f"{SVG}text")]
    assert "a < b" in [each.text for each in root.iter(f"{SVG}text")]


def test_what_has_no_logarithm_is_refused() -> None:
    with pytest.raises(ValueError, match="expected coordinates above 0"):
        line_chart([Line("a", ((0.0, 1.0),))], AXES)
    with pytest.raises(ValueError, match="expected 1 to 4 lines with points, got 0"):
        line_chart([], AXES)


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (32.0, "32"), (131072.0, "131,072")])
def test_ticks_are_written_out(value: float, text: str) -> None:
    assert tick_label(value) == text
