"""Parts of the Steer page: the scale under a slider, continuations, shifts of the next token.

What cannot be read, computed or steered raises InputError; so does a model that is busy.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.analysis.features.export import TEMPLATE
from gsae_core.app import cache
from gsae_core.app.parts import PAGE_TEMPLATE, figure_tools, notice, plain
from gsae_core.app.prompt_view import read
from gsae_core.config import Place
from gsae_core.errors import InputError
from gsae_core.runs.run import Run
from gsae_core.text import fixed, macros, quoted, visible

if TYPE_CHECKING:
    from torch import Tensor

    from gsae_core.analysis.generation import Loop, Shift
    from gsae_core.analysis.prompt import Prompt
    from gsae_core.analysis.steering import Mode, Scales, Steering

UNSTEERED, STEERED, MATCHED = "unsteered", "steered", "matched"


class Push(NamedTuple):
    """What is done to one feature, as the page has it."""

    latent: int
    mode: "Mode"
    strength: float


class Settings(NamedTuple):
    """All that decides a result: equal settings, equal result."""

    weights: tuple[Any, ...]
    """`cache.identity` of the run."""
    name: str
    other: str | None
    text: str
    pushes: tuple[Push, ...]
    keep_error: bool
    n_tokens: int
    temperature: float
    seed: int


@dataclass
class Generation:
    """One set of settings, and what has come of it so far."""

    settings: Settings
    prompt: "Prompt"
    steerings: "dict[str, Steering | None]"
    matches: list[str]
    """What is said of the other SAE's features that match the steered ones."""
    shifts: "dict[str, Shift]"
    """Next-token shift of each steering."""
    tokens: dict[str, list[int]]
    stream: Iterator[tuple[str, int]] | None
    """None when all tokens are there, or what ended them was an error."""
    seconds: float
    stopped: bool = False
    kl: dict[str, float] = field(default_factory=dict)
    """Mean KL to the unsteered predictions along the unsteered text, once it is whole."""


def scales_or_prompt(run: Run, name: str, text: str) -> "tuple[Scales, str | None]":
    """Return the scales of an SAE, and why they are this prompt's alone where they are."""
    try:
        return cache.scales(run, name), None
    except InputError as error:
        sae, prompt = cache.sae(run, name), cache.prompt(run, text)
        place = run.config.place_of(name)
        from gsae_core.analysis.steering import scales_of

        with cache.alone(run) as model:
            x = model.harvest(prompt.ids, layer=place.layer, site=place.site)
        x = x[0, prompt.counted.to(x.device)]
        return scales_of(sae, x, source="tokens of this prompt"), str(error)


def active_features(run: Run, name: str, text: str) -> list[tuple[int, float, str]]:
    """Return features that fire on a prompt, strongest for their scale first.

    Of each: its number, its largest activation in its own units, and the token.
    """
    scales, _ = scales_or_prompt(run, name, text)
    features = read(run, (name,), text).looks[0].features
    units = scales.p99.numpy()[features["latent"].to_numpy()]
    found = features.assign(units=features["activation"].to_numpy() / units)
    best = found.sort_values("units", ascending=False).drop_duplicates("latent").head(12)
    return list(zip(best["latent"], best["units"], best["token"], strict=True))


def start(run: Run, settings: Settings) -> Generation:
    """Return a generation with its next-token shifts computed, ready to go on."""
    began = time.perf_counter()
    model, place = cache.language_model(run).model, run.config.place_of(settings.name)
    from gsae_core.analysis.generation import Sampling, next_token_shift, side_by_side

    sampling = Sampling(settings.n_tokens, settings.temperature, settings.seed)
    sampling.check()
    prompt = cache.prompt(run, settings.text)
    steerings, matches = _steerings(run, settings)
    with cache.alone(run):
        before, logits = _logits(run, prompt, steerings, place)
    shifts = {
        k: next_token_shift(before[-1], after[-1], model=model) for k, after in logits.items()
    }
    stream = side_by_side(
        model, prompt, steerings, sampling=sampling, layer=place.layer, site=place.site
    )
    tokens: dict[str, list[int]] = {kind: [] for kind in steerings}
    seconds = time.perf_counter() - began
    return Generation(settings, prompt, steerings, matches, shifts, tokens, stream, seconds)


