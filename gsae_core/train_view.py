"""Pieces of the Train page: escaped HTML for bars, tokens and what earlier runs found."""

import html
import re
from collections.abc import Sequence

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.config import RunConfig, SAESpec, TrainRecipe
from gsae_core.estimates import Expected
from gsae_core.pieces import SIGNS
from gsae_core.plots.palette import LOOKS
from gsae_core.preflight import Bar
from gsae_core.store.files import readable

# Shares of a bar, told apart by lightness as well as hue; Okabe-Ito.
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
OVER = "#D55E00"


def side_by_side() -> DeltaGenerator:
    """Return a container whose columns stack on a narrow page; on a wide one the second stays.

    Streamlit's own columns stack below 640 px, where two forms beside each other are long cut off.
    """
    columns = ".st-key-train-form>[data-testid=stLayoutWrapper]>[data-testid=stHorizontalBlock]"
    column = f"{columns}>[data-testid=stColumn]"
    st.html(
        f"<style>@media(max-width:1000px){{{columns}{{flex-wrap:wrap}}"
        f"{column}{{min-width:100%}}}}"
        f"@media(min-width:1001px){{{column}:last-child"
        "{position:sticky;top:4rem;align-self:flex-start}}</style>"
    )
    return st.container(key="train.form")


def bar(shown: Bar) -> None:
    """Draw how much is needed of how much there is; a part's name is under it."""
    whole = max(shown.needed, shown.available, 1)
    said = f"{readable(shown.needed)} of {readable(shown.available)} free"
    shares = "".join(
        f'<div style="width:{100 * part.size / whole:.2f}%;background:{shade}"></div>'
        for part, shade in zip(shown.parts, SHADES, strict=False)
    )
    names = "".join(
        f'<span style="white-space:nowrap"><span style="display:inline-block;width:.7em;'
        f'height:.7em;border-radius:2px;background:{shade}"></span> {html.escape(part.label)} '
        f"{readable(part.size)}</span>"
        for part, shade in zip(shown.parts, SHADES, strict=False)
        if part.size
    )
    edge = "transparent" if shown.fits else OVER
    limit = f"{100 * shown.available / whole:.2f}%"
    st.html(
        f'<div style="display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap">'
        f"<span>{html.escape(shown.label)}</span>"
        f'<span style="font-variant-numeric:tabular-nums">about {said}'
        f"{'' if shown.fits else ' ✕'}</span></div>"
        f'<div role="meter" aria-label="{html.escape(shown.label)}" aria-valuemin="0" '
        f'aria-valuemax="{shown.available}" aria-valuenow="{shown.needed}" '
        f'aria-valuetext="about {said}" style="position:relative;height:.75rem;'
        f"border-radius:.4rem;overflow:hidden;display:flex;outline:2px solid {edge};"
        f'background:color-mix(in srgb,currentColor 12%,transparent)">{shares}'
        + (
            ""
            if shown.fits
            else f'<div style="position:absolute;left:{limit};top:0;bottom:0;width:3px;'
            'background:currentColor"></div>'
        )
        + '</div><div style="display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.875rem;'
        f'opacity:.85;margin-top:.2rem">{names}</div>'
    )


def token_lines(lines: Sequence[Sequence[str]]) -> None:
    """Show tokens side by side, each in its own frame, with white space made visible."""
    rows = "".join(
        f'<div style="white-space:nowrap;overflow-x:auto" tabindex="0" role="listitem">'
        f"{''.join(_token(token) for token in line)}</div>"
        for line in lines
    )
    st.html(
        "<style>.gs-t{display:inline-block;border:1px solid color-mix(in srgb,currentColor 25%,"
        "transparent);border-radius:3px;padding:0 .2em;margin:1px;max-width:16em;overflow:hidden;"
        "text-overflow:ellipsis;vertical-align:bottom;unicode-bidi:isolate}"
        ".gs-t:nth-child(even){background:color-mix(in srgb,currentColor 8%,transparent)}"
        ".gs-w{opacity:.55}</style>"
        '<div role="list" aria-label="First lines as tokens" style="font-family:monospace;'
        f'font-size:.875rem;line-height:1.7">{rows}</div>'
    )


def _token(text: str) -> str:
    shown = "".join(_glyph(character) for character in text[:200]) or '<span class="gs-w">∅</span>'
    return f'<span class="gs-t">{shown}</span>'


def _glyph(character: str) -> str:
    """Return a character as HTML; white space and what cannot be seen as a sign for it."""
    sign = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}.get(character)
    if sign is None and not character.isprintable():
        sign = f"U+{ord(character):04X}"
    return html.escape(character) if sign is None else f'<span class="gs-w">{sign}</span>'


def schedule_rows(recipe: TrainRecipe) -> dict[str, str]:
    """Return the rows about the steps over which rates change and features are revived."""
    steps, n = recipe.schedule, recipe.n_steps
    rate = [_rise(steps.lr_warmup_steps, whole="at its peak")]
    if recipe.lr_decay_fraction:
        rate.append(f"falls over the last {recipe.lr_decay_fraction * n:,.0f}")
    revived = f"revived every {_steps(steps.revive_every)}, if silent for {steps.revive_window:,}"
    return {
        "Learning rate": ", ".join(rate),
        "λ": _rise(steps.sparsity_warmup_steps, whole="whole"),
        "Dead features": revived if steps.revive_every else "not revived",
    }


def _rise(n: int, *, whole: str) -> str:
    return f"rises over {_steps(n)}" if n else f"{whole} from the first step on"


def _steps(n: int) -> str:
    return f"{n:,} step{'s' * (n != 1)}"


def plan(config: RunConfig, expected: dict[str, Expected]) -> None:
    """Show every SAE of the sweep: width, lambda and the L0 that earlier runs let one expect."""
    groups: dict[str, list[SAESpec]] = {}
    for spec in config.saes:
        groups.setdefault(f"{spec.architecture} {spec.d_sae}", []).append(spec)
    body = "".join(_group(saes, expected) for saes in groups.values())
    st.html(
        f'<div style="display:flex;flex-direction:column;gap:.6rem;font-size:.9375rem">{body}</div>'
    )


def _group(saes: list[SAESpec], expected: dict[str, Expected]) -> str:
    look, sign = LOOKS[saes[0].architecture], SIGNS[saes[0].architecture]
    letter = "k" if saes[0].architecture == "topk" else "λ"
    head = (
        f'<div><span style="color:{look.colour}">{sign}</span> <strong>{html.escape(look.label)}'
        f"</strong>, {saes[0].d_sae:,} features</div>"
    )
    cells = "".join(
        '<span style="white-space:nowrap;border:1px solid color-mix(in srgb,currentColor 20%,'
        'transparent);border-radius:.4rem;padding:.05rem .5rem;font-variant-numeric:tabular-nums">'
        f"{letter} {spec.sparsity:g}{_l0(spec, expected)}</span>"
        for spec in saes
    )
    return f'<div>{head}<div style="display:flex;flex-wrap:wrap;gap:.3rem">{cells}</div></div>'


def _l0(spec: SAESpec, expected: dict[str, Expected]) -> str:
    if spec.architecture == "topk":
        return ""
    found = expected.get(spec.name)
    if found is None:
        return ""
    low, high = f"{found.low:.2g}", f"{found.high:.2g}"
    low, high = (_plainly(text) for text in (low, high))
    return f' <span style="opacity:.8">→ L0 {low if low == high else f"{low}–{high}"}</span>'


def _plainly(number: str) -> str:
    return re.sub(r"\.0$", "", f"{float(number):,}")
