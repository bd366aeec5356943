"""`bench curves`: how a step's time grows, point by point into scaling.json, and as figures."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import torch

from benchmarks.flags import Curves, Step
from benchmarks.harness import Say
from benchmarks.step import OURS, PRODUCT, bench_step
from benchmarks.table import machine_facts, machine_line
from gsae_core.errors import InputError
from gsae_core.files import replace_durably, write_json
from gsae_core.plots.palette import round_values

# Okabe-Ito hues; markers tell the lines apart without them.
LOOKS = (
    ("#0072B2", "circle"),
    ("#D55E00", "square"),
    ("#009E73", "diamond"),
    ("#6B7280", "triangle-up"),
)
X_LABEL = "format(datum.value, datum.value >= 1000 ? ',.0f' : '~g')"


class Line(NamedTuple):
    """A named series; both coordinates are above 0. Without points it only keeps its colour."""

    name: str
    points: tuple[tuple[float, float], ...]


class Axes(NamedTuple):
    """What the figure says around its lines."""

    title: str
    subtitle: str
    x: str
    y: str
    unit_line: str
    """Label of the dashed line at y = 1."""


def line_chart(lines: Sequence[Line], axes: Axes) -> str:
    """Return the chart as the text of an SVG file; at most four lines.

    Raises:
        ValueError: if there is no point, too many lines, or a coordinate that is not above 0.
    """
    points = [point for line in lines for point in line.points]
    if not points or len(lines) > len(LOOKS):
        raise ValueError(f"expected 1 to {len(LOOKS)} lines with points, got {len(lines)}")
    if any(value <= 0 for point in points for value in point):
        raise ValueError("expected coordinates above 0, got others; the axes are logarithmic")
    rows = [
        {"x": x, "y": y, "name": line.name, "label": f"{line.name}: {y:.3g}× at {tick_label(x)}"}
        for line in lines
        for x, y in line.points
    ]
    # One look for each in every figure, also where others are missing.
    looks = [(line.name, *look) for line, look in zip(lines, LOOKS, strict=False) if line.points]
    names, colours, markers = (list(column) for column in zip(*looks, strict=True))
    # The line at 1 always shows, and its label below it, where the slower ones' lines do not come.
    ticks = round_values([1.0, *(y for _, y in points)])
    heights = [0.75, *ticks, *(y for _, y in points)]
    x = alt.X("x:Q", title=axes.x).scale(type="log", nice=False, padding=20)
    y = alt.Y("y:Q", title=axes.y).scale(
        type="log", nice=False, domain=[min(heights), max(heights)]
    )
    hue = alt.Color("name:N").scale(domain=names, range=colours)
    shape = alt.Shape("name:N").scale(domain=names, range=markers)
    chart = alt.Chart(alt.InlineData(rows)).encode(
        x.axis(values=sorted({x for x, _ in points}), labelExpr=X_LABEL, grid=False),
        y.axis(values=ticks, labelExpr="format(datum.value, '~g') + '×'"),
        hue.legend(orient="top", title=None),
    )
    unit = alt.Chart(alt.InlineData([{"at": 1, "label": axes.unit_line}])).encode(y="at:Q")
    figure = alt.layer(
        unit.mark_rule(strokeDash=[5, 4], color="#52606d"),
        unit.mark_text(align="right", dx=-4, dy=10).encode(alt.XValue("width"), text="label:N"),
        chart.mark_line(),
        chart.mark_point(filled=True, size=60, opacity=1).encode(shape, description="label:N"),
        title=alt.Title(axes.title, subtitle=axes.subtitle, anchor="start"),
        background="white",
        width=560,
        height=300,
    )
    svg = io.StringIO()
    figure.save(svg, format="svg")
    return svg.getvalue()


def tick_label(value: float) -> str:
    """Return a number as people write it: `0.5`, `32`, `131,072`."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


