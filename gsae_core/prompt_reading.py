"""What the Prompt page reads: a text through one SAE and another, kept for the next click."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from gsae_core import loaded
from gsae_core.config import Architecture
from gsae_core.store.runs import Run
from gsae_core.token_picker import Cell
from gsae_core.token_strip import STRONGEST
from gsae_core.wording import fixed

if TYPE_CHECKING:
    from gsae_core.analysis.attribution import Candidate
    from gsae_core.analysis.prompt import Alignment, Look
    from gsae_core.sae.base import SAE

MEASURES = {
    "active features": ("n_active", "features that fire on the token"),
    "strongest": ("strongest", "the largest activation on the token"),
    "loss added": ("added", "nats that reading the reconstruction adds to predicting the token"),
    "attribution": ("effect", "what the token's features together do to the chosen next token"),
}
"""What the strip can be shaded by: column, and definition."""

SORTS = {"activation": "activation", "share": "share", "attribution": "effect"}


class Seen(NamedTuple):
    """A text through the SAEs of the page."""

    looks: "list[Look]"
    alignment: "Alignment | None"
    seconds: float
    """What reading it took, when it was read."""
    key: tuple[Any, ...]
    """Says which text, model and weights."""


class Chosen(NamedTuple):
    """The SAEs of the page."""

    run: Run
    name: str
    other: str | None

    @property
    def names(self) -> list[str]:
        return [self.name, *([self.other] if self.other else [])]

    def architectures(self) -> "list[Architecture]":
        specs: dict[str, Architecture] = {s.name: s.architecture for s in self.run.config.saes}
        return [specs[name] for name in self.names]


def read(chosen: Chosen, text: str) -> Seen:
    """Return a text through the chosen SAEs, from memory where it was read before.

    Raises:
        InputError: if the text, the model or an SAE cannot be read, or the model is busy.
    """
    began = time.perf_counter()
    model = loaded.language_model(chosen.run)
    saes = [loaded.sae(chosen.run, name) for name in chosen.names]
    bos = chosen.run.config.data.bos != "never"
    place = chosen.run.config.model
    key = (loaded.identity(chosen.run, chosen.names), bos, text, place.layer, place.site)
    return _read(key, _model=model, _saes=saes, _began=began)


# The key says which model and weights; arguments with an underscore are no part of it.
@st.cache_resource(max_entries=16, show_spinner=False)
def _read(key: tuple[Any, ...], _model: loaded.Loaded, _saes: "list[SAE]", _began: float) -> Seen:
    from gsae_core.analysis.prompt import align, look
    from gsae_core.analysis.reading import read_prompt

    *_, bos, text, layer, site = key
    prompt = read_prompt(_model.model, text, bos=bos)
    with _model.desk.turn():
        looks = look(_model.model, _saes, prompt, layer=layer, site=site)
    aligned = align(looks[0], looks[1], _saes[0], _saes[1]) if len(looks) == 2 else None
    return Seen(looks, aligned, time.perf_counter() - _began, key)


def next_tokens(chosen: Chosen, seen: Seen, position: int) -> "list[Candidate]":
    """Return what may follow a token: what does follow first, then the likeliest."""
    return _next_tokens(seen.key, position, _chosen=chosen, _seen=seen)


# The likeliest of every token of a vocabulary, or a pass back through the model: a page that is
# opened again, or drawn anew for a choice beside it, does not pay for them again.
@st.cache_resource(max_entries=64, show_spinner=False)
def _next_tokens(
    key: tuple[Any, ...], position: int, _chosen: Chosen, _seen: Seen
) -> "list[Candidate]":
    from gsae_core.analysis.attribution import candidates

    model, desk = loaded.language_model(_chosen.run)
    with desk.turn():
        return candidates(model, _seen.looks[0].prompt, position=position)


def attributed(chosen: Chosen, seen: Seen, *, position: int, token: int) -> list[pd.DataFrame]:
    """Return the features of each SAE with their effect on a next token, in logits."""
    return _attributed(seen.key, position, token, _chosen=chosen, _seen=seen)


@st.cache_resource(max_entries=64, show_spinner=False)
def _attributed(
    key: tuple[Any, ...], position: int, token: int, _chosen: Chosen, _seen: Seen
) -> list[pd.DataFrame]:
    from gsae_core.analysis.attribution import effects, slope_at

    model, desk = loaded.language_model(_chosen.run)
    place, prompt = _chosen.run.config.model, _seen.looks[0].prompt
    with desk.turn():
        slope = slope_at(
            model, prompt, layer=place.layer, site=place.site, position=position, token=token
        )
    saes = [loaded.sae(_chosen.run, name) for name in _chosen.names]
    return [effects(look, sae, slope) for look, sae in zip(_seen.looks, saes, strict=True)]


def cells(seen: Seen, tables: Sequence[pd.DataFrame], measure: str) -> list[Cell]:
    """Return the strip: the first SAE's measure as ground, the second's as a line below.

    Both are on one scale, so that equal shades are equal numbers.
    """
    values = [
        _measured(look, table, measure) for look, table in zip(seen.looks, tables, strict=True)
    ]
    top = max((float(column.abs().max()) for column in values), default=0.0)
    top = top if top > 0 else 1.0
    prompt, found = seen.looks[0].prompt, []
    for index, token in enumerate(prompt.tokens):
        special = not bool(prompt.counted[index])
        here = [float(column.iloc[index]) for column in values]
        shares = [min(abs(value) / top, 1.0) if value == value else 0.0 for value in here]
        about = "special token: not read by the SAE" if special else _about(here, measure)
        if not token:
            about += "\n∅: the rest of the character before it"
        below = shares[1] if len(shares) > 1 else 0.0
        found.append(Cell(token, about, STRONGEST * shares[0], below, special))
    return found


def _measured(look: "Look", table: pd.DataFrame, measure: str) -> Any:
    column = MEASURES[measure][0]
    tokens = look.tokens
    if column == "added":
        return tokens["loss_sae"] - tokens["loss"]
    if column == "effect":
        sums: Any = table.groupby("position")["effect"].sum()
        return sums.reindex(tokens["position"], fill_value=0.0).reset_index(drop=True)
    return tokens[column].astype(float)


def _about(values: Sequence[float], measure: str) -> str:
    digits = 0 if measure == "active features" else 3
    lines = [fixed(value, digits) for value in values]
    return f"{measure}: {lines[0]}" + (f"\nbeside: {lines[1]}" if len(lines) > 1 else "")


def feature_rows(table: pd.DataFrame, *, position: int, sort: str) -> pd.DataFrame:
    """Return the features of a token, the strongest by `sort` first, either sign."""
    column = SORTS[sort]
    here: Any = table[table["position"] == position]
    order = here[column].abs().sort_values(ascending=False, kind="stable").index
    return here.loc[order, ["latent", "activation", "gate", "share", "effect"]].reset_index(
        drop=True
    )


def chosen_row(event: Any, n_rows: int) -> int | None:
    """Return which row of a table is ticked; None if none is, or one that is gone."""
    rows = event["selection"]["rows"] if event else []
    return rows[0] if rows and 0 <= rows[0] < n_rows else None
