"""One feature of an index: its numbers, where it fires, what it writes, who is near it."""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from gsae_core.analysis.examples import AFTER, BEFORE, Example, Group, distinct

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.features import FeatureIndex
    from gsae_core.analysis.matching import By

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
        from gsae_core.analysis.matching import matches

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
        from gsae_core.analysis.feature_html import card

        return card(self)
