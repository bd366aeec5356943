"""Shrinkage of whole SAEs, in Plotly: gamma over a sweep, lengths by length of activation."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from gsae_core.analysis.results import of_architecture
from gsae_core.config import SAESpec
from gsae_core.plots.curves import FAINT, dash_of, draw_worse, hover, style
from gsae_core.plots.palette import AXES, LOOKS, NEUTRAL, THIRD, hover_name, knob

Length = Literal["ratio", "gamma"]

LENGTH_AXES: dict[Length, str] = {
    "ratio": "length ratio |x̂| / |x|",
    "gamma": "γ of the tenth's tokens",
}


class Series(NamedTuple):
    """A line of gamma over a sweep."""

    label: str
    rows: pd.DataFrame
    column: str
    colour: str
    symbol: str
    dash: str


def gamma_over_sweep(evals: pd.DataFrame, *, paper: pd.DataFrame | None = None) -> go.Figure:
    """Return gamma against L0 of each architecture and of the gate path; 1 means no shrinkage.

    Args:
        evals: `results.evaluation_frame`'s rows.
        paper: `results.published`'s rows, drawn faint behind.
    """
    figure = go.Figure()
    if paper is not None:
        _draw_paper(figure, paper)
    for series in _series(evals):
        figure.add_scatter(
            x=series.rows["l0"].to_list(),
            y=series.rows[series.column].to_list(),
            mode="lines+markers",
            name=series.label,
            line={"color": series.colour, "dash": series.dash, "width": 2},
            marker={"symbol": series.symbol, "size": 10},
            customdata=[
                [name, knob(architecture, sparsity)]
                for name, architecture, sparsity in zip(
                    series.rows["name"],
                    series.rows["architecture"],
                    series.rows["sparsity"],
                    strict=True,
                )
            ],
            hovertemplate=hover(series.label, "%{customdata[1]}", "L0 %{x:.1f}", "γ %{y:.3f}"),
        )
    draw_worse(figure, pd.DataFrame(evals[evals["l0"] > 0]), "l0", "gamma")
    rule_at_one(figure, "no shrinkage")
    return style(figure, x=AXES["l0"], y=AXES["gamma"], log_x=True)


def _series(evals: pd.DataFrame) -> list[Series]:
    found = []
    for architecture, look in LOOKS.items():
        dash = dash_of(look)
        gated = architecture == "gated"
        label = f"{look.label}, output" if gated else look.label
        kinds = [(label, "gamma", look.colour, look.plotly_symbol, dash)]
        if gated:
            kinds.append((f"{look.label}, gate path", "gamma_gate", THIRD, "triangle-down", "dot"))
        for name, column, colour, symbol, line in kinds:
            rows = of_architecture(evals, architecture).dropna(subset=[column, "l0"])
            rows = pd.DataFrame(rows[rows["l0"] > 0]).sort_values("l0")
            if len(rows):
                found.append(Series(name, rows, column, colour, symbol, line))
    return found


def _draw_paper(figure: go.Figure, paper: pd.DataFrame) -> None:
    """Draw the published gammas, faint; a few printed L0 are 0 or negative and have no place."""
    for architecture, look in LOOKS.items():
        rows = of_architecture(paper, architecture)
        rows = pd.DataFrame(rows[rows["l0"] > 0]).sort_values("l0")
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["l0"].to_list(),
            y=rows["gamma"].to_list(),
            mode="markers",
            marker={"color": look.colour, "symbol": look.plotly_symbol, "size": 8},
            opacity=FAINT,
            name=f"{look.label}, published",
            text=[knob(architecture, sparsity) for sparsity in rows["sparsity"]],
            hovertemplate=hover(f"published: {look.label}, %{{text}}", "L0 %{x:.1f}", "γ %{y:.3f}"),
        )


def lengths_by_decile(
    deciles: Sequence[tuple[SAESpec, pd.DataFrame]], column: Length = "ratio"
) -> go.Figure:
    """Return how long reconstructions are, from the shortest tenth of activations to the longest.

    Args:
        deciles: each SAE and its `store.evals.norm_deciles`.
        column: the ratio of lengths, or gamma of the tokens in each tenth.
    """
    figure = go.Figure()
    for spec, frame in deciles:
        look = LOOKS[spec.architecture]
        name = hover_name(spec)
        figure.add_scatter(
            x=frame["decile"].to_list(),
            y=frame[column].to_list(),
            mode="lines+markers",
            name=name,
            line={
                "color": look.colour,
                "dash": dash_of(look),
                "width": 2,
            },
            marker={"symbol": look.plotly_symbol, "size": 10},
            customdata=[[f"{norm:.4g}"] for norm in frame["norm"]],
            hovertemplate=hover(
                name,
                "tenth %{x} of the tokens, |x| about %{customdata[0]}",
                f"{LENGTH_AXES[column]} %{{y:.3f}}",
            ),
        )
    rule_at_one(figure, "no shrinkage" if column == "gamma" else "as long as x")
    figure.update_xaxes(tickvals=list(range(1, 11)), range=[0.5, 10.5])
    return style(figure, x="tenth of the tokens, shortest activations first", y=LENGTH_AXES[column])


def rule_at_one(figure: go.Figure, text: str) -> None:
    """Draw the line where nothing is too short, and say so."""
    figure.add_hline(y=1, line={"color": NEUTRAL, "dash": "dot", "width": 1.5})
    # On the left, where the dense end of a Gated curve, close to 1, does not run through it.
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yanchor="bottom",
        showarrow=False,
        text=text,
        font={"size": 12, "color": NEUTRAL},
    )
