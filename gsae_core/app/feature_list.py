"""The list of features: how often they fire, which of them are wanted, and in what order."""

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from gsae_core.analysis.features.files import COLUMNS
from gsae_core.analysis.features.filter import (
    ANY,
    ORDERS,
    RANGES,
    Chosen,
    Life,
    Range,
    Wanted,
    choose,
    parse_range,
    range_text,
)
from gsae_core.app.feature_index import Opened
from gsae_core.app.parts import correct, figure_tools, notice, plain
from gsae_core.app.pickers import architecture, choice, ticked_row
from gsae_core.errors import InputError
from gsae_core.plots.features import density_histogram
from gsae_core.plots.palette import Theme
from gsae_core.text import in_units

MOST_ROWS = 2000
PARAMS = {
    "density": ("dens", "1e-4..1e-2"),
    "theta": ("theta", "0.5.."),
    "gamma": ("gamma", "0.8..1.2"),
    "fired": ("fired", "30.."),
}
"""Parameter of the address for each range, and an example."""
TEXTS = ("q", "label", *(param for param, _ in PARAMS.values()))
NUMBERS = {
    "density": ("density", "%.3g %%", 78),
    "max": ("max", "%.3g", 60),
    "theta": ("θ", "%.3g", 60),
    "gamma": ("γ", "%.3f", 60),
    "gain": ("e^r", "%.3g", 60),
    "gate_density": ("gate open", "%.3g %%", 86),
}
"""Columns of numbers: head, format, width in pixels."""
LIVES: tuple[Life, ...] = ("all", "alive", "dead")


def ask(unit: str) -> tuple[Wanted, str]:
    """Draw the search field, the filters and the order; return what is wanted.

    `unit`: what features fire on, a token or a vector with a caption.
    """
    about = "Features that fire on tokens with this text, the most specific first, and those whose "
    about += "label has it. Spaces and capitals count in tokens."
    hint = "part of a token or of a label, e.g. import"
    if unit == "vector":
        about, hint = in_units(about, "caption"), "part of a caption or of a label"
    text = st.text_input("Search", key="q", bind="query-params", placeholder=hint, help=about)
    usual = "best match" if text else "number"
    left, right = st.columns([1, 1.4], vertical_alignment="bottom")
    with left:
        wanted = _filters(text or "", unit)
    with right:
        correct("sort", list(ORDERS), what="order", shown="the usual one")
        order = st.selectbox(
            "Order",
            list(ORDERS),
            index=None,
            key="sort",
            bind="query-params",
            placeholder=usual,
            label_visibility="collapsed",
        )
    return wanted, usual if order in (None, "best match") else order


def _filters(text: str, unit: str) -> Wanted:
    """Draw the filters behind a button that says how many are in use."""
    filters = (*TEXTS[1:], "life", "star")
    held = [st.session_state.get(key, st.query_params.get(key)) for key in filters]
    used = sum(value not in (None, "", "all", False, "false") for value in held)
    label = f"Filters ({used})" if used else "Filters"
    with st.popover(label, icon=":material/filter_list:", width="stretch", key="features.filters"):
        ranges = {name: _range(name, title, unit) for name, title in RANGES.items()}
        about = f"A dead feature fired on none of the {unit}s that were read."
        life = choice("Features", LIVES, key="life", what="choice here", help=about)
        label = st.text_input("Label contains", key="label", bind="query-params")
        starred = st.toggle("Starred only", key="star", bind="query-params")
        _clear_button("Clear all", key="features.clear")
    return Wanted(**ranges, life=life, starred=starred, label=label or "", text=text)


def _range(name: str, title: str, unit: str) -> Range:
    param, example = PARAMS[name]
    label = title.capitalize() if title.isascii() else title
    hint, about = f"from..to, e.g. {example}", in_units(COLUMNS[name], unit)
    asked = st.text_input(label, key=param, bind="query-params", placeholder=hint, help=about)
    try:
        return parse_range(asked or "", title)
    except InputError as error:
        plain(f"{error}; it filters nothing as it is.", size=".875rem")
        return ANY


def _clear_button(label: str, *, key: str) -> None:
    usual = dict.fromkeys(TEXTS, "") | {"life": "all", "star": False}
    icon = ":material/filter_list_off:"
    st.button(label, key=key, on_click=st.session_state.update, args=(usual,), icon=icon)


def find(sae: Opened, wanted: Wanted, order: str) -> Chosen:
    """Return the rows that are wanted."""
    if sae.index is None:
        said = pd.DataFrame(columns=["label", "star", "author", "model", "score"], dtype=object)
        return choose(sae.rows, wanted, said=said, order=order)
    matches = None
    if wanted.text:
        found = sae.index.by_text(wanted.text)
        matches = dict(zip(found["feature"].tolist(), found["f1"].tolist(), strict=True))
    said = sae.index.labels.frame()
    return choose(sae.rows, wanted, said=said, matches=matches, order=order)


