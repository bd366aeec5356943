"""Figures of shrinkage, in Plotly: gamma over a sweep, gamma per feature, gamma against density."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from gsae_core.config import Architecture, SAESpec
from gsae_core.plots.curves import hover, of_architecture, style, traces
from gsae_core.plots.palette import AXES, LOOKS, NEUTRAL, THIRD, hover_name

BIN = 0.025  # width of a gamma bin
MAX_DOTS = 2000  # dots per SAE in a scatter: more hide each other and slow the page


class FeatureGamma(NamedTuple):
    """Per-feature gamma of one SAE, after hiding features that fired too seldom to tell."""

    spec: SAESpec
    stats: pd.DataFrame
    n_features: int
    n_hidden: int

    @property
    def median(self) -> float:
        """Median gamma of the features shown; NaN if none is."""
        return float(np.median(self.stats["gamma"])) if len(self.stats) else math.nan


def select_features(spec: SAESpec, stats: pd.DataFrame, *, min_fired: int) -> FeatureGamma:
    """Return the features that fired at least `min_fired` times and have a gamma."""
    shown = pd.DataFrame(stats[stats["fired"] >= min_fired]).dropna(subset="gamma")
    return FeatureGamma(spec, shown, len(stats), len(stats) - len(shown))


def gamma_over_sweep(evals: pd.DataFrame) -> go.Figure:
    """Return gamma against L0: gated output, its gate path, and the baseline; 1 means no shrinkage.

    Args:
        evals: `curves.evaluation_frame`'s rows.
    """
    gated, relu = LOOKS["gated"], LOOKS["relu"]
    series: list[tuple[Architecture, str, str, str, str, str]] = [
        ("gated", "gamma", f"{gated.label}, output", gated.colour, gated.plotly_symbol, "solid"),
        ("gated", "gamma_gate", "Gated, gate path", THIRD, "triangle-up", "dot"),
        ("relu", "gamma", relu.label, relu.colour, relu.plotly_symbol, "dash"),
    ]
    figure = go.Figure()
    for architecture, column, label, colour, symbol, dash in series:
        rows = of_architecture(evals, architecture).dropna(subset=column)
        rows = rows.sort_values("l0")
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["l0"].to_list(),
            y=rows[column].to_list(),
            mode="lines+markers",
            name=label,
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 10},
            customdata=[
                [name, f"{sparsity:g}"]
                for name, sparsity in zip(rows["name"], rows["sparsity"], strict=True)
            ],
            hovertemplate=hover(label, "λ %{customdata[1]}", "L0 %{x:.1f}", "γ %{y:.3f}"),
        )
    figure.add_hline(y=1, line={"color": NEUTRAL, "dash": "dot", "width": 1.5})
    # On the left, where the dense end of a Gated curve, close to 1, does not run through it.
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yanchor="bottom",
        showarrow=False,
        text="no shrinkage",
        font={"size": 12, "color": NEUTRAL},
    )
    return style(figure, x=AXES["l0"], y=AXES["gamma"], log_x=True)


def gamma_histogram(features: Sequence[FeatureGamma]) -> go.Figure:
    """Return the share of features per bin of gamma, all SAEs on the same bins.

    Values beyond the axis are counted in its first and last bin.
    """
    edges = common_bins([f.stats["gamma"].to_numpy() for f in features])
    centres = (edges[:-1] + edges[1:]) / 2
    figure = go.Figure()
    for feature in features:
        look = LOOKS[feature.spec.architecture]
        values = np.clip(feature.stats["gamma"].to_numpy(), edges[0], edges[-1] - BIN / 2)
        counts, _ = np.histogram(values, bins=edges)
        share = counts / max(len(values), 1)
        figure.add_bar(
            x=centres.tolist(),
            y=share.tolist(),
            width=BIN,
            name=f"{hover_name(feature.spec)} (N = {len(values):,})",
            marker={
                "color": look.colour,
                "line": {"width": 0},
                "pattern": {"shape": "" if look.dash == (1, 0) else "/", "size": 5},
            },
            opacity=0.6,
            customdata=[[int(count)] for count in counts],
            hovertemplate=hover(
                hover_name(feature.spec),
                "γ about %{x:.3f}",
                "%{y:.1%} of the features shown (%{customdata[0]:,})",
            ),
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.add_vline(x=1, line={"color": NEUTRAL, "dash": "dot", "width": 1.5})
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return style(figure, x="γ of the feature", y="share of the features shown")


def common_bins(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return bin edges, multiples of `BIN`, that span 99 % of all values and gamma = 1."""
    pooled = np.concatenate([*values, np.array([1.0])])
    low, high = np.quantile(pooled, [0.005, 0.995])
    first = int(np.floor(min(low, 1.0) / BIN)) - 1
    last = int(np.ceil(max(high, 1.0) / BIN)) + 1
    return np.arange(first, last + 1) * BIN


def gamma_against_density(features: Sequence[FeatureGamma]) -> go.Figure:
    """Return each feature's gamma against how often it fires, on the histogram's range of gamma.

    One runaway feature would flatten all the others; how many lie beyond is said.
    """
    figure = go.Figure()
    for feature in features:
        look = LOOKS[feature.spec.architecture]
        stats = feature.stats.query("density > 0")
        stats = stats.iloc[:: -(-len(stats) // MAX_DOTS) or 1]
        figure.add_scatter(
            x=stats["density"].to_list(),
            y=stats["gamma"].to_list(),
            mode="markers",
            name=hover_name(feature.spec),
            marker={"color": look.colour, "symbol": look.plotly_symbol, "size": 5, "opacity": 0.5},
            customdata=[[int(latent)] for latent in stats.index],
            hovertemplate=hover(
                hover_name(feature.spec),
                "feature %{customdata[0]}",
                "density %{x:.2~g}",
                "γ %{y:.3f}",
            ),
        )
    figure.add_hline(y=1, line={"color": NEUTRAL, "dash": "dot", "width": 1.5})
    edges = common_bins([feature.stats["gamma"].to_numpy() for feature in features])
    low, high = float(edges[0]), float(edges[-1])
    figure.update_yaxes(range=[low, high])
    beyond = sum(not low <= y <= high for trace in traces(figure) for y in trace.y)
    if beyond:
        figure.add_annotation(
            text=f"beyond the axis: {beyond:,}",
            x=1,
            xref="paper",
            y=0,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            font={"size": 12, "color": NEUTRAL},
        )
    return style(figure, x=AXES["density"], y="γ of the feature", log_x=True, decades=True)


def nearest_pair(evals: pd.DataFrame) -> Mapping[str, str]:
    """Return, by architecture, the names of the gated SAE and the baseline whose L0 are closest.

    An architecture that was not evaluated is missing.
    """
    gated = of_architecture(evals, "gated")
    relu = of_architecture(evals, "relu")
    if gated.empty or relu.empty:
        present = gated if relu.empty else relu
        return {str(row["architecture"]): str(row["name"]) for _, row in present.tail(1).iterrows()}
    pairs = gated.merge(relu, how="cross", suffixes=("_gated", "_relu"))
    log_l0 = np.log(pairs.loc[:, ["l0_gated", "l0_relu"]].to_numpy().clip(min=1e-9))
    best = pairs.iloc[int(np.abs(log_l0[:, 0] - log_l0[:, 1]).argmin())]
    return {"gated": str(best["name_gated"]), "relu": str(best["name_relu"])}
