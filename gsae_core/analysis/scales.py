"""How strongly each feature usually fires: the unit that steering counts in."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import check_finite
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import encode_sparse

if TYPE_CHECKING:
    from gsae_core.analysis.features import FeatureIndex

QUANTILE = 0.99
N_TOKENS = 2**14
"""Held-out tokens that scales are measured on where there is no feature index."""

READ_TOKENS = 2**12  # harvested and encoded at a time


class Unit(NamedTuple):
    """What strength 1 means for one feature."""

    value: float
    """In the latent's own units: adding one unit adds this much to f."""
    own: bool
    """Whether it is the feature's own scale; a feature that never fired has none."""
    sentence: str
    """Where it comes from, for a person."""


class Scales(NamedTuple):
    """The scale of every feature of one SAE on some tokens."""

    p99: Float[Tensor, " d_sae"]
    """99th percentile of f over the tokens it fired on; NaN where it never fired."""
    largest: Float[Tensor, " d_sae"]
    """The largest f; 0 where it never fired."""
    fired: Int64[Tensor, " d_sae"]
    """Tokens it fired on."""
    decoder_norm: Float[Tensor, " d_sae"]
    typical: float
    """Median over the features that fired of p99 times decoder norm: the length of what a feature
    writes. If none fired, the root mean square length of the activations, as the SAE sees them."""
    n_tokens: int
    source: str
    """Which tokens: `held-out tokens`, `tokens of the feature index`, `tokens of this prompt`."""
    normalised: bool = False
    """Whether the SAE normalises its inputs: lengths are then times each token's own scale."""

    def unit(self, latent: int) -> Unit:
        """Return the unit of a feature: its 99th percentile.

        A feature that never fired has no scale; its unit writes a vector as long as a typical
        feature does, `typical / |W_dec_i|`.

        Raises:
            InputError: if there is no such feature.
        """
        check_latent(latent, len(self.p99))
        fired, norm = int(self.fired[latent]), float(self.decoder_norm[latent])
        if fired:
            value = float(self.p99[latent])
            said = (
                f"1 unit = {value:.3g}, the 99th percentile of its activations "
                f"(fired on {fired:,} of {self.n_tokens:,} {self.source})"
            )
            return Unit(value, True, said)
        value = self.typical / norm if norm > 0 else self.typical
        said = (
            f"did not fire on {self.n_tokens:,} {self.source}, so it has no scale of its own: "
            f"1 unit = {value:.3g}, which writes a vector of length {value * norm:.3g}, as a "
            f"typical feature does (its decoder norm is {norm:.3g})"
        )
        if self.normalised:
            said += "; in activations, that length times each token's own scale"
        return Unit(value, False, said)


def check_latent(latent: int, d_sae: int) -> None:
    """Raise InputError if there is no such latent."""
    if not 0 <= latent < d_sae:
        raise InputError(
            f"expected a feature from 0 to {d_sae - 1}, got {latent}; this SAE has {d_sae} features"
        )


def measure_scales(
    model: LanguageModel,
    sae: SAE,
    sequences: SequenceSet,
    *,
    layer: int,
    site: Site,
    n_tokens: int = N_TOKENS,
) -> Scales:
    """Return the scales of an SAE on the first counted tokens of `sequences`.

    Raises:
        InputError: if the site does not exist or the SAE has another width.
    """
    x = counted_vectors(model, sequences, layer=layer, site=site, n_tokens=n_tokens)
    return scales_of(sae, x, source="held-out tokens")


def counted_vectors(
    model: LanguageModel, sequences: SequenceSet, *, layer: int, site: Site, n_tokens: int
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of the first counted tokens of `sequences`.

    Raises:
        InputError: if the site does not exist, an activation is not finite, or there is no token
            to count.
    """
    vectors, left = [], n_tokens
    rows = max(1, READ_TOKENS // sequences.n_ctx)
    for start in range(0, len(sequences), rows):
        if left <= 0:
            break
        ids, mask = sequences[start : start + rows]
        x = model.harvest(ids, layer=layer, site=site)[mask.to(model.device)][:left]
        check_finite(x, layer=layer, site=site, dtype=model.dtype)
        vectors.append(x)
        left -= len(x)
    if not vectors:
        raise InputError("expected held-out text to measure features on, got none")
    return torch.cat(vectors)


@torch.no_grad()
def scales_of(sae: SAE, x: Float[Tensor, "tokens d_in"], *, source: str) -> Scales:
    """Return the scales of an SAE on given activations.

    The percentile lies between two activations as `torch.quantile` has it: linearly.
    """
    codes = encode_sparse(sae, x)
    fires = codes.magnitude > 0  # a gate may open onto nothing
    latent, f = (column[fires].cpu().numpy() for column in (codes.latent, codes.magnitude))
    order = np.lexsort((-f, latent))
    ends = np.cumsum(np.bincount(latent, minlength=sae.d_sae))
    length = float(sae.normalised(x).u.square().sum(-1).mean().sqrt())
    offsets = np.concatenate([[0], ends])
    return _of_sorted(sae, offsets, f[order], n_tokens=len(x), source=source, if_none=length)


def scales_of_index(index: "FeatureIndex", sae: SAE) -> Scales:
    """Return the scales of an SAE from its feature index: three reads a feature, no model.

    Raises:
        InputError: if the index is of an SAE of another width.
    """
    offsets = np.asarray(index.array("offsets")).astype(np.int64)
    if len(offsets) != sae.d_sae + 1:
        raise InputError(
            f"expected the feature index of an SAE with {sae.d_sae} features, got one with "
            f"{len(offsets) - 1}; build the index of this SAE"
        )
    value, source = index.array("value"), "tokens of the feature index"
    return _of_sorted(sae, offsets, value, n_tokens=index.n_tokens, source=source, if_none=1.0)


def _of_sorted(
    sae: SAE,
    offsets: np.ndarray,
    value: np.ndarray,
    *,
    n_tokens: int,
    source: str,
    if_none: float,
) -> Scales:
    """Return scales from every firing, latent by latent, the strongest first.

    Args:
        offsets: latent i owns values offsets[i] to offsets[i + 1].
        if_none: the typical length where nothing fires.
    """
    fired = np.diff(offsets)
    alive = np.flatnonzero(fired)
    # The percentile lies a hundredth of the way down, between two entries.
    place = (1 - QUANTILE) * (fired[alive] - 1)
    above, below = np.floor(place).astype(np.int64), np.ceil(place).astype(np.int64)
    high, low = (np.asarray(value[offsets[alive] + at], np.float64) for at in (above, below))
    p99, largest = np.full(sae.d_sae, np.nan), np.zeros(sae.d_sae)
    p99[alive] = high + (place - above) * (low - high)
    largest[alive] = value[offsets[alive]]
    norm = sae.W_dec.detach().norm(dim=1).float().cpu()
    written = torch.from_numpy(p99[alive]).float() * norm[torch.from_numpy(alive)]
    return Scales(
        p99=torch.from_numpy(p99).float(),
        largest=torch.from_numpy(largest).float(),
        fired=torch.from_numpy(fired),
        decoder_norm=norm,
        typical=float(written.median()) if len(alive) else if_none,
        n_tokens=n_tokens,
        source=source,
        normalised=sae.input_norm is not None,
    )
