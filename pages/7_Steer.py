"""Steer: add to, clamp or ablate up to three features, and read what the model writes."""

import time
from typing import Any

import streamlit as st

from gsae_core.app import cache, shell, steer_view
from gsae_core.app.parts import asked, copy_link, key_for, noticed, plain, write
from gsae_core.app.pickers import (
    architecture,
    choice,
    correct_number,
    need_model,
    need_saes,
    pick_pair,
    stacking,
    text_field,
)
from gsae_core.app.steer_view import MATCHED, STEERED, UNSTEERED, Generation, Push, Settings
from gsae_core.plots.palette import LOOKS
from gsae_core.text import quoted

MODES: list[Any] = ["add", "clamp", "ablate"]
LIMIT = 10.0
MAX_SEED = 2**31 - 1
ROWS = ("", "2", "3")  # f, s and mode of the first feature; f2, s2 and mode2 of the second
EVERY = 0.08  # seconds between two drawings of a text that grows

frame = shell.page(
    "Steer",
    icon="🎚️",
    purpose="Add to, clamp or ablate features while the model writes, next to its unsteered text.",
)


@noticed()
def choose_saes() -> tuple[str, str | None, str]:
    """Draw the pickers of SAEs and the prompt."""
    name, other = pick_pair(run, names, page="steer")
    text = text_field("Prompt", page="steer", model=run.config.model.name)
    return name, other, text


@noticed()
def choose_features(name: str, text: str) -> tuple[Push, ...]:
    """Draw a row for each feature that is steered, and one more."""
    d_sae = cache.sae(run, name).d_sae
    with st.spinner("Measuring the scale of each feature", show_time=True):
        scales, why = steer_view.scales_or_prompt(run, name, text)
    if why is not None:
        plain(f"Scales are of this prompt alone: the run's held-out text cannot be read ({why}).")
    pushes: list[Push] = []
    for row in ROWS:
        push = feature_row(row, d_sae, scales)
        if push is None:
            break
        if push.latent in [each.latent for each in pushes]:
            plain(f"Feature {push.latent} is listed already; it is steered once.", size=".9rem")
            break
        pushes.append(push)
    if not pushes:
        suggestions(name, text)
    return tuple(pushes)


def feature_row(row: str, d_sae: int, scales: Any) -> Push | None:
    """Draw what is done to one feature; None if none is given."""
    f, s, mode = f"f{row}", f"s{row}", f"mode{row}"
    correct_number(f, 0, d_sae - 1, what="feature", shown="none")
    if (st.session_state.get(f) or 0) >= d_sae:
        st.session_state[f] = None  # of a wider SAE
    with stacking(f"steer.feature{row}", least=10):
        one, two, three = st.columns([1, 1.6, 3], vertical_alignment="top")
    with one:
        latent = st.number_input(
            "Feature" if not row else f"Feature {row} (optional)",
            0,
            d_sae - 1,
            value=None,
            key=f,
            bind="query-params",
            placeholder=f"0 to {d_sae - 1}",
        )
    if latent is None:
        return None
    with two:
        how = choice(
            "Mode",
            MODES,
            key=mode,
            what="mode",
            help="add: f + strength, on every token. clamp: f = strength, whether it fires or "
            "not. ablate: f = 0.",
        )
    with three:
        correct_number(s, -LIMIT, LIMIT, what="strength", shown="4", whole=False)
        strength = st.slider(
            "Strength, in units of the feature's own scale",
            -LIMIT,
            LIMIT,
            value=4.0,
            step=0.25,
            key=s,
            bind="query-params",
            disabled=how == "ablate",
        )
        steer_view.scale_under(scales, int(latent), limit=LIMIT)
    return Push(int(latent), how, strength)


def suggestions(name: str, text: str) -> None:
    """Offer features that fire on the prompt."""
    found = steer_view.active_features(run, name, text)
    if not found:
        st.caption("No feature fires on this prompt; enter a feature's number.")
        return
    st.caption("Choose a feature to steer.")
    labels = {
        f"feature {latent} · {units:.2f} × its scale on {quoted(token)}": latent
        for latent, units, token in found
    }
    key = key_for("steer.suggested", run.id, name, text)

    def take() -> None:
        if (chosen := st.session_state[key]) in labels:
            st.session_state["f"] = labels[chosen]

    st.selectbox(
        "Features that fire on the prompt",
        list(labels),
        index=None,
        key=key,
        placeholder="strongest relative to its scale first",
        on_change=take,
    )


