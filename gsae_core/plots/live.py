"""Figures of a run that still moves, in Altair: charts keep their zoom while data arrive."""

from collections.abc import Sequence
from typing import Literal

import altair as alt
import pandas as pd

from gsae_core.config import SAESpec
from gsae_core.plots.palette import AXES, LOOKS, Theme, hover_name, round_values, shades

LiveChart = alt.LayerChart | alt.FacetChart
XAxis = Literal["tokens", "step", "seconds"]

MAX_POINTS = 400  # per line: more than a chart's width in pixels shows, and a tick stays small
Y_FORMATS = {"dead_gate": "~%", "dead_magnitude": "~%"}
TRAIL = 40  # logged points of an SAE's path that the plane shows


def metrics_frame(lines: Sequence[dict], saes: Sequence[SAESpec]) -> pd.DataFrame:
    """Return metric lines as a table: one row per SAE and logged step, of the SAEs asked for.

    Long runs are thinned evenly to `MAX_POINTS` logged steps; the newest is always kept.
    """
    frame = pd.DataFrame(lines)
    if frame.empty:
        return pd.DataFrame(columns=["step", "tokens", "seconds", "sae", "label"])
    steps = frame["step"].drop_duplicates().to_list()
    stride = -(-len(steps) // MAX_POINTS)
    kept = steps[::-1][::stride]
    labels = {spec.name: hover_name(spec) for spec in saes}
    frame = pd.DataFrame(frame[frame["step"].isin(kept) & frame["sae"].isin(list(labels))])
    return frame.assign(label=[labels[name] for name in frame["sae"]]).reset_index(drop=True)


def smoothed(frame: pd.DataFrame, column: str, weight: float) -> pd.Series:
    """Return the exponential moving average of a column within each SAE: causal, unbiased early on.

    Args:
        weight: share of the past in each value, from 0 (raw) to below 1.
    """
    grouped = frame.groupby("sae", sort=False)[column]
    return pd.Series(grouped.transform(lambda v: v.ewm(alpha=1 - weight, adjust=True).mean()))


def line_chart(
    frame: pd.DataFrame,
    column: str,
    saes: Sequence[SAESpec],
    *,
    x: XAxis,
    theme: Theme,
    smoothing: float = 0.0,
    log: bool = False,
    rule: float | None = None,
    height: int = 220,
) -> LiveChart:
    """Return one quantity against training, a line per SAE; smoothing leaves the raw line faint.

    Args:
        column: a key of `metrics.jsonl`, e.g. `l0`.
        rule: value marked with a thin line, such as gamma = 1.
    """
    colours = shades(saes, theme)
    data = frame.loc[:, [x, "sae", "label"]].assign(raw=frame[column]).dropna()
    if log:
        data = data.query("raw > 0")
    data = data.assign(value=smoothed(data, "raw", smoothing))
    x_axis = alt.X(
        f"{x}:Q",
        title=AXES[x],
        axis=alt.Axis(format="~s", tickCount=5, grid=False),
        scale=alt.Scale(nice=False),
    )
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    form = Y_FORMATS.get(column, "~g")
    y_axis = alt.Axis(format=form, tickCount=5)
    if log:
        y_axis = alt.Axis(format=form, values=round_values(data["raw"]), labelOverlap=False)
    base = alt.Chart(data).encode(
        x=x_axis,
        color=alt.Color(
            "sae:N",
            scale=alt.Scale(domain=list(colours), range=list(colours.values())),
            legend=None,
        ),
        strokeDash=alt.StrokeDash(
            "sae:N",
            scale=alt.Scale(
                domain=list(colours),
                range=[list(LOOKS[s.architecture].dash) for s in _sorted(saes, colours)],
            ),
            legend=None,
        ),
        tooltip=[
            alt.Tooltip("label:N", title="SAE"),
            alt.Tooltip(f"{x}:Q", title=AXES[x], format=",.4~g" if x == "seconds" else ","),
            alt.Tooltip("raw:Q", title=AXES[column], format=".4~g"),
        ],
    )
    y = alt.Y("value:Q", title=None, scale=scale, axis=y_axis)
    layers = [base.mark_line(strokeWidth=2, clip=True).encode(y=y)]
    if smoothing > 0:
        raw = alt.Y("raw:Q", title=None, scale=scale, axis=y_axis)
        layers.insert(0, base.mark_line(strokeWidth=1, opacity=0.25, clip=True).encode(y=raw))
    if rule is not None:
        mark = alt.Chart(pd.DataFrame({"value": [rule]})).mark_rule(strokeDash=[2, 2], opacity=0.6)
        layers.insert(0, mark.encode(y="value:Q", color=alt.value("#7d8894")))
    title = alt.TitleParams(AXES[column], anchor="start", fontSize=13, fontWeight="normal")
    chart = alt.layer(*layers).properties(height=height, title=title)
    return chart.interactive(bind_y=False)


def plane(
    frame: pd.DataFrame, saes: Sequence[SAESpec], *, theme: Theme, finished: bool, height: int = 220
) -> LiveChart:
    """Return where each SAE stands, L0 against FVU, and its path there; down and left is better.

    Markers are hollow while a run moves and solid when it is finished.
    """
    colours = shades(saes, theme)
    data = frame.loc[:, ["step", "sae", "label", "l0", "fvu"]].dropna()
    data = data.query("l0 > 0 and fvu > 0")
    data = data.groupby("sae", sort=False).tail(TRAIL)
    newest = data.groupby("sae", sort=False).tail(1)
    domain = list(colours)
    shapes = [LOOKS[s.architecture].vega_shape for s in _sorted(saes, colours)]
    encoding = {
        "x": alt.X(
            "l0:Q",
            title=AXES["l0"],
            scale=alt.Scale(type="log", padding=10),
            axis=alt.Axis(values=round_values(data["l0"]), format="~g", labelOverlap=False),
        ),
        "y": alt.Y(
            "fvu:Q",
            title=None,
            scale=alt.Scale(type="log", padding=10),
            axis=alt.Axis(values=round_values(data["fvu"]), format="~g", labelOverlap=False),
        ),
        "color": alt.Color(
            "sae:N", scale=alt.Scale(domain=domain, range=list(colours.values())), legend=None
        ),
    }
    trail = alt.Chart(data).mark_line(opacity=0.35, strokeWidth=1.5, clip=True)
    trail = trail.encode(order="step:Q", **encoding)
    here = alt.Chart(newest).mark_point(size=90, filled=finished, strokeWidth=2, opacity=1)
    here = here.encode(
        shape=alt.Shape("sae:N", scale=alt.Scale(domain=domain, range=shapes), legend=None),
        tooltip=[
            alt.Tooltip("label:N", title="SAE"),
            alt.Tooltip("l0:Q", title="L0", format=".1f"),
            alt.Tooltip("fvu:Q", title="FVU", format=".3f"),
        ],
        **encoding,
    )
    title = alt.TitleParams(
        "L0 against fraction of variance unexplained",
        anchor="start",
        fontSize=13,
        fontWeight="normal",
    )
    return (trail + here).properties(height=height, title=title).interactive()


def _sorted(saes: Sequence[SAESpec], colours: dict[str, str]) -> list[SAESpec]:
    """Return the SAEs in the order of the colour scale."""
    by_name = {spec.name: spec for spec in saes}
    return [by_name[name] for name in colours]
