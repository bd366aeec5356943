"""How a language model goes on from a prompt, by itself and steered, under one sampling noise."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.analysis.prompt import Prompt
from gsae_core.analysis.steering import Steering
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import special_ids
from gsae_core.lm.model import Decoding, LanguageModel
from gsae_core.lm.texts import by_itself, raw_texts, token_texts

MAX_NEW_TOKENS = 400
MAX_TEMPERATURE = 2.0
LONGEST_CYCLE = 8  # tokens
SHORTEST_REPEAT = 12  # tokens that repeat themselves before it is called a loop


class Sampling(NamedTuple):
    """How the next token is drawn.

    token = argmax(logits / temperature + Gumbel noise), which draws from softmax(logits /
    temperature). The noise of the n-th new token depends on the seed and n alone, so two
    continuations differ only where their logits do. Temperature 0 takes the largest logit.
    """

    n_tokens: int = 40
    temperature: float = 0.8
    seed: int = 0

    def check(self) -> None:
        """Raise InputError if a number is out of range."""
        drawn = 0 <= self.temperature <= MAX_TEMPERATURE and 0 <= self.seed < 2**31
        if not (drawn and 1 <= self.n_tokens <= MAX_NEW_TOKENS):
            raise InputError(
                f"expected 1 to {MAX_NEW_TOKENS} tokens, a temperature from 0 (the likeliest) "
                f"to {MAX_TEMPERATURE:g} and a seed from 0 to {2**31 - 1}, got {self.n_tokens}, "
                f"{self.temperature} and {self.seed}"
            )


def continuation(
    model: LanguageModel,
    prompt: Prompt,
    steering: Steering | None,
    *,
    layer: int,
    site: Site,
    sampling: Sampling,
) -> Iterator[int]:
    """Yield the ids of new tokens; ends at end-of-text or where the context is full.

    Between two of them nothing is held: others may use the model, and the caller may stop.
    """
    sampling.check()
    generator = torch.Generator().manual_seed(sampling.seed)
    decoding = Decoding(model, layer=layer, site=site)
    special = special_ids(model.tokenizer)
    ids, counted = prompt.ids, prompt.counted
    for _ in range(sampling.n_tokens):
        if decoding.n_tokens + ids.shape[1] > model.n_ctx:
            return
        edit = None if steering is None else steering.edit(counted)
        logits = decoding.extend(ids, edit)[-1].cpu()
        token = draw(logits, temperature=sampling.temperature, generator=generator)
        yield token
        if token == model.tokenizer.eos_token_id:
            return
        ids, counted = torch.tensor([[token]]), torch.tensor([token not in special])


def draw(
    logits: Float[Tensor, " d_vocab"], *, temperature: float, generator: torch.Generator
) -> int:
    """Return a token drawn from softmax(logits / temperature); see `Sampling`."""
    if not logits.isfinite().all():
        raise InputError(
            "expected finite logits, got infinite or undefined ones: steering this hard breaks the "
            "language model; lower the strength"
        )
    # Drawn at temperature 0 too, so that the noise of later tokens does not depend on it.
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    return int((logits.double() / temperature + gumbel).argmax())


def side_by_side(
    model: LanguageModel,
    prompt: Prompt,
    steerings: Mapping[str, Steering | None],
    *,
    layer: int,
    site: Site,
    sampling: Sampling,
) -> Iterator[tuple[str, int]]:
    """Yield (name, new token) of several continuations in step, each ending in its own time."""
    going = {
        name: continuation(model, prompt, steering, layer=layer, site=site, sampling=sampling)
        for name, steering in steerings.items()
    }
    while going:
        # None is drawn before it is asked for: others may use the model between any two.
        for name, tokens in list(going.items()):
            token = next(tokens, None)
            if token is None:
                del going[name]
            else:
                yield name, token


class Shift(NamedTuple):
    """What steering does to the prediction of one next token."""

    kl: float
    """KL(default || steered), nats."""
    table: pd.DataFrame
    """Tokens by |change| of probability: `token`, `id`, `before`, `after`, `change`,
    `delta_logit`."""


def next_token_shift(
    before: Float[Tensor, " d_vocab"], after: Float[Tensor, " d_vocab"], *, model: LanguageModel
) -> Shift:
    """Return how a prediction moves, in the 10 likeliest tokens before and the 10 after."""
    p, q = before.softmax(-1), after.softmax(-1)
    n = min(10, len(p))
    ids = torch.cat([p.topk(n).indices, q.topk(n).indices]).unique()
    ids = ids[(q - p)[ids].abs().argsort(descending=True, stable=True)].tolist()
    table = pd.DataFrame(
        {
            "token": [by_itself(raw) for raw in raw_texts(model.tokenizer, ids)],
            "id": ids,
            "before": p[ids].tolist(),
            "after": q[ids].tolist(),
            "change": (q - p)[ids].tolist(),
            "delta_logit": (after - before)[ids].tolist(),
        }
    )
    return Shift(float(divergence(before, after)), table)


def divergence(
    before: Float[Tensor, "*pos d_vocab"], after: Float[Tensor, "*pos d_vocab"]
) -> Float[Tensor, "*pos"]:
    """Return KL(softmax(before) || softmax(after)) in nats; exactly 0 where they are equal."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return ((log_p - log_q) * log_p.exp()).sum(-1)


def steered_logits(
    model: LanguageModel, prompt: Prompt, steering: Steering | None, *, layer: int, site: Site
) -> Float[Tensor, "pos d_vocab"]:
    """Return the next-token logits after every token of a text, steered; on the CPU."""
    edit = None if steering is None else steering.edit(prompt.counted)
    where = {} if edit is None else {"layer": layer, "site": site, "edit": edit}
    return model.logits(prompt.ids, **where)[0].cpu()


def mean_divergence(
    prompt: Prompt, before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "pos d_vocab"]
) -> float:
    """Return KL(default || steered) averaged over the predictions after counted tokens, in nats."""
    return float(divergence(before, after)[prompt.counted].double().mean())


def followed_by(prompt: Prompt, new: list[int], *, model: LanguageModel) -> Prompt:
    """Return a prompt and its continuation as one text."""
    ids = torch.cat([prompt.ids, torch.tensor([new], dtype=torch.int64)], 1)
    special = special_ids(model.tokenizer)
    more = torch.tensor([i not in special for i in new], dtype=torch.bool)
    texts = new_texts(prompt, new, model=model)
    return prompt._replace(
        ids=ids, counted=torch.cat([prompt.counted, more]), tokens=prompt.tokens + texts
    )


def new_texts(prompt: Prompt, new: list[int], *, model: LanguageModel) -> tuple[str, ...]:
    """Return the texts of tokens that go on from a prompt."""
    before = prompt.ids[0].tolist()
    return tuple(token_texts(model.tokenizer, before + new)[len(before) :])


class Loop(NamedTuple):
    """Tokens that end a text by repeating themselves, each `period` after the last."""

    period: int
    n_tokens: int


def loop_at_end(ids: list[int]) -> Loop | None:
    """Return the shortest loop a text ends in: at least 12 tokens, three times round at least."""
    for period in range(1, LONGEST_CYCLE + 1):
        n = period
        while n < len(ids) and ids[-n - 1] == ids[-n - 1 + period]:
            n += 1
        if n >= max(SHORTEST_REPEAT, 3 * period):
            return Loop(period, n)
    return None
