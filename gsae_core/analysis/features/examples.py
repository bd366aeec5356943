"""A feature's examples: tokens in their context, with the feature's value on each of them."""

from dataclasses import dataclass

import numpy as np

from gsae_core.text import token_strip

BEFORE, AFTER = 20, 8
"""Tokens of context on either side; None in their place means all there are."""
# Candidates looked at before a list of examples is left short: some 10 ms of them.
MOST_LOOKED_AT = 2**13


@dataclass(frozen=True)
class Example:
    """A token that a feature fires on, or nearly does, in its context."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    values: tuple[float, ...]
    """The feature's value on each token; 0 where it does not fire or the token is not counted."""
    at: int
    """Which of `tokens` it is about."""
    value: float
    """The feature's value there; of a near miss its margin, at most 0."""
    sequence: int
    position: int
    """Of the token in its sequence."""
    split: str
    """`held_out` or `train`."""

    def html(self, *, top: float | None = None) -> str:
        """Return the tokens as a strip of HTML, all text escaped.

        Args:
            top: value of the strongest shade; None takes the largest here. Lists share one.
        """
        strongest = max(self.values, default=0.0) if top is None else top
        return token_strip(self.tokens, self.values, at=self.at, top=strongest)

    def _repr_html_(self) -> str:
        return self.html()


@dataclass(frozen=True)
class Group:
    """A slice of a feature's firings, ranked by strength, and examples drawn from it."""

    low: float
    high: float
    """The weakest and the strongest value in it."""
    n_fired: int
    examples: tuple[Example, ...]


def distinct(
    places: np.ndarray, ids: np.ndarray, k: int, *, before: int | None, after: int | None
) -> list[int]:
    """Return the first `k` places whose contexts differ, in the order given.

    Two contexts are the same if they hold the same tokens, or if they lie in the same sequence and
    overlap: of a repeated licence, or of a phrase that the feature fires on throughout, one stays.

    Args:
        places: (n,), best first.
        ids: (sequences, n_ctx).
        before, after: tokens of context on either side; None: to the end of the sequence.
    """
    n_ctx = ids.shape[1]
    chosen: list[int] = []
    contexts: set[bytes] = set()
    taken: dict[int, list[tuple[int, int]]] = {}
    for place in places[:MOST_LOOKED_AT].tolist():
        if len(chosen) == k:
            break
        sequence, first, last = window(place, n_ctx, before=before, after=after)
        context = ids[sequence, first:last].tobytes()
        spans = taken.setdefault(sequence, [])
        if context in contexts or any(first < stop and start < last for start, stop in spans):
            continue
        contexts.add(context)
        spans.append((first, last))
        chosen.append(place)
    return chosen


def window(
    place: int, n_ctx: int, *, before: int | None, after: int | None
) -> tuple[int, int, int]:
    """Return the sequence of a place, and where its context begins and ends there."""
    sequence, position = divmod(place, n_ctx)
    first = 0 if before is None else max(0, position - before)
    last = n_ctx if after is None else min(n_ctx, position + after + 1)
    return sequence, first, last
