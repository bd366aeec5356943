"""Text as a language model reads it: token ids, which of them count, what each stands for."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel

MAX_CHARACTERS = 20_000
MAX_TOKENS = 512
"""A page's strip of tokens; the model's context, where that is shorter."""

TOKEN_LENGTH = 64  # characters shown of a token: some vocabularies hold whole pages
PART_OF_CHARACTER = "\ufffd"


class Prompt(NamedTuple):
    """A text as tokens."""

    ids: Int64[Tensor, "1 pos"]
    counted: Bool[Tensor, " pos"]
    """False for special tokens (BOS, EOS, padding), on which SAEs are not trained."""
    tokens: tuple[str, ...]
    """What each token stands for. The parts of a character are numbered: `é⟨1/2⟩`, `é⟨2/2⟩`."""
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
    ids = (front + found)[: min(model.n_ctx, max_tokens)]
    unknown = tokenizer.unk_token_id
    special = special_ids(tokenizer)
    return Prompt(
        ids=torch.tensor([ids], dtype=torch.int64),
        counted=torch.tensor([i not in special for i in ids]),
        tokens=token_texts(tokenizer, ids),
        # GPT-2's tokenizer calls its end of text unknown as well, and knows every byte.
        n_unknown=0 if unknown in special else ids.count(unknown),
        n_left_out=len(front) + len(found) - len(ids),
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that are never counted: BOS, EOS and padding."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {each for each in special if each is not None}


def token_texts(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """Return what each token stands for, cut where it is very long.

    Tokens that only together make up a character are given that character, and numbered.
    """
    texts = [_decoded(tokenizer, [i]) for i in ids]
    start = 0
    while start < len(ids):
        stop = start + 1
        if PART_OF_CHARACTER in texts[start]:
            stop = _end_of_character(tokenizer, ids, start)
            whole, n = _decoded(tokenizer, ids[start:stop]), stop - start
            if n > 1:
                texts[start:stop] = [f"{whole}⟨{k + 1}/{n}⟩" for k in range(n)]
        start = stop
    return tuple(t if len(t) <= TOKEN_LENGTH else f"{t[:TOKEN_LENGTH]}…" for t in texts)


def _end_of_character(tokenizer: Any, ids: list[int], start: int) -> int:
    """Return after which token the character that begins in `start` is whole; start + 1 if none."""
    # UTF-8 has at most four bytes a character, and a token at least one of them.
    for stop in range(start + 2, min(start + 4, len(ids)) + 1):
        if PART_OF_CHARACTER not in _decoded(tokenizer, ids[start:stop]):
            return stop
    return start + 1


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
