"""Parts of the Steer page: the scale under a slider, continuations, shifts of the next token."""

import html
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.app import cache
from gsae_core.app.parts import escaped, figure_tools, notice, plain
from gsae_core.app.pickers import quoted
from gsae_core.app.prompt_view import Chosen, read
from gsae_core.errors import InputError
from gsae_core.runs.run import Run
from gsae_core.text import fixed, visible

if TYPE_CHECKING:
    from gsae_core.analysis.generation import Loop, Sampling, Shift
    from gsae_core.analysis.prompt import Prompt
    from gsae_core.analysis.steering import Mode, Scales, Steering, Unit

DEFAULT, STEERED, BASELINE = "default", "steered", "baseline"


class Push(NamedTuple):
    """What is done to one feature, as the page has it."""

    latent: int
    mode: "Mode"
    strength: float


class Settings(NamedTuple):
    """All that decides a result: equal settings, equal result."""

    weights: tuple[Any, ...]
    """`loaded.identity` of the SAEs and their model."""
    name: str
    other: str | None
    text: str
    pushes: tuple[Push, ...]
    keep_error: bool
    n_tokens: int
    temperature: float
    seed: int


class Match(NamedTuple):
    """The other SAE's feature that points most alike."""

    latent: int
    partner: int
    cosine: float
    mutual: bool


@dataclass
class Job:
    """One set of settings, and what has come of it so far."""

    settings: Settings
    prompt: "Prompt"
    steerings: "dict[str, Steering | None]"
    matches: list[Match]
    notes: list[str]
    """What of the baseline could not be matched one to one."""
    shifts: "dict[str, Shift]"
    """Next-token shift of each steering."""
    tokens: dict[str, list[int]]
    stream: Iterator[tuple[str, int]] | None
    """None when all tokens are there, or what ended them was an error."""
    seconds: float = 0.0
    stopped: bool = False
    kl: dict[str, float] = field(default_factory=dict)
    """Mean KL to the default along the default's text, once it is whole."""


def scales_or_prompt(run: Run, name: str, text: str) -> "tuple[Scales, str | None]":
    """Return the scales of an SAE, and why they are this prompt's alone where they are.

    Raises:
        InputError: if the model, the SAE or the prompt cannot be read.
    """
    try:
        return cache.scales(run, name), None
    except InputError as error:
        from gsae_core.analysis.prompt import read_prompt
        from gsae_core.analysis.steering import scales_of

        (model, desk), sae = cache.language_model(run), cache.sae(run, name)
        prompt, place = read_prompt(model, text, bos=_bos(run)), run.config.model
        with desk.turn():
            x = model.harvest(prompt.ids, layer=place.layer, site=place.site)
        x = x[0, prompt.counted.to(x.device)]
        return scales_of(sae, x, source="tokens of this prompt"), str(error)


def active_features(run: Run, name: str, text: str, n: int = 12) -> list[tuple[int, float, str]]:
    """Return features that fire on a prompt, strongest for their scale first.

    Returns:
        for each: its number, its largest activation in its own units, and the token.
    """
    scales, _ = scales_or_prompt(run, name, text)
    features = read(Chosen(run, name, None), text).looks[0].features
    units = scales.p99.numpy()[features["latent"].to_numpy()]
    found = features.assign(units=features["activation"].to_numpy() / units)
    best = found.sort_values("units", ascending=False).drop_duplicates("latent").head(n)
    rows = zip(best["latent"], best["units"], best["token"], strict=True)
    return [(int(latent), float(units), str(token)) for latent, units, token in rows]


def start(run: Run, settings: Settings) -> Job:
    """Return a job with its next-token shifts computed, ready to go on.

    Raises:
        InputError: if the text, the model, an SAE or a setting is not as it should be, or the model
            is busy.
    """
    from gsae_core.analysis.generation import next_token_shift, side_by_side, steered_logits
    from gsae_core.analysis.prompt import read_prompt

    began = time.perf_counter()
    model, desk = cache.language_model(run)
    sampling = _sampling(settings)
    sampling.check()
    prompt = read_prompt(model, settings.text, bos=_bos(run))
    steerings, matches, notes = _steerings(run, settings)
    place = run.config.model
    where: dict[str, Any] = {"layer": place.layer, "site": place.site}
    with desk.turn():
        logits = {
            kind: steered_logits(model, prompt, steering, **where)[-1]
            for kind, steering in steerings.items()
        }
    shifts = {
        kind: next_token_shift(logits[DEFAULT], logits[kind], model=model)
        for kind in steerings
        if kind != DEFAULT
    }
    stream = side_by_side(model, prompt, steerings, sampling=sampling, **where)
    tokens: dict[str, list[int]] = {kind: [] for kind in steerings}
    job = Job(settings, prompt, steerings, matches, notes, shifts, tokens, stream)
    job.seconds = time.perf_counter() - began
    return job


