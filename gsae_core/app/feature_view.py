"""One feature: its numbers, how its gate decides, its logit effects, its label, its exports."""

import getpass
import json
import math
import mimetypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from gsae_core.analysis.features.export import TEMPLATE, neuronpedia_batch, page
from gsae_core.analysis.features.files import COLUMNS
from gsae_core.analysis.features.filter import Chosen, beside
from gsae_core.app import shell
from gsae_core.app.feature_list import Opened
from gsae_core.app.parts import copy_link, facts, figure_tools, key_for, notice, plain
from gsae_core.app.pickers import architecture, correct_number
from gsae_core.errors import InputError
from gsae_core.files import left_out
from gsae_core.plots.features import activation_histogram, gate_plane, histogram_table
from gsae_core.plots.palette import Theme
from gsae_core.text import macros, percent, short

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features.feature import Feature
    from gsae_core.analysis.labels import Kind, Labels


def summary(feature: "Feature") -> None:
    """Say in two lines what the feature is: how often, on what, to what end."""
    fired, n_tokens = int(feature.stats["fired"]), int(feature.stats["n_tokens"])
    often = f"1 token in {_round(n_tokens / fired)}" if fired else "no token"
    tokens = [(token, percent(share, 0)) for token, share in feature.top_tokens]
    logits = feature.logits
    st.html(macros(TEMPLATE).summary(often, tokens, logits.top[:4], logits.bottom[:2]))


def _round(number: float) -> str:
    digits = max(0, len(str(int(number))) - 2)
    return f"{int(round(number, -digits)):,}".replace(",", " ")


def numbers(feature: "Feature") -> None:
    """Draw the feature's numbers, each with its definition on hovering."""
    row, kind = feature.stats, feature.index.manifest.architecture
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    share = f"{fired:,} of {n_tokens:,} tokens"
    tiles = [
        ("feature density", percent(row["density"], 2), share, "density"),
        ("strongest", short(row["max"]), f"median {short(row['q50'])}", "max"),
    ]
    if kind in ("gated", "jumprelu"):
        gain = f"e^r {short(row['gain'])}" if math.isfinite(row["gain"]) else "threshold"
        tiles.append(("θ", short(row["theta"]), gain, "theta"))
    tiles.append(("γ", short(row["gamma"]), _shrinkage(row["gamma"]), "gamma"))
    if kind == "gated":
        silent = int(row["gate_open"]) - fired
        note = f"no output {silent:,} times" if silent else "always with output"
        tiles.append(("gate open", percent(row["gate_density"], 2), note, "gate_density"))
    st.html(macros(TEMPLATE).tiles([(*cell, COLUMNS[column]) for *cell, column in tiles]))


def _shrinkage(gamma: float) -> str:
    if not math.isfinite(gamma):
        return "never fired"
    if abs(gamma - 1) < 0.02:
        return "no shrinkage"
    return f"{100 * abs(1 - gamma):.0f} % too {'short' if gamma < 1 else 'long'}"


def pictures(feature: "Feature", theme: Theme) -> None:
    """Draw how strongly it fires, and how its gate decides."""
    theta, kind = float(feature.stats["theta"]), feature.index.manifest.architecture
    plane = gate_plane(feature, theme=theme) if kind == "gated" else None
    left, right = st.columns([1, 1.1]) if plane is not None else (st.container(), None)
    top = float(feature.histogram.edges[-1])
    jumps = math.isfinite(theta) and theta > 0
    words = {
        "relu": "One path decides whether and how much: no gate, no empty band at 0.",
        "topk": "It fires where it is among the k largest of a token.",
    }
    with left:
        _picture(
            "How strongly it fires",
            activation_histogram(feature.histogram, theta=theta, theme=theme, architecture=kind),
            key="features.activations",
            alt=f"How often it fires how strongly, from 0 to {top:.3g}"
            + (f"; nothing between 0 and {theta:.3g}" if jumps else ""),
            caption=f"Nothing between 0 and θ = {theta:.3g}: it jumps."
            if jumps
            else words.get(kind, "Its gate never binds: no jump."),
            table=histogram_table(feature.histogram),
            about="\n".join(f"{name}: {COLUMNS[name]}" for name in ("max", "q50", "theta")),
        )
    if right is not None and plane is not None:
        with right:
            _picture(
                "How its gate decides",
                plane,
                key="features.gate_and_magnitude",
                alt="Tokens by gate and magnitude: all lie on one line, which crosses the gate's "
                f"opening at theta, {theta:.3g}",
                caption="A dot is a token, hollow: just missed. Slope: e^r.",
                table=feature.gate_line(),
                about=COLUMNS["theta"],
            )


def _picture(
    title: str, chart: Any, *, key: str, alt: str, caption: str, table: "pd.DataFrame", about: str
) -> None:
    """Draw a chart under its title, above a sentence and the tools of a figure."""
    st.html(f'<div style="font-weight:600">{title}</div>')
    st.vega_lite_chart(chart.data, chart.spec, key=f"features.{key}", alt=alt)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(caption)
        figure_tools(table, name=key, about=about)


