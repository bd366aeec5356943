"""Figures of features, in Altair: how often they fire, and how strongly.

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
from gsae_core.errors import extra
from gsae_core.plots.live import LiveChart, spec_of, tooltips
from gsae_core.plots.palette import LOOKS, NEUTRAL, Theme

if TYPE_CHECKING:
    from gsae_core.analysis.features.feature import Feature, Histogram

with extra("app"):
    import altair as alt

BINS_A_DECADE = 5
POWERS = "['1','10⁻¹','10⁻²','10⁻³','10⁻⁴','10⁻⁵','10⁻⁶','10⁻⁷','10⁻⁸','10⁻⁹']"
RED = {"light": "#D55E00", "dark": "#f08a3c"}
THETA: dict[str, Any] = {"text": "θ", "fontSize": 15, "fontWeight": "bold"}
DOTS = 120  # tokens drawn in the plane of gate and magnitude: more hide each other


def hue(architecture: Architecture, theme: Theme) -> str:
    """Return the colour of an architecture's marks on a page: lighter on a dark one."""
    look = LOOKS[architecture]
    return look.dark if theme == "dark" else look.colour


def _bars(x: alt.X, y: alt.Y, tooltip: list[alt.Tooltip], **mark: Any) -> alt.Chart:
    """Return bars from `x` to the column `high`, which stand on 0."""
    chart = alt.Chart().mark_rect(**mark)
    return chart.encode(x, alt.X2("high"), y, alt.Y2Datum(0), tooltip=tooltip)


def density_histogram(
    density: Float[np.ndarray, " d_sae"],
    kept: Bool[np.ndarray, " d_sae"],
    *,
    theme: Theme,
    architecture: Architecture = "gated",
    unit: str = "token",
) -> LiveChart:
    """Return how many features fire how often, on a log axis; those kept by filters stand out.

    A bar that is clicked is the selection `bar`, with its ends `low` and `high`. Dead features have
    no place on a log axis and are left out.
    """
    fires = np.isfinite(density) & (density > 0)
    logs = np.log10(density[fires]) * BINS_A_DECADE
    numbers = np.minimum(np.floor(logs + 1e-9), -1).astype(np.int64)
    first = int(numbers.min(initial=-1))
    ends = np.array([10.0 ** (number / BINS_A_DECADE) for number in range(first, 1)])
    n, n_kept = (
        np.bincount(here - first, minlength=-first) for here in (numbers, numbers[kept[fires]])
    )
    columns = {"low": ends[:-1], "high": ends[1:], "n": n, "kept": n_kept}
    return LiveChart(_density_spec(hue(architecture, theme), unit), columns)


@functools.lru_cache(maxsize=16)
def _density_spec(colour: str, unit: str) -> dict[str, Any]:
    x = alt.X(
        "low:Q",
        title=f"density: share of {unit}s (10⁻⁴ is 1 in 10 000)",
        scale=alt.Scale(type="log", nice=False),
    ).axis(
        values=[10.0**-i for i in range(10)],
        labelExpr=f"{POWERS}[-round(log(datum.value) / LN10)]",
        grid=False,
    )
    tooltip = tooltips(".2~g", low="density from", high="to")
    tooltip += tooltips(",", n="features", kept="shown in the list")

    def bars(field: str, fill: str, **mark: Any) -> alt.Chart:
        y = alt.Y(field, type="quantitative", title="features").axis(tickCount=3)
        return _bars(x, y, tooltip, color=fill, stroke="transparent", cursor="pointer", **mark)

    clicked = alt.selection_point(name="bar", fields=["low", "high"])
    below, above = bars("n", NEUTRAL, opacity=0.45), bars("kept", colour).add_params(clicked)
    # What lies under a bar's full height can be clicked too: a short bar is hard to hit.
    return spec_of([below, above, bars("n", "transparent")], height=165, padding=0)


