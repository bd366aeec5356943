"""One text through a language model and SAEs: what fires on each token, and what it does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.fidelity import reconstruct
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import special_ids
from gsae_core.lm.harvest import check_finite
from gsae_core.lm.model import LanguageModel, Splice
from gsae_core.lm.texts import by_itself, raw_texts, token_texts
from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.base import SAE, Dictionary
from gsae_core.sae.metrics import Metrics
from gsae_core.sae.sparse.codes import SparseCodes, encode_sparse

MAX_CHARACTERS = 20_000
MAX_TOKENS = 512  # of a page's strip; the model's context, where that is shorter
MATCHED = 0.7
"""Cosine from which two mutual best matches count as one feature; ours, and shown on the pages."""
ROWS = 512  # latents whose cosines with a whole dictionary are held at once
PerToken = Float[Tensor, " pos"]


class Prompt(NamedTuple):
    """A text as tokens."""

    ids: Int64[Tensor, "1 pos"]
    counted: Bool[Tensor, " pos"]
    """False for special tokens (BOS, EOS, padding), on which SAEs are not trained."""
    tokens: tuple[str, ...]
    """What each stands for (`lm.texts.token_texts`): joined, behind BOS, the text."""
    n_unknown: int
    """Tokens that stand for text the tokenizer has no token for."""
    n_left_out: int
    """Tokens at the end that had no room."""


def read_prompt(model: LanguageModel, text: str, *, bos: bool = True) -> Prompt:
    """Return a text as tokens, cut to the model's context and to `MAX_TOKENS`.

    `bos`: whether to put BOS in front, if the tokenizer has one: as the SAE was trained.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"expected a text of at most {MAX_CHARACTERS:,} characters, got {len(text):,}; "
            "paste the passage you want to look into"
        )
    tokenizer = model.tokenizer
    # Half of a surrogate pair is no character; tokenizers refuse what cannot be encoded.
    whole = text.encode("utf-8", "replace").decode()
    found = tokenizer.encode(whole, add_special_tokens=False)
    if not (found and text.strip()):
        raise InputError("expected some text with words, got none; type or paste a sentence")
    front = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    kept = found[: max(min(model.n_ctx, MAX_TOKENS) - len(front), 0)]
    ids = front + kept
    unknown = tokenizer.unk_token_id
    special = special_ids(tokenizer)
    return Prompt(
        ids=torch.tensor([ids], dtype=torch.int64),
        counted=torch.tensor([i not in special for i in ids]),
        tokens=(*token_texts(tokenizer, front, text=""), *token_texts(tokenizer, kept, text=whole)),
        # GPT-2's tokenizer calls its end of text unknown as well, and knows every byte.
        n_unknown=0 if unknown in special else ids.count(unknown),
        n_left_out=len(front) + len(found) - len(ids),
    )


class TextNumbers(NamedTuple):
    """Numbers of an SAE on the counted tokens of one text."""

    n_tokens: int
    l0: float
    fvu: float
    """About this text's own mean; NaN of one token."""
    ce_clean: float
    """Next-token loss of the model as it is, nats per token; NaN where nothing is predicted."""
    ce_sae: float
    """The same when it reads the SAE's reconstructions."""

    @property
    def delta_ce(self) -> float:
        """Loss that reading reconstructions adds, nats per token."""
        return self.ce_sae - self.ce_clean


class PromptAnalysis(NamedTuple):
    """One text through one SAE."""

    prompt: Prompt
    features: pd.DataFrame
    """A row for each feature that fires on a token, strongest first within a token: `position`,
    `token`, `latent`, `activation` f, `gate` (pi_gate; NaN for an SAE without a gate) and `share`
    of the token's reconstruction: f <W_dec_i, x_hat - b_dec> / |x_hat - b_dec|^2, which adds up to
    1 over a token's features. Of an SAE that normalises its inputs f and share count in u."""
    tokens: pd.DataFrame
    """A row for each token: `position`, `token`, `counted`, `n_active`, `strongest` (largest f),
    `loss` and `loss_sae` of predicting this token, in nats (NaN where it is not predicted)."""
    numbers: TextNumbers
    scale: PerToken | None = None
    """`Normalised.scale` of each token, NaN on special ones; None: 1 on every token."""


