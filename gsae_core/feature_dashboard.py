"""One feature: where it fires, how its gate decides, what it writes, and who is near it."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from gsae_core.feature_files import Opened
from gsae_core.glossary import feature_columns
from gsae_core.inspect_parts import architecture, quoted
from gsae_core.pieces import facts, figure_tools, plain
from gsae_core.plots.features import activation_histogram, histogram_table
from gsae_core.plots.gate_plane import gate_plane
from gsae_core.plots.palette import Theme
from gsae_core.wording import percent

if TYPE_CHECKING:
    from gsae_core.analysis.feature import Feature, Logit


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
    row, columns = feature.stats, feature_columns()
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
        f'<div title="{html.escape(columns[column], quote=True)}">'
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
            about = feature_columns()["theta"]
            figure_tools(feature.gate_line(), name="gate_and_magnitude", about=about)


def _histogram_words(feature: "Feature", theta: float) -> str:
    top = float(feature.histogram.edges[-1])
    band = f"; nothing between 0 and {theta:.3g}" if math.isfinite(theta) and theta > 0 else ""
    return f"How often it fires how strongly, from 0 to {top:.3g}{band}"


def _definitions() -> str:
    columns = feature_columns()
    return "\n".join(f"{name}: {columns[name]}" for name in ("max", "q50", "theta"))


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
    columns, kind = feature_columns(), architecture(sae.run, sae.name)
    shown = {"theta": "θ", "gain": "e^r", "b_gate": "b_gate", "b_mag": "b_mag"}
    shown = shown if kind == "gated" else {"theta": "θ"} if kind == "jumprelu" else {}
    shown |= {"decoder_norm": "decoder norm", "encoder_cosine": "encoder-decoder cosine"}
    facts({title: _short(row[name]) for name, title in shown.items()})
    with st.popover("What these mean", icon=":material/help:", type="tertiary"):
        for name, title in shown.items():
            plain(f"{title}: {columns[name]}", size=".9rem")
