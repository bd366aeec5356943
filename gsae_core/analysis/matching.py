"""A feature's like in another index: by decoder direction, or by firing on the same tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Integer

from gsae_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.analysis.feature import Feature
    from gsae_core.analysis.features import FeatureIndex

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