def logits(feature: "Feature") -> None:
    """Draw the next tokens that it raises and lowers most."""
    found = feature.logits
    if found.top:
        st.html(macros(TEMPLATE).logits(found.top, found.bottom))
    else:
        st.caption("Logit effects are not known: the model's head could not be followed.")


TERMS = {
    "density": "feature density",
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


def from_weights(sae: Opened, row: Mapping[str, Any]) -> None:
    """Draw what the weights alone say of a feature."""
    kind = architecture(sae.run, sae.name)
    shown = {"theta": "θ", "gain": "e^r", "b_gate": "b_gate", "b_mag": "b_mag"}
    shown = shown if kind == "gated" else {"theta": "θ"} if kind == "jumprelu" else {}
    shown |= {"decoder_norm": "decoder norm", "encoder_cosine": "encoder-decoder cosine"}
    facts({title: short(row[name]) for name, title in shown.items()})
    with st.popover("What these mean", icon=":material/help:", type="tertiary"):
        _define(shown)


def _define(terms: Mapping[str, str]) -> None:
    """Draw what columns of the table mean, by what people call them."""
    for name, title in terms.items():
        plain(f"{title}: {COLUMNS[name]}", size=".9rem")


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
            terms = st.popover(
                "Terms",
                icon=":material/help:",
                type="tertiary",
                key="features.terms",
                on_change="rerun",
            )
            if terms.open:
                with terms:
                    _define(TERMS)
    return int(number if number is not None else held or 0)


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
        _field(
            st.text_input,
            feature,
            "label",
            label_visibility="collapsed",
            placeholder="What does it mean? Your label",
            max_chars=200,
            width="stretch",
        )
        notes = st.popover(
            "Notes ●" if "note" in known else "Notes",
            icon=":material/edit_note:",
            key="features.notes",
            on_change="rerun",
        )
        if notes.open:
            with notes:
                _field(st.text_area, feature, "note", height=160, max_chars=10_000)
                st.caption("Kept as you leave the field; earlier versions stay in labels.jsonl.")
    if labels.damaged:
        st.caption(f"{left_out(labels.damaged, 'labels.jsonl')}.")
    if by := known.get("label"):
        who = f"{by.model} ({by.author})" if by.model else by.author
        score = f"; {by.measured}" if by.measured else ""
        plain(f"written by {who}{score}", size=".8125rem")


def heading(number: int) -> None:
    """Draw the feature's number as the heading of all below."""
    st.html(
        '<div role="heading" aria-level="2" style="font-size:1.3rem;font-weight:700;'
        f'white-space:nowrap">Feature {number}</div>',
        width="content",
    )


def _field(draw: Callable[..., Any], feature: "Feature", kind: "Kind", **looks: Any) -> None:
    """Draw the field of a feature's label or notes, which is kept as it is left."""
    labels, number = feature.index.labels, feature.number
    key = key_for(f"features.{kind}", feature.index.folder, number)
    known = labels.of(number).get(kind)
    st.session_state.setdefault(key, known.text if known is not None else "")

    def keep() -> None:
        _say(labels, number, kind, st.session_state[key])

    draw("Label" if kind == "label" else "Notes", key=key, on_change=keep, **looks)


def _say(labels: "Labels", number: int, kind: "Kind", text: str) -> None:
    try:
        author = getpass.getuser()
    except (KeyError, OSError):
        author = "somebody"  # a container without a user of this number
    try:
        labels.add(number, kind, text.strip(), author=author)
    except InputError as error:
        st.session_state["shell.refused"] = ("Not kept", str(error))
    # The list shows labels and stars too.
    st.session_state["features.list_is_old"] = True


def take_along(sae: Opened, feature: "Feature") -> None:
    """Draw where to go with the feature: other pages, a link, files."""
    number = feature.number
    with st.container(horizontal=True, gap="small"):
        if st.button("Steer this feature", icon=":material/alt_route:", key="features.to_steer"):
            shell.go("pages/7_Steer.py", sae.run, sae=sae.name, f=str(number))
        share = st.popover(
            "Share and export", icon=":material/ios_share:", key="features.share", on_change="rerun"
        )
    if not share.open:
        return
    with share:
        copy_link()
        _download(
            "One HTML file",
            lambda: page([feature]),
            f"{sae.name}-{number}.html",
            "Numbers, pictures and examples; needs nothing from elsewhere.",
        )
        place = {"model_id": feature.index.manifest.model, "sae_set": sae.name}
        _download(
            "Neuronpedia JSON",
            lambda: json.dumps(neuronpedia_batch([feature], **place)),
            "batch-0.json",
            "A batch of one feature, as Neuronpedia's importer reads it.",
        )


def _download(label: str, make: Callable[[], str], file_name: str, about: str) -> None:
    st.download_button(
        label,
        make,
        file_name=file_name,
        mime=mimetypes.guess_type(file_name)[0],
        icon=":material/download:",
        key=f"features.as_{file_name.rpartition('.')[2]}",
        on_click="ignore",
        help=about,
    )


def say_refused() -> None:
    """Say what a press could not do; a part of the page that is drawn alone has no frame."""
    if refused := st.session_state.pop("shell.refused", None):
        notice(refused[1], title=refused[0])