def advance(run: Run, job: Job) -> bool:
    """Add one token to a job; return whether there is more to come.

    Raises:
        InputError: if the model is busy (ask again), or steering breaks it.
    """
    if job.stream is None:
        return False
    began = time.perf_counter()
    with cache.language_model(run).desk.turn():
        try:
            found = next(job.stream, None)
        except InputError:
            job.stream = None  # a generator that failed is at its end
            raise
        if found is not None:
            kind, token = found
            job.tokens[kind].append(token)
    if found is None:
        _finish(run, job)
    job.seconds += time.perf_counter() - began
    return job.stream is not None


def _finish(run: Run, job: Job) -> None:
    """Measure how far the steered predictions are from the default's, along the default's text."""
    from gsae_core.analysis.generation import followed_by, mean_divergence, steered_logits

    model, place = cache.language_model(run).model, run.config.model
    job.stream = None
    text = followed_by(job.prompt, job.tokens[DEFAULT], model=model)
    if text.ids.shape[1] > model.n_ctx:  # its last token was never read
        text = followed_by(job.prompt, job.tokens[DEFAULT][:-1], model=model)
    logits = {
        kind: steered_logits(model, text, steering, layer=place.layer, site=place.site)
        for kind, steering in job.steerings.items()
    }
    job.kl = {
        kind: mean_divergence(text, logits[DEFAULT], logits[kind])
        for kind in job.steerings
        if kind != DEFAULT
    }


def texts(run: Run, job: Job, new: list[int]) -> tuple[str, ...]:
    """Return new tokens of a continuation as they can be shown."""
    from gsae_core.analysis.generation import new_texts

    return new_texts(job.prompt, new, model=cache.language_model(run).model)


def loop(job: Job, kind: str) -> "Loop | None":
    """Return the loop a continuation ends in, or None."""
    from gsae_core.analysis.generation import loop_at_end

    return loop_at_end(job.tokens[kind])


def _steerings(
    run: Run, settings: Settings
) -> "tuple[dict[str, Steering | None], list[Match], list[str]]":
    from gsae_core.analysis.steering import Steering, intervention

    sae = cache.sae(run, settings.name)
    scales, _ = scales_or_prompt(run, settings.name, settings.text)
    pushes = tuple(intervention(scales, *push) for push in settings.pushes)
    found: dict[str, Steering | None] = {DEFAULT: None}
    found[STEERED] = Steering(sae, pushes, keep_error=settings.keep_error)
    if settings.other is None or not pushes:
        return found, [], []
    matches = _matches(run, settings)
    other = cache.sae(run, settings.other)
    scales, _ = scales_or_prompt(run, settings.other, settings.text)
    partners, notes = {}, []
    for match, push in zip(matches, settings.pushes, strict=True):
        if match.partner in partners:
            notes.append(
                f"feature {match.latent} has the same match as another, which is steered once"
            )
        partners.setdefault(
            match.partner, intervention(scales, match.partner, push.mode, push.strength)
        )
    found[BASELINE] = Steering(other, tuple(partners.values()), keep_error=settings.keep_error)
    return found, matches, notes


def _matches(run: Run, settings: Settings) -> list[Match]:
    import torch

    from gsae_core.analysis.matching import best_matches

    assert settings.other is not None
    one, two = cache.sae(run, settings.name), cache.sae(run, settings.other)
    latents = torch.tensor([push.latent for push in settings.pushes])
    found = best_matches(latents, one.W_dec, two.W_dec)
    columns = (column.tolist() for column in found)
    return [Match(*row) for row in zip(*columns, strict=True)]


def _sampling(settings: Settings) -> "Sampling":
    from gsae_core.analysis.generation import Sampling

    return Sampling(settings.n_tokens, settings.temperature, settings.seed)


def _bos(run: Run) -> bool:
    return run.config.data.bos != "never"


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