def density_chart(sae: Opened, chosen: Chosen, theme: Theme) -> None:
    """Draw how often features fire; a click on a bar lists its features, a click beside all."""
    density = sae.rows["density"].to_numpy(dtype=float)
    kept = sae.rows["feature"].isin(chosen.rows["feature"]).to_numpy()
    kind = architecture(sae.run, sae.name)
    chart = density_histogram(density, kept, theme=theme, architecture=kind, unit=sae.unit)
    if not chart.data["n"].to_numpy().any():
        return

    def clicked() -> None:
        sent = st.session_state["features.density"]["selection"].get("bar")
        st.session_state["dens"] = bar_range(sent)

    st.vega_lite_chart(
        chart.data,
        chart.spec,
        key="features.density",
        on_select=clicked,
        selection_mode="bar",
        alt="How many features fire how often; a click on a bar lists its features",
    )
    n_dead = int((sae.rows["fired"].to_numpy(dtype=float) == 0).sum())
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"Click a bar to list its features. Dead, off the log axis: {n_dead:,}.")
        figure_tools(chart.data, name="densities", about=in_units(COLUMNS["density"], sae.unit))


def bar_range(sent: Any) -> str:
    """Return the range of densities a browser says was clicked, as the filter reads it."""
    try:
        ends = [float(bar[end]) for bar in sent or [] for end in ("low", "high")]
    except (KeyError, TypeError, ValueError):
        return ""
    return range_text(min(ends), max(ends)) if ends else ""


def table(sae: Opened, chosen: Chosen, *, current: int | None) -> None:
    """Draw the list, and say how much of it is shown."""
    n = len(chosen.rows)
    everything = n > MOST_ROWS and bool(st.session_state.get("features.everything"))
    rows = chosen.rows if everything else chosen.rows.head(MOST_ROWS)
    features = rows["feature"].to_numpy()
    at = (features == current).nonzero()[0]
    number = st.column_config.NumberColumn

    def picked() -> None:
        row = ticked_row(st.session_state["features.list"], len(features))
        if row is not None:
            go_to(int(features[row]))

    st.dataframe(
        rows.assign(density=100 * rows["density"], gate_density=100 * rows["gate_density"]),
        hide_index=True,
        height=min(38 + 35 * max(len(rows), 1), 560),
        key="features.list",
        on_select=picked,
        selection_mode="single-row-required",
        selection_default={"selection": {"rows": [int(at[0]) if len(at) else 0]}},
        column_order=_columns(sae, rows),
        column_config={
            "star": st.column_config.CheckboxColumn("★", width=36, help="Starred"),
            "feature": number("feature", format="%d", width=62, pinned=True),
            "tokens": st.column_config.TextColumn("fires on", help=COLUMNS["top_tokens"]),
            "by": st.column_config.TextColumn("by", help="Who wrote the label; 0.5 is guessing"),
            **{
                name: number(
                    title, format=form, width=width, help=in_units(COLUMNS[name], sae.unit)
                )
                for name, (title, form, width) in NUMBERS.items()
            },
        },
        alt="The features that the filters leave: number, what they fire on, and their numbers",
    )
    fit = f"; {n:,} fit the filters" if len(rows) < n < chosen.n_all else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"{len(rows):,} of {chosen.n_all:,} features{fit}.")
        if n > MOST_ROWS:
            st.toggle("All rows", key="features.everything")
    if "γ" in chosen.excluded and sae.index is not None:
        about = f"γ here is over the index's {sae.unit}s; that of Shrinkage is over held-out ones."
        st.caption(about)


def _columns(sae: Opened, rows: pd.DataFrame) -> list[str]:
    """Return the columns that say anything of this SAE."""
    gated = architecture(sae.run, sae.name) == "gated"
    numbers = [name for name in NUMBERS if gated or name not in ("gain", "gate_density")]
    return [
        "feature",
        *["star"] * bool(rows["star"].any()),
        *["label", "by"] * bool((rows["label"] != "").any()),
        *["tokens"] * (sae.index is not None),
        *(n for n in numbers if np.isfinite(sae.rows[n].to_numpy(dtype=float)).any()),
    ]


def go_to(feature: int) -> None:
    """Show a feature; for callbacks, before its field is drawn."""
    st.session_state["feature"] = feature


def landing(sae: Opened, chosen: Chosen) -> int:
    """Return the feature to begin with: of a filtered list the first, else one that is rare."""
    if 0 < len(chosen.rows) < chosen.n_all:
        return int(chosen.rows["feature"].iloc[0])
    density = sae.rows["density"].to_numpy(dtype=float)
    for low, high in ((1e-4, 0.02), (0.0, 1.0)):
        found = ((density > low) & (density <= high)).nonzero()[0]
        if len(found):
            return int(found[0])
    return 0


def nothing_left(sae: Opened, chosen: Chosen) -> None:
    """Say that no feature is left, which filter excludes most, and offer to clear them."""
    name, n = next(iter(chosen.excluded.items()))
    text = f"The filter on {name} excludes most: {n:,} of {chosen.n_all:,} features."
    if name == "search" and sae.index is None:
        text += " Only labels are searched until there is an index."
    elif name == "search":
        text += " A token is a piece of a word; try a shorter text." * (sae.unit == "token")
    notice(text, kind="info", title="No feature is left")
    _clear_button("Clear filters", key="features.clear_all")
