"""Above a feature: going on to others, what people say of it, and taking it along."""

import getpass
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import streamlit as st

from gsae_core import shell
from gsae_core.analysis.feature_filter import Chosen, beside
from gsae_core.errors import InputError
from gsae_core.feature_files import Opened
from gsae_core.glossary import feature_columns
from gsae_core.inspect_parts import correct_number
from gsae_core.keys import key_for
from gsae_core.pieces import copy_link, escaped, notice, plain
from gsae_core.store.json_lines import left_out

if TYPE_CHECKING:
    from gsae_core.analysis.feature import Feature
    from gsae_core.store.labels import Labels


TERMS = {
    "density": "density",
    "max": "strongest",
    "q50": "median",
    "theta": "θ",
    "gain": "e^r",
    "gamma": "γ",
    "gate_density": "gate open",
    "top_tokens": "fires on",
    "top_logits": "makes more likely",
}
"""Columns of the table, by what people call them."""


def which(sae: Opened, landing: int) -> int:
    """Settle which feature is shown, before its field is drawn: what the address says, or one.

    Args:
        landing: the one to begin with.
    """
    last = sae.n_features - 1
    asked = st.query_params.get("feature")
    held = st.session_state.get("feature")
    if held is None:
        correct_number("feature", 0, last, what="feature", shown=str(landing))
        if asked is None or not asked.isdecimal() or int(asked) > last:
            st.session_state["feature"] = landing
            return landing
        return int(asked)
    if held > last:
        st.caption(f"{sae.name} has features 0 to {last}, no {held}; showing {landing}.")
        st.session_state["feature"] = landing
        return landing
    return int(held)


def navigation(sae: Opened, chosen: Chosen, *, go: Callable[[int], None]) -> int:
    """Draw the ways to go on; return the feature that is shown."""
    held = st.session_state.get("feature")

    def step(by: int) -> None:
        number = beside(chosen.rows, st.session_state.get("feature") or 0, by)
        if number is not None:
            go(number)

    with st.container(
        horizontal=True, vertical_alignment="bottom", gap="small", key="features.going_on"
    ):
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            key="features.previous",
            shortcut="p",
            on_click=step,
            args=(-1,),
            help="The one above in the list",
        )
        number = st.number_input(
            "Feature",
            0,
            sae.n_features - 1,
            value=None,
            step=1,
            key="feature",
            bind="query-params",
            width=130,
            label_visibility="collapsed",
            placeholder="number",
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            icon_position="right",
            key="features.next",
            shortcut="n",
            on_click=step,
            args=(1,),
            help="The one below in the list",
        )
        if sae.index is not None:
            st.button(
                "Random",
                icon=":material/shuffle:",
                key="features.random",
                on_click=_random,
                args=(sae, go),
                help="Any feature that fires",
            )
            _terms()
    return int(number if number is not None else held or 0)


def _terms() -> None:
    """Draw what the numbers of a feature mean, one click away."""
    terms = st.popover(
        "Terms", icon=":material/help:", type="tertiary", key="features.terms", on_change="rerun"
    )
    if not terms.open:
        return
    with terms:
        columns = feature_columns()
        for name, title in TERMS.items():
            plain(f"{title}: {columns[name]}", size=".9rem")


def _random(sae: Opened, go: Callable[[int], None]) -> None:
    assert sae.index is not None
    # As many draws as presses: the next one is another.
    drawn = st.session_state["features.draws"] = st.session_state.get("features.draws", 0) + 1
    try:
        go(sae.index.random_alive(seed=drawn))
    except InputError as error:
        st.session_state["shell.refused"] = ("No feature fires", str(error))


