"""Pieces of documents -> rows of `n_ctx` token ids.

A row is `n_ctx` consecutive ids of all documents set end to end, with a separator after each; with
BOS, the first id of a row is BOS and `n_ctx - 1` follow. What is left at the end fills no row and
is dropped. Token arrays whose rows all have `n_ctx` ids, and BOS as asked, stay as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.pieces import Piece, narrowest

# Characters (or ids) that are tokenised in one call: enough to keep every core busy.
SMALLEST_BLOCK, LARGEST_BLOCK = 2**12, 2**22


@dataclass(frozen=True)
class Layout:
    """How ids become rows: decided from a config, a tokenizer and, for token arrays, the data."""

    n_ctx: int
    bos: int | None
    """Id in front of every row, or None."""

    separator: int | None
    """Id after every document: EOS, else BOS, else none."""

    special: tuple[int, ...]
    """Ids that are never counted: BOS, EOS, padding and the separator."""

    vocabulary: int
    as_they_are: bool = False
    """Whether the source's own rows are kept."""

    starts_with_bos: bool = False
    """Whether rows start with BOS, put there by us or by the maker of the token array."""

    @property
    def dtype(self) -> str:
        return narrowest(self.vocabulary)


def choose_layout(cfg: DataConfig, tokenizer: Any, *, model_n_ctx: int) -> Layout:
    """Return the layout of text.

    Raises:
        InputError: if the context is longer than the model's or has room for nothing but BOS, or
            BOS is asked of a tokenizer that has none.
    """
    n_ctx = cfg.n_ctx or min(model_n_ctx, 256)
    if n_ctx > model_n_ctx:
        raise InputError(
            f"expected n_ctx of at most {model_n_ctx}, the model's context, got {n_ctx}: lower "
            "n_ctx or leave it out"
        )
    if cfg.bos == "always" and tokenizer.bos_token_id is None:
        raise InputError(
            "expected a tokenizer with a BOS token for bos='always', got one without: use "
            "bos='auto' or 'never'"
        )
    if n_ctx < 2:
        raise InputError(f"expected n_ctx of at least 2, got {n_ctx}: nothing can be predicted")
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    return Layout(
        n_ctx=n_ctx,
        bos=None if cfg.bos == "never" else bos,
        separator=bos if eos is None else eos,
        special=tuple(sorted({id_ for id_ in (bos, eos, pad) if id_ is not None})),
        vocabulary=len(tokenizer),
        starts_with_bos=cfg.bos != "never" and bos is not None,
    )


def settle_layout(
    layout: Layout, pieces: Iterator[Piece], cfg: DataConfig, tokenizer: Any, *, model_n_ctx: int
) -> tuple[Layout, Iterator[Piece]]:
    """Return the layout after a look at the first 64 documents, and all the pieces.

    Token arrays whose rows have one length keep it if `cfg.n_ctx` is None, and keep their rows if
    that length is the context's and they start with BOS as `cfg.bos` asks.
    """
    head = list(islice(pieces, 64))
    pieces = chain(head, pieces)
    rows = [piece.content for piece in head if piece.ends and isinstance(piece.content, np.ndarray)]
    lengths = {len(row) for row in rows}
    if len(rows) < len(head) or len(lengths) != 1:
        return layout, pieces
    (length,) = lengths
    with_bos = tokenizer.bos_token_id is not None and all(
        row[0] == tokenizer.bos_token_id for row in rows
    )
    fits = length == cfg.n_ctx if cfg.n_ctx else 2 <= length <= model_n_ctx
    if not fits or (cfg.bos == "always" and not with_bos) or (cfg.bos == "never" and with_bos):
        return layout, pieces
    return (
        Layout(
            n_ctx=length,
            bos=None,
            separator=None,
            special=layout.special,
            vocabulary=layout.vocabulary,
            as_they_are=True,
            starts_with_bos=with_bos,
        ),
        pieces,
    )


def pack(
    pieces: Iterator[Piece], layout: Layout, tokenizer: Any, *, wanted: Callable[[], float]
) -> Iterator[np.ndarray]:
    """Yield blocks of rows (n, n_ctx) for as long as somebody takes them.

    Args:
        wanted: returns how many more tokens are wanted; asked before each block, so that the last
            blocks are small and little is read in vain.

    Raises:
        InputError: if an id is outside the tokenizer's vocabulary.
    """
    carry = np.empty(0, layout.dtype)
    width = layout.n_ctx - (layout.bos is not None)
    while block := _block(pieces, wanted()):
        ids = np.concatenate([carry, *_ids(block, layout, tokenizer)])
        n = len(ids) // width
        rows, carry = ids[: n * width].reshape(n, width), ids[n * width :]
        if layout.bos is not None:
            rows = np.insert(rows, 0, layout.bos, axis=1)
        yield rows


def _block(pieces: Iterator[Piece], wanted: float) -> list[Piece]:
    """Return the next pieces, of about `2 wanted` characters together; none at the end."""
    # Text has three or four characters a token: two a token stops short rather than beyond.
    size = min(max(2 * wanted, SMALLEST_BLOCK), LARGEST_BLOCK)
    block: list[Piece] = []
    while size > 0 and (piece := next(pieces, None)) is not None:
        block.append(piece)
        size -= len(piece.content)
    return block


def _ids(block: list[Piece], layout: Layout, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the ids of each piece and, after a document's end, the separator."""
    texts = [piece.content for piece in block if isinstance(piece.content, str)]
    encoded = iter(_tokenise(texts, tokenizer) if texts else ())
    for piece in block:
        if isinstance(piece.content, str):
            yield np.array(next(encoded), layout.dtype)
        else:
            yield _checked(piece, layout)
        if piece.ends and layout.separator is not None:
            yield np.array([layout.separator], layout.dtype)


def _tokenise(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # Not verbose: the warning that a text exceeds the model's context is for those who do not cut.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _checked(piece: Piece, layout: Layout) -> np.ndarray:
    """Return the ids of a token array, without the BOS and EOS that packing puts there itself."""
    ids = np.asarray(piece.content)
    if len(ids) and (ids.min() < 0 or ids.max() >= layout.vocabulary):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            f"expected token ids from 0 to {layout.vocabulary - 1}, got {wrong}: were they made by "
            "another tokenizer, or stored in another width?"
        )
    if layout.as_they_are:
        if len(ids) != layout.n_ctx:
            raise InputError(
                f"expected rows of {layout.n_ctx} token ids like the first ones, got one of "
                f"{len(ids)}: give n_ctx to have the rows packed anew"
            )
    elif piece.ends:
        edges = [layout.bos, layout.separator]
        start = int(len(ids) > 0 and ids[0] in edges)
        stop = len(ids) - int(len(ids) > start and ids[-1] in edges)
        ids = ids[start:stop]
    return ids.astype(layout.dtype)
