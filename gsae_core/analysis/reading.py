"""Text as a language model reads it: token ids, which of them count, what each stands for."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.texts import token_texts

MAX_CHARACTERS = 20_000
MAX_TOKENS = 512
"""A page's strip of tokens; the model's context, where that is shorter."""


class Prompt(NamedTuple):
    """A text as tokens."""

    ids: Int64[Tensor, "1 pos"]
    counted: Bool[Tensor, " pos"]
    """False for special tokens (BOS, EOS, padding), on which SAEs are not trained."""
    tokens: tuple[str, ...]
    """What each token stands for; behind BOS, end to end, the text (`lm.texts.token_texts`)."""
    n_unknown: int
    """Tokens that stand for text the tokenizer has no token for."""
    n_left_out: int
    """Tokens at the end that had no room."""


def read_prompt(
    model: LanguageModel, text: str, *, bos: bool = True, max_tokens: int = MAX_TOKENS
) -> Prompt:
    """Return a text as tokens, cut to the model's context and to `max_tokens`.

    Args:
        bos: whether to put BOS in front, if the tokenizer has one: as the SAE was trained.

    Raises:
        InputError: if there is no text, or far too much of it.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"expected a text of at most {MAX_CHARACTERS:,} characters, got {len(text):,}; "
            "paste the passage you want to look into"
        )
    if not text.strip():
        raise InputError("expected some text, got none; type or paste a sentence")
    tokenizer = model.tokenizer
    # Half of a surrogate pair is no character; tokenizers refuse what cannot be encoded.
    whole = text.encode("utf-8", "replace").decode()
    found = tokenizer.encode(whole, add_special_tokens=False)
    if not found:
        raise InputError(
            "expected text that the tokenizer makes tokens of, got none it knows; add some words"
        )
    front = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    kept = found[: max(min(model.n_ctx, max_tokens) - len(front), 0)]
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


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that are never counted: BOS, EOS and padding."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {each for each in special if each is not None}
