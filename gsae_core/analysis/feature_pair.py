"""Two features on the same tokens: a Gated SAE's, and the one of a baseline that is its like."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

if TYPE_CHECKING:
    from gsae_core.analysis.examples import Example
    from gsae_core.analysis.feature import Feature


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