@torch.no_grad()
def analyse(
    model: LanguageModel, saes: Sequence[SAE], prompt: Prompt, *, layer: int, site: Site
) -> list[PromptAnalysis]:
    """Return a text through each SAE of a site; one clean pass of the model serves all."""
    if not prompt.counted.any():
        raise InputError(
            "expected a token that is no special one, got none; add some words to the text"
        )
    splice = Splice(model, prompt.ids, layer=layer, site=site)
    counted = prompt.counted.to(model.device)
    x = splice.x[0, counted]
    check_finite(x, layer=layer, site=site, dtype=model.dtype)
    clean = _losses(splice.logits, prompt)
    found = []
    for sae in saes:
        inputs = x.to(sae.W_dec)
        codes = encode_sparse(sae, inputs)
        x_hat, stats = reconstruct(sae, inputs, codes)
        read = splice.x.clone()
        read[0, counted] = x_hat.to(x)
        spliced = _losses(splice.run(read), prompt)
        features = _features(sae, codes, prompt)
        tokens = _tokens(prompt, features, clean, spliced)
        metrics = Metrics(stats)
        # A single token lies on its own mean: there is nothing to explain.
        fvu = metrics.fvu if len(x) > 1 else float("nan")
        losses = float(clean.nanmean()), float(spliced.nanmean())
        numbers = TextNumbers(len(x), metrics.l0, fvu, *losses)
        scale = sae.normalised(inputs).scale
        if scale is not None:
            whole = torch.full(prompt.counted.shape, torch.nan, dtype=scale.dtype)
            scale = whole.masked_scatter(prompt.counted, scale[:, 0].cpu())
        found.append(PromptAnalysis(prompt, features, tokens, numbers, scale))
    return found


def _losses(logits: Float[Tensor, "1 pos d_vocab"], prompt: Prompt) -> PerToken:
    """Return the loss of predicting each token; NaN unless it and the one before are counted."""
    losses = torch.full(prompt.counted.shape, torch.nan, dtype=torch.float64)
    losses[1:] = F.cross_entropy(logits[0, :-1].cpu(), prompt.ids[0, 1:], reduction="none").double()
    predicted = prompt.counted.clone()
    predicted[1:] &= prompt.counted[:-1]
    return losses.where(predicted, torch.nan)


def _features(sae: SAE, codes: SparseCodes, prompt: Prompt) -> pd.DataFrame:
    fires, row = codes.magnitude > 0, codes.rows()
    written = codes.magnitude[:, None] * sae.W_dec[codes.latent]
    n_rows = codes.row_offsets.numel() - 1
    whole = written.new_zeros(n_rows, sae.d_in).index_add_(0, row, written)
    share = (written * whole[row]).sum(1) / whole.square().sum(1)[row]
    latent, f = codes.latent[fires], codes.magnitude[fires]
    gate = codes.gate[fires] if isinstance(sae, GatedSAE) else torch.full_like(f, torch.nan)
    position = prompt.counted.nonzero()[:, 0].to(row.device)[row[fires]].tolist()
    table = pd.DataFrame(
        {
            "position": position,
            "token": [prompt.tokens[i] for i in position],
            "latent": latent.tolist(),
            "activation": f.tolist(),
            "gate": gate.tolist(),
            "share": share[fires].tolist(),
        }
    ).astype({"position": "int64", "latent": "int64"})
    order = ["position", "activation"]
    return table.sort_values(order, ascending=[True, False], ignore_index=True, kind="stable")


def _tokens(
    prompt: Prompt, features: pd.DataFrame, clean: PerToken, spliced: PerToken
) -> pd.DataFrame:
    n, position = len(prompt.tokens), features["position"].to_numpy()
    strongest = np.zeros(n)
    np.maximum.at(strongest, position, features["activation"].to_numpy())
    return pd.DataFrame(
        {
            "position": range(n),
            "token": prompt.tokens,
            "counted": prompt.counted.tolist(),
            "n_active": np.bincount(position, minlength=n),
            "strongest": strongest,
            "loss": clean.tolist(),
            "loss_sae": spliced.tolist(),
        }
    )


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
    """Return what does follow a token in the text, then the likeliest."""
    p = model.logits(prompt.ids)[0, position].softmax(-1).cpu()
    last = position + 1 == prompt.ids.shape[1]
    actual = [] if last else [int(prompt.ids[0, position + 1])]
    ids = list(dict.fromkeys(actual + p.topk(min(n, len(p))).indices.tolist()))
    texts = [by_itself(raw) for raw in raw_texts(model.tokenizer, ids)]
    return [
        Candidate(i, text, float(p[i]), [i] == actual) for i, text in zip(ids, texts, strict=True)
    ]


