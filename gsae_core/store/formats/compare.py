"""Whether two SAEs compute the same: latents and reconstructions of random activations."""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE

TOKENS = 512

# Of the largest pre-activation. Weights rounded to float32 move one by 1e-7 or so; which side of
# its threshold a latent is on decides nothing so near to it.
AT_THRESHOLD = 1e-6


class Parity(NamedTuple):
    """How far apart two SAEs are on the same activations, relative to the largest number."""

    latents: float
    reconstructions: float
    n_tokens: int
    n_active: int
    """Latents that fire, over all tokens: a comparison of silence says nothing."""

    n_at_threshold: int
    """Latents that fire in one alone and lie on the threshold to 1e-6: left out."""

    @property
    def largest(self) -> float:
        """The larger of the two differences."""
        return max(self.latents, self.reconstructions)

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        edge = f"; {self.n_at_threshold} lie on their threshold" * bool(self.n_at_threshold)
        return (
            f"latents within {self.latents:.1e} and reconstructions within "
            f"{self.reconstructions:.1e} on {self.n_tokens} random activations, "
            f"{self.n_active / self.n_tokens:.3g} latents a token{edge}"
        )


@torch.no_grad()
def parity(sae: SAE, other: SAE, *, n_tokens: int = TOKENS, seed: int = 0) -> Parity:
    """Return how closely `other` computes what `sae` does, in double precision.

    Single precision would compare orders of summation: a latent whose pre-activation is a rounding
    error away from its threshold fires in one and not in the other.
    """
    sae, other = copy.deepcopy(sae).cpu().double(), copy.deepcopy(other).cpu().double()
    x = telling_activations(sae, n_tokens, seed)
    latents = reconstructions = 0.0
    largest_f = largest_x = 0.0
    n_active = n_edge = 0
    for rows in x.split(max(1, 2**22 // sae.d_sae)):
        f, g = sae.encode(rows), other.encode(rows)
        edge = ((f > 0) != (g > 0)) & _at_threshold(sae, rows)
        x_hat = sae.normalised(rows).undo(sae.decode(f))
        x_hat_other = other.normalised(rows).undo(other.decode(g))
        kept = ~edge.any(dim=1)
        latents = max(latents, _largest((f - g).masked_fill(edge, 0.0)))
        reconstructions = max(reconstructions, _largest((x_hat - x_hat_other)[kept]))
        largest_f, largest_x = max(largest_f, _largest(f)), max(largest_x, _largest(x_hat))
        n_active, n_edge = n_active + int((f > 0).sum()), n_edge + int(edge.sum())
    return Parity(
        latents=latents / (largest_f or 1.0),
        reconstructions=reconstructions / (largest_x or 1.0),
        n_tokens=len(x),
        n_active=n_active,
        n_at_threshold=n_edge,
    )


def _largest(values: Tensor) -> float:
    # NaN survives amax, and is no number that any bound lets through.
    return float(values.abs().amax()) if values.numel() else 0.0


def telling_activations(sae: SAE, n_tokens: int, seed: int) -> Float[Tensor, "n_tokens d_in"]:
    """Return random activations, from some that leave most latents silent to some that do not.

    Around b_dec, in four sizes about the one at which products are as large as the biases.
    """
    generator = torch.Generator().manual_seed(seed)
    W, biases = _encoder(sae)
    size = float(biases.abs().mean() / W.norm(dim=0).mean().clamp(min=1e-12)) or 1.0
    noise = torch.randn(n_tokens, sae.d_in, generator=generator, dtype=sae.W_dec.dtype)
    sizes = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=noise.dtype)
    return sae.b_dec + size * sizes[torch.arange(n_tokens) % 4, None] * noise


def _encoder(sae: SAE) -> tuple[Tensor, Tensor]:
    match sae:
        case GatedSAE():
            return sae.W_gate, sae.b_gate.abs() + sae.b_mag.abs()
        case JumpReluSAE():
            return sae.W_enc, sae.b_enc.abs() + sae.threshold
        case ReluSAE() | TopKSAE():
            return sae.W_enc, sae.b_enc
    raise AssertionError(type(sae))


def _at_threshold(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Tensor:
    """Return where a pre-activation lies within rounding of what decides whether it fires."""
    match sae:
        case GatedSAE():
            pi_gate, pi_mag = sae.pre_activations(x)
            margin, z = torch.minimum(pi_gate.abs(), pi_mag.abs()), pi_mag
        case JumpReluSAE():
            z = sae.pre_activations(x)
            margin = (z - sae.threshold).abs()
        case TopKSAE():
            z = sae.pre_activations(x)
            margin = torch.minimum(z.abs(), (z - z.topk(sae.k).values[:, -1:]).abs())
        case _:
            z = (sae.normalised(x).u - sae.b_dec) @ sae.W_enc + sae.b_enc  # pyright: ignore
            margin = z.abs()
    return margin <= AT_THRESHOLD * z.abs().amax()
