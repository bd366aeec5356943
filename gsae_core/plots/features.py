"""Figures of features, in Vega-Lite: how often they fire, and how strongly.

A specification does not change with the feature: its rows do, so that going on to the next feature
hands new rows to the chart that is there.
"""

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from gsae_core.config import Architecture
from gsae_core.plots.live import LiveChart
from gsae_core.plots.palette import LOOKS, NEUTRAL, Theme

if TYPE_CHECKING:
    from gsae_core.analysis.features.index import Feature, Histogram

BINS_A_DECADE = 5
POWERS = "['1','10⁻¹','10⁻²','10⁻³','10⁻⁴','10⁻⁵','10⁻⁶','10⁻⁷','10⁻⁸','10⁻⁹']"
RED = {"light": "#D55E00", "dark": "#f08a3c"}


def hue(architecture: Architecture, theme: Theme) -> str:
    """Return the colour an architecture's marks have on a page: lighter on a dark one."""
    dark: dict[Architecture, str] = {"gated": "#56B4E9", "relu": "#f08a3c", "jumprelu": "#2bbf95"}
    return (
        dark.get(architecture, LOOKS[architecture].colour)
        if theme == "dark"
        else LOOKS[architecture].colour
    )


def density_histogram(
    density: Float[np.ndarray, " d_sae"],
    kept: Bool[np.ndarray, " d_sae"],
    *,
    theme: Theme,
    architecture: Architecture = "gated",
) -> LiveChart:
    """Return how many features fire how often, on a log axis; those kept by filters stand out.

    A bar that is clicked is the selection `bar`, with its ends `low` and `high`. Dead features have
    no place on a log axis and are left out.
    """
    fires = np.isfinite(density) & (density > 0)
    logs = np.log10(density[fires]) * BINS_A_DECADE
    numbers = np.minimum(np.floor(logs + 1e-9), -1).astype(np.int64)
    rows = []
    for number in range(int(numbers.min(initial=-1)), 0):
        here = numbers == number
        low, high = (10.0 ** (end / BINS_A_DECADE) for end in (number, number + 1))
        rows.append((low, high, int(here.sum()), int((here & kept[fires]).sum())))
    data = pd.DataFrame(rows, columns=["low", "high", "n", "kept"])
    return LiveChart.of(_density_spec(hue(architecture, theme)), data)


@functools.lru_cache(maxsize=16)
def _density_spec(colour: str) -> dict[str, Any]:
    axis = {
        "values": [10.0**-i for i in range(10)],
        "labelExpr": f"{POWERS}[-round(log(datum.value) / LN10)]",
        "grid": False,
    }
    x = {
        "field": "low",
        "type": "quantitative",
        "title": "density: share of tokens (10⁻⁴ is 1 in 10 000)",
        "scale": {"type": "log", "nice": False},
        "axis": axis,
    }
    tooltip = [
        {"field": "low", "title": "density from", "format": ".2~g"},
        {"field": "high", "title": "to", "format": ".2~g"},
        {"field": "n", "title": "features", "format": ","},
        {"field": "kept", "title": "shown in the list", "format": ","},
    ]

    def bars(field: str, fill: str) -> dict[str, Any]:
        y = {"field": field, "type": "quantitative", "title": "features", "axis": {"tickCount": 3}}
        return {
            "mark": {"type": "rect", "color": fill, "stroke": "transparent", "cursor": "pointer"},
            "encoding": {
                "x": x,
                "x2": {"field": "high"},
                "y": y,
                "y2": {"datum": 0},
                "tooltip": tooltip,
            },
        }

    below = bars("n", NEUTRAL)
    below["mark"]["opacity"] = 0.45
    above = bars("kept", colour)
    above["params"] = [{"name": "bar", "select": {"type": "point", "fields": ["low", "high"]}}]
    # What lies under a bar's full height can be clicked too: a short bar is hard to hit.
    hit = bars("n", "transparent")
    return {"height": 165, "padding": 0, "layer": [below, above, hit]}


def activation_histogram(
    histogram: "Histogram",
    *,
    theta: float,
    theme: Theme,
    architecture: Architecture = "gated",
    name: str = "value of the feature",
) -> LiveChart:
    """Return how often a feature fires how strongly, with a rule at theta.

    Nothing lies between 0 and theta: that empty band is the jump. Heights are on a square-root
    scale, so that rare strong firings are seen beside many weak ones.
    """
    data = pd.DataFrame(
        {
            "low": histogram.edges[:-1],
            "high": histogram.edges[1:],
            "count": histogram.counts.astype(np.int64),
        }
    )
    shown = math.isfinite(theta) and 0 < theta <= float(histogram.edges[-1])
    # Of one row: the band and its rule are drawn once.
    data["theta"] = [theta if shown else math.nan, *[math.nan] * (len(data) - 1)]
    return LiveChart.of(_activation_spec(hue(architecture, theme), RED[theme], name), data)


