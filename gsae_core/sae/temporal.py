"""Temporal SAEs: attention predicts part of an activation from those before, an SAE the rest.

    r = s x - b_dec,  z = relu(r W_enc / 4 d_in)           s: a scale of the file's
    p = relu(attention(queries: z, keys and values: z a position earlier))
    c = r . (p W_dec) / (|p W_dec| + 1e-6)^2                the prediction, projected on r
    predicted += c p,  r -= c p W_dec                       and so on for every attention layer
    novel = the k largest of relu(r W_enc / 4 d_in)
    x_hat = ((novel + predicted) W_dec + b_dec) / s

arXiv:2511.01836, as the class of that name in sae-lens 6.54.12 computes it. Its features depend on
the positions before, so that it is no `SAE`: nothing here trains, indexes or steers it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6  # of the prediction's norm


class Codes(NamedTuple):
    """Features of sequences, `(*batch, pos, d_sae)`."""

    novel: Tensor  # what is called its features: at most k of a position, of what is not predicted
    predicted: Tensor


class Attention(nn.Module):
    """Causal attention over latents; keys and queries are `bottleneck` times narrower."""

    def __init__(self, d_sae: int, *, n_heads: int, bottleneck: int) -> None:
        super().__init__()
        self.n_heads: int = n_heads
        self.k_ctx: nn.Linear = nn.Linear(d_sae, d_sae // bottleneck)
        self.q_target: nn.Linear = nn.Linear(d_sae, d_sae // bottleneck)
        self.v_ctx: nn.Linear = nn.Linear(d_sae, d_sae)
        self.c_proj: nn.Linear = nn.Linear(d_sae, d_sae)

    def forward(self, z: Float[Tensor, "*batch pos d_sae"]) -> Float[Tensor, "*batch pos d_sae"]:
        """Return what each position hears of those before it: position i of 0 to i - 1."""
        # The first position hears a latent of zeros, and so of the biases alone.
        before = F.pad(z, (0, 0, 1, 0))[..., :-1, :]
        q, k, v = (
            linear(each).unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
            for linear, each in ((self.q_target, z), (self.k_ctx, before), (self.v_ctx, before))
        )
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(heard.transpose(-3, -2).flatten(-2))


class TemporalSAE(nn.Module):
    """A temporal SAE, for sequences of raw activations."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        n_layers: int,
        n_heads: int,
        bottleneck: int,
        k: int | None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.k: int | None = k
        self.scale: float = scale
        self.W_enc: nn.Parameter = nn.Parameter(torch.zeros(d_in, d_sae))
        self.W_dec: nn.Parameter = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec: nn.Parameter = nn.Parameter(torch.zeros(d_in))
        made = (Attention(d_sae, n_heads=n_heads, bottleneck=bottleneck) for _ in range(n_layers))
        self.attn_layers: nn.ModuleList = nn.ModuleList(made)

    def encode(self, x: Float[Tensor, "*batch pos d_in"]) -> Codes:
        """Return the features of whole sequences, which begin with their first token."""
        residual = x * self.scale - self.b_dec
        W_enc = self.W_enc / (4 * x.shape[-1])
        predicted = torch.zeros_like(x[..., :1]) * self.W_enc[0]
        for attention in self.attn_layers:
            p = torch.relu(attention(torch.relu(residual @ W_enc)))
            written = p @ self.W_dec
            length = written.norm(dim=-1, keepdim=True) + EPSILON
            share = (written * residual).sum(-1, keepdim=True) / length.square()
            predicted = predicted + share * p
            residual = residual - share * written
        novel = torch.relu(residual @ W_enc)
        if self.k is not None:
            kept = novel.topk(self.k)
            novel = torch.zeros_like(novel).scatter(-1, kept.indices, kept.values)
        return Codes(novel, predicted)

    def forward(self, x: Float[Tensor, "*batch pos d_in"]) -> Float[Tensor, "*batch pos d_in"]:
        """Return the reconstruction of `x` from both codes."""
        novel, predicted = self.encode(x)
        return ((novel + predicted) @ self.W_dec + self.b_dec) / self.scale
