"""The trade-off between sparsity and fidelity, in Plotly, and what all Plotly figures share."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from gsae_core.analysis.pareto import MatchedRatio, Point, frontier
from gsae_core.analysis.results import of_architecture, unit_measured
from gsae_core.errors import extra
from gsae_core.plots.palette import AXES, LOOKS, LOWER_IS_BETTER, NEUTRAL, Look, knob, round_values
from gsae_core.text import WORSE, in_units, is_worse_than_mean

with extra("app"):
    import plotly.graph_objects as go

Measure = Literal["l0", "loss_recovered", "delta_ce", "fvu", "kl"]

VALUE_FORMATS = {"l0": ".1f", "loss_recovered": ".2%", "delta_ce": ".4f", "kl": ".4f"}
"""How hovering says a number; others are `.3f`."""
FAINT = 0.55  # opacity of published runs
# These traces lie on SAEs, whose own clicks and hovers must win.
NO_HOVER: dict[str, Any] = {"hoverinfo": "skip"}
BARE_LINE: dict[str, Any] = {"mode": "lines", "showlegend": False} | NO_HOVER


class RunLook(NamedTuple):
    """How a run's points differ from another run's of the same architecture."""

    suffix: str  # of Plotly's symbol: filled, hollow, ...
    size: int
    dash: str | None  # of its frontiers; None keeps the architecture's own


RUN_LOOKS = (
    RunLook("", 12, None),
    RunLook("-open", 12, "dot"),
    RunLook("-dot", 12, "dashdot"),
    RunLook("-open-dot", 12, "longdashdot"),
    RunLook("", 8, "longdash"),
    RunLook("-open", 8, "dot"),
)
"""The looks of the runs of one figure, or of places, in order; as many fit into it."""


def dash_of(look: Look) -> str:
    """Return an architecture's dash as Plotly writes it."""
    return "solid" if look.dash == (1, 0) else ",".join(f"{length * 2}px" for length in look.dash)


LOG: dict[str, Any] = {"type": "log", "exponentformat": "power", "dtick": 1}
"""An axis over many powers of ten, which alone are labelled."""


def style(figure: go.Figure, *, x: str, y: str, log_x: bool = False) -> go.Figure:
    """Return the figure with titled axes, the legend below the title, and room for labels."""
    figure.update_xaxes(title=x, ticks="outside")
    figure.update_yaxes(title=y, ticks="outside")
    if log_x:
        ticks = round_values(
            value for trace in traces(figure) for value in trace.x if value is not None
        )
        figure.update_xaxes(LOG, tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": None},
        margin={"l": 8, "r": 8, "t": 48, "b": 8},
        hovermode="closest",
        height=420,
    )


def traces(figure: go.Figure) -> list[Any]:
    """Return a figure's traces, which Plotly types as strings."""
    return list(figure.select_traces())


def hover(*lines: str) -> str:
    """Return a hover box of these lines."""
    return "<br>".join(lines) + "<extra></extra>"


def columns(rows: pd.DataFrame, x: str, y: str) -> dict[str, list[Any]]:
    """Return two columns of a table as a trace takes them."""
    return {"x": rows[x].to_list(), "y": rows[y].to_list()}