@functools.lru_cache(maxsize=16)
def _activation_spec(colour: str, red: str, name: str) -> dict[str, Any]:
    x: dict[str, Any] = {
        "type": "quantitative",
        "scale": {"nice": False, "domainMin": 0},
        "axis": {"tickCount": 5, "format": ".3~r", "grid": False},
        "title": name,
    }
    y = {
        "field": "count",
        "type": "quantitative",
        "title": "tokens (√ scale)",
        "scale": {"type": "sqrt"},
        "axis": {"tickCount": 4, "format": "~s"},
    }
    tooltip = [
        {"field": "low", "title": "from", "format": ".3~g"},
        {"field": "high", "title": "to", "format": ".3~g"},
        {"field": "count", "title": "tokens", "format": ","},
    ]
    one = [{"filter": "isValid(datum.theta)"}]
    at = {**x, "field": "theta"}
    return {
        "height": 235,
        "padding": 0,
        "layer": [
            {
                "transform": [*one, {"calculate": "0", "as": "zero"}],
                "mark": {"type": "rect", "color": red, "opacity": 0.14},
                "encoding": {"x": {**x, "field": "zero"}, "x2": {"field": "theta"}},
            },
            {
                "mark": {"type": "rect", "color": colour, "opacity": 0.9},
                "encoding": {
                    "x": {**x, "field": "low"},
                    "x2": {"field": "high"},
                    "y": y,
                    "y2": {"datum": 0},
                    "tooltip": tooltip,
                },
            },
            {
                "transform": one,
                "mark": {"type": "rule", "color": red, "strokeWidth": 2},
                "encoding": {
                    "x": at,
                    "tooltip": [{"field": "theta", "title": "θ", "format": ".3~g"}],
                },
            },
            {
                "transform": one,
                "mark": {
                    "type": "text",
                    "text": "θ",
                    "color": red,
                    "fontSize": 15,
                    "fontWeight": "bold",
                    "align": "left",
                    "baseline": "top",
                    "dx": 5,
                },
                "encoding": {"x": at, "y": {"value": 0}},
            },
        ],
    }


def histogram_table(histogram: "Histogram") -> pd.DataFrame:
    """Return what `activation_histogram` draws: the ends of each bin, and its tokens."""
    ends = {"from": histogram.edges[:-1], "to": histogram.edges[1:]}
    return pd.DataFrame(ends | {"tokens": histogram.counts})


DOTS = 120
"""Tokens drawn in the plane of gate and magnitude; more hide each other."""

Region = Literal["silent", "vetoed", "open", "fires"]


def gate_plane(feature: "Feature", *, theme: Theme) -> LiveChart | None:
    """Return a feature's tokens in the plane of its gate and its magnitude, with its four regions.

    All tokens of one feature lie on one line, pi_mag = exp(r_mag) (pi_gate - b_gate) + b_mag; it
    crosses the gate's opening at theta. The feature's value is pi_mag where both are above 0.

    Returns:
        None where no gate is tied to a magnitude, as in a baseline.
    """
    line = feature.gate_line(DOTS)
    if line.empty:
        return None
    row = feature.stats
    gain, b_gate, b_mag = (float(row[name]) for name in ("gain", "b_gate", "b_mag"))
    cross = b_mag - gain * b_gate
    right = max(float(line["pi_gate"].to_numpy().max()), 1e-9) * 1.05
    left = min(-0.45 * right, float(line["pi_gate"].to_numpy().min()))
    left = min(left, -1.15 * cross / gain) if 0 < cross < gain * right else left
    ends = [(x, gain * x + cross) for x in (left, right)]
    top = max(ends[1][1], 1e-9) * 1.08
    bottom = min(-0.3 * top, ends[0][1])
    counts = _regions(row)
    rows = [
        {"kind": "region", "x": x, "x2": x2, "y": y, "y2": y2, "region": name, "said": said}
        for name, x, x2, y, y2, said in (
            ("vetoed", left, 0.0, 0.0, top, "gate closed"),
            ("fires", 0.0, right, 0.0, top, f"fires: {counts['fires']:,}"),
            ("silent", left, 0.0, bottom, 0.0, "both closed"),
            ("open", 0.0, right, bottom, 0.0, f"gate open in vain: {counts['open']:,}"),
        )
    ]
    rows += [{"kind": "line", "x": x, "y": y} for x, y in ends]
    begin = max(0.0, -cross / gain)
    rows += [{"kind": "value", "x": x, "y": gain * x + cross} for x in (begin, right)]
    rows += [{"kind": "theta", "x": 0.0, "y": cross}] if cross > 0 else []
    fired = line["f"] > 0
    dots = line.rename(columns={"pi_gate": "x", "pi_mag": "y"})
    dots["kind"] = np.where(fired, "dot", "miss")
    columns = ["kind", "x", "x2", "y", "y2", "region", "said", "f"]
    data = pd.concat([pd.DataFrame(rows), dots], ignore_index=True).reindex(columns=columns)
    return LiveChart.of(_plane_spec(hue("gated", theme), RED[theme]), data)