NUMBERS = "scaling.json"
X_TITLES = {
    "d_sae": "latents (d_sae)",
    "l0": "L0 (active features per token)",
    "saes": "SAEs that learn at once",
}
FILES = {"d_sae": "scaling-width.svg", "l0": "scaling-l0.svg", "saes": "scaling-saes.svg"}
# Rows that are drawn, and what they are called where colours are few.
DRAWN = {
    OURS: "ours",
    "SAELens SAETrainer.step": "SAELens",
    "dictionary_learning update": "dictionary_learning",
    "gradients alone: autograd": "autograd, gradients alone",
}

Point = dict[str, Any]


def bench_curves(flags: Curves, say: Say) -> list[Path]:
    """Measure every point that is not known yet, draw the curves, and return the files written.

    Raises:
        InputError: for flags that cannot be, a folder that is not there or cannot be written, a
            scaling.json that is something else, or too little memory.
    """
    flags.check()
    if not flags.folder.is_dir():
        raise InputError(f"--folder: expected a folder, found none at {flags.folder}")
    numbers = flags.folder / NUMBERS
    machine = machine_facts(threads=flags.threads or torch.get_num_threads(), device=flags.device)
    known = [] if flags.fresh else read_points(numbers)
    curves: dict[str, list[Point]] = {}
    for name, steps in flags.steps().items():
        curves[name] = []
        for step in steps:
            point = find_point(known, step, machine)
            if point is None:
                say(f"{name} {getattr(step, name):g}")
                point = bench_step(step, say).json()
                known.append(point)
                write_json(numbers, {"points": known})
            curves[name].append(point)
    written = [numbers]
    for name, points in curves.items():
        written.append(flags.folder / FILES[name])
        _write_text(written[-1], draw(name, points))
    return written


def read_points(path: Path) -> list[Point]:
    """Return the points of a scaling.json; none if there is no such file.

    Raises:
        InputError: if it is something else.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    points = found.get("points") if isinstance(found, dict) else None
    if not isinstance(points, list) or not all(
        isinstance(point, dict) and {"settings", "machine", "rows"} <= point.keys()
        for point in points
    ):
        raise InputError(
            f"expected points of an earlier run in {path}, got something else; "
            "begin anew with --fresh"
        )
    return points


def find_point(known: list[Point], step: Step, machine: dict[str, Any]) -> Point | None:
    """Return the point that was measured with these settings on this machine, if one was."""
    for point in known:
        same = all(getattr(step, name) == value for name, value in point["settings"].items())
        if same and point["machine"] == machine:
            return point
    return None


def draw(name: str, points: list[Point]) -> str:
    """Return the figure of one curve: time of a step, in encoder products, over `name`."""
    lines = []
    for row_name, shown in DRAWN.items():
        found = [
            (float(point["settings"][name]), float(row["ratio"]))
            for point in points
            for row in point["rows"]
            if row["name"] == row_name
        ]
        # One colour for each in every figure, also where others are missing.
        lines.append(Line(shown, tuple(found)))
    fixed = points[0]["settings"]
    others = {"batch": "batch", "d_in": "d_in", "d_sae": "d_sae", "l0": "L0"}
    shape = ", ".join(f"{label} {fixed[key]:g}" for key, label in others.items() if key != name)
    machine = machine_line(points[0]["machine"]).partition(";")[0]
    each = " for each SAE" if name == "saes" else ""
    return line_chart(
        lines,
        Axes(
            title=f"Time of a Gated training step{each}",
            subtitle=f"{shape}, float32; {machine}",
            x=X_TITLES[name],
            y=f"time{each}, in encoder products",
            unit_line=f"one {PRODUCT}",
        ),
    )


def _write_text(path: Path, text: str) -> None:
    def write(sibling: Path) -> None:
        sibling.write_text(text, encoding="utf-8")

    replace_durably(path, write, n_bytes=len(text.encode("utf-8")))
