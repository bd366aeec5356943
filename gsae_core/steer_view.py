"""Parts of the Steer page: the scale under a slider, continuations, shifts of the next token."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.inspect_parts import quoted
from gsae_core.pieces import escaped, figure_tools, notice, plain
from gsae_core.steer_job import BASELINE, DEFAULT, STEERED, Job, loop, texts
from gsae_core.store.runs import Run
from gsae_core.token_strip import visible
from gsae_core.wording import fixed

if TYPE_CHECKING:
    from gsae_core.analysis.continuation import Loop
    from gsae_core.analysis.scales import Scales, Unit

COLOURS = {DEFAULT: "#7d8894", STEERED: "#0072B2", BASELINE: "#D55E00"}
POOR = 0.7  # cosine below which a match is said to be a poor one; alike.MATCHED, without torch


class Mark:
    """A place on the scale under a strength slider."""

    def __init__(self, at: float | int, text: str) -> None:
        self.at, self.text = at, text


def ruler(marks: Sequence[Mark], *, low: float | int, high: float | int) -> None:
    """Draw marks under a slider that spans `low` to `high`."""
    ticks = "".join(
        f'<span style="position:absolute;left:{100 * (mark.at - low) / (high - low):.2f}%;'
        f'transform:translateX(-50%);white-space:nowrap;text-align:center">'
        f'<span style="display:block;margin:0 auto;width:2px;height:.45rem;'
        f'background:currentColor"></span>{escaped(mark.text)}</span>'
        for mark in marks
        if low <= mark.at <= high
    )
    st.html(
        '<div style="position:relative;height:1.7rem;margin:-.6rem .5rem 0;font-size:.78rem;'
        f'opacity:.85">{ticks}</div>'
    )


def say_unit(unit: "Unit", latent: int) -> None:
    """Say what strength 1 means for a feature."""
    sign = "" if unit.own else "⚠ "
    plain(f"{sign}Feature {latent}: {unit.sentence}.", size=".85rem")


def shift_columns(spots: Sequence[DeltaGenerator], job: Job, titles: dict[str, str]) -> None:
    """Draw how the prediction of the next token moves, one column for each steering."""
    for spot, (kind, shift) in zip(spots, job.shifts.items(), strict=False):
        with spot:
            heading(kind, titles[kind])
            one, two = st.columns(2)
            one.metric(
                "KL, next token (nats)",
                fixed(shift.kl, 4),
                help="KL(default || steered) of the token after the prompt.",
            )
            two.metric(
                "KL, mean per token",
                fixed(job.kl.get(kind), 4),
                help="KL(default || steered) averaged over the prompt and the default's "
                "continuation, both models reading that same text.",
            )
            _shift_table(shift.table, kind)


def _shift_table(table: pd.DataFrame, kind: str) -> None:
    number = st.column_config.NumberColumn
    shown = table.assign(
        token=[quoted(token) for token in table["token"]],
        **{name: 100 * table[name] for name in ("before", "after", "change")},
    )
    st.dataframe(
        shown,
        hide_index=True,
        height=285,
        key=f"steer.shift_{kind}",
        column_order=["token", "before", "after", "change", "delta_logit"],
        column_config={
            "token": st.column_config.TextColumn("next token"),
            "before": number("default", format="%.2f %%"),
            "after": number("steered", format="%.2f %%"),
            "change": number("change", format="%+.2f", help="In percentage points."),
            "delta_logit": number("Δ logit", format="%+.2f", help="Plain difference of logits."),
        },
        alt="Next tokens: probability by default and steered, its change, and the logit's",
    )
    figure_tools(table, name=f"next_token_{kind}")


def heading(kind: str, title: str) -> None:
    """Draw the name of a continuation."""
    st.html(
        f'<div style="font-weight:600;border-left:4px solid {COLOURS[kind]};padding-left:.5rem;'
        f'overflow-wrap:anywhere">{escaped(title)}</div>'
    )


def continuation_html(tokens: Sequence[str], differs: Sequence[bool], *, going: bool) -> str:
    """Return a continuation as HTML; tokens that are not the default's are underlined and shaded.

    Args:
        going: whether more is to come.
    """
    spans = []
    for token, other in zip(tokens, differs, strict=True):
        style = "unicode-bidi:isolate"
        if other:
            # Below the line that an underscore is drawn on.
            style += ";border-bottom:2px dotted currentColor;padding-bottom:2px"
            style += ";background:rgba(230,159,0,.22)"
        spans.append(f'<span style="{style}">{html.escape(_readable(token))}</span>')
    cursor = '<span aria-hidden="true" style="opacity:.6">▍</span>' if going else ""
    empty = "" if tokens or going else '<span style="opacity:.75">nothing: no room left</span>'
    return (
        '<div dir="ltr" style="font-family:monospace;font-size:.9rem;line-height:1.6;'
        'white-space:pre-wrap;overflow-wrap:anywhere;min-height:6rem">'
        f"{''.join(spans)}{cursor}{empty}</div>"
    )


def _readable(token: str) -> str:
    """Return a token as running text: spaces and line ends act, everything else hidden is shown."""
    shown = (c if c == " " else f"↵{c}" if c == "\n" else visible(c) for c in token)
    return "".join(shown)


def say_loop(found: "Loop | None", default: "Loop | None") -> None:
    """Warn of a steered text that goes round and round."""
    if found is None:
        return
    what = "the same token" if found.period == 1 else f"the same {found.period} tokens"
    if default is not None:
        text = (
            f"The last {found.n_tokens} tokens repeat {what}, and the default goes round as well: "
            "raise the temperature."
        )
    else:
        text = (
            f"The last {found.n_tokens} steered tokens repeat {what}: steered too hard, the model "
            "only says this; lower the strength."
        )
    notice(text, kind="warning", title="Repeats itself")


def continuation(run: Run, job: Job, kind: str) -> str:
    """Return a continuation, as far as it is, as HTML."""
    # Copies: the run of the page that a press ended may still add a token.
    own, default = list(job.tokens[kind]), list(job.tokens[DEFAULT])
    differs = [kind != DEFAULT and default[i : i + 1] != [token] for i, token in enumerate(own)]
    going = job.stream is not None and not job.stopped
    return continuation_html(texts(run, job, own), differs, going=going)


def scale_under(scales: "Scales", latent: int, *, limit: float) -> None:
    """Draw where a feature's own scale lies under the slider, and say what it is."""
    unit = scales.unit(latent)
    marks = [Mark(0.0, "")]
    if unit.own:
        marks.append(Mark(1.0, "p99"))
        top = float(scales.largest[latent]) / unit.value
        if top >= 2:  # nearer, its name would lie over the other's
            marks.append(Mark(top, "max"))
    ruler(marks, low=-limit, high=limit)
    say_unit(unit, latent)