def _regions(row: Mapping[str, Any]) -> dict[Region, int]:
    fired, opened = int(row["fired"]), int(row["gate_open"])
    return {"fires": fired, "open": opened - fired}


@functools.lru_cache(maxsize=8)
def _plane_spec(colour: str, red: str) -> dict[str, Any]:
    def quantity(field: str, title: str) -> dict[str, Any]:
        return {
            "field": field,
            "type": "quantitative",
            "title": title,
            "scale": {"nice": False, "zero": True},
            "axis": {"tickCount": 5, "format": ".3~r", "grid": False},
        }

    x, y = quantity("x", "gate π_gate: open above 0"), quantity("y", "magnitude π_mag")
    both = {"x": x, "y": y}

    def only(kind: str) -> list[dict[str, str]]:
        return [{"filter": f"datum.kind == '{kind}'"}]

    def dots(kind: str, mark: dict[str, Any], says: str) -> dict[str, Any]:
        tooltip = [
            {"field": "x", "title": "π_gate", "format": ".3~g"},
            {"field": "y", "title": "π_mag", "format": ".3~g"},
            {"field": "f", "title": says, "format": ".3~g"},
        ]
        shape = {"type": "point", "size": 28, **mark}
        return {"transform": only(kind), "mark": shape, "encoding": {**both, "tooltip": tooltip}}

    fills = {
        "domain": ["silent", "vetoed", "open", "fires"],
        "range": ["transparent", red, NEUTRAL, colour],
    }
    region = {
        "transform": only("region"),
        "mark": {"type": "rect", "opacity": 0.1},
        "encoding": {
            **both,
            "x2": {"field": "x2"},
            "y2": {"field": "y2"},
            "color": {"field": "region", "type": "nominal", "scale": fills, "legend": None},
        },
    }
    rule = {"type": "rule", "color": NEUTRAL, "strokeWidth": 1}
    layers = [
        region,
        {"mark": rule, "encoding": {"x": {"datum": 0, "type": "quantitative"}}},
        {"mark": rule, "encoding": {"y": {"datum": 0, "type": "quantitative"}}},
        _said(only("region"), "vetoed", "left", "top", both),
        _said(only("region"), "fires", "right", "bottom", both),
        _said(only("region"), "silent", "right", "bottom", both),
        _said(only("region"), "open", "right", "bottom", both),
        {
            "transform": only("line"),
            "mark": {"type": "line", "color": NEUTRAL, "strokeDash": [4, 3]},
            "encoding": both,
        },
        {
            "transform": only("value"),
            "mark": {"type": "line", "color": colour, "strokeWidth": 2.5},
            "encoding": both,
        },
        dots("miss", {"color": NEUTRAL, "filled": False, "opacity": 0.7}, "value"),
        dots("dot", {"color": colour, "filled": True, "opacity": 0.55}, "value"),
        {
            "transform": only("theta"),
            "mark": {"type": "text", "text": "θ", "color": red, "fontSize": 15}
            | {"fontWeight": "bold", "align": "right", "baseline": "bottom", "dx": -6, "dy": -2},
            "encoding": both,
        },
        {
            "transform": only("theta"),
            "mark": {"type": "point", "color": red, "filled": True, "size": 60, "opacity": 1},
            "encoding": {**both, "tooltip": [{"field": "y", "title": "θ", "format": ".3~g"}]},
        },
    ]
    return {"height": 235, "padding": 0, "layer": layers}


def _said(
    rows: list[dict[str, str]], region: Region, align: str, baseline: str, both: dict[str, Any]
) -> dict[str, Any]:
    """Return the words of one region, in its outer corner."""
    right, top = align == "right", baseline == "top"
    field = {"x": "x2" if right else "x", "y": "y2" if region in ("vetoed",) else "y"}
    mark = {
        "type": "text",
        "align": align,
        "baseline": baseline,
        "lineBreak": "\n",
        "fontSize": 11,
        "lineHeight": 13,
        "dx": -4 if right else 4,
        "dy": 4 if top else -4,
        "color": NEUTRAL,
    }
    return {
        "transform": [*rows, {"filter": f"datum.region == '{region}'"}],
        "mark": mark,
        "encoding": {
            "x": {**both["x"], "field": field["x"]},
            "y": {**both["y"], "field": field["y"]},
            "text": {"field": "said"},
        },
    }
