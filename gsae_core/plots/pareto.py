"""The trade-off between sparsity and fidelity, in Plotly."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from gsae_core.analysis.pareto import MatchedRatio, Point, frontier
from gsae_core.analysis.results import of_architecture
from gsae_core.plots.palette import AXES, LOOKS, LOWER_IS_BETTER, NEUTRAL, Look, knob, round_values
from gsae_core.text import WORSE, is_worse_than_mean

Measure = Literal["l0", "loss_recovered", "delta_ce", "fvu", "kl"]

MEASURES: tuple[Measure, ...] = ("l0", "loss_recovered", "delta_ce", "fvu", "kl")
VALUE_FORMATS: dict[Measure, str] = {
    "l0": ".1f",
    "loss_recovered": ".2%",
    "delta_ce": ".4f",
    "fvu": ".3f",
    "kl": ".4f",
}
FAINT = 0.55  # opacity of what is there to compare with


class RunLook(NamedTuple):
    """How a run's points differ from another run's of the same architecture."""

    suffix: str
    """Of Plotly's symbol: filled, hollow, ..."""
    size: int
    dash: str | None
    """Of its frontiers; None keeps the architecture's own."""


RUN_LOOKS = (
    RunLook("", 12, None),
    RunLook("-open", 12, "dot"),
    RunLook("-dot", 12, "dashdot"),
    RunLook("-open-dot", 12, "longdashdot"),
    RunLook("", 8, "longdash"),
    RunLook("-open", 8, "dot"),
)
"""The looks of the runs of one figure, in order; as many runs fit into it."""


def dash_of(look: Look) -> str:
    """Return an architecture's dash as Plotly writes it."""
    return "solid" if look.dash == (1, 0) else ",".join(f"{length * 2}px" for length in look.dash)


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
        ticks = round_values(
            value for trace in traces(figure) for value in trace.x if value is not None
        )
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
    evals: pd.DataFrame,
    y: Measure = "loss_recovered",
    *,
    x: Measure = "l0",
    log_x: bool = True,
    matched: MatchedRatio | None = None,
    picked: Sequence[str] = (),
    paper: pd.DataFrame | None = None,
) -> go.Figure:
    """Return one measure against another: every SAE, and each architecture's frontier.

    Hue and shape tell the architecture; fill, size and dash tell the run. A point's `customdata`
    begins with its id, which is what a click reports.

    Args:
        evals: `results.several_runs`' rows, or those of one run from `results.evaluation_frame`.
        matched: levels of loss recovered at which to draw the interpolation the ratio comes from;
            drawn on the axes it is taken on, L0 and loss recovered, and left out on others.
        picked: ids of up to two SAEs to mark, numbered in this order.
        paper: `results.published`'s rows, drawn faint behind; they have L0 and loss recovered only.
    """
    if "id" not in evals:
        evals = evals.assign(run="", id=evals["name"])
    figure = go.Figure()
    evals = placed(evals, x, y, log_x=log_x)
    on_own_axes = (x, y) == ("l0", "loss_recovered")
    if paper is not None and on_own_axes:
        _draw_paper(figure, paper, log_x=log_x)
    if matched is not None and on_own_axes:
        _draw_matches(figure, matched)
    _draw_picks(figure, evals.set_index("id"), x, y, picked)
    runs = list(dict.fromkeys(evals["run"]))
    for run, run_look in zip(runs, RUN_LOOKS, strict=False):
        for architecture, look in LOOKS.items():
            rows = of_architecture(pd.DataFrame(evals[evals["run"] == run]), architecture)
            if len(rows):
                name = look.label + (f" · {run}" if len(runs) > 1 else "")
                _draw_architecture(figure, rows, x, y, look, run_look, name)
    draw_worse(figure, evals, x, y)
    for axis, measure in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        if measure == "loss_recovered":
            axis(tickformat="~%")
    return style(figure, x=AXES[x], y=AXES[y], log_x=log_x)


def placed(evals: pd.DataFrame, x: Measure, y: Measure, *, log_x: bool) -> pd.DataFrame:
    """Return the rows that have a place in the plane: measured, and above 0 on a log axis."""
    rows = evals.dropna(subset=[x, y])
    return pd.DataFrame(rows[rows[x] > 0]) if log_x else rows


def best(rows: pd.DataFrame, y: Measure, x: Measure = "l0") -> pd.DataFrame:
    """Return the Pareto-optimal rows, from the best `x` to the best `y`: no other beats them twice.

    Args:
        rows: SAEs with different names.
    """
    along, up = (1 if x in LOWER_IS_BETTER else -1), (-1 if y in LOWER_IS_BETTER else 1)
    points = [
        Point(along * float(first), up * float(second), str(name))
        for first, second, name in zip(rows[x], rows[y], rows["name"], strict=True)
    ]
    return rows.set_index("name").loc[[point.name for point in frontier(points)]].reset_index()


