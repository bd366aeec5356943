"""Figures of features, in Vega-Lite: how often they fire, and how strongly.

A specification does not change with the feature: its rows do, so that going on to the next feature
hands new rows to the chart that is there.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from gsae_core.config import Architecture
from gsae_core.plots.live import LiveChart
from gsae_core.plots.palette import LOOKS, NEUTRAL, Theme

if TYPE_CHECKING:
    from gsae_core.analysis.feature import Histogram

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
