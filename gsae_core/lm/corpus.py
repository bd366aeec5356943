"""Text or tokens from anywhere -> fixed-length token sequences, with a mask of what counts.

What is counted: every position that holds neither BOS nor EOS nor padding (arXiv:2404.16014 says
nothing of these; leaving them out of training and averages is Gemma Scope's way).

The split comes before anything else: by file for `stdlib`, else by sequence, evenly spread.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.readers import Part, narrowest, open_source
from gsae_core.lm.token_cache import Cached, cache_key, find, keep, tokenizer_key

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
    layout: Layout, parts: Iterator[Part], cfg: DataConfig, tokenizer: Any, *, model_n_ctx: int
) -> tuple[Layout, Iterator[Part]]:
    """Return the layout after a look at the first 64 documents, and all the parts.

    Token arrays whose rows have one length keep it if `cfg.n_ctx` is None, and keep their rows if
    that length is the context's and they start with BOS as `cfg.bos` asks.
    """
    head = list(islice(parts, 64))
    parts = chain(head, parts)
    rows = [part.content for part in head if part.ends and isinstance(part.content, np.ndarray)]
    lengths = {len(row) for row in rows}
    if len(rows) < len(head) or len(lengths) != 1:
        return layout, parts
    (length,) = lengths
    with_bos = tokenizer.bos_token_id is not None and all(
        row[0] == tokenizer.bos_token_id for row in rows
    )
    fits = length == cfg.n_ctx if cfg.n_ctx else 2 <= length <= model_n_ctx
    if not fits or (cfg.bos == "always" and not with_bos) or (cfg.bos == "never" and with_bos):
        return layout, parts
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
        parts,
    )


def pack(
    parts: Iterator[Part], layout: Layout, tokenizer: Any, *, wanted: Callable[[], float]
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
    while block := _block(parts, wanted()):
        ids = np.concatenate([carry, *_ids(block, layout, tokenizer)])
        n = len(ids) // width
        rows, carry = ids[: n * width].reshape(n, width), ids[n * width :]
        if layout.bos is not None:
            rows = np.insert(rows, 0, layout.bos, axis=1)
        yield rows


def _block(parts: Iterator[Part], wanted: float) -> list[Part]:
    """Return the next parts, of about `2 wanted` characters together; none at the end."""
    # Text has three or four characters a token: two a token stops short rather than beyond.
    size = min(max(2 * wanted, SMALLEST_BLOCK), LARGEST_BLOCK)
    block: list[Part] = []
    while size > 0 and (part := next(parts, None)) is not None:
        block.append(part)
        size -= len(part.content)
    return block


def _ids(block: list[Part], layout: Layout, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the ids of each part and, after a document's end, the separator."""
    texts = [part.content for part in block if isinstance(part.content, str)]
    encoded = iter(_tokenise(texts, tokenizer) if texts else ())
    for part in block:
        if isinstance(part.content, str):
            yield np.array(next(encoded), layout.dtype)
        else:
            yield _checked(part, layout)
        if part.ends and layout.separator is not None:
            yield np.array([layout.separator], layout.dtype)


