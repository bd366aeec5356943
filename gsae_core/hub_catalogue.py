"""Part of the Hub page that searches public releases; a chosen one fills the repository's field."""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from gsae_core.pieces import notice
from gsae_core.sae_catalogue import Release, Wanted, architectures, ranged, releases, search, widths


def catalogue() -> None:
    """Draw the search over public releases; a chosen row fills the repository's field."""
    words, layer, kind, width, l0 = st.columns([4, 1.5, 2.5, 2, 1.5])
    wanted = Wanted(
        words=words.text_input(
            "Model or words", key="hub.find", placeholder="gemma-2-2b resid_post"
        ),
        layer=layer.number_input("Layer", 0, 200, None, key="hub.find_layer", placeholder="any"),
        architecture=kind.selectbox(
            "Architecture", architectures(), index=None, key="hub.find_arch", placeholder="any"
        ),
        width=width.selectbox(
            "Width",
            widths(),
            index=None,
            key="hub.find_width",
            placeholder="any",
            format_func=lambda n: f"{n:,}",
        ),
        l0=l0.number_input("L0 near", 1.0, 5000.0, None, 1.0, key="hub.find_l0", placeholder="any"),
    )
    found = search(wanted)
    if not found:
        notice(
            "No release states all of this. Leave a field empty: what a release does not state, it "
            "is not found by.",
            kind="info",
        )
        return
    shown = f"{len(found)} of {len(releases())} releases"
    st.caption(f"{shown}. Tick a row to see what is in its repository.")
    st.dataframe(
        catalogue_table(found),
        hide_index=True,
        height=min(320, 36 * len(found) + 38),
        key="hub.catalogue",
        on_select=lambda: _choose(found),
        selection_mode="single-row",
        column_config={
            "release": st.column_config.TextColumn(width=150),
            "model": st.column_config.TextColumn(width=170),
            "widths": st.column_config.TextColumn(width=130),
            "SAEs": st.column_config.NumberColumn(width=60),
            "layers": st.column_config.TextColumn(width=70),
        },
        alt="Public releases: title, model, site, layers, architecture, widths, L0, SAEs, where",
    )


def catalogue_table(found: Sequence[Release]) -> pd.DataFrame:
    """Return releases as a table's rows; a dash where nothing is known."""
    rows = [
        {
            "release": release.title,
            "model": release.model,
            "site": release.site or "–",
            "layers": ranged(release.layers),
            "architecture": release.architecture or "–",
            "widths": ", ".join(short(width) for width in release.widths) or "–",
            "L0": _l0(release),
            "SAEs": release.count,
            "where": release.repo or release.where or "–",
        }
        for release in found
    ]
    return pd.DataFrame(rows)


def short(width: int) -> str:
    """Return a number of features as releases write it: `16k` for 16,384, `1M`."""
    if width % 2**20 == 0:
        return f"{width // 2**20}M"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def _l0(release: Release) -> str:
    if release.l0 is None:
        return "–"
    low, high = release.l0
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _choose(found: Sequence[Release]) -> None:
    chosen = st.session_state["hub.catalogue"]["selection"]["rows"]
    if chosen:
        choose_release(found[chosen[0]])


def choose_release(release: Release) -> None:
    """Put a release into the repository's field, or say why it cannot be. For callbacks."""
    st.session_state["hub.note"] = release.note
    st.session_state["sae"] = None
    if release.repo is None:
        st.session_state["repo"] = ""
        return
    path = f":{release.prefix}" if release.prefix else ""
    st.session_state["repo"] = f"{release.repo}{path}"
    st.session_state["rev"] = ""