def _logits(
    run: Run, text: "Prompt", steerings: "dict[str, Steering | None]", place: Place
) -> "tuple[Tensor, dict[str, Tensor]]":
    """Return the logits after every token of a text, unsteered, and under each steering."""
    from gsae_core.analysis.generation import steered_logits

    model = cache.language_model(run).model
    found = {
        kind: steered_logits(model, text, steering, layer=place.layer, site=place.site)
        for kind, steering in steerings.items()
    }
    return found.pop(UNSTEERED), found


def advance(run: Run, generation: Generation) -> bool:
    """Add one token; return whether there is more to come. Where the model is busy, ask again."""
    if generation.stream is None:
        return False
    began = time.perf_counter()
    with cache.alone(run):
        try:
            found = next(generation.stream, None)
        except InputError:
            generation.stream = None  # a generator that failed is at its end
            raise
        if found is not None:
            kind, token = found
            generation.tokens[kind].append(token)
    if found is None:
        _finish(run, generation)
    generation.seconds += time.perf_counter() - began
    return generation.stream is not None


def _finish(run: Run, generation: Generation) -> None:
    """Measure how far steered predictions are from unsteered ones, along the unsteered text."""
    from gsae_core.analysis.generation import followed_by, mean_divergence

    model = cache.language_model(run).model
    generation.stream = None
    prompt, new = generation.prompt, generation.tokens[UNSTEERED]
    text = followed_by(prompt, new, model=model)
    if text.ids.shape[1] > model.n_ctx:  # its last token was never read
        text = followed_by(prompt, new[:-1], model=model)
    place = run.config.place_of(generation.settings.name)
    before, logits = _logits(run, text, generation.steerings, place)
    generation.kl = {k: mean_divergence(text, before, after) for k, after in logits.items()}


def _steerings(run: Run, settings: Settings) -> "tuple[dict[str, Steering | None], list[str]]":
    """Return what each continuation is steered by, and what is said of the other SAE's matches."""
    import torch

    from gsae_core.analysis import prompt
    from gsae_core.analysis.steering import Steering, intervention

    sae = cache.sae(run, settings.name)
    scales, _ = scales_or_prompt(run, settings.name, settings.text)
    pushes = tuple(intervention(scales, *push) for push in settings.pushes)
    found: dict[str, Steering | None] = {UNSTEERED: None}
    found[STEERED] = Steering(sae, pushes, keep_error=settings.keep_error)
    if settings.other is None or not pushes:
        return found, []
    other = cache.sae(run, settings.other)
    latents = torch.tensor([push.latent for push in settings.pushes])
    best = prompt.best_matches(latents, sae.W_dec, other.W_dec)
    scales, _ = scales_or_prompt(run, settings.other, settings.text)
    partners, said = {}, []
    for push, *row in zip(settings.pushes, *(each.tolist() for each in best[1:]), strict=True):
        partner, cosine, mutual = row
        text = f"feature {push.latent} ↔ {partner} of {settings.other}, decoder cosine {cosine:.3f}"
        text += ", mutual best" if mutual else ", not mutual"
        is_good = mutual and cosine >= prompt.MATCHED
        said.append(text if is_good else f"{text}: a weak match, the best there is")
        partners.setdefault(partner, intervention(scales, partner, push.mode, push.strength))
    found[MATCHED] = Steering(other, tuple(partners.values()), keep_error=settings.keep_error)
    return found, said


COLOURS = {UNSTEERED: "#7d8894", STEERED: "#0072B2", MATCHED: "#D55E00"}


def scale_under(scales: "Scales", latent: int, *, limit: float) -> None:
    """Draw where a feature's own scale lies under the slider, and say what it is."""
    unit = scales.unit(latent)
    marks = {0.0: ""}
    if unit.own:
        marks[1.0] = "p99"
        top = float(scales.largest[latent]) / unit.value
        if top >= 2:  # nearer, its name would lie over the other's
            marks[top] = "max"
    st.html(macros(PAGE_TEMPLATE).ruler(marks, limit))
    plain(f"{'' if unit.own else '⚠ '}Feature {latent}: {unit.sentence}.", size=".85rem")


