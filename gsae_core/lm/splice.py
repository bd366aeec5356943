"""One pass over a batch, continued from other activations: what ran before the site runs once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.sites import hooked, recording, replaying

if TYPE_CHECKING:
    from gsae_core.lm.model import LanguageModel

Edit = Callable[[Tensor], Tensor]


class Splice:
    """A clean pass over one batch, and passes that differ from it from one site on.

    What ran before the site is remembered, so a continuation costs only what comes after it.

    Attributes:
        x: the site's activations in the clean pass, float32 (rows, pos, d_in).
        logits: the clean next-token logits, float32 (rows, pos, d_vocab).
    """

    def __init__(self, model: "LanguageModel", ids: Tensor, layer: int, site: Site) -> None:
        self._model, self._ids, self._tap = model, ids, model._blocks[layer].taps[site]
        earlier = [sites.block for sites in model._blocks[:layer]]
        before = model._blocks[layer].before.get(site, ())
        seen: list[Tensor] = []
        with (
            model._turns.alone(),
            recording((*earlier[-1:], *before)) as outputs,
            hooked(self._tap, seen.append),
        ):
            self.logits: Tensor = model._forward(ids)
        # A copy made outside inference mode may later meet autograd.
        self.x: Tensor = seen[0].to(torch.float32, copy=True)
        # Each block hands on one residual stream, so every earlier one may return the last one's.
        self._outputs = outputs | {block: outputs[earlier[-1]] for block in earlier}
        self._mine = threading.local()  # what each thread that continues the pass puts there

    def run(self, x: Float[Tensor, "rows pos d_in"]) -> Float[Tensor, "rows pos d_vocab"]:
        """Return the logits that follow when the rest of the model reads `x` at the site.

        Threads may continue one pass side by side (in a TransformerBridge, one after the other).

        Raises:
            InputError: if `x` has another shape than the site's activations.
        """
        key = self if self._model._bridge is None else object()
        with self._model._turns.together(key, self._spliced):
            self._mine.x = x
            return self._model._forward(self._ids)

    @contextmanager
    def _spliced(self) -> Iterator[None]:
        with (
            replaying(self._outputs),
            hooked(self._tap, in_model_dtype(lambda _: self._mine.x)),
        ):
            yield


def in_model_dtype(edit: Edit) -> Edit:
    """Return `edit` between a float32 view of the model's tensor and the model's own precision."""

    def edited(x: Tensor) -> Tensor:
        new = edit(x.float())
        if new.shape != x.shape:
            raise InputError(
                f"expected an edit that keeps the shape {tuple(x.shape)}, got {tuple(new.shape)}; "
                "was this SAE trained at another site?"
            )
        return new.to(x)

    return edited
