"""The list of features: how often they fire, which of them are wanted, and in what order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from gsae_core.analysis.features.files import COLUMNS, MANIFEST, read_manifest
from gsae_core.analysis.features.filter import (
    ANY,
    ORDERS,
    RANGES,
    Chosen,
    Life,
    Range,
    Wanted,
    choose,
    listing,
    parse_range,
    range_text,
    weight_listing,
)
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.analysis.labels import Labels
from gsae_core.app import cache
from gsae_core.app.cache import Version, version
from gsae_core.app.parts import correct, figure_tools, notice, plain
from gsae_core.app.pickers import architecture
from gsae_core.errors import InputError
from gsae_core.plots.features import density_histogram
from gsae_core.plots.palette import Theme
from gsae_core.runs import run as launch
from gsae_core.runs.run import Run, is_example, labels_folder
from gsae_core.runs.work.index import index_folder


@dataclass(frozen=True)
class Opened:
    """An SAE as the page can show it."""

    run: Run
    name: str
    index: FeatureIndex | None
    """None where there is none, or none that can be read."""
    problem: str
    """Why an index that is there cannot be read."""
    rows: pd.DataFrame
    """A row per feature: `filter.listing`, or `filter.weight_listing` without an index."""

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return len(self.rows)


def open_sae(run: Run, name: str) -> Opened:
    """Return one of a run's SAEs with its index, if it has one that can be read.

    Raises:
        InputError: if not even its weights can be read.
    """
    problem, index = "", None
    try:
        index = open_index(run, name)
    except InputError as error:
        problem = str(error)
    if index is not None:
        return Opened(run, name, index, "", _listing(str(index.folder), index.manifest.made, index))
    try:
        stats = cache.feature_stats(run, name)
    except InputError:
        stats = None  # not evaluated: the weights alone
    return Opened(run, name, None, problem, weight_listing(weights_of(run, name), stats))


def open_index(run: Run, name: str) -> FeatureIndex | None:
    """Return the index of one of a run's SAEs; None if there is none.

    Raises:
        InputError: if it is of other weights, cut short, or a newer version's, or if its labels
            cannot be read.
    """
    folder = index_folder(run, name)
    if not (folder / MANIFEST).is_file():
        return None
    # At every look: a mapped file that was cut short since would end the server.
    manifest = read_manifest(folder)
    weights = version(run.sae_folder(name) / "cfg.json")
    said = labels_folder(launch.runs_root().absolute(), name) if is_example(run) else folder
    index = _index(str(folder), manifest.made, weights, str(said), _run=run, _name=name)
    index.labels.all()  # A file of them that cannot be read is told now, and once.
    return index


def weights_of(run: Run, name: str) -> pd.DataFrame:
    """Return what the weights of an SAE say of each feature: `table.weight_columns`.

    Raises:
        InputError: if the SAE cannot be read.
    """
    folder = run.sae_folder(name)
    return _weight_table(str(folder), version(folder / "sae_weights.safetensors"))


# Arguments with an underscore are no part of the key: what stands before them tells them apart.
@st.cache_resource(max_entries=8, show_spinner=False)
def _index(
    folder: str, made: float, weights: Version, said: str, _run: Run, _name: str
) -> FeatureIndex:
    index = _run.features(_name)
    index.labels = Labels(Path(said))
    return index


@st.cache_resource(max_entries=8, show_spinner=False)
def _listing(folder: str, made: float, _index: FeatureIndex) -> pd.DataFrame:
    # Shared by every visitor: read, never changed.
    return listing(_index)


@st.cache_resource(max_entries=8, show_spinner=False)
def _weight_table(folder: str, stamp: Version) -> pd.DataFrame:
    from gsae_core.analysis.features.table import weight_columns
    from gsae_core.checkpoints.checkpoint import load_sae

    return pd.DataFrame(weight_columns(load_sae(folder))).rename_axis("feature")


MOST_ROWS = 2000
PARAMS = {"density": "dens", "theta": "theta", "gamma": "gamma", "fired": "fired"}
"""Parameter of the address for each range."""
TEXTS = ("q", "label", *PARAMS.values())
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
EXAMPLES = {"density": "1e-4..1e-2", "theta": "0.5..", "gamma": "0.8..1.2", "fired": "30.."}


def ask(sae: Opened) -> tuple[Wanted, str]:
    """Draw the search field, the filters and the order; return what is wanted."""
    text = st.text_input(
        "Search",
        key="q",
        bind="query-params",
        placeholder="part of a token or of a label, e.g. import",
        help="Features that fire on tokens with this text, the most specific first, and those "
        "whose label has it. Spaces and capitals count in tokens.",
    )
    usual = "best match" if text else "number"
    left, right = st.columns([1, 1.4], vertical_alignment="bottom")
    with left:
        wanted = _filters(text or "")
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


def _filters(text: str) -> Wanted:
    """Draw the filters behind a button that says how many are in use."""
    used = _in_use()
    label = f"Filters ({used})" if used else "Filters"
    ranges: dict[str, Range] = {}
    with st.popover(label, icon=":material/filter_list:", width="stretch", key="features.filters"):
        for name, title in RANGES.items():
            ranges[name] = _range(name, title)
        correct("life", list(LIVES), what="choice here", shown="all")
        life = st.segmented_control(
            "Features",
            list(LIVES),
            default="all",
            required=True,
            key="life",
            bind="query-params",
            help="A dead feature fired on none of the tokens that were read.",
        )
        label = st.text_input("Label contains", key="label", bind="query-params")
        starred = st.toggle("Starred only", key="star", bind="query-params")
        st.button(
            "Clear all", key="features.clear", on_click=clear, icon=":material/filter_list_off:"
        )
    kept: Life = life if life in LIVES else "all"
    return Wanted(**ranges, life=kept, starred=starred, label=label or "", text=text)


def _range(name: str, title: str) -> Range:
    asked = st.text_input(
        title.capitalize() if title.isascii() else title,
        key=PARAMS[name],
        bind="query-params",
        placeholder=f"from..to, e.g. {EXAMPLES[name]}",
        help=COLUMNS[name],
    )
    try:
        return parse_range(asked or "", title)
    except InputError as error:
        plain(f"{error}; it filters nothing as it is.", size=".875rem")
        return ANY


def _in_use() -> int:
    """Return how many filters the popover holds values for."""
    texts = [st.session_state.get(key, st.query_params.get(key)) for key in TEXTS[1:]]
    life = st.session_state.get("life", st.query_params.get("life", "all"))
    star = st.session_state.get("star", st.query_params.get("star") == "true")
    return sum(bool(text) for text in texts) + (life not in (None, "all")) + bool(star)


def clear() -> None:
    """Ask for everything again."""
    for key in TEXTS:
        st.session_state[key] = ""
    st.session_state["life"], st.session_state["star"] = "all", False


def find(sae: Opened, wanted: Wanted, order: str) -> Chosen:
    """Return the rows that are wanted."""
    if sae.index is None:
        columns = ["label", "star", "author", "model", "score"]
        said = pd.DataFrame(columns=columns, dtype=object)
        return choose(sae.rows, wanted, said=said, order=order)
    matches = None
    if wanted.text:
        found = sae.index.by_text(wanted.text)
        matches = dict(zip(found["feature"].tolist(), found["f1"].tolist(), strict=True))
    said = sae.index.labels.frame()
    return choose(sae.rows, wanted, said=said, matches=matches, order=order)


def density_chart(sae: Opened, chosen: Chosen, theme: Theme) -> None:
    """Draw how often features fire; a click on a bar lists its features."""
    density = sae.rows["density"].to_numpy(dtype=float)
    kept = sae.rows["feature"].isin(chosen.rows["feature"]).to_numpy()
    kind = architecture(sae.run, sae.name)
    chart = density_histogram(density, kept, theme=theme, architecture=kind)
    if not chart.data["n"].to_numpy().any():
        return
    st.vega_lite_chart(
        chart.data,
        chart.spec,
        key="features.density",
        on_select=_remember_bar,
        selection_mode="bar",
        alt="How many features fire how often; a click on a bar lists its features",
    )
    n_dead = int((sae.rows["fired"].to_numpy(dtype=float) == 0).sum())
    dead = f" {n_dead:,} {'are' if n_dead > 1 else 'is'} dead, off a log axis." if n_dead else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"Click a bar to list its features.{dead}")
        figure_tools(chart.data, name="densities", about=COLUMNS["density"])


def _remember_bar() -> None:
    """Filter by the bar that was clicked; a click beside the bars asks for all again."""
    st.session_state["dens"] = bar_range(
        st.session_state["features.density"]["selection"].get("bar")
    )


def bar_range(sent: Any) -> str:
    """Return the range of densities a browser says was clicked, as the filter reads it."""
    try:
        ends = [(float(bar["low"]), float(bar["high"])) for bar in sent or []]
    except (KeyError, TypeError, ValueError):
        return ""
    if not ends:
        return ""
    return range_text(min(low for low, _ in ends), max(high for _, high in ends))


def table(sae: Opened, chosen: Chosen, *, current: int | None) -> None:
    """Draw the list, and say how much of it is shown."""
    n = len(chosen.rows)
    everything = n > MOST_ROWS and bool(st.session_state.get("features.everything"))
    rows = chosen.rows if everything else chosen.rows.head(MOST_ROWS)
    features = rows["feature"].to_numpy()
    at = (features == current).nonzero()[0]
    number = st.column_config.NumberColumn

    def picked() -> None:
        row = picked_row(st.session_state["features.list"], len(features))
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
            "label": st.column_config.TextColumn("label"),
            "by": st.column_config.TextColumn("by", help="Who wrote the label; 0.5 is guessing"),
            **{
                name: number(title, format=form, width=width, help=COLUMNS[name])
                for name, (title, form, width) in NUMBERS.items()
            },
        },
        alt="The features that the filters leave: number, what they fire on, and their numbers",
    )
    _count(chosen, len(rows))
    if "γ" in chosen.excluded and sae.index is not None:
        st.caption("γ here is over the index's tokens; that of Shrinkage is over held-out ones.")


def _count(chosen: Chosen, n_shown: int) -> None:
    n, n_all = len(chosen.rows), chosen.n_all
    text = f"All {n_all:,} features."
    if n_shown < n_all:
        fit = f" ({n:,} fit)" if n_shown < n < n_all else ""
        text = f"{n_shown:,} of {n_all:,} features{fit}."
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(text.replace(",", " "))
        if n > MOST_ROWS:
            st.toggle("All rows", key="features.everything")


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


def picked_row(event: Any, n_rows: int) -> int | None:
    """Return which row a browser says is ticked; None if that is none there is."""
    rows = event["selection"]["rows"]
    return int(rows[0]) if rows and 0 <= rows[0] < n_rows else None


def go_to(feature: int) -> None:
    """Show a feature; for callbacks, before its field is drawn."""
    st.session_state["feature"] = feature


def landing(sae: Opened, chosen: Chosen) -> int:
    """Return the feature to begin with: the first that fires on few tokens, but some.

    Of a list that is filtered it is the first.
    """
    if 0 < len(chosen.rows) < chosen.n_all:
        return int(chosen.rows["feature"].iloc[0])
    density = sae.rows["density"].to_numpy(dtype=float)
    for low, high in ((1e-4, 0.02), (0.0, 1.0)):
        found = ((density > low) & (density <= high)).nonzero()[0]
        if len(found):
            return int(found[0])
    return 0


def nothing_left(sae: Opened, chosen: Chosen, wanted: Wanted) -> None:
    """Say that no feature is left, which filter excludes most, and offer to clear them."""
    if wanted.text and sae.index is None:
        text = "Tokens can be searched once there is an index; no label has this text."
    elif list(chosen.excluded) == ["search"]:
        text = (
            f"No feature fires on a token that contains {wanted.text!r}, and no label has it. A "
            "token is a piece of a word; try a shorter text."
        )
    else:
        name, n = next(iter(chosen.excluded.items()))
        text = f"The filter on {name} excludes most: {n:,} of {chosen.n_all:,} features."
    notice(text, kind="info", title="No feature is left")
    st.button(
        "Clear filters", key="features.clear_all", on_click=clear, icon=":material/filter_list_off:"
    )
