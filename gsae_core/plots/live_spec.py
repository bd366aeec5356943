"""The specifications of charts of a run that still moves, in Vega-Lite: without data."""

import functools
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from gsae_core.plots.palette import AXES, log_ticks

XAxis = Literal["tokens", "step", "seconds"]

PERCENT = ("dead_gate", "dead_magnitude")
TITLES = {
    "loss": "loss (Eq. 8)",
    "reconstruction": "squared error",
    "sparsity_loss": "sparsity penalty",
    "auxiliary": "auxiliary error",
    "l0": "L0",
    "fvu": "FVU",
    "gamma": "γ of the output",
    "gamma_gate": "γ of the gate path",
    "dead_gate": "dead: gate never opens",
    "dead_magnitude": "dead: gate opens, silent",
    "lr": "learning rate",
}
"""Short enough for a third of a narrow window; tooltips have the long ones."""


class Line(NamedTuple):
    """One SAE of one run, and how all charts draw it."""

    run: str
    sae: str
    label: str
    colour: str
    dash: tuple[int, ...]
    shape: str
    """Vega's name of its marker."""


def shared(lines: Sequence[Line], title: str) -> dict[str, Any]:
    """Return what every live chart's specification begins with."""
    names = json.dumps([line.label for line in lines])
    return {
        "title": {"text": title, "anchor": "start", "fontSize": 13, "fontWeight": "normal"},
        "height": 240,
        "padding": {"left": 0, "right": 4, "top": 0, "bottom": 0},
        "transform": [{"calculate": f"{names}[datum.line]", "as": "SAE"}],
    }


def series_scale(lines: Sequence[Line], trait: str) -> dict[str, Any]:
    """Return the scale from a line's number to its colour, dash or shape."""
    values = [list(v) if isinstance(v := getattr(line, trait), tuple) else v for line in lines]
    return {"domain": list(range(len(lines))), "range": values}


@functools.lru_cache(maxsize=256)
def line_spec(
    lines: tuple[Line, ...],
    column: str,
    x: XAxis,
    smooth: bool,
    log: bool,
    rule: float | None,
    top: float | None,
) -> dict[str, Any]:
    form = "~%" if column in PERCENT else "~g"
    scale: dict[str, Any] = {"type": "log", "nice": False} if log else {"zero": False}
    if top is not None:
        scale = {"domain": [0, top], "nice": False}
    axis = {"format": form, **({"values": log_ticks("y")} if log else {"tickCount": 5})}
    encoding = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": AXES[x],
            "axis": {"format": "~s", "tickCount": 5, "grid": False},
            "scale": {"nice": False},
        },
        "color": {"field": "line", "type": "nominal", "scale": series_scale(lines, "colour")},
        "strokeDash": {"field": "line", "type": "nominal", "scale": series_scale(lines, "dash")},
        "tooltip": [
            {"field": "SAE", "type": "nominal"},
            {"field": "x", "type": "quantitative", "title": AXES[x], "format": ",.6~g"},
            {"field": "raw", "type": "quantitative", "title": AXES[column], "format": ".4~g"},
        ],
    }
    for channel in ("color", "strokeDash"):
        encoding[channel]["legend"] = None  # one legend serves all charts of a page

    def y(field: str) -> dict[str, Any]:
        return {"field": field, "type": "quantitative", "title": None, "scale": scale, "axis": axis}

    zoom = {
        "name": "zoom",
        "select": {"type": "interval", "encodings": ["x"]},
        "bind": "scales",
    }
    mark = {"type": "line", "strokeWidth": 2, "clip": True}
    main = {"mark": mark, "params": [zoom], "encoding": {**encoding, "y": y("raw")}}
    layers = [main]
    if smooth:
        main["encoding"]["y"] = y("value")
        faint = {**mark, "strokeWidth": 1, "opacity": 0.25}
        layers.insert(0, {"mark": faint, "encoding": {**encoding, "y": y("raw")}})
    if rule is not None:
        ruler = {"type": "rule", "strokeDash": [2, 2], "opacity": 0.6, "color": "#7d8894"}
        layers.insert(0, {"mark": ruler, "encoding": {"y": {"datum": rule}}})
    if column in PERCENT:
        # Where nothing is dead the axis would have no length: it reaches a percent at least.
        unseen = {"type": "rule", "opacity": 0}
        layers += [{"mark": unseen, "encoding": {"y": {"datum": end}}} for end in (0, 0.01)]
    return {**shared(lines, TITLES[column]), "layer": layers}