def _tokenise(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # Not verbose: the warning that a text exceeds the model's context is for those who do not cut.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _checked(part: Part, layout: Layout) -> np.ndarray:
    """Return the ids of a token array, without the BOS and EOS that packing puts there itself."""
    ids = np.asarray(part.content)
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
    elif part.ends:
        edges = [layout.bos, layout.separator]
        start = int(len(ids) > 0 and ids[0] in edges)
        stop = len(ids) - int(len(ids) > start and ids[-1] in edges)
        ids = ids[start:stop]
    return ids.astype(layout.dtype)


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
    shortage: str = "the held-out text has no more"
    """Why there are not more held-out tokens, to say where more were asked for."""

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

    @property
    def starts(self) -> list[str]:
        """Hashes of the training split's first 1, 4, 16, ... 4096 sequences, as far as it goes.

        Readings of one text for fewer and for more tokens agree in those that both have.
        """
        sizes = [4**i for i in range(7) if 4**i <= len(self.train)]
        ids = self.train[: max(sizes, default=0)].ids.numpy()
        return [sha256(ids[:size].tobytes()).hexdigest()[:16] for size in sizes]


def load_corpus(
    cfg: DataConfig,
    tokenizer: Any,
    *,
    n_tokens: int | None,
    model_n_ctx: int,
    n_held_out: int = 0,
) -> Corpus:
    """Return the sequences that `cfg` describes, from the token cache where it has them.

    A corpus for fewer tokens is a prefix of one for more, in both splits.

    Args:
        cfg: the source and how it is cut.
        tokenizer: a Hugging Face tokenizer.
        n_tokens: counted training tokens after which reading stops, rounded up to a sequence, plus
            the held-out sequences up to there (of `stdlib`: as many in proportion, or 2^18 tokens).
            None reads all there is.
        model_n_ctx: the longest sequence the model takes.
        n_held_out: counted held-out tokens wanted. Where there are fewer up to there, reading goes
            on, and takes of what follows the sequences that the split holds out, which a run for
            more tokens would not train on either. Fewer come where the text has no more.

    Raises:
        InputError: if the source cannot be read, has no text, or does not fill two sequences; or if
            n_ctx or BOS do not suit the model.
    """
    layout = choose_layout(cfg, tokenizer, model_n_ctx=model_n_ctx)
    source = open_source(cfg, layout.vocabulary)
    settings = (cfg.n_ctx, cfg.bos, model_n_ctx, tokenizer_key(tokenizer), source.stamp)

    trouble: list[str] = []

    def read(documents: Callable[[], Iterator[Part]], wanted: _Wanted) -> Cached:
        key = cache_key(*settings, wanted.share, documents is source.held_out)
        found = find(key, wanted.n_tokens, layout.dtype)
        if not found:
            return read_anew(documents, wanted, key, before=None)
        first = found[0]
        for each in found:
            enough = each.whole or wanted.has_held_out(each.rows, layout.special)
            # A data set on the Hub is known by its name, and may have changed between the two.
            if enough and (each is first or _begins_with(each.rows, first.rows)):
                log.info("tokens of an earlier reading of %s", source.name)
                return each
        try:
            return read_anew(documents, wanted, key, before=first.rows)
        except InputError as error:
            # Training does not need it, so a run from a source that is out of reach goes on.
            trouble.append(f"no more than what was read before could be read ({error})")
            log.warning("held-out text: %s", trouble[0])
            return first

    def read_anew(
        documents: Callable[[], Iterator[Part]],
        wanted: _Wanted,
        key: str,
        before: np.ndarray | None,
    ) -> Cached:
        parts = documents()
        first = next(parts, None)
        if first is None:
            raise InputError(f"expected some text in {source.name}, got none")
        settled, parts = settle_layout(
            layout, chain([first], parts), cfg, tokenizer, model_n_ctx=model_n_ctx
        )
        reading = _Reading(parts, settled, tokenizer, wanted)
        rows = keep(
            iter(reading) if before is None else _going_on(iter(reading), before, source.name),
            key,
            starts_with_bos=settled.starts_with_bos,
            reach=lambda: reading.reach,
            always=source.remote,
        )
        return Cached(rows, settled.starts_with_bos, reading.reach is None)

    share = cfg.held_out
    if source.held_out is None:
        wanted = _Wanted(n_tokens, n_held_out, share)
        rows, bos, _ = read(source.train, wanted)
        train, held_out = _split(rows, layout.special, wanted)
    else:
        wanted = _Wanted(n_tokens, 0, 0.0)
        rows, bos, _ = read(source.train, wanted)
        train, _ = _split(rows, layout.special, wanted)
        limit = None
        if n_tokens is not None:
            in_proportion = math.ceil(n_tokens * share / (1 - share))
            limit = max(HELD_OUT_TOKENS, in_proportion, n_held_out)
        wanted = _Wanted(limit, 0, 0.0)
        held_out, _ = _split(read(source.held_out, wanted).rows, layout.special, wanted)
    if not len(train) or not len(held_out):
        raise InputError(
            f"expected enough text in {source.name} for a training and a held-out sequence of "
            f"{rows.shape[1]} tokens, got {len(rows)} in all: give more text, a smaller n_ctx or "
            "another held_out"
        )
    corpus = Corpus(train, held_out, source.name, rows.shape[1], bos)
    if trouble:
        corpus = replace(corpus, shortage=trouble[0])
    log.info(
        "%s: %d training and %d held-out tokens in sequences of %d, %s BOS",
        corpus.name,
        corpus.n_train_tokens,
        corpus.n_held_out_tokens,
        corpus.n_ctx,
        "with" if bos else "without",
    )
    return corpus


class _Wanted(NamedTuple):
    """How far a source is read."""

    n_tokens: int | None
    """Counted tokens of the sequences that are not held out; None: to its end."""
    n_held_out: int
    """Counted tokens of those that are."""
    share: float
    """Of the sequences that are held out; 0: none is."""

    def has_held_out(self, rows: np.ndarray, special: tuple[int, ...]) -> bool:
        """Return whether there are as many held-out tokens as wanted among rows."""
        if not self.n_held_out:
            return True
        held_out = np.flatnonzero(_held_out(0, len(rows), self.share))
        return int(_count(rows[held_out], special).sum()) >= self.n_held_out


class _Reading:
    """Blocks of rows, until there are as many counted tokens among them as wanted."""

    def __init__(
        self, parts: Iterator[Part], layout: Layout, tokenizer: Any, wanted: _Wanted
    ) -> None:
        self._pieces, self._layout, self._tokenizer = parts, layout, tokenizer
        self._wanted = wanted
        self._n_tokens = self._n_held_out = 0
        self.reach: int | None = None
        """Training tokens there were when reading stopped; None: the source ended first."""

    def __iter__(self) -> Iterator[np.ndarray]:
        n_rows = 0
        blocks = pack(self._pieces, self._layout, self._tokenizer, wanted=self._missing)
        for rows in blocks:
            yield rows
            counts = _count(rows, self._layout.special)
            held_out = _held_out(n_rows, n_rows + len(rows), self._wanted.share)
            self._n_tokens += int(counts[~held_out].sum())
            self._n_held_out += int(counts[held_out].sum())
            n_rows += len(rows)
            if self._missing() <= 0:
                self.reach = self._n_tokens
                return

    def _missing(self) -> float:
        """Return about how many more tokens are wanted; none if there are enough of both kinds."""
        n_tokens, n_held_out, share = self._wanted
        missing = math.inf if n_tokens is None else float(n_tokens - self._n_tokens)
        if n_held_out > self._n_held_out:
            missing = max(missing, (n_held_out - self._n_held_out) / share)
        return missing


def _going_on(blocks: Iterator[np.ndarray], before: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Yield blocks of rows that begin with those an earlier reading came to.

    Of other text, what is held out may be what was trained on.

    Raises:
        InputError: while iterating, if they do not.
    """
    n_rows = 0
    for rows in blocks:
        known = before[n_rows : n_rows + len(rows)]
        if not _begins_with(rows, known):
            break
        yield rows
        n_rows += len(rows)
    else:
        if n_rows >= len(before):
            return
    raise InputError(f"expected the text that was read of {name} before, got other text")


def _begins_with(rows: np.ndarray, known: np.ndarray) -> bool:
    return np.array_equal(rows[: len(known)], known)


def _held_out(start: int, stop: int, share: float) -> np.ndarray:
    """Return which of the sequences `start` to `stop - 1` are held out: the first of every 1/share.

    Known without the number of sequences, so that a longer reading splits its prefix alike.
    """
    edges = np.ceil(np.arange(start, stop + 1) * share)
    return edges[1:] > edges[:-1]


def _split(
    rows: np.ndarray, special: tuple[int, ...], wanted: _Wanted
) -> tuple[SequenceSet, SequenceSet]:
    """Return the training and the held-out sequences among as many rows as are wanted."""
    counts = _count(rows, special)
    held_out = _held_out(0, len(rows), wanted.share)
    last = _reaching(np.where(held_out, 0, counts), wanted.n_tokens)
    # Of what follows, sequences that the split holds out, and no training one.
    beyond = max(last, _reaching(np.where(held_out, counts, 0), wanted.n_held_out))
    parts = [np.flatnonzero(~held_out[:last]), np.flatnonzero(held_out[:beyond])]
    train, rest = (SequenceSet(rows, special, index, counts[index]) for index in parts)
    return train, rest


def _reaching(counts: np.ndarray, n_tokens: int | None) -> int:
    """Return how many rows hold so many tokens; all where there are fewer, or None is said."""
    if n_tokens is None:
        return len(counts)
    return min(int(np.searchsorted(np.cumsum(counts), n_tokens)) + 1, len(counts))


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
