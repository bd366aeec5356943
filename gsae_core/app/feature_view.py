"""One feature: where it fires, how its gate decides, what it writes, and who is near it."""

import getpass
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gsae_core.analysis.features.files import COLUMNS
from gsae_core.analysis.features.filter import Chosen, beside
from gsae_core.app import shell
from gsae_core.app.feature_list import Opened
from gsae_core.app.parts import copy_link, escaped, facts, figure_tools, key_for, notice, plain
from gsae_core.app.pickers import architecture, correct_number, quoted
from gsae_core.errors import InputError
from gsae_core.files import left_out
from gsae_core.plots.features import activation_histogram, gate_plane, histogram_table
from gsae_core.plots.palette import Theme
from gsae_core.text import percent

if TYPE_CHECKING:
    from gsae_core.analysis.features.index import Feature, Logit
    from gsae_core.analysis.labels import Labels


def summary(feature: "Feature") -> None:
    """Say in two lines what the feature is: how often, on what, to what end."""
    row = feature.stats
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    tokens = feature.index.texts([int(token) for token in row["top_tokens"]])
    shares = [float(share) for share in row["top_token_shares"]]
    chips = " ".join(
        _chip(token, percent(share, 0)) for token, share in zip(tokens, shares, strict=True)
    )
    raised = " ".join(_chip(each.text) for each in feature.logits.top[:4])
    lowered = " ".join(_chip(each.text) for each in feature.logits.bottom[:2])
    often = f"1 token in {_round(n_tokens / fired)}" if fired else "no token"
    lines = [f"Fires on <b>{often}</b>, most on {chips}"]
    if raised:
        lines.append(f"Makes {raised} more likely next, {lowered} less")
    body = "".join(f'<div style="margin:.15rem 0">{line}</div>' for line in lines)
    st.html(f'<div style="line-height:1.9">{body}</div>')


def _chip(token: str, said: str = "") -> str:
    note = f' <span style="opacity:.75;font-size:.8rem">{said}</span>' if said else ""
    return (
        '<span style="white-space:nowrap"><code dir="ltr" style="unicode-bidi:isolate;'
        "padding:.05rem .3rem;border-radius:4px;color:inherit;font-size:.9rem;"
        'background:color-mix(in srgb,currentColor 9%,transparent)">'
        f"{html.escape(quoted(token))}</code>{note}</span>"
    )


def _round(number: float) -> str:
    digits = max(0, len(str(int(number))) - 2)
    return f"{int(round(number, -digits)):,}".replace(",", " ")


def numbers(feature: "Feature") -> None:
    """Draw the feature's numbers, each with its definition on hovering."""
    row = feature.stats
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    tiles = [
        ("density", percent(row["density"], 2), f"{fired:,} of {n_tokens:,} tokens", "density"),
        ("strongest", _short(row["max"]), f"median {_short(row['q50'])}", "max"),
    ]
    if feature.index.manifest.architecture in ("gated", "jumprelu"):
        gain = f"e^r {_short(row['gain'])}" if math.isfinite(row["gain"]) else "threshold"
        tiles.append(("θ", _short(row["theta"]), gain, "theta"))
    tiles.append(("γ", _short(row["gamma"]), _shrinkage(row["gamma"]), "gamma"))
    if feature.index.manifest.architecture == "gated":
        vain = int(row["gate_open"]) - fired
        note = f"{vain:,} times in vain" if vain else "never in vain"
        tiles.append(("gate open", percent(row["gate_density"], 2), note, "gate_density"))
    cells = "".join(
        f'<div title="{html.escape(COLUMNS[column], quote=True)}">'
        f'<div style="opacity:.75;font-size:.8125rem">{html.escape(title)}</div>'
        f'<div style="font-size:1.25rem;line-height:1.3;font-variant-numeric:tabular-nums">'
        f"{html.escape(value)}</div>"
        f'<div style="opacity:.75;font-size:.8125rem">{html.escape(note)}</div></div>'
        for title, value, note, column in tiles
    )
    st.html(
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(6rem,1fr));'
        f'gap:.5rem 1rem">{cells}</div>'
    )


def _shrinkage(gamma: float) -> str:
    if not math.isfinite(gamma):
        return "never fired"
    if abs(gamma - 1) < 0.02:
        return "as long as it should"
    return f"{100 * abs(1 - gamma):.0f} % too {'short' if gamma < 1 else 'long'}"


def _short(number: float) -> str:
    return f"{number:.3g}" if math.isfinite(number) else "–"


