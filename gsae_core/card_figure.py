"""The sparsity-fidelity plane as an SVG file that needs nothing else, for a card on the Hub.

Written by hand because the chart libraries here write pictures only through a browser. It follows
the reader's light or dark theme, also where a page shows it as an image.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gsae_core.analysis.pareto import Point, frontier
from gsae_core.config import Architecture
from gsae_core.plots.palette import AXES, LOOKS, round_values

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 62, 56

# Hues for a light and for a dark page.
HUES = {
    "gated": ("#0072B2", "#56B4E9"),
    "relu": ("#D55E00", "#F0883E"),
    "jumprelu": ("#00795A", "#2EC4A0"),
    "topk": ("#B0568A", "#E39CC4"),
}


def pareto_svg(rows: Sequence[Mapping[str, Any]], *, chosen: Sequence[str], title: str) -> str:
    """Return L0 against loss recovered of a run's SAEs, with a frontier for each architecture.

    Args:
        rows: of evals.json; those without both numbers are left out.
        chosen: names of the SAEs that get a ring.

    Raises:
        ValueError: if no row has both numbers, L0 above 0.
    """
    placed = [row for row in rows if _is_placed(row)]
    if not placed:
        raise ValueError("expected an SAE with an L0 above 0 and a loss recovered, got none")
    x = _Axis([float(row["l0"]) for row in placed], LEFT, WIDTH - RIGHT, log=True)
    y = _Axis([100 * row["loss_recovered"] for row in placed], HEIGHT - BOTTOM, TOP, log=False)
    kinds: list[Architecture] = [
        kind for kind in LOOKS if any(row["architecture"] == kind for row in placed)
    ]
    parts = [_head(title), *_grid(x, y), *_legend(kinds)]
    for kind in kinds:
        parts += _series([row for row in placed if row["architecture"] == kind], kind, x, y, chosen)
    return "\n".join([*parts, "</svg>", ""])


def _is_placed(row: Mapping[str, Any]) -> bool:
    numbers = (row["l0"], row["loss_recovered"])
    return all(n is not None and math.isfinite(n) for n in numbers) and row["l0"] > 0


class _Axis:
    """From numbers to places along one side of the picture."""

    def __init__(self, values: Sequence[float], start: int, end: int, *, log: bool) -> None:
        self.start, self.end, self.log = start, end, log
        spread = [math.log(v) for v in values] if log else list(values)
        pad = 0.08 * (max(spread) - min(spread)) or (0.5 if log else 1.0)
        self.low, self.high = min(spread) - pad, max(spread) + pad
        self.ticks = self._ticks(values)

    def at(self, value: float) -> float:
        position = math.log(value) if self.log else value
        share = (position - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _ticks(self, values: Sequence[float]) -> list[float]:
        if self.log:
            inside = (t for t in round_values(values) if self.low <= math.log(t) <= self.high)
            return list(inside)
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        while (self.high - self.low) / step > 6:
            step *= 2
        while (self.high - self.low) / step < 3:
            step /= 2
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def _head(title: str) -> str:
    light = "".join(f".{kind}{{--hue:{hues[0]}}}" for kind, hues in HUES.items())
    dark = "".join(f".{kind}{{--hue:{hues[1]}}}" for kind, hues in HUES.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">
<title id="title">{escape(title)}: loss recovered against L0</title>
<style>
svg{{--ink:#1f2933;--soft:#52606d;--grid:#d9dee4;font-family:system-ui,sans-serif;font-size:12px}}
{light}
@media (prefers-color-scheme:dark){{svg{{--ink:#e6e9ed;--soft:#a9b2bc;--grid:#39424d}}{dark}}}
text{{fill:var(--soft)}} .title{{fill:var(--ink);font-size:15px;font-weight:600}}
.grid{{stroke:var(--grid)}} .line{{fill:none;stroke:var(--hue);stroke-width:2}}
.mark{{fill:var(--hue)}} .ring{{fill:none;stroke:var(--ink);stroke-width:1.5}}
.name{{fill:var(--ink)}}
</style>
<text class="title" x="{LEFT}" y="24">{escape(title)}</text>"""


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = f"{tick:.6g} %"
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        )
        parts.append(f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>')
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(AXES['l0'])}, logarithmic</text>",
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(AXES['loss_recovered'])}</text>",
    ]


def _legend(kinds: Sequence[Architecture]) -> list[str]:
    parts, x = [], LEFT + 6.0
    for kind in kinds:
        label = LOOKS[kind].label
        parts.append(_mark(kind, x, 43.0))
        parts.append(f'<text class="name" x="{x + 10:.0f}" y="47">{escape(label)}</text>')
        # No font is at hand to measure with; 6.6 px a letter is generous for system fonts.
        x += 34 + 6.6 * len(label)
    return parts


def _series(
    rows: Sequence[Mapping[str, Any]], kind: Architecture, x: _Axis, y: _Axis, chosen: Sequence[str]
) -> list[str]:
    points = [Point(float(r["l0"]), 100 * float(r["loss_recovered"]), r["name"]) for r in rows]
    best = " ".join(f"{x.at(p.l0):.1f},{y.at(p.loss_recovered):.1f}" for p in frontier(points))
    dash = ",".join(str(n) for n in LOOKS[kind].dash) if LOOKS[kind].dash != (1, 0) else "none"
    parts = [f'<polyline class="line {kind}" stroke-dasharray="{dash}" points="{best}"/>']
    for point in points:
        left, top = x.at(point.l0), y.at(point.loss_recovered)
        told = f"{point.name}: L0 {point.l0:.3g}, {point.loss_recovered:.2f} % recovered"
        parts.append(_mark(kind, left, top, f"<title>{escape(told)}</title>"))
        if point.name in chosen:
            parts.append(f'<circle class="ring" cx="{left:.1f}" cy="{top:.1f}" r="9"/>')
    return parts


def _mark(kind: Architecture, x: float, y: float, inner: str = "") -> str:
    match kind:
        case "gated":
            shape, where = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
        case "topk":
            shape, where = "rect", f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        case "relu":
            shape, where = (
                "polygon",
                _corners(x, y, ((0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0))),
            )
        case _:
            shape, where = "polygon", _corners(x, y, ((0.0, -5.5), (5.0, 4.0), (-5.0, 4.0)))
    return f'<{shape} class="mark {kind}" {where}>{inner}</{shape}>'


def _corners(x: float, y: float, offsets: Sequence[tuple[float, float]]) -> str:
    return 'points="' + " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in offsets) + '"'