def dots(rows: pd.DataFrame, x: str, y: str, name: str) -> dict[str, Any]:
    """Return SAEs as a trace takes them: where they are, and what hovering says."""
    unit = unit_measured(rows)
    said = [
        f"{in_units(AXES[measure], unit)} %{{{axis}:{VALUE_FORMATS.get(measure, '.3f')}}}"
        for axis, measure in (("x", x), ("y", y))
    ]
    return columns(rows, x, y) | {
        "name": name,
        "text": [knob(*pair) for pair in zip(rows["architecture"], rows["sparsity"], strict=True)],
        "hovertemplate": hover(f"{name}, %{{text}}", *said),
    }


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

    Hue and shape tell the architecture; fill, size and dash tell the run and the place. A point's
    `customdata` begins with its id, which is what a click reports.

    Args:
        evals: `results.several_runs`' rows, or those of one run from `results.evaluation_frame`.
        matched: levels of loss recovered at which to draw the interpolation the ratio comes from;
            drawn on the axes it is taken on, L0 and loss recovered, and left out on others.
        picked: ids of up to two SAEs to mark, numbered in this order.
        paper: `results.published`'s rows, drawn faint behind; they have L0 and loss recovered only.
    """
    if "id" not in evals:
        evals = evals.assign(run="", id=evals["name"], group="")
    figure = go.Figure()
    evals = placed(evals, x, y, log_x=log_x)
    on_own_axes = (x, y) == ("l0", "loss_recovered")
    if paper is not None and on_own_axes:
        draw_paper(figure, placed(paper, x, y, log_x=log_x), "loss_recovered")
    if matched is not None and on_own_axes:
        _draw_matches(figure, matched)
    _draw_picks(figure, evals, x, y, picked)
    groups = list(dict.fromkeys(evals["group"]))
    for group, run_look in zip(groups, RUN_LOOKS, strict=False):
        suffix = f" · {group}" if len(groups) > 1 else ""
        _draw_run(figure, pd.DataFrame(evals[evals["group"] == group]), x, y, run_look, suffix)
    draw_worse(figure, evals, x, y)
    for axis, measure in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        if measure == "loss_recovered":
            axis(tickformat="~%")
    titles = (in_units(AXES[measure], unit_measured(evals)) for measure in (x, y))
    return style(figure, **dict(zip("xy", titles, strict=True)), log_x=log_x)


def placed(evals: pd.DataFrame, x: str, y: str, *, log_x: bool = True) -> pd.DataFrame:
    """Return the rows that have a place in the plane: measured, and above 0 on a log axis.

    Of the paper's, a few printed L0 are 0 or negative.
    """
    rows = evals.dropna(subset=[x, y])
    return pd.DataFrame(rows[rows[x] > 0]) if log_x else rows


def best(rows: pd.DataFrame, y: str, x: str = "l0") -> pd.DataFrame:
    """Return the Pareto-optimal rows, which no other beats on both axes, from the best `x` on."""
    along, up = (1 if x in LOWER_IS_BETTER else -1), (-1 if y in LOWER_IS_BETTER else 1)
    # Rows may share a name, so points are numbered.
    points = [
        Point(along * float(first), up * float(second), str(number))
        for number, (first, second) in enumerate(zip(rows[x], rows[y], strict=True))
    ]
    return rows.iloc[[int(point.name) for point in frontier(points)]].reset_index(drop=True)


def _draw_run(
    figure: go.Figure, evals: pd.DataFrame, x: str, y: str, run_look: RunLook, suffix: str
) -> None:
    """Draw the SAEs of a run at a place and each architecture's frontier; `suffix` names both."""
    hollow = "open" in run_look.suffix
    for architecture, look in LOOKS.items():
        rows, name = of_architecture(evals, architecture), look.label + suffix
        if rows.empty:
            continue
        figure.add_scatter(
            **columns(best(rows, y, x), x, y),
            line={"color": look.colour, "width": 2, "dash": run_look.dash or dash_of(look)},
            name=f"{name} frontier",
            legendgroup=name,
            **BARE_LINE,
        )
        figure.add_scatter(
            **dots(rows, x, y, name),
            mode="markers",
            marker={
                "color": look.colour,
                "symbol": look.shape + run_look.suffix,
                "size": run_look.size,
                "line": {"width": 2} if hollow else {"width": 1, "color": "white"},
            },
            # A click would fade all other points; what was clicked has its ring and its card.
            unselected={"marker": {"opacity": 1}},
            legendgroup=name,
            customdata=[[key] for key in rows["id"]],
        )


def draw_worse(figure: go.Figure, rows: pd.DataFrame, x: str, y: str) -> None:
    """Draw a cross over each SAE whose FVU is above 1."""
    worse = pd.DataFrame(rows[[is_worse_than_mean(fvu) for fvu in rows["fvu"]]])
    if len(worse):
        figure.add_scatter(
            **columns(worse, x, y),
            mode="markers",
            marker={"symbol": "x-thin", "size": 14, "line": {"width": 2, "color": NEUTRAL}},
            name=f"{WORSE} FVU above 1: worse than the mean activation",
            **NO_HOVER,
        )


def _draw_picks(
    figure: go.Figure, evals: pd.DataFrame, x: Measure, y: Measure, picked: Sequence[str]
) -> None:
    """Draw a numbered ring around each SAE that was picked."""
    rows = evals.set_index("id")
    numbers = {key: str(i) for i, key in enumerate(picked[:2], start=1) if key in rows.index}
    if numbers:
        figure.add_scatter(
            **columns(rows.loc[list(numbers)], x, y),
            text=list(numbers.values()),
            mode="markers+text",
            # Of two next to each other, one number above and one below.
            textposition=["top center", "bottom center"][: len(numbers)],
            marker={"symbol": "circle-open", "size": 22, "color": NEUTRAL, "line": {"width": 2.5}},
            name="picked",
            showlegend=False,
            cliponaxis=False,
            **NO_HOVER,
        )