@torch.no_grad()
def effects(analysis: PromptAnalysis, sae: SAE, slope: Float[Tensor, "pos d_in"]) -> pd.DataFrame:
    """Return `analysis.features` with a column `effect` on a logit, to first order.

        effect(q, i) = f_i(q) <W_dec_i, d logit / d x(q)>

    times scale(q) of an SAE that normalises its inputs; `slope` is d logit / d x, from
    `lm.model.logit_slope`: at the model's own activations, through later blocks, the final norm and
    the unembedding. It is exact for a small change of f; for taking a feature away it is the
    tangent's answer, which those blocks and the norm bend.
    """
    features = analysis.features
    latent = torch.tensor(features["latent"].to_numpy(), device=sae.W_dec.device)
    position = torch.tensor(features["position"].to_numpy(), device=sae.W_dec.device)
    along = (sae.W_dec[latent] * slope.to(sae.W_dec)[position]).sum(1).cpu()
    f = torch.tensor(features["activation"].to_numpy(), dtype=along.dtype)
    if analysis.scale is not None:
        f = f * analysis.scale[position.cpu()]
    return features.assign(effect=(f * along).tolist())


class Matches(NamedTuple):
    """For each of some latents, the one of another dictionary with the largest decoder cosine."""

    latent: Int64[Tensor, " n"]
    partner: Int64[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    mutual: Bool[Tensor, " n"]
    """Whether `latent` is also its partner's best match."""


@torch.no_grad()
def best_matches(
    latents: Int64[Tensor, " n"], W_dec: Dictionary, W_dec_other: Float[Tensor, "d_other d_in"]
) -> Matches:
    """Return the best match of each of some latents; costs n (d_sae + d_other) d_in products."""
    latents = latents.to(W_dec.device)
    own, other = F.normalize(W_dec.detach(), dim=1), F.normalize(W_dec_other.detach(), dim=1)
    parts = []
    for some in latents.split(ROWS):
        cosine, partner = (own[some] @ other.T).max(dim=1)
        back = (other[partner] @ own.T).argmax(dim=1)
        parts.append(Matches(some, partner, cosine, back == some))
    return Matches(*map(torch.cat, zip(*parts, strict=True)))


def align(
    gated: PromptAnalysis, baseline: PromptAnalysis, sae: SAE, base: SAE, threshold: float = MATCHED
) -> pd.DataFrame:
    """Return a row for each feature, or pair of the same, that fires on a token.

    Two are the same where each is the other's best match by decoder cosine and that is at least
    `threshold`. Columns: `position`, `where` (both, only gated, only baseline), `gated`, `baseline`
    (latents; NA without a match), `cosine`, `gated_activation`, `baseline_activation`.
    """
    pairs = _pairs(gated, baseline, sae, base, threshold)
    sides: list[Any] = []
    for name, look in (("gated", gated), ("baseline", baseline)):
        rows: Any = look.features[["position", "latent", "activation"]]
        rows = rows.set_axis(["position", name, f"{name}_activation"], axis=1)
        rows = rows.merge(pairs, on=name, how="left")
        sides.append(rows.astype({"gated": "Int64", "baseline": "Int64"}))
    # Features without a match do not meet: each names its own latent, where the other has none.
    keys = ["position", "gated", "baseline", "cosine"]
    table: Any = sides[0].merge(sides[1], on=keys, how="outer")
    activations = ["gated_activation", "baseline_activation"]
    table[activations] = table[activations].fillna(0.0)
    one, two = (table[name] > 0 for name in activations)
    table["where"] = np.select([one & two, one], ["both", "only gated"], "only baseline")
    table["strongest"] = table[activations].max(axis=1)
    table = table.sort_values(["position", "strongest"], ascending=[True, False])
    names = ["position", "where", "gated", "baseline", "cosine", *activations]
    return table[names].reset_index(drop=True)


def _pairs(
    gated: PromptAnalysis, baseline: PromptAnalysis, sae: SAE, base: SAE, threshold: float
) -> pd.DataFrame:
    """Return the matched pairs of which at least one feature fires somewhere in the text."""
    tables = []
    for analysis, own, other, names in (
        (gated, sae, base, ["gated", "baseline"]),
        (baseline, base, sae, ["baseline", "gated"]),
    ):
        active = torch.tensor(sorted(set(analysis.features["latent"])), dtype=torch.int64)
        *columns, mutual = best_matches(active, own.W_dec, other.W_dec)
        keep = mutual & (columns[-1] >= threshold)
        found = [column[keep].tolist() for column in columns]
        tables.append(pd.DataFrame(dict(zip([*names, "cosine"], found, strict=True))))
    # Found from both sides, a pair's cosine differs in its last digits.
    pairs = pd.concat(tables, ignore_index=True).drop_duplicates(["gated", "baseline"])
    return pairs.astype({"gated": "int64", "baseline": "int64", "cosine": "float64"})
