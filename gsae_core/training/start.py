"""A sparse start: a centre and biases with which few latents fire from the first step on.

With biases of zero, half of the latents fire on a token at first: steps are dense, and a short run
ends with a higher L0 and less loss recovered than after a sparse start (benchmarks/RESULTS.md).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import Start
from gsae_core.errors import InputError
from gsae_core.norms import ordinary
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE
from gsae_core.sae.base import SAE, Rows, SinglePathSAE
from gsae_core.sae.topk import TopKSAE

N_VECTORS = 2**13
"""Activations that a run measures its start on."""
N_FIRING = 64
"""Latents that fire on a token at the start, on average."""
CHUNK_ENTRIES = 2**22  # Pre-activations held at once: 16 MiB of float32.


@torch.no_grad()
def start_(sae: SAE, x: Rows, *, start: Start = "sparse", n_firing: int | None = None) -> None:
    """Start an untrained SAE from activations, in the units that it trains in, in place.

    `sparse` sets `b_dec` to their mean, outliers left out, and biases as `sparse_biases_`.
    `sparse_median` takes their geometric median for `b_dec`; `zero` changes nothing. InputError if
    there are fewer than two activations.
    """
    if start == "zero":
        return
    if len(x) < 2:
        raise InputError(f"expected two activations or more to start from, got {len(x)}; give more")
    if isinstance(sae, JumpReluSAE):
        sae.measure_unit_(x)
    x = without_outliers(x)
    sae.b_dec.copy_(x.mean(0) if start == "sparse" else geometric_median(x))
    sparse_biases_(sae, x, torch.arange(sae.d_sae), n_firing=n_firing)


@torch.no_grad()
def sparse_biases_(
    sae: SAE, x: Rows, latents: Int64[Tensor, " some"], *, n_firing: int | None = None
) -> None:
    """Set biases so that each of the latents fires on `n_firing / d_sae` of the inputs, in place.

    None takes 64, or half of the latents where these are fewer; outliers do not count. It fires on
    one input at least, and on exactly as many where none of its pre-activations are equal. `b_gate`
    and `b_mag`, or `b_enc`, become minus the largest pre-activation it shall not fire on, plus the
    threshold of a JumpReLU SAE. A TopK SAE keeps its biases: k does the same.
    """
    if isinstance(sae, TopKSAE):
        return
    assert isinstance(sae, GatedSAE | SinglePathSAE)
    W = sae.W_gate if isinstance(sae, GatedSAE) else sae.W_enc
    # An outlier is so long that no bias decides there: half of the latents fire on it.
    x = without_outliers(x) - sae.b_dec
    # A latent fires on half of the inputs with a bias of 0, and on more with one that adds to all.
    share = min(N_FIRING / sae.d_sae, 0.5) if n_firing is None else n_firing / sae.d_sae
    n = min(max(1, round(len(x) * share)), len(x) - 1)
    parts = latents.to(x.device).split(max(1, CHUNK_ENTRIES // len(x)))
    silent = torch.cat([(x @ W[:, part]).topk(n + 1, dim=0).values[-1] for part in parts])
    above = sae.threshold[latents] if isinstance(sae, JumpReluSAE) else 0.0
    for name in {"b_gate", "b_mag", "b_enc"} & dict(sae.named_parameters()).keys():
        getattr(sae, name)[latents] = above - silent


def without_outliers(x: Rows) -> Float[Tensor, "ordinary d_in"]:
    """Return those of some activations that are no outliers among them."""
    power = x.square().sum(1)
    return x[power <= ordinary(power).max()]


def geometric_median(x: Rows, *, n_steps: int = 50) -> Float[Tensor, " d_in"]:
    """Return the point with the least sum of distances to the rows, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(n_steps):
        weights = 1 / torch.linalg.vector_norm(x - point, dim=1).clamp_min(1e-6)
        point = (weights @ x) / weights.sum()
    return point