def draw_paper(figure: go.Figure, paper: pd.DataFrame, y: str) -> None:
    """Draw the paper's runs, faint, and for loss recovered their frontiers."""
    for architecture, look in LOOKS.items():
        rows = of_architecture(paper, architecture)
        if rows.empty:
            continue
        common: dict[str, Any] = {"opacity": FAINT, "legendgroup": f"paper {architecture}"}
        if y == "loss_recovered":
            line = {"color": look.colour, "width": 1, "dash": "dot"}
            figure.add_scatter(**columns(best(rows, y), "l0", y), line=line, **BARE_LINE, **common)
        figure.add_scatter(
            **dots(rows, "l0", y, f"{look.label}, published"),
            mode="markers",
            marker={"color": look.colour, "symbol": look.shape, "size": 8},
            unselected={"marker": {"opacity": FAINT}},
            **common,
        )


def _draw_matches(figure: go.Figure, matched: MatchedRatio) -> None:
    """Draw a level line between the two frontiers for each pair the ratio is taken from."""
    common = {"name": "matched fidelity", "legendgroup": "matched"}
    # One trace with gaps: a trace for each level takes longer to make and to draw than all SAEs.
    figure.add_scatter(
        x=[end for pair in matched.pairs for end in (pair.l0_gated, pair.l0_baseline, None)],
        y=[end for pair in matched.pairs for end in (*[pair.loss_recovered] * 2, None)],
        line={"color": NEUTRAL, "width": 1, "dash": "dot"},
        **BARE_LINE,
        **common,
    )
    figure.add_scatter(
        x=[math.sqrt(pair.l0_gated * pair.l0_baseline) for pair in matched.pairs],
        y=[pair.loss_recovered for pair in matched.pairs],
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 8, "color": NEUTRAL},
        legendrank=2000,  # after the SAEs it is about
        showlegend=bool(matched.pairs),
        text=[
            f"at {pair.loss_recovered:.2%} of the loss recovered<br>gated {pair.l0_gated:.1f}, "
            f"baseline {pair.l0_baseline:.1f}<br>ratio {pair.ratio:.2f}"
            for pair in matched.pairs
        ],
        hovertemplate=hover("%{text}"),
        **common,
    )


def pareto_svg(
    rows: Sequence[Mapping[str, Any]], *, chosen: Sequence[str], title: str
) -> str | None:
    """Return L0 against loss recovered, a frontier for each architecture, rings on those chosen.

    Rows of evals.json without both numbers, L0 above 0, are left out; None if all are.
    """
    # The pages' figures are Plotly's; this one is a picture in a file.
    with extra("app"):
        import altair as alt
        import vl_convert  # noqa: F401  (altair writes files with it)

    numbers = {"l0": float, "loss_recovered": float}  # JSON has null for NaN
    frame = pd.DataFrame(list(rows), columns=["name", "architecture", *numbers]).astype(numbers)
    frame = placed(frame, "l0", "loss_recovered")
    if frame.empty:
        return None
    frame = frame.assign(kind=[LOOKS[each].label for each in frame["architecture"]])
    edges = pd.concat([best(of_architecture(frame, kind), "loss_recovered") for kind in LOOKS])
    looks = [look for kind, look in LOOKS.items() if kind in set(frame["architecture"])]
    labels = [look.label for look in looks]
    ticks = round_values(frame["l0"])
    x = alt.X("l0:Q", title=f"{AXES['l0']}, logarithmic")
    x = x.scale(type="log", nice=False, padding=24).axis(values=ticks, format="~g", grid=False)
    y = alt.Y("loss_recovered:Q", title=AXES["loss_recovered"])
    y = y.scale(zero=False, nice=False, padding=24).axis(format="~%")
    hue = alt.Color("kind:N").scale(domain=labels, range=[look.colour for look in looks])
    hue = hue.legend(orient="top", title=None)
    shape = alt.Shape("kind:N").scale(domain=labels, range=[look.shape for look in looks])
    dash = alt.StrokeDash("kind:N", legend=None)
    dash = dash.scale(domain=labels, range=[look.dash for look in looks])
    ringed = pd.DataFrame(frame[frame["name"].isin(list(chosen))])
    chart = alt.layer(
        alt.Chart(edges).mark_line().encode(x, y, hue, dash),
        alt.Chart(frame).mark_point(filled=True, size=70, opacity=1).encode(x, y, hue, shape),
        alt.Chart(ringed).mark_point(size=240, color="black", strokeWidth=1.5).encode(x, y),
        title=title,
        background="white",
        width=560,
        height=320,
    )
    svg = io.StringIO()
    chart.save(svg, format="svg")
    return svg.getvalue()