def choose_sampling() -> tuple[int, float, int, bool]:
    """Draw how tokens are drawn."""
    one, two, three, four = st.columns([1, 1.3, 1.3, 1.6], vertical_alignment="bottom")
    with one:
        good = correct_number("seed", 0, MAX_SEED, what="seed", shown="0")
        if (wanted := asked("seed")) is not None and good:
            st.session_state["steer.seed"] = int(wanted)
        st.session_state.setdefault("steer.seed", 0)
        seed = st.number_input("Seed", 0, MAX_SEED, key="steer.seed", persist_state="session")
        write({"seed": str(seed) if seed else None})
    with two:
        correct_number("temp", 0, 2, what="temperature", shown="0.8", whole=False)
        temperature = st.slider(
            "Temperature",
            0.0,
            2.0,
            value=0.8,
            step=0.1,
            key="temp",
            bind="query-params",
            help="0 always takes the likeliest token. Unsteered and steered text share their "
            "random numbers: they differ only where the predictions do.",
        )
    with three:
        correct_number("len", 10, 200, what="length", shown="60")
        length = st.slider("New tokens", 10, 200, 60, 10, key="len", bind="query-params")
    with four:
        keep = st.toggle(
            "Keep the SAE's error",
            value=True,
            key="err",
            bind="query-params",
            help="On: x + (f' - f) W_dec, the reconstruction error is kept. Off: the model reads "
            "the reconstruction of f'.",
        )
    return int(length), float(temperature), int(seed), bool(keep)


def generation_of(settings: Settings) -> Generation:
    """Return the generation of these settings: the session's, or a new one."""
    generation = st.session_state.get("steer.generation")
    if generation is None or generation.settings != settings:
        with st.spinner("Two passes over the prompt", show_time=True):
            generation = steer_view.start(run, settings)
        st.session_state["steer.generation"] = generation
    return generation


def titles(generation: Generation) -> dict[str, str]:
    """Return the heading of each column."""
    kind = LOOKS[architecture(run, generation.settings.name)].label
    found = {UNSTEERED: "Unsteered", STEERED: f"Steered · {kind} {generation.settings.name}"}
    if generation.settings.other is not None:
        kind = LOOKS[architecture(run, generation.settings.other)].label
        found[MATCHED] = f"Matched · {kind} {generation.settings.other}"
    return found


def results(generation: Generation) -> None:
    """Draw the continuations as they grow, then how predictions shift."""
    named = titles(generation)
    st.subheader("Continuations", anchor=False)
    for sentence in generation.matches:
        plain(sentence, size=".85rem")
    buttons = st.empty()
    with stacking("steer.texts", least=18):
        spots = st.columns(len(generation.tokens))
    bodies = {}
    for spot, kind in zip(spots, generation.tokens, strict=True):
        with spot:
            steer_view.heading(kind, named[kind])
            bodies[kind] = st.empty()
    draw(generation, bodies)
    if generation.stream is not None and not generation.stopped:
        # Streamlit's own Stop, at the top, ends this run of the page and not the generation.
        buttons.button(
            "Stop generating",
            icon=":material/stop_circle:",
            key="steer.stop",
            on_click=setattr,
            args=(generation, "stopped", True),
        )
        grow(generation, bodies)
    if generation.stopped and generation.stream is not None:
        buttons.button(
            "Continue",
            icon=":material/play_arrow:",
            key="steer.go_on",
            on_click=setattr,
            args=(generation, "stopped", False),
        )
    else:
        buttons.empty()
    draw(generation, bodies)
    steer_view.say_end(generation)
    st.subheader("Next token", anchor=False)
    with stacking("steer.shifts", least=24):
        steer_view.shift_columns(st.columns(max(len(generation.shifts), 2)), generation, named)


def grow(generation: Generation, bodies: dict[str, Any]) -> None:
    """Let the continuations grow to their end, showing them on the way."""
    drawn = time.monotonic()
    while steer_view.advance(run, generation):
        if time.monotonic() - drawn > EVERY:
            draw(generation, bodies)  # where a press of Stop ends this run of the page
            drawn = time.monotonic()


def draw(generation: Generation, bodies: dict[str, Any]) -> None:
    """Draw every continuation as far as it is."""
    for kind, body in bodies.items():
        body.html(steer_view.continuation(run, generation, kind))


run, names = need_saes(frame, "steered continuations")
need_model(run)
name, other, text = choose_saes()
pushes = choose_features(name, text)
length, temperature, seed, keep = choose_sampling()
if not pushes:
    st.stop()
with noticed():
    generation = generation_of(
        Settings(cache.identity(run), name, other, text, pushes, keep, length, temperature, seed)
    )
    results(generation)
with st.container(horizontal=True):
    if st.button("Open in Features", icon=":material/search:", key="steer.to_features"):
        shell.go("pages/5_Features.py", run, sae=name, feature=str(pushes[0].latent))
    with st.popover("Copy link", icon=":material/link:", type="tertiary"):
        copy_link()