def pictures(feature: "Feature", theme: Theme) -> None:
    """Draw how strongly it fires, and how its gate decides."""
    row = feature.stats
    theta, kind = float(row["theta"]), feature.index.manifest.architecture
    plane = gate_plane(feature, theme=theme) if kind == "gated" else None
    left, right = st.columns([1, 1.1]) if plane is not None else (st.container(), None)
    with left:
        st.html('<div style="font-weight:600">How strongly it fires</div>')
        chart = activation_histogram(feature.histogram, theta=theta, theme=theme, architecture=kind)
        st.vega_lite_chart(
            chart.data, chart.spec, key="features.activations", alt=_histogram_words(feature, theta)
        )
        words = {
            "relu": "One path decides whether and how much: no gate, no empty band at 0.",
            "topk": "It fires where it is among the k largest of a token.",
        }
        jump = f"Nothing between 0 and θ = {theta:.3g}: it jumps."
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(jump if theta > 0 else words.get(kind, "Its gate never binds: no jump."))
            table = histogram_table(feature.histogram)
            figure_tools(table, name="activations", about=_definitions())
    if right is None or plane is None:
        return
    with right:
        st.html('<div style="font-weight:600">How its gate decides</div>')
        st.vega_lite_chart(
            plane.data,
            plane.spec,
            key="features.plane",
            alt="Tokens by gate and magnitude: all lie on one line, which crosses the gate's "
            f"opening at theta, {theta:.3g}",
        )
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption("A dot is a token, hollow: just missed. Slope: e^r.")
            figure_tools(feature.gate_line(), name="gate_and_magnitude", about=COLUMNS["theta"])


def _histogram_words(feature: "Feature", theta: float) -> str:
    top = float(feature.histogram.edges[-1])
    band = f"; nothing between 0 and {theta:.3g}" if math.isfinite(theta) and theta > 0 else ""
    return f"How often it fires how strongly, from 0 to {top:.3g}{band}"


def _definitions() -> str:
    return "\n".join(f"{name}: {COLUMNS[name]}" for name in ("max", "q50", "theta"))


def logits(feature: "Feature") -> None:
    """Draw the next tokens that it raises and lowers most."""
    found = feature.logits
    if not found.top:
        st.caption("What it writes is not known: the model's head could not be followed.")
        return
    most = max((abs(each.effect) for each in (*found.top, *found.bottom)), default=0.0)
    st.html(
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));'
        'gap:.25rem 1.5rem">'
        f"{_logit_list('Makes more likely next', found.top, most, '#0072B2')}"
        f"{_logit_list('Makes less likely next', found.bottom, most, '#D55E00')}</div>"
    )


def _logit_list(title: str, found: "Sequence[Logit]", most: float, colour: str) -> str:
    rows = "".join(
        '<div style="display:grid;grid-template-columns:minmax(0,1fr) 6.5rem;gap:.5rem;'
        'align-items:center"><code dir="ltr" style="unicode-bidi:isolate;overflow:hidden;'
        'text-overflow:ellipsis;white-space:nowrap;color:inherit;background:none;padding:0" '
        f'title="{html.escape(quoted(each.text, most=200), quote=True)}">'
        f"{html.escape(quoted(each.text))}</code>"
        '<span style="text-align:right;font-variant-numeric:tabular-nums;border-radius:3px;'
        f"padding:0 4px;background:linear-gradient(to right,color-mix(in srgb,{colour} 35%,"
        f'transparent) {100 * abs(each.effect) / most if most else 0:.0f}%,transparent 0)">'
        f"{each.effect:+.3f}</span></div>"
        for each in found
    )
    return (
        f'<div><div style="font-weight:600;margin-bottom:.2rem">{html.escape(title)}</div>'
        f'<div style="font-size:.875rem;line-height:1.65">{rows}</div></div>'
    )


def from_weights(sae: Opened, row: Mapping[str, Any]) -> None:
    """Draw what the weights alone say of a feature."""
    kind = architecture(sae.run, sae.name)
    shown = {"theta": "θ", "gain": "e^r", "b_gate": "b_gate", "b_mag": "b_mag"}
    shown = shown if kind == "gated" else {"theta": "θ"} if kind == "jumprelu" else {}
    shown |= {"decoder_norm": "decoder norm", "encoder_cosine": "encoder-decoder cosine"}
    facts({title: _short(row[name]) for name, title in shown.items()})
    with st.popover("What these mean", icon=":material/help:", type="tertiary"):
        for name, title in shown.items():
            plain(f"{title}: {COLUMNS[name]}", size=".9rem")


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
        for name, title in TERMS.items():
            plain(f"{title}: {COLUMNS[name]}", size=".9rem")


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
    from gsae_core.analysis.features.html import page

    return page([feature])


def _json(sae: Opened, feature: "Feature") -> str:
    from gsae_core.analysis.features.neuronpedia import batch

    manifest = feature.index.manifest
    return json.dumps(batch([feature], model_id=manifest.model, sae_set=sae.name))


def say_refused() -> None:
    """Say what a press could not do; a part of the page that is drawn alone has no frame."""
    if refused := st.session_state.pop("shell.refused", None):
        notice(refused[1], title=refused[0])
