"""Inputs normalised token by token, as some libraries train: the way in, and the way out again.

    layer_norm               u = (x - mean(x)) / (std(x) + 1e-5),  x_hat = u_hat std(x) + mean(x)
    constant_norm_rescale    u = x / s,  x_hat = u_hat s,          s = |x| / sqrt(d_in)

Means and deviations run over a token's d_in coordinates; the deviation divides by d_in - 1. They
depend on the token, so no weights can hold them as they hold one scale for all tokens. The names
are SAELens'; OpenAI's TopK autoencoders and BatchTopK's `input_unit_norm` are the first.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

InputNorm = Literal["layer_norm", "constant_norm_rescale"]

# All three libraries add it to the deviation, and only on the way in.
EPS = 1e-5


class Normalised(NamedTuple):
    """A batch as an SAE sees it, and what leads back from there."""

    u: Float[Tensor, "*batch d_in"]
    scale: Float[Tensor, "*batch 1"] | None = None
    """How long one unit of u is in x; None: one, for every token."""
    mean: Float[Tensor, "*batch 1"] | None = None
    """What was taken from x first; None: nothing."""

    def undo(self, u_hat: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return reconstructions of u as reconstructions of x."""
        x_hat = self.in_raw_units(u_hat)
        return x_hat if self.mean is None else x_hat + self.mean

    def in_raw_units(self, step: Float[Tensor, "*#batch d_in"]) -> Float[Tensor, "*#batch d_in"]:
        """Return how far u_hat's going so far moves x_hat: the step times each token's scale."""
        return step if self.scale is None else step * self.scale


def normalised(x: Float[Tensor, "*batch d_in"], kind: InputNorm | None) -> Normalised:
    """Return `x` as an SAE with such inputs sees it; with None, `x` itself.

    A vector of zeros has no direction to rescale: its u is zeros, as is its x_hat.
    """
    match kind:
        case None:
            return Normalised(x)
        case "layer_norm":
            mean = x.mean(-1, keepdim=True)
            centred = x - mean
            scale = centred.std(-1, keepdim=True)
            return Normalised(centred / (scale + EPS), scale, mean)
        case "constant_norm_rescale":
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            return Normalised(x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale)
