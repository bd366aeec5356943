"""Text or tokens from anywhere -> fixed-length token sequences, with a mask of what counts.

What is counted: every position that holds neither BOS nor EOS nor padding (arXiv:2404.16014 says
nothing of these; leaving them out of training and averages is Gemma Scope's way).

The split comes before anything else: by file for `stdlib`, else by sequence, evenly spread.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.packing import Layout, choose_layout, pack, settle_layout
from gsae_core.lm.pieces import Piece
from gsae_core.lm.readers import open_source
from gsae_core.lm.token_cache import Cached, cache_key, find, keep, tokenizer_key

log = logging.getLogger(__name__)

# `stdlib` can spare as many held-out tokens for a short run as a trustworthy loss takes.
HELD_OUT_TOKENS = 2**18

# Rows whose counted tokens are found at once: bounds the temporary masks to a few MB.
COUNT_ROWS = 2**12


class TokenBatch(NamedTuple):
    """Sequences, and which of their positions are counted (True)."""

    ids: Int64[Tensor, "rows n_ctx"]
    mask: Bool[Tensor, "rows n_ctx"]


class SequenceSet:
    """Token sequences of one length; `set[i:j]` and `set[indices]` are TokenBatches.

    Attributes:
        counts: counted tokens of each sequence, int64 (n,).

    Args:
        rows: token ids (n, n_ctx) of any integer dtype, possibly mapped from a file.
        special: ids that are not counted.
        index: which rows belong to the set, and in which order; None: all.
        counts: counted tokens of each sequence, int64 (len(index),), where they are known.
    """

    def __init__(
        self,
        rows: np.ndarray,
        special: tuple[int, ...] = (),
        index: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        self._rows, self._special = rows, special
        self._index = np.arange(len(rows)) if index is None else index
        self.counts = _count(rows, special)[self._index] if counts is None else counts

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, which: slice | np.ndarray | Tensor) -> TokenBatch:
        rows = self._rows[self._index[which]]
        mask = _is_counted(rows, self._special)
        return TokenBatch(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(mask))

    @property
    def n_ctx(self) -> int:
        return self._rows.shape[1]

    @property
    def n_tokens(self) -> int:
        """Counted tokens of all sequences."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out split, and what was decided on the way."""

    train: SequenceSet
    held_out: SequenceSet
    name: str
    n_ctx: int
    bos: bool
    """Whether sequences start with BOS."""

    @property
    def n_train_tokens(self) -> int:
        """Counted training tokens: masked positions left out."""
        return self.train.n_tokens

    @property
    def n_held_out_tokens(self) -> int:
        """Counted held-out tokens: masked positions left out."""
        return self.held_out.n_tokens

    @property
    def digest(self) -> str:
        """A hash of the training split's length and of its first and last 64 sequences."""
        n = len(self.train)
        ends = np.unique(np.r_[: min(n, 64), max(0, n - 64) : n])
        ids = self.train[ends].ids.numpy()
        return sha256(
            repr((n, self.n_train_tokens, ids.shape)).encode() + ids.tobytes()
        ).hexdigest()


