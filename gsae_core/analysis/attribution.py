"""What each feature of a text does to a logit, to first order.

    effect(q, i) = f_i(q) <W_dec_i, d logit / d x(q)>

The derivative is taken at the model's own activations and runs through everything after the site:
later blocks, the final norm and the unembedding. It is exact for a small change of f at any site;
for taking a feature away altogether it is the tangent's answer, which the final norm and later
blocks bend. Of an SAE that normalises its inputs, f_i writes scale(q) f_i W_dec_i, and the effect
has that factor too.
"""

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.analysis.prompt import Look, Prompt
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel, logit_slope
from gsae_core.lm.texts import alone, pieces
from gsae_core.sae.base import SAE


class Candidate(NamedTuple):
    """A token that may come next."""

    id: int
    text: str
    probability: float
    actual: bool
    """Whether it is the token that follows in the text."""


def candidates(
    model: LanguageModel, prompt: Prompt, *, position: int, n: int = 10
) -> list[Candidate]:
    """Return what may follow a token: what does follow in the text first, then the likeliest.

    Raises:
        InputError: if there is no such token.
    """
    _check_position(prompt, position)
    p = model.logits(prompt.ids)[0, position].softmax(-1).cpu()
    last = position + 1 == prompt.ids.shape[1]
    actual = [] if last else [int(prompt.ids[0, position + 1])]
    ids = list(dict.fromkeys(actual + p.topk(min(n, len(p))).indices.tolist()))
    texts = [alone(piece) for piece in pieces(model.tokenizer, ids)]
    return [
        Candidate(i, text, float(p[i]), [i] == actual) for i, text in zip(ids, texts, strict=True)
    ]


def slope_at(
    model: LanguageModel, prompt: Prompt, *, layer: int, site: Site, position: int, token: int
) -> Float[Tensor, "pos d_in"]:
    """Return d logit(`token` after `position`) / d x at every token of a text.

    Raises:
        InputError: if there is no such position, token or site.
    """
    _check_position(prompt, position)
    return logit_slope(
        model, prompt.ids, layer=layer, site=site, position=position, token=token
    ).cpu()


@torch.no_grad()
def effects(seen: Look, sae: SAE, slope: Float[Tensor, "pos d_in"]) -> pd.DataFrame:
    """Return `seen.features` with a column `effect`, in logits: see the top of this module."""
    features = seen.features
    latent = torch.tensor(features["latent"].to_numpy(), device=sae.W_dec.device)
    position = torch.tensor(features["position"].to_numpy(), device=sae.W_dec.device)
    along = (sae.W_dec[latent] * slope.to(sae.W_dec)[position]).sum(1).cpu()
    f = torch.tensor(features["activation"].to_numpy(), dtype=along.dtype)
    if seen.scale is not None:
        f = f * seen.scale[position.cpu()]
    return features.assign(effect=(f * along).tolist())


def _check_position(prompt: Prompt, position: int) -> None:
    if not 0 <= position < prompt.ids.shape[1]:
        raise InputError(
            f"expected a token from 0 to {prompt.ids.shape[1] - 1} of this text, got {position}"
        )
