"""TopK SAEs: exactly as many latents a token as asked for, with no penalty to tune.

Gao et al. 2024 (arXiv:2406.04093). Latents that never make it into the k largest would stay dead;
an auxiliary loss lets them explain what the others leave over (its appendix on AuxK).
"""

import torch

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError
from gsae_core.sae.base import Inputs, Latents, SinglePathSAE

AUX_WEIGHT = 1 / 32


class TopKSAE(SinglePathSAE):
    """Dictionary that keeps a token's `k` largest latents.

        z     = (x - b_dec) @ W_enc + b_enc
        f     = relu(z) on the k largest z of a token, 0 elsewhere
        x_hat = f @ W_dec + b_dec

    `k_aux` dead latents take part in the auxiliary loss of each token, d_in / 2 by default. `P` is
    the only recipe: latents compete by size, so their directions have one length.

    Raises:
        InputError: if a width or `k_aux` is below 1, `k` not from 1 to `d_sae`, the recipe not P.
    """

    architecture: Architecture = "topk"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int,
        k_aux: int | None = None,
        recipe: Recipe = "P",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        if not 1 <= k <= d_sae:
            raise InputError(f"expected k, latents of a token, from 1 to d_sae={d_sae}, got {k}")
        self.k: int = k
        self.k_aux: int = max(d_in // 2, 1) if k_aux is None else k_aux
        if self.k_aux < 1:
            raise InputError(f"expected k_aux of at least 1, got {k_aux}")

    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0`; InputError if the last axis is not `d_in`.

        They are fewer than `k` where the k-th largest z is negative.
        """
        return largest(self.pre_activations(x), k=self.k)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"{super().extra_repr()}, k={self.k}"


def largest(z: Latents, *, k: int) -> Latents:
    """Return relu(z) on the k largest entries of each row, 0 elsewhere; gradients pass there alone.

    Which of two equal entries is kept is torch.topk's choice; `largest_codes`, which training
    and evaluation on a CPU use, keeps the lower one.
    """
    kept = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, kept.indices, torch.relu(kept.values))