def activation_histogram(
    histogram: "Histogram",
    *,
    theta: float,
    theme: Theme,
    architecture: Architecture = "gated",
    unit: str = "token",
) -> LiveChart:
    """Return how often a feature fires how strongly, with a rule at theta.

    Nothing lies between 0 and theta: that empty band is the jump. Heights are on a square-root
    scale, so that rare strong firings are seen beside many weak ones.
    """
    shown = math.isfinite(theta) and 0 < theta <= float(histogram.edges[-1])
    thetas = np.full(len(histogram.counts), math.nan)
    thetas[0] = theta if shown else math.nan  # in one row: the band and its rule are drawn once
    columns = {
        "low": histogram.edges[:-1],
        "high": histogram.edges[1:],
        "count": histogram.counts.astype(np.int64),
        "theta": thetas,
    }
    return LiveChart(_activation_spec(hue(architecture, theme), RED[theme], unit), columns)


@functools.lru_cache(maxsize=16)
def _activation_spec(colour: str, red: str, unit: str) -> dict[str, Any]:
    def x(field: str) -> alt.X:
        channel = alt.X(field, type="quantitative", title="value of the feature")
        return channel.scale(nice=False, domainMin=0).axis(tickCount=5, format=".3~r", grid=False)

    y = alt.Y("count:Q", title=f"{unit}s (√ scale)", scale=alt.Scale(type="sqrt"))
    y = y.axis(tickCount=4, format="~s")
    tooltip = tooltips(".3~g", low="from", high="to") + tooltips(",", count=f"{unit}s")
    theta = alt.Chart().transform_filter("isValid(datum.theta)")
    band = theta.transform_calculate(zero="0").mark_rect(color=red, opacity=0.14)
    rule = theta.mark_rule(color=red, strokeWidth=2)
    text = theta.mark_text(**THETA, color=red, align="left", baseline="top", dx=5)
    layers = [
        band.encode(x("zero"), alt.X2("theta")),
        _bars(x("low"), y, tooltip, color=colour, opacity=0.9),
        rule.encode(x("theta"), tooltip=tooltips(".3~g", theta="θ")),
        text.encode(x("theta"), y=alt.value(0)),
    ]
    return spec_of(layers, height=235, padding=0)


def histogram_table(histogram: "Histogram", *, unit: str = "token") -> pd.DataFrame:
    """Return what `activation_histogram` draws: the ends of each bin, and what is in it."""
    ends = {"from": histogram.edges[:-1], "to": histogram.edges[1:]}
    return pd.DataFrame(ends | {f"{unit}s": histogram.counts})


def gate_plane(feature: "Feature", *, theme: Theme) -> LiveChart | None:
    """Return a feature's tokens in the plane of its gate and its magnitude, with its four regions.

    All tokens of one feature lie on one line, pi_mag = exp(r_mag) (pi_gate - b_gate) + b_mag; it
    crosses the gate's opening at theta. The feature's value is pi_mag where both are above 0.
    None where no gate is tied to a magnitude, as in a baseline.
    """
    line = feature.gate_line(DOTS)
    if line.empty:
        return None
    row = feature.stats
    gain, b_gate, b_mag = (float(row[name]) for name in ("gain", "b_gate", "b_mag"))
    fired, opened = int(row["fired"]), int(row["gate_open"])
    cross = b_mag - gain * b_gate
    right = max(float(line["pi_gate"].to_numpy().max()), 1e-9) * 1.05
    left = min(-0.45 * right, float(line["pi_gate"].to_numpy().min()))
    left = min(left, -1.15 * cross / gain) if 0 < cross < gain * right else left
    ends = [(x, gain * x + cross) for x in (left, right)]
    top = max(ends[1][1], 1e-9) * 1.08
    bottom = min(-0.3 * top, ends[0][1])
    rows = [
        {"kind": "region", "x": x, "x2": x2, "y": y, "y2": y2, "region": name, "label": label}
        for name, x, x2, y, y2, label in (
            ("gate closed", left, 0.0, 0.0, top, "gate closed"),
            ("fires", 0.0, right, 0.0, top, f"fires: {fired:,}"),
            ("both closed", left, 0.0, bottom, 0.0, "both closed"),
            ("open", 0.0, right, bottom, 0.0, f"gate open, no output: {opened - fired:,}"),
        )
    ]
    rows += [{"kind": "line", "x": x, "y": y} for x, y in ends]
    begin = max(0.0, -cross / gain)
    rows += [{"kind": "value", "x": x, "y": gain * x + cross} for x in (begin, right)]
    rows += [{"kind": "theta", "x": 0.0, "y": cross}] if cross > 0 else []
    dots = line.rename(columns={"pi_gate": "x", "pi_mag": "y"})
    dots["kind"] = np.where(line["f"] > 0, "dot", "miss")
    data = pd.concat([pd.DataFrame(rows), dots], ignore_index=True)
    names = ("kind", "x", "x2", "y", "y2", "region", "label", "f")
    spec = _plane_spec(hue("gated", theme), RED[theme])
    return LiveChart(spec, {name: data[name].to_numpy() for name in names})


