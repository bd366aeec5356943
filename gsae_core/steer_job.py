"""What the Steer page computes: default, steered and the baseline's continuation, token by token.

A job lives in the session. Its continuations are generators that pause between two tokens, so a
rerun of the page, which a click causes at any moment, goes on where the last one was.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gsae_core import loaded
from gsae_core.errors import InputError
from gsae_core.prompt_reading import Chosen, read
from gsae_core.store.runs import Run

if TYPE_CHECKING:
    from gsae_core.analysis.continuation import Loop, Sampling, Shift
    from gsae_core.analysis.reading import Prompt
    from gsae_core.analysis.scales import Scales
    from gsae_core.analysis.steering import Mode, Steering

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
        return loaded.scales(run, name), None
    except InputError as error:
        from gsae_core.analysis.reading import read_prompt
        from gsae_core.analysis.scales import scales_of

        (model, desk), sae = loaded.language_model(run), loaded.sae(run, name)
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
    from gsae_core.analysis.continuation import next_token_shift, side_by_side, steered_logits
    from gsae_core.analysis.reading import read_prompt

    began = time.perf_counter()
    model, desk = loaded.language_model(run)
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
    with loaded.language_model(run).desk.turn():
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
    from gsae_core.analysis.continuation import followed_by, mean_divergence, steered_logits

    model, place = loaded.language_model(run).model, run.config.model
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
    from gsae_core.analysis.continuation import new_texts

    return new_texts(job.prompt, new, model=loaded.language_model(run).model)


def loop(job: Job, kind: str) -> "Loop | None":
    """Return the loop a continuation ends in, or None."""
    from gsae_core.analysis.continuation import loop_at_end

    return loop_at_end(job.tokens[kind])


def _steerings(
    run: Run, settings: Settings
) -> "tuple[dict[str, Steering | None], list[Match], list[str]]":
    from gsae_core.analysis.steering import Steering, intervention

    sae = loaded.sae(run, settings.name)
    scales, _ = scales_or_prompt(run, settings.name, settings.text)
    pushes = tuple(intervention(scales, *push) for push in settings.pushes)
    found: dict[str, Steering | None] = {DEFAULT: None}
    found[STEERED] = Steering(sae, pushes, keep_error=settings.keep_error)
    if settings.other is None or not pushes:
        return found, [], []
    matches = _matches(run, settings)
    other = loaded.sae(run, settings.other)
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

    from gsae_core.analysis.alike import best_matches

    assert settings.other is not None
    one, two = loaded.sae(run, settings.name), loaded.sae(run, settings.other)
    latents = torch.tensor([push.latent for push in settings.pushes])
    found = best_matches(latents, one.W_dec, two.W_dec)
    columns = (column.tolist() for column in found)
    return [Match(*row) for row in zip(*columns, strict=True)]


def _sampling(settings: Settings) -> "Sampling":
    from gsae_core.analysis.continuation import Sampling

    return Sampling(settings.n_tokens, settings.temperature, settings.seed)


def _bos(run: Run) -> bool:
    return run.config.data.bos != "never"
