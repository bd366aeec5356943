"""Shrinkage: how much too short reconstructions are, per SAE and per feature."""

import pandas as pd
import streamlit as st

from gsae_core.analysis.results import (
    baselines,
    nearest_pair,
    published,
)
from gsae_core.app import cache, shell
from gsae_core.app.glossary import definition
from gsae_core.app.parts import (
    correct,
    escape_markdown,
    figure_tools,
    key_for,
    notice,
    plain,
    say_worse,
    settle,
    write,
)
from gsae_core.app.pickers import alongside, choice, paper_site
from gsae_core.errors import InputError
from gsae_core.plots.palette import hover_name
from gsae_core.plots.shrinkage import (
    Bins,
    FeatureGamma,
    Length,
    common_bins,
    features_in_bin,
    gamma_against_density,
    gamma_histogram,
    gamma_over_sweep,
    histogram_table,
    lengths_by_decile,
    range_text,
    select_features,
)
from gsae_core.text import fixed, in_units

CONFIG = {"displaylogo": False}
LIMITS = [1, 3, 10, 30, 100, 300, 1000]
MAX_ROWS = 2000
FEATURES = "pages/5_Features.py"
TWO_GAMMAS = (
    "γ at the top of the page measures whole reconstructions, over all tokens. γ here measures one "
    "feature's part of them, with all other parts left as they are. The median counts every "
    "feature once, rare and weak ones too, so it may be far from the SAE's γ."
)
# Labels first: the address holds what a bound widget shows.
LENGTHS: dict[str, Length] = {"length ratio": "ratio", "γ": "gamma"}

frame = shell.page(
    "Shrinkage",
    icon="📏",
    purpose="Relative reconstruction bias γ: 1 is unbiased, below 1 reconstructions are too short.",
)
run = shell.need_run(frame, "γ and its histograms")
shell.need_evals(run)
evals, unit = cache.evaluations(run), run.config.unit
specs = {spec.name: spec for spec in run.config.saes}
rows = evals.set_index("name")


def hook_of(name: str, before: str) -> str:
    """Return the hook point that an SAE reads behind some words; nothing of a run of one."""
    several = len(run.config.places) > 1
    return before + escape_markdown(run.config.place_of(name).hook_name) if several else ""


def choose() -> dict[str, str | None]:
    """Draw a picker for each side; the pair nearest in L0 is chosen to begin with."""
    names = alongside(run, run.config.saes[0].name, list(evals["name"]))
    pair = dict(nearest_pair(pd.DataFrame(evals[evals["name"].isin(names)])))
    gated = list(evals.loc[evals["architecture"] == "gated", "name"])
    sides = {"gated": ("Gated SAE", gated), "base": ("Baseline", list(baselines(evals)["name"]))}
    opened = st.session_state.pop("shrinkage.open_sae", None)
    chosen: dict[str, str | None] = {}
    for cell, (side, (label, names)) in zip(st.columns(2), sides.items(), strict=True):
        with cell:
            key = key_for(f"shrinkage.{side}", run.id)
            what = "SAE of this run to show here"
            settle(side, names, key=key, default=pair.get(side), what=what)
            if opened in names:
                st.session_state[key] = opened
            name = chosen[side] = st.selectbox(
                label,
                names,
                key=key,
                persist_state="session",
                placeholder="none in this run",
                disabled=not names,
            )
            # Pareto's address has a baseline of this name too, a run: so it is not bound here.
            write({side: name if name != pair.get(side) else None})
            if name is not None:
                said = f"{hover_name(specs[name])} · L0 {fixed(rows.loc[name, 'l0'], 1)}"
                st.caption(f"{said}{hook_of(name, ' · ')}")
    say_worse({name: float(rows.loc[name, "fvu"]) for name in chosen.values() if name})
    return chosen


def about(term: str) -> str:
    return in_units(definition(term), unit)


def headline() -> None:
    """Draw the three gammas."""
    one, two, three = st.columns(3, border=True)
    for cell, label, name, number in (
        (one, "γ gated, output", gated, "gamma"),
        (two, "γ gated, gate path", gated, "gamma_gate"),
        (three, "γ baseline", base, "gamma"),
    ):
        value = fixed(float(rows.loc[name, number])) if name else "–"
        cell.metric(label, value, help=about(number))


def evals_here() -> pd.DataFrame:
    """Return the evaluations of the SAEs that read what the first one chosen does."""
    name = gated or base
    here = list(evals["name"]) if name is None else alongside(run, name, list(evals["name"]))
    return pd.DataFrame(evals[evals["name"].isin(here)])


def over_the_sweep() -> None:
    """Draw gamma against L0, and the paper's behind it."""
    st.subheader("Over the sweep", anchor=False, help=about("gamma"))
    place = paper_site()
    st.plotly_chart(
        gamma_over_sweep(evals_here(), paper=None if place is None else published(place)),
        key="shrinkage.sweep",
        config=CONFIG,
        alt="γ against L0 for every architecture, and for the gate path",
    )
    if (name := gated or base) and (of := hook_of(name, "SAEs at ")):
        st.caption(f"{of}.")
    columns = ["name", "architecture", "sparsity", "l0", "gamma", "gamma_gate"]
    figure_tools(evals_here().loc[:, columns], name="sweep", about=about("gamma"))
    if place is not None:
        st.caption(
            f"Faint: {place.model}, {place.site} of block {place.layer}, as printed in "
            f"{place.source}; rows with an L0 of 0 or below are not shown."
        )


