"""Shrinkage feature by feature, in Plotly: gamma in common bins, and against density."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from gsae_core.analysis.results import of_architecture, unit_measured
from gsae_core.config import SAESpec
from gsae_core.errors import extra
from gsae_core.plots.palette import AXES, LOOKS, NEUTRAL, THIRD, hover_name
from gsae_core.plots.pareto import (
    LOG,
    columns,
    dash_of,
    dots,
    draw_paper,
    draw_worse,
    hover,
    placed,
    style,
)
from gsae_core.text import in_units

with extra("app"):
    import plotly.graph_objects as go

BIN = 0.025  # width of a gamma bin; doubled until they fit
MAX_BINS = 80  # more are thinner than a pointer can hit
MAX_DOTS = 1000  # dots per SAE in a scatter: more hide each other and slow the page
RULE: dict[str, str | float] = {"color": NEUTRAL, "dash": "dot", "width": 1.5}


class FeatureGamma(NamedTuple):
    """Per-feature gamma of one SAE; those that fired too seldom to tell are hidden."""

    spec: SAESpec
    stats: pd.DataFrame  # of the features shown
    n_features: int  # shown or hidden

    def sentence(self, min_fired: int, unit: str = "token") -> str:
        """Say how many features are shown, and the median of their gammas; `unit`: of firings."""
        n, gammas = len(self.stats), self.stats["gamma"]
        shown = f"{n:,} of {self.n_features:,} features fired on {min_fired:,} {unit}s or more"
        median = f"; the median of their own γ is {gammas.median():.3f}" if n else ""
        return f"{hover_name(self.spec)}: {shown}{median}."


class Bins(NamedTuple):
    """Common bins of gamma; the first and the last also hold what lies beyond them."""

    edges: np.ndarray
    width: float
    labels: list[str]
    """Name of each bin, as lists and addresses show it."""

    def place(self, stats: pd.DataFrame) -> np.ndarray:
        """Return the number of the bin of each feature, by its `gamma`."""
        return np.digitize(stats["gamma"].to_numpy(), self.edges[1:-1])

    def counts(self, stats: pd.DataFrame) -> np.ndarray:
        """Return how many features lie in each bin."""
        return np.bincount(self.place(stats), minlength=len(self.edges) - 1)


def range_text(label: str) -> str:
    """Return the label of a bin as `filter.parse_range` reads it; the outer bins are open."""
    return label.replace("below", "to").replace("or more", "to")


def select_features(spec: SAESpec, stats: pd.DataFrame, *, min_fired: int) -> FeatureGamma:
    """Return the features that fired at least `min_fired` times and have a gamma."""
    shown = pd.DataFrame(stats[stats["fired"] >= min_fired]).dropna(subset="gamma")
    return FeatureGamma(spec, shown, len(stats))


def gamma_histogram(
    features: Sequence[FeatureGamma], *, bins: Bins, chosen: str | None = None
) -> go.Figure:
    """Return the share of features per bin of gamma, with the bin labelled `chosen` marked.

    A bar's `customdata` begins with its bin's label, which is what a click reports.
    """
    labels, centres = bins.labels, bins.edges[:-1] + bins.width / 2
    figure = go.Figure()
    for feature in features:
        look = LOOKS[feature.spec.architecture]
        counts, n = bins.counts(feature.stats), len(feature.stats)
        figure.add_bar(
            x=centres.tolist(),
            y=(counts / max(n, 1)).tolist(),
            width=bins.width,
            name=f"{hover_name(feature.spec)} (N = {n:,})",
            marker={
                "color": look.colour,
                "line": {"width": 0},
                "pattern": {"shape": "" if look.dash == (1, 0) else "/", "size": 5},
            },
            opacity=0.6,
            unselected={"marker": {"opacity": 0.6}},
            selected={"marker": {"opacity": 0.6}},
            customdata=[[label, int(count)] for label, count in zip(labels, counts, strict=True)],
            hovertemplate=hover(
                hover_name(feature.spec),
                "γ %{customdata[0]}",
                "%{y:.1%} of the features shown (%{customdata[1]:,})",
            ),
        )
    if chosen in labels:
        left = float(bins.edges[labels.index(chosen)])
        figure.add_vrect(
            x0=left, x1=left + bins.width, fillcolor=NEUTRAL, opacity=0.25, line_width=0
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.add_vline(x=1, line=RULE)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return style(figure, x="γ of the feature", y="share of the features shown")


def histogram_table(features: Sequence[FeatureGamma], bins: Bins) -> pd.DataFrame:
    """Return the counts the histogram draws, one row per bin and one column per SAE."""
    counts = {feature.spec.name: bins.counts(feature.stats) for feature in features}
    return pd.DataFrame({"γ": bins.labels} | counts)


def features_in_bin(features: Sequence[FeatureGamma], bins: Bins, label: str) -> pd.DataFrame:
    """Return the features of one bin, those that fired most first.

    Columns: `sae`, `latent`, `gamma`, `density`, `fired`, `gate_open`.
    """
    number = bins.labels.index(label)
    found = {f.spec.name: f.stats[bins.place(f.stats) == number] for f in features}
    table = pd.concat(found, names=["sae", "latent"]).reset_index()
    columns = ["sae", "latent", "gamma", "density", "fired", "gate_open"]
    return table.sort_values("fired", ascending=False).loc[:, columns]


def common_bins(features: Sequence[FeatureGamma]) -> Bins:
    """Return bins that span 99 % of the gammas shown, and gamma = 1; of few features, fewer.

    In a few hundred one runaway is within those 99 %: none counts that is beyond ten times the
    distance between the quartiles.
    Edges are multiples of `BIN`, or of `BIN` doubled until no more than `MAX_BINS` are needed.
    """
    pooled = np.concatenate([*(f.stats["gamma"].to_numpy() for f in features), np.array([1.0])])
    low, first, third, high = np.quantile(pooled, [0.005, 0.25, 0.75, 0.995])
    reach = 10 * (third - first)
    low, high = max(low, first - reach), min(high, third + reach)
    low, high, width = min(low, 1.0 - BIN), max(high, 1.0 + BIN), BIN
    while (high - low) / width > MAX_BINS - 3:
        width *= 2
    first, last = math.floor(low / width) - 1, math.ceil(high / width) + 1
    edges = np.arange(first, last + 1) * width
    inner = [f"{low:.3f} to {high:.3f}" for low, high in pairwise(edges)]
    labels = [f"below {edges[1]:.3f}", *inner[1:-1], f"{edges[-2]:.3f} or more"]
    return Bins(edges, width, labels)


def gamma_against_density(features: Sequence[FeatureGamma], *, unit: str = "token") -> go.Figure:
    """Return each feature's gamma against how often it fires, on the histogram's range of gamma.

    One runaway feature would flatten all the others: a note counts those beyond the range. Of more
    than `MAX_DOTS` features one in n is drawn, and the note says so. `unit`: what density is of.
    """
    figure = go.Figure()
    edges = common_bins(features).edges
    low, high = float(edges[0]), float(edges[-1])
    beyond, one_in = 0, 1
    for feature in features:
        look = LOOKS[feature.spec.architecture]
        stats = feature.stats.query("density > 0")
        beyond += int((~stats["gamma"].between(low, high)).sum())
        every = -(-len(stats) // MAX_DOTS) or 1
        one_in, stats = max(one_in, every), stats.iloc[::every]
        figure.add_scatter(
            # Arrays: Plotly checks lists number by number, which took half of the page's time.
            x=stats["density"].to_numpy(),
            y=stats["gamma"].to_numpy(),
            mode="markers",
            name=hover_name(feature.spec),
            marker={"color": look.colour, "symbol": look.shape, "size": 5, "opacity": 0.6},
            customdata=stats.index.to_numpy(),
            hovertemplate=hover(
                hover_name(feature.spec), "feature %{customdata}", "density %{x:.2~g}", "γ %{y:.3f}"
            ),
        )
    figure.add_hline(y=1, line=RULE)
    figure.update_yaxes(range=[low, high])
    notes = [f"beyond the axis: {beyond:,}"] if beyond else []
    notes += [f"one feature in {one_in} drawn"] if one_in > 1 else []
    if notes:
        corner = {"x": 1, "y": 0, "yref": "paper", "yanchor": "bottom", "align": "right"}
        _note(figure, "<br>".join(notes), **corner)
    figure.update_xaxes(LOG)
    return style(figure, x=in_units(AXES["density"], unit), y="γ of the feature")


Length = Literal["ratio", "gamma"]

LENGTH_AXES: dict[Length, str] = {
    "ratio": "length ratio |x̂| / |x|",
    "gamma": "γ of the tenth's tokens",
}


def gamma_over_sweep(evals: pd.DataFrame, *, paper: pd.DataFrame | None = None) -> go.Figure:
    """Return gamma against L0 of each architecture and of the gate path; 1 means no shrinkage.

    `evals` are `results.evaluation_frame`'s rows; `results.published`'s are drawn faint behind.
    """
    figure = go.Figure()
    if paper is not None:
        draw_paper(figure, placed(paper, "l0", "gamma"), "gamma")
    for architecture, look in LOOKS.items():
        name = f"{look.label}, output" if architecture == "gated" else look.label
        series = [(name, "gamma", look.colour, look.shape, dash_of(look))]
        if architecture == "gated":
            series.append((f"{look.label}, gate path", "gamma_gate", THIRD, "triangle-down", "dot"))
        for name, column, colour, symbol, dash in series:
            rows = placed(of_architecture(evals, architecture), "l0", column).sort_values("l0")
            if len(rows):
                figure.add_scatter(**dots(rows, "l0", column, name), **_curve(colour, symbol, dash))
    draw_worse(figure, pd.DataFrame(evals[evals["l0"] > 0]), "l0", "gamma")
    _rule_at_one(figure, "no shrinkage")
    x = in_units(AXES["l0"], unit_measured(evals))
    return style(figure, x=x, y=AXES["gamma"], log_x=True)


def lengths_by_decile(
    deciles: Sequence[tuple[SAESpec, pd.DataFrame]],
    column: Length = "ratio",
    *,
    unit: str = "token",
) -> go.Figure:
    """Return the ratio of lengths, or gamma, from the shortest tenth of activations to the longest.

    `deciles` is each SAE and its `Run.norm_deciles`; `unit`: what they are tenths of.
    """
    figure, y = go.Figure(), in_units(LENGTH_AXES[column], unit)
    for spec, frame in deciles:
        look, name = LOOKS[spec.architecture], hover_name(spec)
        figure.add_scatter(
            **columns(frame, "decile", column),
            **_curve(look.colour, look.shape, dash_of(look)),
            name=name,
            customdata=[[f"{norm:.4g}"] for norm in frame["norm"]],
            hovertemplate=hover(
                name,
                f"tenth %{{x}} of the {unit}s, |x| about %{{customdata[0]}}",
                f"{y} %{{y:.3f}}",
            ),
        )
    _rule_at_one(figure, "no shrinkage" if column == "gamma" else "|x̂| = |x|")
    figure.update_xaxes(tickvals=list(range(1, 11)), range=[0.5, 10.5])
    return style(figure, x=f"tenth of the {unit}s, shortest activations first", y=y)


def _curve(colour: str, symbol: str, dash: str) -> dict[str, Any]:
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"symbol": symbol, "size": 10},
    }


def _rule_at_one(figure: go.Figure, text: str) -> None:
    """Draw the line where nothing is too short, and say so."""
    figure.add_hline(y=1, line=RULE)
    # On the left, where the dense end of a Gated curve, close to 1, does not run through it.
    _note(figure, text, x=0, xanchor="left", y=1, yanchor="bottom")


def _note(figure: go.Figure, text: str, **place: Any) -> None:
    place |= {"xref": "paper", "showarrow": False, "font": {"size": 12, "color": NEUTRAL}}
    figure.add_annotation(text=text, **place)
