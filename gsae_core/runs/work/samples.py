"""A look at a few latents while they learn: where they fire, on one small held-out batch.

    samples.json  {"step", "every", "n_tokens", "saes": {name: {"alive", "latents": [...]}}}

The batch is harvested once. Of each SAE it shows latents that a seed picks among the living, the
same ones from look to look while they live, and those that fire most.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.files import write_json
from gsae_core.lm.texts import SPLIT, in_sequence, token_texts
from gsae_core.lm.vectors import VectorSource
from gsae_core.norms import longer
from gsae_core.runs.run import Run, read_added
from gsae_core.runs.work.setup import RunSetup, harvest_of
from gsae_core.sae.base import SAE

logger: logging.Logger = logging.getLogger(__name__)

LOOKS_PER_RUN, LEAST_EVERY = 20, 10  # steps: a look costs about as much as a step
FIRST_LOOK = 50  # steps, in a long run: the twentieth part of days is a long wait
SAMPLE_TOKENS = 2048
N_RANDOM, N_DENSEST, N_EXAMPLES = 4, 2, 3
BEFORE, AFTER = 8, 4  # tokens of context
TOKEN_LENGTH = 64  # characters kept of a token: some vocabularies hold whole pages
ENCODED_AT_ONCE = 2**22  # latents of tokens, some 100 MB where all of them fire


Texts = Callable[[list[int]], list[str]]
"""What gives the text of each token of a sequence."""


class _Sampled(NamedTuple):
    """The activations of one place that are looked at."""

    x: Float[Tensor, "tokens d_in"]
    """As training scales them."""
    scale: float
    where: Int64[Tensor, " tokens"]
    """Of each token in the sequences laid end to end; special positions are left out."""


class Sampler:
    """Writes samples.json of a run now and then."""

    @torch.no_grad()
    def __init__(self, run: Run, setup: RunSetup) -> None:
        self._run, self._setup = run, setup
        self._n_steps = run.config.train.n_steps
        # Of SAEs that these are added to.
        looked = None if read_added(run) is None else run.samples()
        self._finished: dict[str, Any] = looked["saes"] if looked else {}
        self.every: int = max(LEAST_EVERY, round(self._n_steps / LOOKS_PER_RUN))
        # Sequences spread evenly over the split.
        held_out = setup.corpus.held_out
        n = min(len(held_out), max(1, SAMPLE_TOKENS // held_out.n_ctx))
        which, model = torch.linspace(0, len(held_out) - 1, n).long().numpy(), setup.model
        if isinstance(model, VectorSource):
            (own,), said = model.readable([(held_out, which)])
            ids, mask = own[:]
            harvest = harvest_of(model, own, *run.config.places)
            found = [torch.cat([*harvest.vectors(np.arange(len(own)))])]
            self._texts: Texts = lambda ids: in_sequence([said[i] for i in ids])
        else:
            ids, mask = held_out[which]
            found = [
                x.flatten(0, 1)[mask.flatten().to(x.device)].float()
                for x in model.harvest_places(ids, run.config.places)
            ]
            self._texts = partial(token_texts, model.tokenizer)
        index = mask.flatten().nonzero().squeeze(1)
        self._ids, self._sampled = ids.cpu(), list[_Sampled]()
        limits = zip(setup.stream.scales, setup.stream.limits, strict=True)
        for x, (scale, limit) in zip(found, limits, strict=True):
            # Samples are for looking at: a vector that is not finite is left out of them. Training
            # and evaluation refuse it where they read it.
            finite = x.isfinite().all(dim=1) & ~longer(x, limit)
            x = x * scale
            self._sampled.append(_Sampled(x[finite], scale, index[finite.cpu()].cpu()))

    def see(self, step: int) -> None:
        """Write samples.json if it is time for a look."""
        if step % self.every and step not in (FIRST_LOOK, self._n_steps):
            return
        cfg = self._run.config
        saes = {
            spec.name: self._look(sae, self._sampled[i])
            for spec, sae, i in zip(cfg.saes, self._setup.trainer.saes, cfg.reads, strict=True)
            if spec.name not in self._setup.stopped
        }
        n_tokens = max(len(each.x) for each in self._sampled)
        looked = {"step": step, "every": self.every, "n_tokens": n_tokens}
        looked |= {"saes": self._finished | saes}
        try:
            write_json(self._run.folder / "samples.json", looked)
        except InputError as error:
            # A full disk is met again, and answered for, when the run saves its state.
            logger.warning("no sample of latents: %s", error)

    @torch.no_grad()
    def _look(self, sae: SAE, sampled: _Sampled) -> dict[str, Any]:
        fired = firings(sae, sampled.x)
        latents = choose(fired, seed=self._run.config.seed)
        # Raw activations in, raw latents out, as the saved SAE has it.
        f = activations(sae, sampled.x, [i for i, _ in latents]) / sampled.scale
        return {
            "alive": int((fired > 0).sum()),
            "latents": [
                {
                    "latent": latent,
                    "chosen": how,
                    "fired": int(fired[latent]),
                    "examples": self._examples(f[:, column], sampled.where),
                }
                for column, (latent, how) in enumerate(latents)
            ],
        }

    def _examples(
        self, f: Float[Tensor, " tokens"], where: Int64[Tensor, " tokens"]
    ) -> list[dict[str, Any]]:
        """Return the tokens a latent fires on most, each in its context, no context twice."""
        rows, n_ctx = self._ids.shape
        everywhere = torch.zeros(rows * n_ctx, dtype=f.dtype)
        everywhere[where] = f.cpu()
        examples: dict[tuple[int, ...], dict[str, Any]] = {}
        for place in torch.argsort(everywhere, descending=True)[: 4 * N_EXAMPLES].tolist():
            if everywhere[place] <= 0 or len(examples) == N_EXAMPLES:
                break
            row, column = divmod(place, n_ctx)
            first, last = max(0, column - BEFORE), min(n_ctx, column + AFTER + 1)
            whole = self._ids[row].tolist()
            values = everywhere[row * n_ctx + first : row * n_ctx + last].tolist()
            example = {
                "tokens": texts_in(self._texts, whole, first, last),
                "values": [round(value, 4) for value in values],
                "at": column - first,
            }
            examples.setdefault(tuple(whole[first:last]), example)
        return list(examples.values())


def firings(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> Int64[Tensor, " d_sae"]:
    """Return on how many tokens each latent fires."""
    return torch.stack([(f > 0).sum(0) for f in _encoded(sae, x)]).sum(0).cpu()


def activations(
    sae: SAE, x: Float[Tensor, "tokens d_in"], latents: Sequence[int]
) -> Float[Tensor, "tokens chosen"]:
    """Return some latents' activations."""
    return torch.cat([f[:, list(latents)] for f in _encoded(sae, x)])


def _encoded(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> Iterator[Float[Tensor, "rows d_sae"]]:
    return map(sae.encode, x.split(max(1, ENCODED_AT_ONCE // sae.d_sae)))


def choose(fired: Int64[Tensor, " d_sae"], *, seed: int) -> list[tuple[int, str]]:
    """Return latents to look at, and how each was chosen; none twice, none that never fired."""
    order = torch.randperm(len(fired), generator=torch.Generator().manual_seed(seed))
    alive = order[fired[order] > 0]
    densest = fired.argsort(descending=True, stable=True)[:N_DENSEST]
    chosen = {int(i): "densest" for i in densest if fired[i] > 0}
    random = [int(i) for i in alive if int(i) not in chosen][:N_RANDOM]
    return [(i, "random") for i in random] + list(chosen.items())


def texts_in(texts_of: Texts, ids: list[int], first: int, last: int) -> list[str]:
    """Return the texts of a sequence's tokens from `first` up to `last`, very long ones cut."""
    start = max(0, first - SPLIT)
    texts = texts_of(ids[start : last + SPLIT])[first - start : last - start]
    return [text if len(text) <= TOKEN_LENGTH else f"{text[:TOKEN_LENGTH]}…" for text in texts]