def shift_columns(
    spots: Sequence[DeltaGenerator], generation: Generation, titles: dict[str, str]
) -> None:
    """Draw how the prediction of the next token moves, one column for each steering."""
    number = st.column_config.NumberColumn
    for spot, (kind, shift) in zip(spots, generation.shifts.items(), strict=False):
        with spot:
            heading(kind, titles[kind])
            one, two = st.columns(2)
            about = "KL(unsteered || steered) of the token after the prompt."
            one.metric("KL, next token (nats)", fixed(shift.kl, 4), help=about)
            about = "KL(unsteered || steered) averaged over the prompt and the unsteered "
            about += "continuation, both models reading that same text."
            two.metric("KL, mean per token", fixed(generation.kl.get(kind), 4), help=about)
            st.dataframe(
                shift.table.assign(
                    token=[quoted(token) for token in shift.table["token"]],
                    **{name: 100 * shift.table[name] for name in ("before", "after", "change")},
                ),
                hide_index=True,
                height=285,
                key=f"steer.shift_{kind}",
                column_order=["token", "before", "after", "change", "delta_logit"],
                column_config={
                    "token": st.column_config.TextColumn("next token"),
                    "before": number("unsteered", format="%.2f %%"),
                    "after": number("steered", format="%.2f %%"),
                    "change": number(format="%+.2f", help="In percentage points."),
                    "delta_logit": number("Δ logit", format="%+.2f"),
                },
                alt="Next tokens: probability unsteered and steered, its change, and the logit's",
            )
            figure_tools(shift.table, name=f"next_token_{kind}")


def heading(kind: str, title: str) -> None:
    """Draw the name of a continuation beside its colour."""
    st.html(macros(PAGE_TEMPLATE).heading(COLOURS[kind], title))


def continuation(run: Run, generation: Generation, kind: str) -> str:
    """Return a continuation, as far as it is, as HTML."""
    from gsae_core.analysis.generation import new_texts

    # Copies: the run of the page that a press ended may still add a token.
    own, other = list(generation.tokens[kind]), list(generation.tokens[UNSTEERED])
    differs = [kind != UNSTEERED and other[i : i + 1] != [token] for i, token in enumerate(own)]
    texts = new_texts(generation.prompt, own, model=cache.language_model(run).model)
    going = generation.stream is not None and not generation.stopped
    return continuation_html(texts, differs, going=going)


def continuation_html(tokens: Sequence[str], differs: Sequence[bool], *, going: bool) -> str:
    """Return a continuation as HTML; those that differ from the unsteered text are marked."""
    # Spaces and line ends act; everything else hidden is shown.
    texts = [
        "".join(c if c == " " else f"↵{c}" if c == "\n" else visible(c) for c in token)
        for token in tokens
    ]
    return macros(TEMPLATE).continuation(list(zip(texts, differs, strict=True)), going)


def say_end(generation: Generation) -> None:
    """Say how long the texts are and took, why they ended, and whether they repeat themselves."""
    n = {kind: len(tokens) for kind, tokens in generation.tokens.items()}
    words = " · ".join(f"{kind} {count} tokens" for kind, count in n.items())
    st.caption(
        f"{words} · {generation.seconds:.1f} s · underlined tokens differ from the unsteered text "
        "at the same position."
    )
    if generation.stopped and generation.stream is not None:
        st.caption("Stopped. Continue adds the remaining tokens.")
        return
    wanted = generation.settings.n_tokens
    short = [kind for kind, count in n.items() if count < wanted]
    if short and generation.stream is None:
        st.caption(
            f"{', '.join(short)}: ended before {wanted} tokens, at an end of text or where the "
            "model's context was full."
        )
    from gsae_core.analysis.generation import loop_at_end

    unsteered, *steered = (loop_at_end(tokens) for tokens in generation.tokens.values())
    for found in steered:
        say_loop(found, unsteered)


def say_loop(found: "Loop | None", unsteered: "Loop | None") -> None:
    """Warn of a steered text that repeats itself at its end."""
    if found is None:
        return
    what = "the same token" if found.period == 1 else f"the same {found.period} tokens"
    so = ": the steering is too strong; lower the strength"
    if unsteered:
        so = ", and the unsteered text repeats itself too: raise the temperature"
    text = f"The last {found.n_tokens} steered tokens repeat {what}{so}."
    notice(text, kind="warning", title="Repeats itself")
