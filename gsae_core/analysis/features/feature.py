"""One feature of an index."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from gsae_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features.index import FeatureIndex

BEFORE, AFTER = 20, 8
# Candidates looked at before a list of examples is left short: some 10 ms of them.
MOST_LOOKED_AT = 2**13
# Firings looked at to find who else fires there, and firings found there; of more, an even sample.
MOST_FIRINGS, MOST_FOUND = 2**13, 2**19

By = Literal["decoder", "firing"]


class Context(TypedDict, total=False):
    """Tokens on either side of an example's; None: to the end of the sequence."""

    before: int | None
    after: int | None


class Histogram(NamedTuple):
    """How often a feature fires how strongly: every firing is in it."""

    edges: Float[np.ndarray, " bins_and_end"]
    """From 0 to the maximum, of equal width; a bin holds its lower edge, the last one both."""
    counts: Integer[np.ndarray, " bins"]


class Logit(NamedTuple):
    """The change of a next token's logit per unit of a feature, to first order."""

    text: str
    effect: float


class Logits(NamedTuple):
    """The next tokens that a feature raises most and lowers most; empty if none were computed."""

    top: tuple[Logit, ...]
    bottom: tuple[Logit, ...]


@dataclass(frozen=True)
class Example:
    """A token that a feature fires on, or nearly does, in its context."""

    tokens: tuple[str, ...]
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
    vector: int | None = None
    """Of a vector that is of no text, its number in the folder; its token is its caption."""

    def html(self) -> str:
        """Return the tokens as HTML; the strongest shade is of the largest value."""
        from gsae_core.analysis.features.export import example_row, strips

        return strips([example_row(self)], top=max(self.values))

    _repr_html_ = html


class Group(NamedTuple):
    """A slice of a feature's firings, from one value to another, and examples drawn from it."""

    low: float
    high: float
    n_fired: int
    examples: tuple[Example, ...]


class Pair(NamedTuple):
    """How two features compare where they fire, lengths in the activations' own units."""

    only_first: int
    both: int
    only_second: int
    first: float
    """Mean length that the first writes, |d| f, over the tokens on which both fire; else NaN."""
    second: float

    @property
    def shorter(self) -> float:
        """By what share the second writes less than the first there; NaN where never both fire."""
        return 1 - self.second / self.first


