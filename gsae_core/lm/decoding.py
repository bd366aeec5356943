"""A sequence that grows while the model reads it, each new token edited at a site."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.hooks import hooked
from gsae_core.lm.model import Edit, LanguageModel, in_model_dtype


class Decoding:
    """Logits of a growing sequence; what was read stays read, with the edits it had.

    Keys and values of earlier tokens are kept, so a token costs one row and not the sequence. An
    edit that changed an earlier token lives on in them, exactly as in a pass over the whole. A
    TransformerBridge keeps none, and reads the sequence again for every token.

    Args:
        model: is shared: between two calls of `extend`, others may use it.
        layer: block of the edited site.
        site: where in the block.

    Raises:
        InputError: if there is no such layer or site.
    """

    def __init__(self, model: LanguageModel, *, layer: int, site: Site) -> None:
        model.check(layer, site)
        self._model, self._tap = model, model._blocks[layer].taps[site]
        self._cache = None
        self._read: list[tuple[Tensor, Edit | None]] = []

    @property
    def n_tokens(self) -> int:
        """Tokens read so far."""
        return sum(ids.shape[1] for ids, _ in self._read)

    @torch.inference_mode()
    def extend(
        self, ids: Int64[Tensor, "1 new"], edit: Edit | None = None
    ) -> Float[Tensor, "new d_vocab"]:
        """Read more tokens; return the next-token logits after each of them, float32.

        Args:
            ids: the new tokens alone.
            edit: takes and returns float32 (1, new, d_in), the new tokens' activations at the site.

        Raises:
            InputError: if the sequence outgrows the model's context.
        """
        model, n_new = self._model, ids.shape[1]
        if self.n_tokens + n_new > model.n_ctx:
            raise InputError(
                f"expected at most {model.n_ctx} tokens in a sequence ({model.name}'s context), "
                f"got {self.n_tokens + n_new}; shorten the prompt or the continuation"
            )
        ids = ids.to(model.device)
        self._read.append((ids, edit))
        if model._bridge is not None:
            return self._again()[-n_new:]
        with model._turns.alone():
            if edit is None:
                return self._step(ids)
            with hooked(self._tap, in_model_dtype(edit)):
                return self._step(ids)

    def _step(self, ids: Int64[Tensor, "1 new"]) -> Float[Tensor, "new d_vocab"]:
        out = self._model.hf(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return out.logits[0].float()

    def _again(self) -> Float[Tensor, "pos d_vocab"]:
        """Read the whole sequence, every part of it under its own edit."""

        def edited(x: Tensor) -> Tensor:
            parts = x.split([ids.shape[1] for ids, _ in self._read], dim=1)
            pairs = zip(parts, self._read, strict=True)
            return torch.cat([part if edit is None else edit(part) for part, (_, edit) in pairs], 1)

        whole = torch.cat([ids for ids, _ in self._read], 1)
        with self._model._turns.alone(), hooked(self._tap, in_model_dtype(edited)):
            return self._model._forward(whole)[0]


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