@functools.lru_cache(maxsize=8)
def _plane_spec(colour: str, red: str) -> dict[str, Any]:
    x, y = (
        channel(title=title, type="quantitative", scale=alt.Scale(nice=False, zero=True)).axis(
            tickCount=5, format=".3~r", grid=False
        )
        for channel, title in ((alt.X, "gate π_gate: open above 0"), (alt.Y, "magnitude π_mag"))
    )

    def rows(kind: str, across: str = "x", up: str = "y") -> alt.Chart:
        chart = alt.Chart().transform_filter(f"datum.kind == '{kind}'")
        return chart.encode(x.field(across), y.field(up))

    def words(chosen: str, across: str, up: str, inwards: int, **corner: Any) -> alt.Chart:
        """Return the words of the chosen regions, in an outer corner: top left, or bottom right."""
        chart = rows("region", across, up).transform_filter(f"datum.region {chosen}")
        chart = chart.mark_text(fontSize=11, dx=inwards, dy=inwards, color=NEUTRAL, **corner)
        return chart.encode(alt.Text("label:N"))

    def dots(kind: str, **mark: Any) -> alt.Chart:
        chart = rows(kind).mark_point(size=28, **mark)
        return chart.encode(tooltip=tooltips(".3~g", x="π_gate", y="π_mag", f="value"))

    regions = ["both closed", "gate closed", "open", "fires"]
    fills = alt.Scale(domain=regions, range=["transparent", red, NEUTRAL, colour])
    region = rows("region").mark_rect(opacity=0.1)
    axis_rule = alt.Chart().mark_rule(color=NEUTRAL, strokeWidth=1)
    theta = rows("theta")
    layers = [
        region.encode(alt.X2("x2"), alt.Y2("y2"), alt.Color("region:N", scale=fills, legend=None)),
        axis_rule.encode(alt.XDatum(0, type="quantitative")),
        axis_rule.encode(alt.YDatum(0, type="quantitative")),
        words("== 'gate closed'", "x", "y2", 4, align="left", baseline="top"),
        words("!= 'gate closed'", "x2", "y", -4, align="right", baseline="bottom"),
        rows("line").mark_line(color=NEUTRAL, strokeDash=[4, 3]),
        rows("value").mark_line(color=colour, strokeWidth=2.5),
        dots("miss", color=NEUTRAL, filled=False, opacity=0.7),
        dots("dot", color=colour, filled=True, opacity=0.55),
        theta.mark_text(**THETA, color=red, align="right", baseline="bottom", dx=-6, dy=-2),
        theta.mark_point(color=red, filled=True, size=60, opacity=1).encode(
            tooltip=tooltips(".3~g", y="θ")
        ),
    ]
    return spec_of(layers, height=235, padding=0)