class Feature:
    """One feature of an index; lists of examples take the `Context` around each token."""

    def __init__(self, index: "FeatureIndex", number: int) -> None:
        self.index: FeatureIndex = index
        self.number: int = number
        self._own = slice(*index.array("offsets")[number : number + 2].tolist())
        self._near = slice(*index.array("near_offsets")[number : number + 2].tolist())

    @property
    def is_dead(self) -> bool:
        """Whether it fired on none of the index's tokens."""
        return self._own.start == self._own.stop

    @cached_property
    def stats(self) -> Mapping[str, Any]:
        """The feature's row of `FeatureIndex.table`, by column."""
        return {str(name): column.iat[self.number] for name, column in self.index.table.items()}

    @property
    def values(self) -> Float32[np.ndarray, " fired"]:
        """Its values on the tokens it fires on, strongest first."""
        return self.index.array("value")[self._own]

    @property
    def positions(self) -> Integer[np.ndarray, " fired"]:
        """The positions of those tokens; ties in the text's order."""
        return self.index.array("token")[self._own]

    @property
    def near_misses(self) -> tuple[Integer[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
        """Positions just under its gate and their margins, nearest first; a bounded band."""
        array = self.index.array
        return array("near_token")[self._near], array("near_margin")[self._near]

    @cached_property
    def histogram(self) -> Histogram:
        """Its firings in bins of equal width from 0 to its maximum."""
        counts = np.array(self.index.array("histogram")[self.number])
        top = float(self.values[0]) if not self.is_dead else 0.0
        return Histogram(np.linspace(0.0, top, len(counts) + 1), counts)

    @property
    def top_tokens(self) -> list[tuple[str, float]]:
        """The vocabulary's tokens it fires on most, each with its share of the summed value."""
        tokens = [self.index.vocabulary[int(token)] for token in self.stats["top_tokens"]]
        return list(zip(tokens, map(float, self.stats["top_token_shares"]), strict=True))

    @cached_property
    def logits(self) -> Logits:
        """The next tokens that it raises and lowers most."""

        def of(end: str) -> tuple[Logit, ...]:
            tokens, effects = self.stats[f"{end}_logit_tokens"], self.stats[f"{end}_logits"]
            texts = [self.index.vocabulary[int(token)] for token in tokens]
            return tuple(map(Logit, texts, map(float, effects)))

        return Logits(of("top"), of("bottom"))

    @cached_property
    def neighbours(self) -> "pd.DataFrame":
        """Features whose decoder directions are nearest: columns `feature`, `cosine`."""
        import pandas as pd

        numbers = self.index.array("neighbours")[self.number].astype(np.int64)
        cosines = np.array(self.index.array("neighbour_cosines")[self.number])
        kept = numbers != self.number
        return pd.DataFrame({"feature": numbers[kept], "cosine": cosines[kept]})

    @cached_property
    def co_firing(self) -> "pd.DataFrame":
        """Features that fire on the same tokens, most alike first.

        Columns: `feature`; `both`, of every `companion_stride`-th token those on which both fire;
        `jaccard`, their share of those on which either fires; `lift`, how many times as often as if
        they were independent.
        """
        import pandas as pd

        both = self.index.array("companion_counts")[self.number].astype(np.int64)
        numbers = self.index.array("companions")[self.number].astype(np.int64)[both > 0]
        both = both[both > 0]
        stride = self.index.manifest.companion_stride

        def counted(feature: Feature) -> int:
            return int((feature.positions % stride == 0).sum())

        # Of these few alone: a pass over the text for all of them took 35 ms and more.
        fired = counted(self)
        theirs = np.array([counted(self.index.feature(i)) for i in numbers.tolist()], np.int64)
        either = fired + theirs - both
        lift = both * (self.index.n_tokens / stride) / np.maximum(fired * theirs, 1)
        return pd.DataFrame(
            {"feature": numbers, "both": both, "jaccard": both / either, "lift": lift}
        )

    def top(self, k: int = 20, **context: Unpack[Context]) -> list[Example]:
        """Return the tokens it fires on most, each context once (see `distinct`)."""
        return self._distinct(self.positions, k, **context)

    def near_threshold(self, k: int = 20, **context: Unpack[Context]) -> list[Example]:
        """Return the tokens it fires on least, weakest first, each context once."""
        return self._distinct(self.positions[::-1], k, **context)

    def just_missed(self, k: int = 20, **context: Unpack[Context]) -> list[Example]:
        """Return tokens just under its gate, nearest first, each context once.

        An example's `value` is its margin: by how much the pre-activation that decides misses the
        threshold, at most 0. A Gated SAE's is pi_gate (of a gate that never binds, what pi_mag
        lacks over exp(r_mag)); a TopK SAE's is what z lacks to the token's k-th largest.
        """
        positions, margins = self.near_misses
        margin = dict(zip(positions.tolist(), margins.tolist(), strict=True))
        n_ctx = self.index.manifest.n_ctx
        return [
            replace(each, value=margin[each.sequence * n_ctx + each.position])
            for each in self._distinct(positions, k, **context)
        ]

    def random(self, k: int = 20, *, seed: int = 0, **context: Unpack[Context]) -> list[Example]:
        """Return tokens drawn evenly from all it fires on: the honest sample."""
        return self._examples(self.positions[self._draw(len(self.values), k, seed)], **context)

    def quantiles(
        self, n: int = 10, *, k: int = 5, seed: int = 0, **context: Unpack[Context]
    ) -> list[Group]:
        """Return its firings in `n` slices of equal size, strongest first, `k` drawn from each."""
        count = len(self.values)
        groups = []
        for i, (start, stop) in enumerate(pairwise(count * i // n for i in range(n + 1))):
            if start == stop:
                continue
            drawn = start + self._draw(stop - start, k, seed, i)
            examples = self._examples(self.positions[drawn], **context)
            low, high = float(self.values[stop - 1]), float(self.values[start])
            groups.append(Group(low, high, stop - start, tuple(examples)))
        return groups

    def non_activating(
        self, k: int = 20, *, seed: int = 0, **context: Unpack[Context]
    ) -> list[Example]:
        """Return counted tokens drawn evenly from all it does not fire on."""
        is_silent = np.array(self.index.array("mask")).reshape(-1)
        is_silent[self.positions] = False
        silent = np.flatnonzero(is_silent)
        return self._examples(silent[self._draw(len(silent), k, seed)], **context)

    def _distinct(self, positions: np.ndarray, k: int, **context: Unpack[Context]) -> list[Example]:
        chosen = distinct(positions, self.index.array("ids"), k, **context)
        return self._examples(np.array(chosen, np.int64), **context)

    def _examples(self, positions: np.ndarray, **context: Unpack[Context]) -> list[Example]:
        n_ctx, examples = self.index.manifest.n_ctx, []
        for number in positions.tolist():
            sequence, first, last = window(number, n_ctx, **context)
            start = sequence * n_ctx
            values = self.everywhere[start + first : start + last].tolist()
            at = number - start - first
            examples.append(
                Example(
                    tokens=tuple(self.index.tokens_of(sequence, first, last)),
                    values=tuple(values),
                    at=at,
                    value=values[at],
                    sequence=sequence,
                    position=first + at,
                    split=self.index.split_of(sequence),
                    vector=self.index.vector(sequence),
                )
            )
        return examples

    def _draw(self, n: int, k: int, *seeds: int) -> Int64[np.ndarray, " drawn"]:
        """Return up to `k` numbers below `n`, none twice, ascending."""
        if n <= k:
            return np.arange(n)
        rng = np.random.default_rng([self.number, *seeds])
        return np.sort(rng.choice(n, k, replace=False, shuffle=False))

    def on_example(self, example: Example) -> Float32[np.ndarray, " tokens"]:
        """Return its value on every token of an example of another feature."""
        first = example.sequence * self.index.manifest.n_ctx + example.position - example.at
        return self.everywhere[first : first + len(example.tokens)]

    @cached_property
    def everywhere(self) -> Float32[np.ndarray, " positions"]:
        """Its value at every position of the text; 0 where it does not fire."""
        # Zeros cost no memory until they are touched; one feature's firings touch little.
        values = np.zeros(self.index.n_places, np.float32)
        values[self.positions] = self.values
        return values

    def gate_line(self, n: int = 2000) -> "pd.DataFrame":
        """Return tokens on the line that ties magnitude to gate: columns `pi_gate`, `pi_mag`, `f`.

        pi_mag = exp(r_mag) (pi_gate - b_gate) + b_mag: known of the tokens it fires on and of its
        near misses, of which `n` each are drawn. Empty where no gate is tied to the magnitude.
        """
        import pandas as pd

        gain, b_gate, b_mag = (float(self.stats[name]) for name in ("gain", "b_gate", "b_mag"))
        if not np.isfinite([gain, b_gate, b_mag]).all():
            return pd.DataFrame({"pi_gate": [], "pi_mag": [], "f": []}, dtype=float)
        f = self.values[self._draw(len(self.values), n, 0)].astype(float)
        margins = self.near_misses[1]
        margin = margins[self._draw(len(margins), n, 0)].astype(float)
        # The threshold of <x - b_dec, w_gate>: where the gate opens, or where the magnitude does.
        missed = margin + max(-b_gate, -b_mag / gain)
        h = np.concatenate([(f - b_mag) / gain, missed])
        f = np.concatenate([f, np.zeros(len(missed))])
        return pd.DataFrame({"pi_gate": h + b_gate, "pi_mag": gain * h + b_mag, "f": f})

    def matched(self, other: "FeatureIndex", *, by: By = "decoder", k: int = 5) -> "pd.DataFrame":
        """Return the features of another index that are most like this one, by `cosine` or `f1`.

        Columns: `feature`; `cosine` of the decoder directions; `both`, tokens on which both fire,
        scaled from an even sample of many; `f1`, the harmonic mean of the shares of either's
        firings that those are; `mutual`, whether this feature is in turn the one whose direction is
        nearest. InputError if the two are of different widths or not over the same tokens.
        """
        import pandas as pd

        a, b = self.index.manifest, other.manifest
        if (a.d_in, a.tokens_sha256) != (b.d_in, b.tokens_sha256):
            raise InputError(
                f"expected two indices over the same {a.unit}s, got {a.n_tokens} of {a.text} for "
                f"{a.sae}, of width {a.d_in}, and {b.n_tokens} of {b.text} for {b.sae}, of width "
                f"{b.d_in}; build one again with the other's --tokens and --split"
            )
        cosine, both = self.index.cosines([self.number], other)[:, 0], self.fired_with(other)
        fired = np.diff(other.array("offsets"))
        f1 = 2 * both / np.maximum(fired + len(self.positions), 1)
        best = np.argsort(-(cosine if by == "decoder" else f1), kind="stable")[:k]
        back = other.cosines(best.tolist(), self.index)
        return pd.DataFrame(
            {
                "feature": best,
                "cosine": cosine[best],
                "both": np.rint(both[best]).astype(np.int64),
                "f1": f1[best],
                "mutual": back.argmax(0) == self.number,
            }
        )

    def fired_with(self, other: "FeatureIndex") -> Float[np.ndarray, " d_sae"]:
        """Return on how many of its tokens each feature of another index fires; see `matched`."""
        positions, row_offsets = self.positions, other.array("row_offsets")
        n_fired = int((row_offsets[positions.astype(np.int64) + 1] - row_offsets[positions]).sum())
        step = max(-(-len(positions) // MOST_FIRINGS), -(-n_fired // MOST_FOUND), 1)
        looked_at = np.asarray(positions[::step]).astype(np.int64)
        counts = np.bincount(other.latents_at(looked_at), minlength=other.n_features)
        return counts * (len(positions) / max(len(looked_at), 1))

    def pair(self, other: "Feature") -> Pair:
        """Return how it compares with a feature, of an index over the same tokens."""
        _, *at = np.intersect1d(
            self.positions, other.positions, assume_unique=True, return_indices=True
        )
        n = len(at[0])
        lengths = [
            float(each.stats["decoder_norm"]) * float(np.mean(each.values[here], dtype=float))
            if n
            else np.nan
            for each, here in zip((self, other), at, strict=True)
        ]
        return Pair(len(self.positions) - n, n, len(other.positions) - n, *lengths)

    def __repr__(self) -> str:
        return f"Feature({self.number} of {self.index.manifest.sae}, fired {len(self.values):,})"

    def _repr_html_(self) -> str:
        from gsae_core.analysis.features.export import card

        return card(self)


def distinct(
    positions: np.ndarray, ids: np.ndarray, k: int, **context: Unpack[Context]
) -> list[int]:
    """Return the first `k` of `positions` (n,) whose contexts differ; `ids` (sequences, n_ctx).

    Contexts with the same tokens, and those that overlap, are the same: of a repeated licence, or
    of a phrase that the feature fires on throughout, one stays.
    """
    chosen: list[int] = []
    seen: set[bytes] = set()
    spans: dict[int, list[tuple[int, int]]] = {}
    for number in positions[:MOST_LOOKED_AT].tolist():
        if len(chosen) == k:
            break
        sequence, first, last = window(number, ids.shape[1], **context)
        read, taken = ids[sequence, first:last].tobytes(), spans.setdefault(sequence, [])
        if read in seen or any(first < stop and start < last for start, stop in taken):
            continue
        seen.add(read)
        taken.append((first, last))
        chosen.append(number)
    return chosen


def window(
    number: int, n_ctx: int, *, before: int | None = BEFORE, after: int | None = AFTER
) -> tuple[int, int, int]:
    """Return the sequence of a token, and where its context begins and ends there."""
    sequence, position = divmod(number, n_ctx)
    first = 0 if before is None else max(0, position - before)
    last = n_ctx if after is None else min(n_ctx, position + after + 1)
    return sequence, first, last
