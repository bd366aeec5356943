"""Which features of an SAE a reader wants to see, and in what order: the list, filtered.

wanted = Wanted(density=parse_range("1e-4..1e-2", "density"), label="loop")
chosen = choose(listing, wanted)
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from gsae_core.errors import InputError
from gsae_core.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features.index import FeatureIndex

Range = tuple[float | None, float | None]
Life = Literal["all", "alive", "dead"]
ANY: Range = (None, None)

RANGES = {"density": "density", "theta": "θ", "gamma": "γ", "fired": "firings"}
"""Columns a range can be asked of, and what people call them."""

ORDERS: dict[str, tuple[str, bool]] = {
    "number": ("feature", True),
    "best match": ("match", False),
    "most frequent": ("density", False),
    "least frequent": ("density", True),
    "strongest": ("max", False),
    "largest θ": ("theta", False),
    "most shrunk": ("gamma", True),
    "gate open in vain": ("vain", False),
}
"""Orders by name: the column, and whether it rises."""

N_TOKENS_SHOWN = 3
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})?\s*(?:\.\.|…|–|to)\s*({_NUMBER})?\s*")


class Wanted(NamedTuple):
    """What is asked of the features of a list; the defaults ask nothing."""

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
    """Return the range that a text like `0.8..0.95`, `..0.1` or `1e-4..` stands for.

    Raises:
        InputError: if it is no range, or its ends are the wrong way round.
    """
    if not text.strip():
        return ANY
    found = _RANGE.fullmatch(text)
    if found is None:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise InputError(f"{what}: expected a range like 0.5..0.9, 0.5.. or ..0.9, got {shown!r}")
    low, high = (None if end is None else float(end) for end in found.groups())
    if low is not None and high is not None and low > high:
        raise InputError(f"{what}: expected the smaller number first, got {text!r}")
    return low, high


def range_text(low: float | None, high: float | None) -> str:
    """Return a range as `parse_range` reads it."""
    return f"{'' if low is None else f'{low:.4g}'}..{'' if high is None else f'{high:.4g}'}"


def listing(index: "FeatureIndex") -> "pd.DataFrame":
    """Return a row per feature with what a list shows and can be asked of it.

    Columns: `feature`, `tokens` (those it fires on most, as they are shown), and of the index's
    table `density`, `max`, `theta`, `gamma`, `gain`, `gate_density` and `fired`; `vain`, the share
    of tokens on which the gate is open and the feature silent.
    """
    import pandas as pd

    table, shown = index.table, [visible(token) for token in index.vocabulary]
    shown = [token if len(token) <= 24 else f"{token[:24]}…" for token in shown]
    names = [shown[int(i)] for i in range(len(shown))]
    tops = table["top_tokens"].to_numpy()
    tokens = ["  ".join(names[int(i)] for i in row[:N_TOKENS_SHOWN]) for row in tops]
    kept = ["density", "max", "theta", "gamma", "gain", "gate_density", "fired"]
    found = {"feature": np.arange(len(table)), "tokens": tokens}
    found |= {name: table[name].to_numpy() for name in kept}
    found["vain"] = found["gate_density"] - found["density"]
    return pd.DataFrame(found)


def weight_listing(weights: "pd.DataFrame", stats: "pd.DataFrame | None") -> "pd.DataFrame":
    """Return the same list from the weights alone, with what an evaluation counted if there is one.

    Args:
        weights: `weight_table` of the SAE.
        stats: `Run.feature_stats`; None: not evaluated.
    """
    import pandas as pd

    n = len(weights)
    none = np.full(n, np.nan)
    found: dict[str, Any] = {"feature": np.arange(n), "tokens": [""] * n}
    found |= {name: none for name in ("density", "max", "gamma", "gate_density", "fired", "vain")}
    found |= {name: weights[name].to_numpy() for name in ("theta", "gain")}
    if stats is not None and len(stats) == n:
        found |= {name: stats[name].to_numpy() for name in ("density", "gamma", "fired")}
        n_tokens = _n_tokens(stats)
        if n_tokens:
            found["gate_density"] = stats["gate_open"].to_numpy() / n_tokens
            found["vain"] = found["gate_density"] - found["density"]
    return pd.DataFrame(found)


def _n_tokens(stats: "pd.DataFrame") -> float:
    """Return how many tokens were evaluated: firings over density, of the busiest feature."""
    busiest = int(stats["fired"].to_numpy().argmax())
    fired, density = (float(stats[name].iloc[busiest]) for name in ("fired", "density"))
    return fired / density if density > 0 else 0.0


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
        matches: how well each feature that fires on tokens with `wanted.text` fits it; None: not
            known, and only labels are searched.
        order: a key of `ORDERS`; rows without the number come last.
    """
    by = dict(zip(said.index, _writers(said), strict=True))
    rows = rows.assign(
        label=said["label"].reindex(rows["feature"]).fillna("").to_numpy(dtype=object),
        by=np.array([by.get(i, "") for i in rows["feature"].tolist()], dtype=object),
        star=said["star"].reindex(rows["feature"], fill_value=False).to_numpy(dtype=bool),
    )
    if wanted.text:
        known = matches or {}
        score = np.array([known.get(int(i), 0.0) for i in rows["feature"].to_numpy()])
        rows = rows.assign(match=score + _holds(rows["label"].to_numpy(), wanted.text))
    masks = dict(_masks(rows, wanted))
    kept = np.ones(len(rows), bool)
    for mask in masks.values():
        kept &= mask
    excluded = {name: int((~mask).sum()) for name, mask in masks.items()}
    column, rising = ORDERS[order]
    found: pd.DataFrame = rows.loc[kept]
    if column in found:
        found = found.sort_values(column, ascending=rising, kind="stable", na_position="last")
    ranked = dict(sorted(excluded.items(), key=lambda pair: -pair[1]))
    return Chosen(found.reset_index(drop=True), len(rows), ranked)


def _writers(said: "pd.DataFrame") -> list[str]:
    """Return who wrote each label: a person, or a model with its score."""
    found = zip(said["author"], said["model"], said["score"], strict=True)
    return [
        (model or author) + (f", {score:.2f}" if score == score else "")
        for author, model, score in found
    ]


def _masks(rows: "pd.DataFrame", wanted: Wanted) -> "Mapping[str, Bool[np.ndarray, ' rows']]":
    """Return which rows each filter in use keeps, by the filter's name."""
    masks = {}
    for name, title in RANGES.items():
        low, high = getattr(wanted, name)
        if (low, high) != ANY:
            numbers = rows[name].to_numpy(dtype=float)
            mask = ~np.isnan(numbers)
            mask &= True if low is None else numbers >= low
            mask &= True if high is None else numbers <= high
            masks[title] = mask
    if wanted.life != "all":
        masks["alive or dead"] = (rows["fired"].to_numpy(dtype=float) > 0) == (
            wanted.life == "alive"
        )
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

    A feature that is not in the list is taken to stand where its number would.
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
