"""How a logit changes with the activations of a site: one backward pass."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.sites import hooked


def logit_slope(
    model: LanguageModel,
    ids: Int64[Tensor, "1 pos"],
    *,
    layer: int,
    site: Site,
    position: int,
    token: int,
) -> Float[Tensor, "pos d_in"]:
    """Return d logit(token after `position`) / d x(q), for every position q; float32.

    It goes through all that lies between the site and the logits: later blocks, attention included,
    the final norm and the unembedding. Positions after `position` have slope 0: attention is
    causal.

    Raises:
        InputError: if there is no such layer, site, position or token.
    """
    model.check(layer, site)
    for name, index, n in (("position", position, ids.shape[1]), ("token", token, model.d_vocab)):
        if not 0 <= index < n:
            raise InputError(f"expected a {name} from 0 to {n - 1}, got {index}")
    leaves: list[Tensor] = []

    def plant(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[0]

    tap, ids = model._blocks[layer].taps[site], ids.to(model.device)
    with torch.enable_grad(), model._turns.alone(), hooked(tap, plant):
        if model._bridge is not None:
            logits = model._bridge(ids, return_type="logits")
        else:
            logits = model.hf(input_ids=ids, use_cache=False).logits
        # Only towards the leaf: the model's weights, which all visitors share, get no gradients.
        (slope,) = torch.autograd.grad(logits[0, position, token], leaves)
    return slope[0].float()