def _draw_architecture(
    figure: go.Figure,
    rows: pd.DataFrame,
    x: Measure,
    y: Measure,
    look: Look,
    run_look: RunLook,
    name: str,
) -> None:
    """Draw the SAEs of one architecture of one run, and their frontier."""
    edge = best(rows, y, x)
    figure.add_scatter(
        x=edge[x].to_list(),
        y=edge[y].to_list(),
        mode="lines",
        line={"color": look.colour, "width": 2, "dash": run_look.dash or dash_of(look)},
        name=f"{name} frontier",
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
    hollow = "open" in run_look.suffix
    rim = {"width": 2} if hollow else {"width": 1, "color": "white"}
    figure.add_scatter(
        x=rows[x].to_list(),
        y=rows[y].to_list(),
        mode="markers",
        marker={
            "color": look.colour,
            "symbol": look.plotly_symbol + run_look.suffix,
            "size": run_look.size,
            "line": rim,
        },
        # A click would fade all other points; what was clicked has its ring and its card.
        unselected={"marker": {"opacity": 1}},
        name=name,
        legendgroup=name,
        customdata=[
            [key, knob(architecture, sparsity)]
            for key, architecture, sparsity in zip(
                rows["id"], rows["architecture"], rows["sparsity"], strict=True
            )
        ],
        hovertemplate=hover(
            f"{name}, %{{customdata[1]}}",
            f"{AXES[x]} %{{x:{VALUE_FORMATS[x]}}}",
            f"{AXES[y]} %{{y:{VALUE_FORMATS[y]}}}",
        ),
    )


def draw_worse(figure: go.Figure, rows: pd.DataFrame, x: str, y: str) -> None:
    """Draw a cross over each SAE whose FVU is above 1."""
    worse = pd.DataFrame(rows[[is_worse_than_mean(fvu) for fvu in rows["fvu"]]])
    if worse.empty:
        return
    figure.add_scatter(
        x=worse[x].to_list(),
        y=worse[y].to_list(),
        mode="markers",
        marker={"symbol": "x-thin", "size": 14, "line": {"width": 2, "color": NEUTRAL}},
        name=f"{WORSE} FVU above 1: worse than the mean activation",
        hoverinfo="skip",  # it lies on an SAE, whose own click and hover must win
    )


def _draw_picks(
    figure: go.Figure, rows: pd.DataFrame, x: Measure, y: Measure, picked: Sequence[str]
) -> None:
    """Draw a numbered ring around each SAE that was picked."""
    places = [(str(i), key) for i, key in enumerate(picked[:2], start=1) if key in rows.index]
    if not places:
        return
    figure.add_scatter(
        x=[float(rows.loc[key, x]) for _, key in places],
        y=[float(rows.loc[key, y]) for _, key in places],
        text=[number for number, _ in places],
        mode="markers+text",
        # Of two next to each other, one number above and one below.
        textposition=["top center", "bottom center"][: len(places)],
        marker={"symbol": "circle-open", "size": 22, "color": NEUTRAL, "line": {"width": 2.5}},
        name="picked",
        showlegend=False,
        hoverinfo="skip",  # it lies on an SAE, whose own click and hover must win
        cliponaxis=False,
    )


def _draw_paper(figure: go.Figure, paper: pd.DataFrame, *, log_x: bool) -> None:
    """Draw the paper's runs and their frontiers, faint."""
    paper = placed(paper, "l0", "loss_recovered", log_x=log_x)
    for architecture, look in LOOKS.items():
        rows = of_architecture(paper, architecture)
        if rows.empty:
            continue
        unique = rows.assign(name=[f"{name}#{i}" for i, name in enumerate(rows["name"])])
        edge = best(unique, "loss_recovered")
        line = {"color": look.colour, "width": 1, "dash": "dot"}
        common: dict[str, Any] = {"opacity": FAINT, "legendgroup": f"paper {architecture}"}
        figure.add_scatter(
            x=edge["l0"].to_list(),
            y=edge["loss_recovered"].to_list(),
            mode="lines",
            line=line,
            showlegend=False,
            hoverinfo="skip",
            **common,
        )
        figure.add_scatter(
            x=rows["l0"].to_list(),
            y=rows["loss_recovered"].to_list(),
            mode="markers",
            marker={"color": look.colour, "symbol": look.plotly_symbol, "size": 8},
            unselected={"marker": {"opacity": FAINT}},
            name=f"{look.label}, published",
            text=[knob(architecture, sparsity) for sparsity in rows["sparsity"]],
            hovertemplate=hover(
                f"published: {look.label}, %{{text}}",
                "L0 %{x:.1f}",
                "loss recovered %{y:.2%}",
            ),
            **common,
        )


def _draw_matches(figure: go.Figure, matched: MatchedRatio) -> None:
    """Draw a level line between the two frontiers for each pair the ratio is taken from."""
    # One trace with gaps: a trace for each level takes longer to make and to draw than all SAEs.
    figure.add_scatter(
        x=[end for pair in matched.pairs for end in (pair.l0_gated, pair.l0_baseline, None)],
        y=[end for pair in matched.pairs for end in (*[pair.loss_recovered] * 2, None)],
        mode="lines",
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
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
        legendrank=2000,  # after the SAEs it is about
        showlegend=bool(matched.pairs),
        text=[
            f"at {pair.loss_recovered:.2%} of the loss recovered<br>gated {pair.l0_gated:.1f}, "
            f"baseline {pair.l0_baseline:.1f}<br>ratio {pair.ratio:.2f}"
            for pair in matched.pairs
        ],
        hovertemplate=hover("%{text}"),
    )
