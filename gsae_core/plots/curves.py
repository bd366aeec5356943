"""The trade-off between sparsity and fidelity, in Plotly."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from gsae_core.analysis.pareto import MatchedRatio, Point, frontier
from gsae_core.config import Architecture
from gsae_core.plots.palette import AXES, LOOKS, LOWER_IS_BETTER, NEUTRAL, round_values

Measure = Literal["loss_recovered", "delta_ce", "fvu", "kl"]

MEASURES: tuple[Measure, ...] = ("loss_recovered", "delta_ce", "fvu", "kl")
VALUE_FORMATS: dict[Measure, str] = {
    "loss_recovered": ".2%",
    "delta_ce": ".4f",
    "fvu": ".3f",
    "kl": ".4f",
}


def delta_ce(evals: pd.DataFrame) -> pd.Series:
    """How much worse the language model predicts when it reads reconstructions; 0 is perfect.

    Its cross-entropy then, less its own, in nats per token: ce_sae - ce_clean.
    """
    return pd.Series(evals["ce_sae"] - evals["ce_clean"])


def evaluation_frame(evals: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return `evals.json`'s SAEs as a table, with `delta_ce`, sorted by architecture and L0."""
    frame = pd.DataFrame(list(evals))
    if frame.empty:
        return frame
    # JSON has null for NaN, which would make a column of objects.
    numbers = frame.columns.difference(["name", "architecture", "d_in", "d_sae", "n_tokens"])
    frame = frame.astype({str(name): float for name in numbers})
    frame = frame.assign(delta_ce=delta_ce(frame))
    return frame.sort_values(["architecture", "l0"]).reset_index(drop=True)


def of_architecture(evals: pd.DataFrame, architecture: Architecture) -> pd.DataFrame:
    """Return the rows of one architecture."""
    return pd.DataFrame(evals[evals["architecture"] == architecture])


def style(
    figure: go.Figure, *, x: str, y: str, log_x: bool = False, decades: bool = False
) -> go.Figure:
    """Return the figure with our axes, legend below the title line, and room for labels.

    Args:
        decades: label powers of ten only, for an axis over many of them.
    """
    figure.update_xaxes(title=x, ticks="outside")
    figure.update_yaxes(title=y, ticks="outside")
    if log_x:
        figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    if log_x and not decades:
        ticks = round_values(value for trace in traces(figure) for value in trace.x)
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": None},
        margin={"l": 8, "r": 8, "t": 48, "b": 8},
        hovermode="closest",
        height=420,
    )
    return figure


def traces(figure: go.Figure) -> list[Any]:
    """Return a figure's traces, which Plotly types as strings."""
    return list(figure.select_traces())


def hover(*lines: str) -> str:
    """Return a hover box with one line per argument."""
    return "<br>".join(lines) + "<extra></extra>"


def tradeoff(
    evals: pd.DataFrame, measure: Measure, *, matched: MatchedRatio | None = None
) -> go.Figure:
    """Return a fidelity measure against L0: every SAE, and each architecture's frontier.

    A point's `customdata` is its name, which is what a click reports.

    Args:
        evals: `evaluation_frame`'s rows.
        matched: levels of loss recovered at which to draw the interpolation the ratio comes from.
    """
    figure = go.Figure()
    if matched is not None:
        _draw_matches(figure, matched)
    for architecture, look in LOOKS.items():
        rows = of_architecture(evals, architecture).dropna(subset=["l0", measure])
        if rows.empty:
            continue
        edge = best(rows, measure)
        figure.add_scatter(
            x=edge["l0"].to_list(),
            y=edge[measure].to_list(),
            mode="lines",
            line={
                "color": look.colour,
                "width": 2,
                "dash": "solid" if look.dash == (1, 0) else "dash",
            },
            name=f"{look.label} frontier",
            legendgroup=architecture,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=rows["l0"].to_list(),
            y=rows[measure].to_list(),
            mode="markers",
            marker={
                "color": look.colour,
                "symbol": look.plotly_symbol,
                "size": 12,
                "line": {"width": 1, "color": "white"},
            },
            name=look.label,
            legendgroup=architecture,
            customdata=[
                [name, f"{sparsity:g}"]
                for name, sparsity in zip(rows["name"], rows["sparsity"], strict=True)
            ],
            hovertemplate=hover(
                f"{look.label}, λ %{{customdata[1]}}",
                "L0 %{x:.1f}",
                f"{AXES[measure]} %{{y:{VALUE_FORMATS[measure]}}}",
            ),
        )
    if measure == "loss_recovered":
        figure.update_yaxes(tickformat=".1%")
    return style(figure, x=AXES["l0"], y=AXES[measure], log_x=True)


def best(rows: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """Return the Pareto-optimal rows, sparsest first: no other is better in both."""
    sign = -1 if measure in LOWER_IS_BETTER else 1
    points = [
        Point(float(l0), sign * float(value), str(name))
        for l0, value, name in zip(rows["l0"], rows[measure], rows["name"], strict=True)
    ]
    return rows.set_index("name").loc[[point.name for point in frontier(points)]].reset_index()


def _draw_matches(figure: go.Figure, matched: MatchedRatio) -> None:
    """Draw a level line between the two frontiers for each pair the ratio is taken from."""
    line = {"color": NEUTRAL, "width": 1, "dash": "dot"}
    for pair in matched.pairs:
        figure.add_scatter(
            x=[pair.l0_gated, pair.l0_baseline],
            y=[pair.loss_recovered] * 2,
            mode="lines",
            line=line,
            name="matched fidelity",
            legendgroup="matched",
            showlegend=False,
            hoverinfo="skip",  # the ends lie on SAEs, whose own clicks and hovers must win
        )
    figure.add_scatter(
        x=[math.sqrt(pair.l0_gated * pair.l0_baseline) for pair in matched.pairs],
        y=[pair.loss_recovered for pair in matched.pairs],
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 8, "color": NEUTRAL},
        name="matched fidelity",
        legendgroup="matched",
        showlegend=bool(matched.pairs),
        text=[
            f"at {pair.loss_recovered:.2%} of the loss recovered<br>gated {pair.l0_gated:.1f}, "
            f"baseline {pair.l0_baseline:.1f}<br>ratio {pair.ratio:.2f}"
            for pair in matched.pairs
        ],
        hovertemplate=hover("%{text}"),
    )