def load_corpus(
    cfg: DataConfig, tokenizer: Any, *, n_tokens: int | None, model_n_ctx: int
) -> Corpus:
    """Return the sequences that `cfg` describes, from the token cache where it has them.

    A corpus for fewer tokens is a prefix of one for more.

    Args:
        cfg: the source and how it is cut.
        tokenizer: a Hugging Face tokenizer.
        n_tokens: counted training tokens after which reading stops, rounded up to a sequence, plus
            the held-out sequences up to there (of `stdlib`: as many in proportion, or 2^18 tokens).
            None reads all there is.
        model_n_ctx: the longest sequence the model takes.

    Raises:
        InputError: if the source cannot be read, has no text, or does not fill two sequences; or if
            n_ctx or BOS do not suit the model.
    """
    layout = choose_layout(cfg, tokenizer, model_n_ctx=model_n_ctx)
    source = open_source(cfg, layout.vocabulary)
    settings = (cfg.n_ctx, cfg.bos, model_n_ctx, tokenizer_key(tokenizer), source.stamp)

    def read(documents: Callable[[], Iterator[Piece]], limit: int | None, share: float) -> Cached:
        key = cache_key(*settings, share, documents is source.held_out)
        found = find(key, limit, layout.dtype)
        if found is not None:
            return found
        pieces = documents()
        first = next(pieces, None)
        if first is None:
            raise InputError(f"expected some text in {source.name}, got none")
        settled, pieces = settle_layout(
            layout, chain([first], pieces), cfg, tokenizer, model_n_ctx=model_n_ctx
        )
        reading = _Reading(pieces, settled, tokenizer, limit, share)
        rows = keep(
            iter(reading),
            key,
            starts_with_bos=settled.starts_with_bos,
            reach=lambda: reading.reach,
            always=source.remote,
        )
        return Cached(rows, settled.starts_with_bos)

    if source.held_out is None:
        rows, bos = read(source.train, n_tokens, cfg.held_out)
        train, held_out = _split(rows, layout.special, n_tokens, cfg.held_out)
    else:
        rows, bos = read(source.train, n_tokens, 0.0)
        train, _ = _split(rows, layout.special, n_tokens, 0.0)
        limit = None
        if n_tokens is not None:
            in_proportion = math.ceil(n_tokens * cfg.held_out / (1 - cfg.held_out))
            limit = max(HELD_OUT_TOKENS, in_proportion)
        held_out, _ = _split(read(source.held_out, limit, 0.0).rows, layout.special, limit, 0.0)
    if not len(train) or not len(held_out):
        raise InputError(
            f"expected enough text in {source.name} for a training and a held-out sequence of "
            f"{rows.shape[1]} tokens, got {len(rows)} in all: give more text, a smaller n_ctx or "
            "another held_out"
        )
    corpus = Corpus(train, held_out, source.name, rows.shape[1], bos)
    log.info(
        "%s: %d training and %d held-out tokens in sequences of %d, %s BOS",
        corpus.name,
        corpus.n_train_tokens,
        corpus.n_held_out_tokens,
        corpus.n_ctx,
        "with" if bos else "without",
    )
    return corpus


class _Reading:
    """Blocks of rows, until the training sequences among them hold `limit` counted tokens."""

    def __init__(
        self,
        pieces: Iterator[Piece],
        layout: Layout,
        tokenizer: Any,
        limit: int | None,
        share: float,
    ) -> None:
        self._pieces, self._layout, self._tokenizer = pieces, layout, tokenizer
        self._limit, self._share = limit, share
        self._missing = math.inf if limit is None else float(limit)
        self.reach: int | None = None
        """Training tokens after which reading stopped, as asked; None: the source ended first."""

    def __iter__(self) -> Iterator[np.ndarray]:
        n_rows = 0
        blocks = pack(self._pieces, self._layout, self._tokenizer, wanted=lambda: self._missing)
        for rows in blocks:
            yield rows
            counts = _count(rows, self._layout.special)
            self._missing -= int(counts[~_held_out(n_rows, n_rows + len(rows), self._share)].sum())
            n_rows += len(rows)
            if self._missing <= 0:
                self.reach = self._limit
                return


def _held_out(start: int, stop: int, share: float) -> np.ndarray:
    """Return which of the sequences `start` to `stop - 1` are held out: the first of every 1/share.

    Known without the number of sequences, so that a longer reading splits its prefix alike.
    """
    edges = np.ceil(np.arange(start, stop + 1) * share)
    return edges[1:] > edges[:-1]


def _split(
    rows: np.ndarray, special: tuple[int, ...], n_tokens: int | None, share: float
) -> tuple[SequenceSet, SequenceSet]:
    """Return the training and the held-out sequences among as many rows as `n_tokens` takes."""
    counts = _count(rows, special)
    held_out = _held_out(0, len(rows), share)
    if n_tokens is not None:
        so_far = np.cumsum(np.where(held_out, 0, counts))
        held_out = held_out[: int(np.searchsorted(so_far, n_tokens)) + 1]
    parts = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    train, rest = (SequenceSet(rows, special, index, counts[index]) for index in parts)
    return train, rest


def _is_counted(rows: np.ndarray, special: tuple[int, ...]) -> np.ndarray:
    mask = np.ones(rows.shape, bool)
    for id_ in special:
        mask &= rows != id_
    return mask


def _count(rows: np.ndarray, special: tuple[int, ...]) -> np.ndarray:
    """Return the counted tokens of each row, int64 (n,)."""
    starts = range(0, len(rows), COUNT_ROWS)
    parts = [_is_counted(rows[start : start + COUNT_ROWS], special).sum(1) for start in starts]
    return np.concatenate([np.empty(0, np.int64), *parts])
