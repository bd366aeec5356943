"""The feature index: built once (`index_build`), asked anything, from files, without torch.

    index = open_index("runs/my-run/features/gated-0.1")   # or open_run(...).features("gated-0.1")
    index.table                                            # a row per feature
    index.feature(7).top(20)                               # where it fires

Every query reads only the slices it needs of arrays that are mapped into memory.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Integer

from gsae_core.analysis.features.examples import AFTER, BEFORE, Example, Group, distinct, window
from gsae_core.analysis.features.files import ARRAYS, TABLE, VOCABULARY, load_array, read_manifest
from gsae_core.analysis.labels import Labels
from gsae_core.errors import InputError
from gsae_core.lm.texts import SPLIT, alone, in_sequence

if TYPE_CHECKING:
    import pandas as pd


LINE_POINTS = 2000


class Histogram(NamedTuple):
    """How often a feature fires how strongly: every firing is in it."""

    edges: Float[np.ndarray, " bins_and_end"]
    """From 0 to the maximum, of equal width; a bin holds its lower edge, the last one both."""
    counts: Integer[np.ndarray, " bins"]


class Logit(NamedTuple):
    """What one unit of a feature does to one next token, to first order."""

    token: int
    text: str
    effect: float


class Logits(NamedTuple):
    """The next tokens that a feature raises most and lowers most; empty if none were computed."""

    top: tuple[Logit, ...]
    bottom: tuple[Logit, ...]


class Feature:
    """One feature of an index; made by `FeatureIndex.feature`, reads only what it is asked for.

    Attributes:
        index: the index it is in.
        number: which latent it is, from 0.
    """

    def __init__(self, index: "FeatureIndex", number: int) -> None:
        self.index, self.number = index, number
        first, last = (int(end) for end in index.array("offsets")[number : number + 2])
        self._entries = slice(first, last)

    @property
    def is_dead(self) -> bool:
        """Whether it fired on none of the index's tokens."""
        return self._entries.start == self._entries.stop

    @cached_property
    def stats(self) -> Mapping[str, Any]:
        """The feature's row of `FeatureIndex.table`, by column."""
        return self.index.row(self.number)

    @property
    def values(self) -> Float32[np.ndarray, " fired"]:
        """Its value on every token it fires on, strongest first."""
        return self.index.array("value")[self._entries]

    @property
    def places(self) -> Integer[np.ndarray, " fired"]:
        """Those tokens, as places (sequence * n_ctx + position); ties in the text's order."""
        return self.index.array("token")[self._entries]

    @cached_property
    def histogram(self) -> Histogram:
        """Its firings in bins of equal width from 0 to its maximum."""
        counts = np.array(self.index.array("histogram")[self.number])
        top = float(self.values[0]) if not self.is_dead else 0.0
        return Histogram(np.linspace(0.0, top, len(counts) + 1), counts)

    @cached_property
    def logits(self) -> Logits:
        """The next tokens that it raises and lowers most, by the logit change of one unit."""
        return Logits(self._logits("top"), self._logits("bottom"))

    @cached_property
    def neighbours(self) -> "pd.DataFrame":
        """Features whose decoder directions are nearest: columns `feature`, `cosine`."""
        import pandas as pd

        found, cosines = (
            np.array(self.index.array(name)[self.number])
            for name in ("neighbours", "neighbour_cosines")
        )
        kept = found != self.number
        return pd.DataFrame({"feature": found[kept].astype(np.int64), "cosine": cosines[kept]})

    @cached_property
    def co_firing(self) -> "pd.DataFrame":
        """Features that fire on the same tokens, most alike first.

        Columns: `feature`; `both`, tokens on which both fire; `jaccard`, those among the tokens on
        which either fires; `lift`, how many times as often as if they were independent. Counted on
        every `manifest.companion_stride`-th place.
        """
        return self.index.companions(self.number)

    def top(
        self, k: int = 20, *, before: int | None = BEFORE, after: int | None = AFTER
    ) -> list[Example]:
        """Return the tokens it fires on most, each context once (see `examples.distinct`).

        Args:
            k: how many at most.
            before, after: tokens of context on either side; None: the whole sequence.
        """
        return self._distinct(self.places, k, before, after)

    def near_threshold(
        self, k: int = 20, *, before: int | None = BEFORE, after: int | None = AFTER
    ) -> list[Example]:
        """Return the tokens it fires on least, weakest first, each context once."""
        return self._distinct(self.places[::-1], k, before, after)

    def just_missed(
        self, k: int = 20, *, before: int | None = BEFORE, after: int | None = AFTER
    ) -> list[Example]:
        """Return tokens just under its gate, nearest first, each context once.

        An example's `value` is its margin: by how much the pre-activation that decides misses the
        threshold, at most 0. A Gated SAE's is pi_gate (of a gate that never binds, what pi_mag
        lacks over exp(r_mag)); a TopK SAE's is what z lacks to the token's k-th largest.
        """
        places, margins = self.near_misses
        chosen = distinct(places, self.index.array("ids"), k, before=before, after=after)
        by_place = dict(zip(places.tolist(), margins.tolist(), strict=True))
        margin = [by_place[place] for place in chosen]
        return self.index.examples(self, chosen, before=before, after=after, values=margin)

    @property
    def near_misses(self) -> tuple[Integer[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
        """Places just under its gate and their margins, nearest first; a bounded band."""
        first, last = self.index.array("near_offsets")[self.number : self.number + 2]
        return (
            self.index.array("near_token")[first:last],
            self.index.array("near_margin")[first:last],
        )

    def random(
        self, k: int = 20, *, seed: int = 0, before: int | None = BEFORE, after: int | None = AFTER
    ) -> list[Example]:
        """Return tokens drawn evenly from all it fires on: the honest sample. One draw a seed."""
        chosen = self._draw(len(self.values), k, seed)
        return self.index.examples(self, self.places[chosen].tolist(), before=before, after=after)

    def quantiles(
        self,
        n: int = 10,
        *,
        k: int = 5,
        seed: int = 0,
        before: int | None = BEFORE,
        after: int | None = AFTER,
    ) -> list[Group]:
        """Return its firings in `n` slices of equal size, strongest first, `k` drawn from each."""
        count = len(self.values)
        edges = [count * i // n for i in range(n + 1)]
        groups = []
        for i, (start, stop) in enumerate(pairwise(edges)):
            if start == stop:
                continue
            drawn = start + self._draw(stop - start, k, [seed, i])
            places = self.places[drawn].tolist()
            examples = self.index.examples(self, places, before=before, after=after)
            low, high = float(self.values[stop - 1]), float(self.values[start])
            groups.append(Group(low, high, stop - start, tuple(examples)))
        return groups

    def non_activating(
        self, k: int = 20, *, seed: int = 0, before: int | None = BEFORE, after: int | None = AFTER
    ) -> list[Example]:
        """Return counted tokens drawn evenly from all it does not fire on."""
        silent = np.array(self.index.array("mask")).reshape(-1)
        silent[self.places] = False
        silent = np.flatnonzero(silent)
        places = silent[self._draw(len(silent), k, seed)].tolist()
        return self.index.examples(self, places, before=before, after=after)

    def gate_line(self, n: int = LINE_POINTS, *, seed: int = 0) -> "pd.DataFrame":
        """Return tokens along the line that ties magnitude to gate, as `pi_gate`, `pi_mag`, `f`.

        pi_mag = exp(r_mag) (pi_gate - b_gate) + b_mag, so each token is one number: known of those
        it fires on and of its near misses. At most `n` of each, drawn evenly; empty where the SAE
        has no gate tied to its magnitude.
        """
        import pandas as pd

        gain, b_gate, b_mag = (float(self.stats[name]) for name in ("gain", "b_gate", "b_mag"))
        if not np.isfinite([gain, b_gate, b_mag]).all():
            return pd.DataFrame({"pi_gate": [], "pi_mag": [], "f": []}, dtype=float)
        f = self.values[self._draw(len(self.values), n, seed)].astype(float)
        margins = self.near_misses[1]
        margin = margins[self._draw(len(margins), n, seed)].astype(float)
        # The threshold of <x - b_dec, w_gate>: where the gate opens, or where the magnitude does.
        missed = margin + max(-b_gate, -b_mag / gain)
        h = np.concatenate([(f - b_mag) / gain, missed])
        f = np.concatenate([f, np.zeros(len(missed))])
        return pd.DataFrame({"pi_gate": h + b_gate, "pi_mag": gain * h + b_mag, "f": f})

    def matched(self, other: "FeatureIndex", *, by: "By" = "decoder", k: int = 5) -> "pd.DataFrame":
        """Return the features of another index over the same tokens that are most like this one.

        See `matching.matches`.
        """

        return matches(self, other, by=by, k=k)

    def on(self, places: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
        """Return its value on any places; 0 where it does not fire."""
        everywhere = self._everywhere
        return everywhere[places]

    @cached_property
    def _everywhere(self) -> Float32[np.ndarray, " places"]:
        # Zeros cost no memory until they are touched; one feature's firings touch little.
        values = np.zeros(self.index.n_places, np.float32)
        values[self.places] = self.values
        return values

    def _distinct(
        self, places: np.ndarray, k: int, before: int | None, after: int | None
    ) -> list[Example]:
        chosen = distinct(places, self.index.array("ids"), k, before=before, after=after)
        return self.index.examples(self, chosen, before=before, after=after)

    def _draw(self, n: int, k: int, seed: int | list[int]) -> Int64[np.ndarray, " drawn"]:
        """Return up to `k` numbers below `n`, none twice, ascending."""
        if n <= k:
            return np.arange(n)
        seeds = [self.number, *([seed] if isinstance(seed, int) else seed)]
        return np.sort(np.random.default_rng(seeds).choice(n, k, replace=False, shuffle=False))

    def _logits(self, end: str) -> tuple[Logit, ...]:
        tokens = [int(token) for token in self.stats[f"{end}_logit_tokens"]]
        effects = [float(effect) for effect in self.stats[f"{end}_logits"]]
        texts = self.index.texts(tokens)
        return tuple(map(Logit, tokens, texts, effects))

    def __repr__(self) -> str:
        return f"Feature({self.number} of {self.index.manifest.sae}, fired {len(self.values):,})"

    def _repr_html_(self) -> str:
        from gsae_core.analysis.features.html import card

        return card(self)


# Places whose features are counted for a query by token or text; more are sampled evenly.
MOST_PLACES = 2**13

Range = tuple[float | int | None, float | int | None]


class FeatureIndex:
    """An index in a folder, as it was when it was opened.

    Attributes:
        folder: where it is.
        manifest: what it is of.
        labels: what people and models said of its features; grows.
        n_features, n_tokens: latents; counted tokens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.n_features, self.n_tokens = self.manifest.d_sae, self.manifest.n_tokens
        self.labels = Labels(folder)
        self._data = data = folder / self.manifest.data
        # All are opened at once: a build that replaces this one may delete them later.
        self._arrays = {name: load_array(data, name) for name in ARRAYS}

    def __len__(self) -> int:
        return self.n_features

    def __getitem__(self, number: int) -> Feature:
        return self.feature(number)

    def array(self, name: str) -> np.ndarray:
        """Return one of `index_files.ARRAYS`, mapped into memory read-only."""
        return self._arrays[name]

    @property
    def n_places(self) -> int:
        """Places of tokens, masked ones included."""
        return self.array("ids").size

    def feature(self, number: int) -> Feature:
        """Return one feature; a dead one is a feature too (`is_dead`).

        Raises:
            InputError: if there is no such number.
        """
        if not 0 <= number < self.n_features:
            raise InputError(
                f"expected a feature from 0 to {self.n_features - 1}, got {number} "
                f"({self.manifest.sae} has {self.n_features} features)"
            )
        return Feature(self, number)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """A row per feature, by its number; `files.COLUMNS` says what the columns mean."""
        import pandas as pd

        return pd.read_parquet(self._data / TABLE).rename_axis("feature")

    def row(self, number: int) -> Mapping[str, Any]:
        """Return a feature's row of the table, by column."""
        return {str(name): column.iat[number] for name, column in self.table.items()}

    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Return which features fired at least once."""
        return np.diff(self.array("offsets")) > 0

    def random_alive(self, *, seed: int) -> int:
        """Return the number of a feature that fired, drawn evenly.

        Raises:
            InputError: if none did.
        """
        alive = np.flatnonzero(self.alive())
        if not len(alive):
            raise InputError(
                f"expected a feature that fires, found none in {self.manifest.sae}: all "
                f"{self.n_features} are dead on these {self.n_tokens} tokens"
            )
        return int(np.random.default_rng(seed).choice(alive))

    def select(self, **ranges: Range) -> "pd.DataFrame":
        """Return the rows whose numbers lie in ranges, ends included; None leaves an end open.

        E.g. `index.select(density=(1e-4, 1e-2), theta=(0.1, None))`. A number that a feature has
        not (NaN) lies in no range.

        Raises:
            InputError: if there is no such column of numbers.
        """
        table = self.table
        kept = np.ones(len(table), bool)
        for name, (low, high) in ranges.items():
            numbers = [column for column, dtype in table.dtypes.items() if dtype.kind in "if"]
            if name not in numbers:
                raise InputError(f"expected a column out of {', '.join(numbers)}, got {name!r}")
            column = table[name].to_numpy()
            kept &= ~np.isnan(column)
            if low is not None:
                kept &= column >= low
            if high is not None:
                kept &= column <= high
        return table.loc[kept]

    def by_token(self, token: int) -> "pd.DataFrame":
        """Return the features that fire on a token of the vocabulary; columns as in `by_places`.

        Raises:
            InputError: if the vocabulary has no such token.
        """
        if not 0 <= token < len(self.vocabulary):
            raise InputError(
                f"expected a token id from 0 to {len(self.vocabulary) - 1}, got {token}"
            )
        return self.by_places(np.flatnonzero(self._flat_ids == token))

    def by_text(self, text: str) -> "pd.DataFrame":
        """Return the features that fire on tokens that contain `text`; columns as in `by_places`.

        Spaces count: ` the` finds words, `the` parts of words too.

        Raises:
            InputError: if there is no text.
        """
        if not text:
            raise InputError("expected some text to look for, got none")
        holds = np.array([text in token for token in self.vocabulary])
        return self.by_places(np.flatnonzero(holds[self._flat_ids]))

    def by_places(self, places: np.ndarray) -> "pd.DataFrame":
        """Return the features that fire on any of these places, the most specific first.

        Columns: `feature`; `on`, those places it fires on; `recall`, their share of the places;
        `precision`, their share of the feature's firings; `f1`, the harmonic mean of both, by which
        rows are ordered. Of more than 2^13 places an even sample is looked at, and `on` and
        `precision` are scaled to all; `attrs["places"]` and `attrs["looked_at"]` say so.
        """
        import pandas as pd

        counted = places[self.array("mask").reshape(-1)[places]]
        step = -(-len(counted) // MOST_PLACES) or 1
        looked_at = counted[::step]
        on = np.bincount(self.latents_at(looked_at), minlength=self.n_features)
        found = np.flatnonzero(on)
        scale = len(counted) / max(len(looked_at), 1)
        fired = np.diff(self.array("offsets"))[found]
        recall = on[found] / max(len(looked_at), 1)
        precision = np.minimum(on[found] * scale / fired, 1.0)
        frame = pd.DataFrame(
            {
                "feature": found,
                "on": np.rint(on[found] * scale).astype(np.int64),
                "recall": recall,
                "precision": precision,
                "f1": 2 * recall * precision / (recall + precision),
            }
        )
        frame = frame.sort_values("f1", ascending=False, kind="stable", ignore_index=True)
        frame.attrs = {"places": len(counted), "looked_at": len(looked_at)}
        return frame

    def latents_at(self, places: np.ndarray) -> np.ndarray:
        """Return which features fire on places, place after place, with repetitions."""
        row_offsets = self.array("row_offsets")
        start = row_offsets[places]
        counts = row_offsets[places + 1] - start
        # Entry e of place p is start[p] + e: ranges set end to end.
        shift = np.repeat(start - np.cumsum(counts) + counts, counts)
        return self.array("latent")[shift + np.arange(len(shift))]

    def companions(self, number: int) -> "pd.DataFrame":
        """Return `Feature.co_firing`."""
        import pandas as pd

        found = np.array(self.array("companions")[number]).astype(np.int64)
        both = np.array(self.array("companion_counts")[number]).astype(np.int64)
        found, both = found[both > 0], both[both > 0]
        # Of these few alone: a pass over the text for all of them took 35 ms and more.
        fired = self._strided_firings(number)
        theirs = np.array([self._strided_firings(i) for i in found.tolist()], np.int64)
        either = fired + theirs - both
        n_tokens = self.n_tokens / self.manifest.companion_stride
        lift = both * n_tokens / np.maximum(fired * theirs, 1)
        columns = {"feature": found, "both": both, "jaccard": both / either, "lift": lift}
        return pd.DataFrame(columns)

    def _strided_firings(self, number: int) -> int:
        """Return on how many of every `companion_stride`-th places a feature fires."""
        first, end = self.array("offsets")[number : number + 2]
        return int((self.array("token")[first:end] % self.manifest.companion_stride == 0).sum())

    def examples(
        self,
        feature: Feature,
        places: Sequence[int],
        *,
        before: int | None,
        after: int | None,
        values: Sequence[float] | None = None,
    ) -> list[Example]:
        """Return places in context; `values` says what to say of them instead of the feature's."""
        ids = self.array("ids")
        n_ctx = ids.shape[1]
        found = []
        for i, place in enumerate(places):
            sequence, first, last = window(place, n_ctx, before=before, after=after)
            context = ids[sequence, first:last].tolist()
            around = feature.on(np.arange(sequence * n_ctx + first, sequence * n_ctx + last))
            at = place - sequence * n_ctx - first
            found.append(
                Example(
                    tokens=tuple(self._in_context(ids[sequence], first, last)),
                    ids=tuple(context),
                    values=tuple(around.tolist()),
                    at=at,
                    value=float(around[at]) if values is None else values[i],
                    sequence=sequence,
                    position=first + at,
                    split=self.split_of(sequence),
                )
            )
        return found

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Return what tokens of the vocabulary stand for, each by itself."""
        return [self.vocabulary[token] for token in tokens]

    def _in_context(self, ids: np.ndarray, first: int, last: int) -> list[str]:
        """Return the texts of a sequence's tokens from `first` up to `last`."""
        start = max(0, first - SPLIT)
        found = in_sequence([self._pieces[i] for i in ids[start : last + SPLIT].tolist()])
        return found[first - start : last - start]

    @cached_property
    def vocabulary(self) -> list[str]:
        """What each token id stands for by itself; part of a character is U+FFFD."""
        return [alone(piece) for piece in self._pieces]

    @cached_property
    def _pieces(self) -> list[str]:
        """`lm.texts.pieces` of every id; of an index made before, U+FFFD in parts of characters."""
        import json

        return json.loads((self._data / VOCABULARY).read_text(encoding="utf-8"))

    def split_of(self, sequence: int) -> str:
        """Return the split a sequence is from."""
        for split in self.manifest.splits:
            if sequence < split.n_sequences:
                return split.name
            sequence -= split.n_sequences
        raise IndexError(f"expected a sequence of the index, got one {sequence} beyond its last")

    @cached_property
    def decoder_norms(self) -> np.ndarray:
        """Length of each decoder direction; 1 in place of 0, for what is divided by it."""
        W_dec = self.array("decoder")
        norms = np.sqrt(np.einsum("ij,ij->i", W_dec, W_dec))
        return np.where(norms > 0, norms, 1)

    @property
    def _flat_ids(self) -> np.ndarray:
        return self.array("ids").reshape(-1)

    def __repr__(self) -> str:
        return (
            f"FeatureIndex({self.manifest.sae}, {self.n_features} features, {self.n_tokens} tokens)"
        )


def open_index(folder: Path | str) -> FeatureIndex:
    """Return the feature index in a folder, such as `runs/<id>/features/<name>`.

    Raises:
        InputError: if there is none, it is cut short, or a newer version made it.
    """
    return FeatureIndex(Path(folder))


By = Literal["decoder", "firing"]

# Firings looked at to find who else fires there, and firings found there; of more, an even sample.
MOST_FIRINGS, MOST_FOUND = 2**13, 2**19


def matches(feature: "Feature", other: "FeatureIndex", *, by: By, k: int) -> "pd.DataFrame":
    """Return the features of another index that are most like this one, best first.

    Columns: `feature`; `cosine` of the decoder directions; `both`, tokens on which both fire; `f1`,
    the harmonic mean of the shares of either's firings that those are; `mutual`, whether this
    feature is in turn the one whose direction is nearest. Ordered by `cosine` or `f1`.

    Of more than 2^13 firings, or of tokens on which more than 2^19 features fire together, an even
    sample is looked at, and `both` is scaled to all.

    Raises:
        InputError: if the two are of different widths or not over the same tokens.
    """
    import pandas as pd

    check_comparable(feature.index, other)
    cosine = cosines(feature, other)
    both = fired_with(feature, other)
    fired = np.diff(other.array("offsets"))
    f1 = 2 * both / np.maximum(fired + len(feature.places), 1)
    best = np.argsort(-(cosine if by == "decoder" else f1), kind="stable")[:k]
    back = _cosines(other, best.tolist(), feature.index)
    return pd.DataFrame(
        {
            "feature": best,
            "cosine": cosine[best],
            "both": np.rint(both[best]).astype(np.int64),
            "f1": f1[best],
            "mutual": back.argmax(0) == feature.number,
        }
    )


def check_comparable(one: "FeatureIndex", other: "FeatureIndex") -> None:
    """Check that two indices are of one place in one model, over the same tokens.

    Raises:
        InputError: if not.
    """
    a, b = one.manifest, other.manifest
    if a.d_in != b.d_in:
        raise InputError(
            f"expected two SAEs of one place in one model, got widths {a.d_in} ({a.sae}) and "
            f"{b.d_in} ({b.sae})"
        )
    if a.tokens_sha256 != b.tokens_sha256:
        raise InputError(
            f"expected two indices over the same tokens, got {a.n_tokens} of {a.text} for {a.sae} "
            f"and {b.n_tokens} of {b.text} for {b.sae}; build one again with the other's --tokens "
            "and --split"
        )


def cosines(feature: "Feature", other: "FeatureIndex") -> Float[np.ndarray, " d_sae"]:
    """Return the cosine of a feature's decoder direction with every one of another index."""
    return _cosines(feature.index, [feature.number], other)[:, 0]


def _cosines(
    one: "FeatureIndex", numbers: Sequence[int], other: "FeatureIndex"
) -> Float[np.ndarray, "d_sae numbers"]:
    """Return the cosines of several directions with every one of another index, in one product."""
    directions = one.array("decoder")[list(numbers)] / one.decoder_norms[list(numbers), None]
    return (other.array("decoder") @ directions.T) / other.decoder_norms[:, None]


def fired_with(feature: "Feature", other: "FeatureIndex") -> Float[np.ndarray, " d_sae"]:
    """Return on how many of a feature's tokens each feature of another index fires."""
    places: Integer[np.ndarray, " fired"] = feature.places
    row_offsets = other.array("row_offsets")
    found = int((row_offsets[places.astype(np.int64) + 1] - row_offsets[places]).sum())
    step = max(-(-len(places) // MOST_FIRINGS), -(-found // MOST_FOUND), 1)
    looked_at = np.asarray(places[::step]).astype(np.int64)
    counts = np.bincount(other.latents_at(looked_at), minlength=other.n_features)
    return counts * (len(places) / max(len(looked_at), 1))


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


def pair(one: "Feature", other: "Feature") -> Pair:
    """Return how two features of indices over the same tokens compare."""
    _, at, there = np.intersect1d(one.places, other.places, assume_unique=True, return_indices=True)
    n = len(at)
    lengths = [
        float(feature.stats["decoder_norm"]) * float(np.mean(feature.values[found], dtype=float))
        if n
        else np.nan
        for feature, found in ((one, at), (other, there))
    ]
    return Pair(len(one.places) - n, n, len(other.places) - n, *lengths)


def values_on(feature: "Feature", example: "Example") -> Float32[np.ndarray, " tokens"]:
    """Return a feature's value on every token of an example of another."""
    return feature.on(_places(feature, example))


def _places(feature: "Feature", example: "Example") -> Int64[np.ndarray, " tokens"]:
    n_ctx = feature.index.manifest.n_ctx
    first = example.sequence * n_ctx + example.position - example.at
    return np.arange(first, first + len(example.tokens), dtype=np.int64)