def say_matches(job: Job) -> None:
    """Say which of the other SAE's features answer to the steered ones, and how well."""
    for match in job.matches:
        text = f"feature {match.latent} ↔ {match.partner} of {job.settings.other}, decoder cosine "
        text += f"{match.cosine:.3f}, {'mutual best' if match.mutual else 'not mutual'}"
        if not match.mutual or match.cosine < POOR:
            text += ": a poor match, the nearest there is"
        plain(text, size=".85rem")
    for note in job.notes:
        plain(note, size=".85rem")


def say_end(run: Run, job: Job) -> None:
    """Say how long the texts are and took, why they ended, and whether they go round."""
    n = {kind: len(tokens) for kind, tokens in job.tokens.items()}
    words = " · ".join(f"{kind} {count} tokens" for kind, count in n.items())
    st.caption(
        f"{words} · {job.seconds:.1f} s · the default's tokens are unmarked; underlined ones "
        "differ from it at the same place."
    )
    if job.stopped and job.stream is not None:
        st.caption("Stopped; what is there stays.")
        return
    wanted = job.settings.n_tokens
    short = [kind for kind, count in n.items() if count < wanted]
    if short and job.stream is None:
        st.caption(
            f"{', '.join(short)}: ended before {wanted} tokens, at an end of text or where the "
            "model's context was full."
        )
    default = loop(job, DEFAULT)
    for kind in n:
        if kind != DEFAULT:
            say_loop(loop(job, kind), default)