def said(feature: "Feature") -> None:
    """Draw the star, the label and the notes of a feature; what is changed is appended at once."""
    labels, number = feature.index.labels, feature.number
    known = labels.of(number)
    with st.container(
        horizontal=True, vertical_alignment="center", gap="small", key="features.said"
    ):
        heading(number)
        star = "star" in known
        st.button(
            "Starred" if star else "Star",
            icon=":material/star:" if star else ":material/star_border:",
            key="features.star_it",
            type="primary" if star else "secondary",
            on_click=_say,
            args=(labels, number, "star", "off" if star else "on"),
        )
        key = key_for("features.label", feature.index.folder, number)
        st.session_state.setdefault(key, known["label"].text if "label" in known else "")
        st.text_input(
            "Label",
            key=key,
            label_visibility="collapsed",
            placeholder="What does it mean? Your label",
            max_chars=200,
            on_change=_say_field,
            args=(labels, number, "label", key),
            width="stretch",
        )
        _notes(feature, known["note"].text if "note" in known else "")
    if labels.damaged:
        st.caption(f"{left_out(labels.damaged, 'labels.jsonl')}.")
    if by := known.get("label"):
        author = escaped(by.author)
        who = f"{escaped(by.model)} ({author})" if by.model else author
        score = escaped(f"; {by.measured}" if by.measured else "")
        st.html(f'<div style="font-size:.8125rem;opacity:.75">written by {who}{score}</div>')


def heading(number: int) -> None:
    """Draw the feature's number as the heading of all below."""
    st.html(
        '<div role="heading" aria-level="2" style="font-size:1.3rem;font-weight:700;'
        f'white-space:nowrap">Feature {number}</div>',
        width="content",
    )


def _notes(feature: "Feature", text: str) -> None:
    labels, number = feature.index.labels, feature.number
    title = "Notes ●" if text else "Notes"
    notes = st.popover(title, icon=":material/edit_note:", key="features.notes", on_change="rerun")
    if not notes.open:
        return
    with notes:
        key = key_for("features.note", feature.index.folder, number)
        st.session_state.setdefault(key, text)
        st.text_area(
            "Notes",
            key=key,
            height=160,
            max_chars=10_000,
            on_change=_say_field,
            args=(labels, number, "note", key),
        )
        st.caption("Kept as you leave the field; earlier versions stay in labels.jsonl.")


def _say_field(labels: "Labels", number: int, kind: str, key: str) -> None:
    _say(labels, number, kind, st.session_state[key])


def _say(labels: "Labels", number: int, kind: str, text: str) -> None:
    try:
        labels.add(number, kind, text.strip(), author=_author())  # type: ignore[arg-type]
    except InputError as error:
        st.session_state["shell.refused"] = ("Not kept", str(error))
    # The list shows labels and stars too.
    st.session_state["features.list_is_old"] = True


def _author() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"  # a container without a user of this number


def take_along(sae: Opened, feature: "Feature") -> None:
    """Draw where to go with the feature: other pages, a link, files."""
    number = feature.number
    with st.container(horizontal=True, gap="small"):
        if st.button("Steer with it", icon=":material/alt_route:", key="features.to_steer"):
            shell.go("pages/7_Steer.py", sae.run, sae=sae.name, f=str(number))
        share = st.popover(
            "Share and export", icon=":material/ios_share:", key="features.share", on_change="rerun"
        )
    if not share.open:
        return
    with share:
        copy_link()
        st.download_button(
            "One HTML file",
            lambda: _html(feature),
            file_name=f"{sae.name}-{number}.html",
            mime="text/html",
            icon=":material/download:",
            key="features.as_html",
            on_click="ignore",
            help="Numbers, pictures and examples; needs nothing from elsewhere.",
        )
        st.download_button(
            "Neuronpedia JSON",
            lambda: _json(sae, feature),
            file_name="batch-0.json",
            mime="application/json",
            icon=":material/download:",
            key="features.as_json",
            on_click="ignore",
            help="A batch of one feature, as Neuronpedia's importer reads it.",
        )


def _html(feature: "Feature") -> str:
    from gsae_core.analysis.feature_html import page

    return page([feature])


def _json(sae: Opened, feature: "Feature") -> str:
    from gsae_core.analysis.neuronpedia import batch

    manifest = feature.index.manifest
    return json.dumps(batch([feature], model_id=manifest.model, sae_set=sae.name))


def say_refused() -> None:
    """Say what a press could not do; a part of the page that is drawn alone has no frame."""
    if refused := st.session_state.pop("shell.refused", None):
        notice(refused[1], title=refused[0])
