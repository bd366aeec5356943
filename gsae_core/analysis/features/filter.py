"""The list of an SAE's features, filtered and ordered."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from gsae_core.errors import InputError
from gsae_core.text import quoted

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features.index import FeatureIndex

Range = tuple[float | int | None, float | int | None]
Life = Literal["all", "alive", "dead"]
ANY: Range = (None, None)

RANGES = {"density": "feature density", "theta": "θ", "gamma": "γ", "fired": "firings"}
"""Columns that a range can be set for, and their names."""

ORDERS: dict[str, tuple[str, bool]] = {
    "number": ("feature", True),
    "best match": ("match", False),
    "most frequent": ("density", False),
    "least frequent": ("density", True),
    "strongest": ("max", False),
    "largest θ": ("theta", False),
    "most shrunk": ("gamma", True),
    "gate open, no output": ("no_output", False),
}
"""The column of each order, and whether it rises."""

N_TOKENS_SHOWN = 3
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})?\s*(?:\.\.|…|–|to)\s*({_NUMBER})?\s*")


class Wanted(NamedTuple):
    """Which features of a list are wanted; by default all."""

    density: Range = ANY
    theta: Range = ANY
    gamma: Range = ANY
    fired: Range = ANY
    life: Life = "all"
    starred: bool = False
    label: str = ""
    """Part of the label; upper and lower case are the same."""
    text: str = ""
    """Part of a token on which the feature fires, spaces and case counting, or of its label."""


class Chosen(NamedTuple):
    """The rows of a list that are wanted."""

    rows: "pd.DataFrame"
    n_all: int
    excluded: dict[str, int]
    """How many of all rows each filter in use excludes, most first."""


def parse_range(text: str, what: str) -> Range:
    """Return the range in a text like `0.8..0.95`, `..0.1` or `1e-4..`; InputError: not one."""
    if not text.strip():
        return ANY
    ends = _RANGE.fullmatch(text)
    if ends is None:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise InputError(f"{what}: expected a range like 0.5..0.9, 0.5.. or ..0.9, got {shown!r}")
    low, high = (None if end is None else float(end) for end in ends.groups())
    if low is not None and high is not None and low > high:
        raise InputError(f"{what}: expected the smaller number first, got {text!r}")
    return low, high


def range_text(low: float | None, high: float | None) -> str:
    """Return a range as `parse_range` reads it."""
    return f"{'' if low is None else f'{low:.4g}'}..{'' if high is None else f'{high:.4g}'}"


def within(numbers: np.ndarray, ends: Range) -> Bool[np.ndarray, " rows"]:
    """Return which numbers lie in a range, ends included; NaN lies in none."""
    low, high = (-np.inf if ends[0] is None else ends[0], np.inf if ends[1] is None else ends[1])
    return (numbers >= low) & (numbers <= high)


COUNTED = ("density", "max", "gamma", "gate_density", "fired")
WEIGHTS = ("theta", "gain")


def listing(index: "FeatureIndex") -> "pd.DataFrame":
    """Return a row per feature: `feature`, `tokens`, `COUNTED`, `WEIGHTS` and `no_output`.

    `tokens` are those it fires on most; `no_output` is the share of tokens on which the gate is
    open and the feature silent.
    """
    shown = index.vocabulary
    if index.manifest.vectors is None:  # captions need no signs for their spaces
        shown = [quoted(token) for token in shown]
    tops = index.table["top_tokens"].to_numpy()
    tokens = ["  ".join(shown[int(i)] for i in row[:N_TOKENS_SHOWN]) for row in tops]
    return _rows(tokens, {name: index.table[name].to_numpy() for name in (*COUNTED, *WEIGHTS)})


def weight_listing(weights: "pd.DataFrame", stats: "pd.DataFrame | None") -> "pd.DataFrame":
    """Return the same list from columns `theta` and `gain` of the weights, and an evaluation's
    counts, `Run.feature_stats`."""
    n = len(weights)
    columns = dict.fromkeys(COUNTED, np.full(n, np.nan))
    columns |= {name: weights[name].to_numpy() for name in WEIGHTS}
    if stats is not None and len(stats) == n:
        columns |= {name: stats[name].to_numpy() for name in ("density", "gamma", "fired")}
        # How many tokens were evaluated: firings over density, of the busiest feature.
        busiest = int(columns["fired"].argmax())
        if columns["density"][busiest] > 0:
            n_tokens = columns["fired"][busiest] / columns["density"][busiest]
            columns["gate_density"] = stats["gate_open"].to_numpy() / n_tokens
    return _rows([""] * n, columns)


def _rows(tokens: list[str], columns: dict[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    no_output = columns["gate_density"] - columns["density"]
    first = {"feature": np.arange(len(tokens)), "tokens": tokens}
    return pd.DataFrame(first | columns | {"no_output": no_output})


def choose(
    rows: "pd.DataFrame",
    wanted: Wanted,
    *,
    said: "pd.DataFrame",
    matches: "Mapping[int, float] | None" = None,
    order: str = "number",
) -> Chosen:
    """Return the rows that are wanted, ordered, with `label`, `by` and `star` beside them.

    Args:
        said: `Labels.frame()`.
        matches: scores of features that fire on tokens with `wanted.text`; None where no index
            tells: then labels alone are searched.
        order: a key of `ORDERS`; rows without the number come last.
    """
    by = {
        # A person, or a model with its score.
        number: (model or author) + (f", {score:.2f}" if score == score else "")
        for number, author, model, score in zip(
            said.index, said["author"], said["model"], said["score"], strict=True
        )
    }
    rows = rows.assign(
        label=said["label"].reindex(rows["feature"]).fillna("").to_numpy(dtype=object),
        by=np.array([by.get(i, "") for i in rows["feature"].tolist()], dtype=object),
        star=said["star"].reindex(rows["feature"], fill_value=False).to_numpy(dtype=bool),
    )
    if wanted.text:
        scores = matches or {}
        score = np.array([scores.get(int(i), 0.0) for i in rows["feature"].to_numpy()])
        rows = rows.assign(match=score + _holds(rows["label"].to_numpy(), wanted.text))
    masks = _masks(rows, wanted)
    kept = rows.loc[np.logical_and.reduce([np.ones(len(rows), bool), *masks.values()])]
    column, rising = ORDERS[order]
    if column in kept:
        kept = kept.sort_values(column, ascending=rising, kind="stable", na_position="last")
    excluded = {name: int((~mask).sum()) for name, mask in masks.items()}
    ranked = dict(sorted(excluded.items(), key=lambda pair: -pair[1]))
    return Chosen(kept.reset_index(drop=True), len(rows), ranked)


def _masks(rows: "pd.DataFrame", wanted: Wanted) -> "dict[str, Bool[np.ndarray, ' rows']]":
    masks = {
        title: within(rows[name].to_numpy(dtype=float), getattr(wanted, name))
        for name, title in RANGES.items()
        if getattr(wanted, name) != ANY
    }
    if wanted.life != "all":
        fires = rows["fired"].to_numpy(dtype=float) > 0
        masks["alive or dead"] = fires == (wanted.life == "alive")
    if wanted.starred:
        masks["starred"] = rows["star"].to_numpy(dtype=bool)
    if wanted.label:
        masks["label"] = _holds(rows["label"].to_numpy(), wanted.label)
    if wanted.text:
        masks["search"] = rows["match"].to_numpy(dtype=float) > 0
    return masks


def _holds(labels: np.ndarray, part: str) -> Bool[np.ndarray, " rows"]:
    sought = part.strip().casefold()
    return np.array([sought in label.casefold() for label in labels], bool)


def beside(rows: "pd.DataFrame", number: int, step: int) -> int | None:
    """Return the feature before (-1) or after (1) one in a list, round its ends; None: empty.

    For a feature that is not in the list: the one with the next smaller or larger number.
    """
    features = rows["feature"].to_numpy()
    if not len(features):
        return None
    at = np.flatnonzero(features == number)
    if len(at):
        return int(features[(int(at[0]) + step) % len(features)])
    above = np.sort(features)
    place = int(np.searchsorted(above, number)) - (1 if step < 0 else 0)
    return int(above[place % len(above)])
