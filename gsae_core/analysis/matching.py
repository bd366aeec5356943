"""Which latents of two dictionaries point alike, from their weights alone."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

MATCHED = 0.7
"""Cosine from which two mutual best matches count as one feature; ours, and shown on the pages."""

ROWS = 512  # latents whose cosines with a whole dictionary are held at once


class Matches(NamedTuple):
    """For each of some latents, the latent of another dictionary that points most alike."""

    latent: Int64[Tensor, " n"]
    partner: Int64[Tensor, " n"]
    """The one in the other dictionary with the largest decoder cosine."""
    cosine: Float[Tensor, " n"]
    """<d_i, d_j> / (|d_i| |d_j|) of the two."""
    mutual: Bool[Tensor, " n"]
    """Whether `latent` is also its partner's best match."""

    def matched(self, threshold: float = MATCHED) -> Bool[Tensor, " n"]:
        """Return which are the same feature: mutual best matches of at least this cosine."""
        return self.mutual & (self.cosine >= threshold)


@torch.no_grad()
def best_matches(
    latents: Int64[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_in"],
    W_dec_other: Float[Tensor, "d_other d_in"],
) -> Matches:
    """Return the best match of `latents` of one dictionary in the other, and whether it is mutual.

    Costs n (d_sae + d_other) d_in products: for the features of one text, not for every pair.
    """
    latents = latents.to(W_dec.device)
    own, other = F.normalize(W_dec.detach(), dim=1), F.normalize(W_dec_other.detach(), dim=1)
    parts = []
    for some in latents.split(ROWS):
        cosine, partner = (own[some] @ other.T).max(dim=1)
        back = (other[partner] @ own.T).argmax(dim=1)
        parts.append(Matches(some, partner, cosine, back == some))
    return Matches(*map(torch.cat, zip(*parts, strict=True)))
