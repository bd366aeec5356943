"""Shrinkage: how much too short reconstructions are, for the SAE and for each feature."""

import streamlit as st

from gsae_core import shell
from gsae_core.errors import InputError
from gsae_core.glossary import definition
from gsae_core.pieces import notice, plain
from gsae_core.plots.curves import evaluation_frame
from gsae_core.plots.palette import hover_name
from gsae_core.plots.shrinkage import (
    FeatureGamma,
    gamma_against_density,
    gamma_histogram,
    gamma_over_sweep,
    nearest_pair,
    select_features,
)
from gsae_core.wording import fixed

CONFIG = {"displaylogo": False}

frame = shell.page(
    "Shrinkage",
    icon="📏",
    purpose="Whether reconstructions are as long as they should be: γ is 1, or less if shrunk.",
)
run = shell.need_run(frame, "γ and its histograms")
evals = evaluation_frame(shell.need_evals(run))
specs = {spec.name: spec for spec in run.config.saes}
rows = evals.set_index("name")
pair = nearest_pair(evals)


def choose() -> dict[str, str | None]:
    """Draw one picker per architecture; the pair nearest in L0 is chosen to begin with."""
    chosen: dict[str, str | None] = {}
    for cell, (architecture, key, label) in zip(
        st.columns(2), (("gated", "gated", "Gated SAE"), ("relu", "base", "Baseline")), strict=True
    ):
        names = list(evals.loc[evals["architecture"] == architecture, "name"])
        with cell:
            chosen[architecture] = st.selectbox(
                label,
                names,
                index=names.index(pair[architecture]) if names else None,
                key=key,
                bind="query-params",
                placeholder="none in this run",
                disabled=not names,
            )
    return chosen


def headline(gated: str | None, base: str | None) -> None:
    """Draw the three gammas."""
    one, two, three = st.columns(3, border=True)
    one.metric(
        "γ gated, output",
        fixed(rows.loc[gated, "gamma"]) if gated else "–",
        help=definition("gamma"),
    )
    two.metric(
        "γ gated, gate path",
        fixed(rows.loc[gated, "gamma_gate"]) if gated else "–",
        help=definition("gamma_gate"),
    )
    three.metric(
        "γ baseline", fixed(rows.loc[base, "gamma"]) if base else "–", help=definition("gamma")
    )


def statistics(names: list[str], min_fired: int) -> list[FeatureGamma]:
    """Return the features to draw, or say why there are none."""
    try:
        return [
            select_features(specs[name], run.feature_stats(name), min_fired=min_fired)
            for name in names
        ]
    except InputError as error:
        notice(str(error), kind="warning", title="No per-feature numbers yet")
        st.stop()


chosen = choose()
headline(chosen["gated"], chosen["relu"])

st.subheader("Over the sweep", anchor=False)
st.plotly_chart(
    gamma_over_sweep(evals),
    key="sweep",
    config=CONFIG,
    alt="γ against L0 for the gated output, its gate path and the baseline",
)
with st.expander("Show as table"):
    st.dataframe(
        evals.loc[:, ["name", "l0", "gamma", "gamma_gate"]].rename(
            columns={"name": "SAE", "l0": "L0", "gamma": "γ", "gamma_gate": "γ gate path"}
        ),
        hide_index=True,
        column_config={
            "L0": st.column_config.NumberColumn(format="%.1f"),
            "γ": st.column_config.NumberColumn(format="%.3f"),
            "γ gate path": st.column_config.NumberColumn(format="%.3f"),
        },
        alt="γ of every SAE of the run",
    )

st.subheader("Feature by feature", anchor=False, help=definition("gamma_per_feature"))
min_fired = st.select_slider(
    "Hide features that fired on fewer held-out tokens than",
    [1, 3, 10, 30, 100, 300, 1000],
    value=30,
    key="minfire",
    bind="query-params",
    help="γ of a feature that fired a few times is mostly noise.",
)
features = statistics([name for name in chosen.values() if name], min_fired)
for feature in features:
    plain(
        f"{hover_name(feature.spec)}: {len(feature.stats):,} of {feature.n_features:,} features "
        f"fired on {min_fired:,} tokens or more; their median γ is {fixed(feature.median)}.",
        size=".9rem",
    )
if any(len(feature.stats) for feature in features):
    left, right = st.columns(2, gap="medium")
    left.plotly_chart(
        gamma_histogram(features),
        key="histogram",
        config=CONFIG,
        alt="Share of features in each bin of γ",
    )
    right.plotly_chart(
        gamma_against_density(features),
        key="scatter",
        config=CONFIG,
        alt="γ of each feature against its density",
    )
else:
    notice(f"No feature fired on {min_fired:,} tokens or more; lower the limit.", kind="info")