def by_length() -> None:
    """Draw lengths of reconstructions from the shortest activations to the longest."""
    st.subheader("By length of the activation", anchor=False, help=about("norm_ratio"))
    label = choice(
        "Measure",
        LENGTHS,
        key="lengths",
        what="measure of length",
        shown="the length ratio",
        help=f"{about('norm_ratio')}\n\nγ: {about('norm_gamma')}",
    )
    try:
        found = [(specs[name], cache.deciles(run, name)) for name in chosen if name]
    except InputError as error:
        notice(str(error), kind="info", title="Lengths cannot be shown")
        st.code(f"python -m gsae_core evaluate {run.folder}", language=None, wrap_lines=True)
        return
    st.plotly_chart(
        lengths_by_decile(found, LENGTHS[label], unit=unit),
        key="shrinkage.deciles",
        config=CONFIG,
        alt=f"{label} of each tenth of the {unit}s, shortest activations first",
    )
    figure_tools(
        pd.concat([table.assign(sae=spec.name) for spec, table in found], ignore_index=True),
        name="lengths",
        about=about("norm_ratio" if LENGTHS[label] == "ratio" else "norm_gamma"),
    )


def feature_by_feature() -> None:
    """Draw gamma of every feature that fired often enough to tell."""
    st.subheader("Feature by feature", anchor=False, help=about("gamma_per_feature"))
    correct("minfire", [str(limit) for limit in LIMITS], what="limit offered", shown="30")
    min_fired = st.select_slider(
        f"Hide features that fired on fewer held-out {unit}s than",
        LIMITS,
        value=30,
        key="minfire",
        bind="query-params",
        help="γ of a feature that fired a few times is mostly noise.",
    )
    try:
        features = [
            select_features(specs[name], cache.feature_stats(run, name), min_fired=min_fired)
            for name in chosen
            if name
        ]
    except InputError as error:
        notice(str(error), kind="warning", title="No per-feature numbers yet")
        return
    for feature in features:
        plain(feature.sentence(min_fired, unit), size=".9rem")
    st.caption(in_units(TWO_GAMMAS, unit))
    if not any(len(feature.stats) for feature in features):
        notice("The limit hides every feature; lower it.", kind="info")
        st.button(
            "Show all that fired",
            key="shrinkage.show_all",
            on_click=st.session_state.update,
            args=({"minfire": LIMITS[0]},),
        )
        return
    bins = common_bins(features)
    correct("bin", bins.labels, what="bin of γ here", shown="no list of features")
    spot = st.container()
    label = st.selectbox(
        "Features of a bin",
        bins.labels,
        index=None,
        key="bin",
        bind="query-params",
        placeholder="click a bar, or choose a range of γ",
    )
    with spot:
        figures(features, bins, label)
    if label is not None:
        listing(features, bins, label)


def remember_bin() -> None:
    """Choose the bin that was clicked."""
    points = st.session_state["shrinkage.histogram"]["selection"]["points"]
    if points and points[0].get("customdata"):
        st.session_state["bin"] = points[0]["customdata"][0]


def figures(features: list[FeatureGamma], bins: Bins, label: str | None) -> None:
    """Draw the histogram and gamma against density, side by side."""
    left, right = st.columns(2, gap="medium")
    with left:
        st.plotly_chart(
            gamma_histogram(features, bins=bins, chosen=label),
            key="shrinkage.histogram",
            on_select=remember_bin,
            selection_mode="points",
            config=CONFIG,
            alt="Share of features in each bin of γ",
        )
        said = about("gamma_per_feature")
        figure_tools(lambda: histogram_table(features, bins), name="histogram", about=said)
    with right:
        st.plotly_chart(
            gamma_against_density(features, unit=unit),
            key="shrinkage.scatter",
            config=CONFIG,
            alt="γ of each feature against its density",
        )
        figure_tools(lambda: every_feature(features), name="features", about=about("density"))


def every_feature(features: list[FeatureGamma]) -> pd.DataFrame:
    """Return the features shown of every SAE, one below the other."""
    tables = [f.stats.reset_index(names="latent").assign(sae=f.spec.name) for f in features]
    return pd.concat(tables, ignore_index=True)


def listing(features: list[FeatureGamma], bins: Bins, label: str) -> None:
    """Draw the features of a bin."""
    found = features_in_bin(features, bins, label)
    if found.empty:
        st.caption(f"No feature shown has γ {label}.")
        return
    number = st.column_config.NumberColumn
    picked = st.dataframe(
        found.head(MAX_ROWS),
        hide_index=True,
        key=f"shrinkage.listed_{label}",
        on_select="rerun",
        selection_mode="single-row",
        column_config={
            "sae": "SAE",
            "latent": number("feature", format="%d"),
            "gamma": number("γ", format="%.3f", help=about("gamma_per_feature")),
            "density": number(format="%.3g", help=about("density")),
            "fired": number("firings", format="localized", help=about("firings")),
            "gate_open": number("gate open", format="localized", help=about("gate_density")),
        },
        alt=f"Features with γ {label}: SAE, feature, γ, density and firings",
    )
    st.caption(
        f"{min(len(found), MAX_ROWS):,} of {len(found):,} features, most firings first; tick one "
        "to see where it fires."
    )
    between = range_text(label)
    if ticked := picked["selection"]["rows"]:
        row = found.iloc[ticked[0]]
        shell.go(FEATURES, run, sae=row["sae"], feature=str(row["latent"]), gamma=between)
    with st.container(horizontal=True):
        for name in found["sae"].unique():
            text = f"Features of {escape_markdown(name)} with γ {label}"
            if st.button(text, icon=":material/search:", key=f"shrinkage.features_of_{name}"):
                shell.go(FEATURES, run, sae=name, gamma=between)


pair = choose()
gated, base = pair["gated"], pair["base"]
chosen = (gated, base)
headline()
# What is chosen in a section concerns it alone: the rest of the page is not drawn anew.
for section in (over_the_sweep, by_length, feature_by_feature):
    st.fragment(section)()
