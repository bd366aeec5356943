"""Batches of whole sequences, for the end-to-end loss; batch i is a pure function of config and i.

Sequences stand in the order of the activations' stream, epoch after epoch, and are not cut: batch i
holds those whose last counted token is among tokens i B to (i + 1) B - 1 of that line. So a batch
has about B activations, and a run as many as its config says, to within a sequence.
"""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsae_core.analysis.fidelity import LOGITS_CPU, LOGITS_GPU
from gsae_core.errors import InputError
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel, Splice
from gsae_core.lm.stream import ActivationStream
from gsae_core.sae.base import Rows
from gsae_core.training.end_to_end import Divergence, SequenceBatch, kl_divergence


def sequences_at_once(model: LanguageModel, n_ctx: int) -> int:
    """Return how many sequences are predicted at a time: their logits are in memory."""
    most = LOGITS_CPU if model.device.type == "cpu" else LOGITS_GPU
    return max(1, most // (n_ctx * model.d_vocab))


class SequenceStream(ActivationStream):
    """An `ActivationStream` whose batches are whole sequences of `model`.

    The model's weights stop asking for gradients. InputError if a batch is shorter than a sequence.
    """

    def __init__(
        self, harvest: Harvest, *, model: LanguageModel, batch_size: int, **options: Any
    ) -> None:
        if batch_size < harvest.sequences.n_ctx:
            raise InputError(
                f"expected a batch of at least one sequence ({harvest.sequences.n_ctx} tokens) for "
                f"loss kl, got {batch_size}; raise the batch size"
            )
        super().__init__(harvest, batch_size=batch_size, **options)
        self._model = model
        model.hf.requires_grad_(False)

    def sequences_of(self, i: int) -> np.ndarray:
        """Return the indices of the sequences of batch `i`, in their order."""
        start, stop = i * self._batch_size, (i + 1) * self._batch_size
        found = []
        for epoch in range(start // self.tokens_per_epoch, (stop - 1) // self.tokens_per_epoch + 1):
            order = self._order(epoch)
            counts = self._counts[order]
            last = epoch * self.tokens_per_epoch + np.cumsum(counts) - 1
            found.append(order[(start <= last) & (last < stop) & (counts > 0)])
        return np.concatenate(found)

    def batch_of_each(self, i: int) -> tuple[Any, ...]:
        """Return the `SequenceBatch` i of each place; a divergence runs the model twice."""
        which = self.sequences_of(i)
        began = time.perf_counter()
        found = map(torch.cat, zip(*self.harvest.parts(which), strict=True))
        self.seconds: float = self.seconds + time.perf_counter() - began
        return tuple(
            SequenceBatch(x * self.scales[k], partial(self._divergence, which, k))
            for k, x in enumerate(found)
        )

    def _divergence(self, which: np.ndarray, k: int, x_hat: Rows) -> Divergence:
        """Return KL(clean || spliced) over predictions made at a counted token of a counted one.

        `x_hat` is read at the k-th place. What does not count keeps its clean activation, as
        evaluation has it.
        """
        model, harvest, scale = self._model, self.harvest, self.scales[k]
        layer, site = harvest.places[k]
        rows = sequences_at_once(model, harvest.sequences.n_ctx)
        kl, slopes, done, n = x_hat.new_zeros(()), [], 0, 0
        for first in range(0, len(which), rows):
            ids, mask = harvest.sequences[which[first : first + rows]]
            splice = Splice(model, ids, layer=layer, site=site)
            mask = mask.to(model.device)
            predicts = mask[:, :-1] & mask[:, 1:]
            mine = x_hat[done : done + int(mask.sum())] / scale
            read = splice.x.masked_scatter(mask[..., None], mine.to(splice.x))
            # Summed, and divided in the end: half precision would lose the slope of a mean.
            found, slope = splice.slope(read, partial(_drift, splice.logits, predicts))
            kl += found
            slopes.append(slope[mask])
            done, n = done + len(mine), n + int(predicts.sum())
        # A batch in which no two counted tokens follow each other predicts nothing.
        return Divergence(kl / max(n, 1), torch.cat(slopes) / (scale * max(n, 1)))


def _drift(clean: Tensor, predicts: Tensor, logits: Tensor) -> Tensor:
    return kl_divergence(clean[:, :-1][predicts], logits[:, :-1][predicts])
