"""`bench curves`: how a step's time grows, point by point into scaling.json, and as figures."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.flags import Curves, Step
from benchmarks.harness import Say
from benchmarks.step import OURS, PRODUCT, bench_step
from benchmarks.table import machine_facts, machine_line
from gsae_core.errors import InputError
from gsae_core.files import replace_durably, write_json
from gsae_core.plots.palette import round_values

WIDTH, HEIGHT = 680, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 86, 58

# Okabe-Ito hues, for a light and for a dark page; markers tell the lines apart without them.
COLOURS = (
    ("#0072B2", "#56B4E9"),
    ("#D55E00", "#F0883E"),
    ("#009E73", "#2EC4A0"),
    ("#6B7280", "#9CA3AF"),
)
MARKERS = ("circle", "square", "diamond", "triangle")


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
    if not points or len(lines) > len(COLOURS):
        raise ValueError(f"expected 1 to {len(COLOURS)} lines with points, got {len(lines)}")
    if any(value <= 0 for point in points for value in point):
        raise ValueError("expected coordinates above 0, got others; the axes are logarithmic")
    frame = _Frame(points)
    parts = [_head(axes), *_grid(frame, axes)]
    for i, line in enumerate(lines):
        parts += _series(frame, line, i) if line.points else []
    parts += _legend(lines)
    return "\n".join([*parts, "</svg>", ""])


class _Frame:
    """From data to places in the picture."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.x_ticks = sorted({x for x, _ in points})
        # The line at 1 always shows.
        values = [1.0, *(y for _, y in points)]
        self.y_ticks = round_values(values)
        self._x = _range(self.x_ticks, margin=0.04)
        # Its label stands below it, where the lines of those who are slower do not come.
        self._y = _range([*values, *self.y_ticks, 0.75], margin=0.03)

    def x(self, value: float) -> float:
        return LEFT + _share(value, self._x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self._y) * (HEIGHT - TOP - BOTTOM)


def _range(values: Sequence[float], *, margin: float) -> tuple[float, float]:
    low, high = math.log(min(values)), math.log(max(values))
    pad = margin * (high - low) or 0.5
    return low - pad, high + pad


def _share(value: float, limits: tuple[float, float]) -> float:
    return (math.log(value) - limits[0]) / (limits[1] - limits[0])


def _head(axes: Axes) -> str:
    hues = "".join(f".s{i}{{--hue:{light}}}" for i, (light, _) in enumerate(COLOURS))
    dark = "".join(f".s{i}{{--hue:{hue}}}" for i, (_, hue) in enumerate(COLOURS))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">
<title id="title">{escape(axes.title)}: {escape(axes.subtitle)}</title>
<style>
svg{{--ink:#1f2933;--soft:#52606d;--grid:#d9dee4;font-family:system-ui,sans-serif;font-size:12px}}
{hues}
@media (prefers-color-scheme:dark){{svg{{--ink:#e6e9ed;--soft:#a9b2bc;--grid:#39424d}}{dark}}}
text{{fill:var(--soft)}} .title{{fill:var(--ink);font-size:15px;font-weight:600}}
.grid{{stroke:var(--grid)}} .unit{{stroke:var(--soft);stroke-dasharray:5 4}}
.line{{fill:none;stroke:var(--hue);stroke-width:2}} .mark{{fill:var(--hue)}}
.name{{fill:var(--ink)}}
</style>
<text class="title" x="{LEFT}" y="24">{escape(axes.title)}</text>
<text x="{LEFT}" y="43">{escape(axes.subtitle)}</text>"""


def _grid(frame: _Frame, axes: Axes) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}×</text>')
    for tick in frame.x_ticks:
        x = frame.x(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    one = frame.y(1.0)
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<line class="unit" x1="{LEFT}" x2="{right}" y1="{one:.1f}" y2="{one:.1f}"/>',
        f'<text x="{right - 4}" y="{one + 14:.1f}" text-anchor="end">'
        f"{escape(axes.unit_line)}</text>",
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
        f"{escape(axes.x)}</text>",
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y)}</text>",
    ]


def tick_label(value: float) -> str:
    """Return a number as people write it: `0.5`, `32`, `131,072`."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _series(frame: _Frame, line: Line, i: int) -> list[str]:
    places = [(frame.x(x), frame.y(y)) for x, y in sorted(line.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line s{i}" points="{path}"/>']
    for (x, y), (left, top) in zip(sorted(line.points), places, strict=True):
        told = f"<title>{escape(line.name)}: {y:.3g}× at {tick_label(x)}</title>"
        parts.append(_mark(i, left, top, told))
    return parts


def _mark(i: int, x: float, y: float, inner: str = "") -> str:
    match MARKERS[i]:
        case "circle":
            shape, where = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
        case "square":
            shape, where = "rect", f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        case "diamond":
            corners = ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0))
            shape, where = "polygon", _corners(x, y, corners)
        case _:
            shape, where = "polygon", _corners(x, y, ((0, -5.5), (5, 4), (-5, 4)))
    return f'<{shape} class="mark s{i}" {where}>{inner}</{shape}>'


def _corners(x: float, y: float, offsets: Sequence[tuple[float, float]]) -> str:
    return 'points="' + " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in offsets) + '"'


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, x = [], LEFT + 6.0
    for i, line in enumerate(lines):
        if not line.points:
            continue
        parts.append(_mark(i, x, 64.0))
        parts.append(f'<text class="name" x="{x + 10:.0f}" y="68">{escape(line.name)}</text>')
        # No font is at hand to measure with; 6.6 px a letter is generous for system fonts.
        x += 34 + 6.6 * len(line.name)
    return parts


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
    shape = ", ".join(f"{said} {fixed[key]:g}" for key, said in others.items() if key != name)
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
