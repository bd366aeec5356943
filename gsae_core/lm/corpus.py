"""Text or tokens from anywhere -> fixed-length token sequences, with a mask of what counts.

Every position that holds neither BOS nor EOS nor padding is counted (arXiv:2404.16014 says nothing
of these; leaving them out of training and averages is Gemma Scope's way).

The split comes before anything else: by file for `stdlib`, else by sequence, evenly spread.

Rows are kept in files that later runs map into memory, named by everything that decides them and by
how far the source was read. They appear whole, so runs may tokenise the same text at once.
"""

import logging
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.files import writing
from gsae_core.lm.chat import ChatTemplate
from gsae_core.lm.packed import Part
from gsae_core.lm.readers import narrowest, open_source, permitted
from gsae_core.machine import cache_folder

log: logging.Logger = logging.getLogger(__name__)

# Rows whose counted tokens are found at once: bounds the temporary masks to a few MB.
COUNT_ROWS = 2**12


class TokenBatch(NamedTuple):
    """Sequences, and which of their positions are counted (True)."""

    ids: Int64[Tensor, "rows n_ctx"]
    mask: Bool[Tensor, "rows n_ctx"]


class SequenceSet:
    """Token sequences of one length; `set[i:j]` and `set[indices]` are TokenBatches.

    Args:
        rows: token ids (n, n_ctx) of any integer dtype, possibly mapped from a file.
        special: ids that are not counted.
        index: which rows belong to the set, in order; None: all.
        counts: counted tokens of each of these, int64; None: to be counted.
        first: number of each one's first vector, where they lie in a folder (`lm.vectors`).
    """

    def __init__(
        self,
        rows: np.ndarray,
        special: tuple[int, ...] = (),
        index: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        first: Int64[np.ndarray, " n"] | None = None,
    ) -> None:
        self._rows, self._special = rows, special
        self._index = np.arange(len(rows)) if index is None else index
        self.counts: np.ndarray = _count(rows, special)[self._index] if counts is None else counts
        self.first: Int64[np.ndarray, " n"] | None = first

    def __len__(self) -> int:
        return len(self._index)

    def take(self, which: slice | np.ndarray) -> "SequenceSet":
        """Return some of the sequences."""
        first = None if self.first is None else self.first[which]
        own = (self._index[which], self.counts[which], first)
        return SequenceSet(self._rows, self._special, *own)

    def numbers(self, which: np.ndarray) -> Int64[np.ndarray, " vectors"]:
        """Return the numbers of the vectors of some sequences of a folder, in their order."""
        assert self.first is not None
        counts = self.counts[which]
        shift = np.repeat(self.first[which] - np.cumsum(counts) + counts, counts)
        return shift + np.arange(len(shift))

    def __getitem__(self, which: slice | np.ndarray | Tensor) -> TokenBatch:
        rows = self._rows[self._index[which]]
        mask = _is_counted(rows, self._special)
        return TokenBatch(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(mask))

    def joined(self, other: "SequenceSet") -> "SequenceSet":
        """Return the sequences of two sets of the same rows, in the order of the rows."""
        assert self._rows is other._rows
        index = np.concatenate([self._index, other._index])
        order = np.argsort(index)
        counts = np.concatenate([self.counts, other.counts])
        return SequenceSet(self._rows, self._special, index[order], counts[order])

    @property
    def n_ctx(self) -> int:
        """Tokens of each sequence."""
        return self._rows.shape[1]

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 without sequences."""
        return int(self._rows[self._index].max(initial=-1))

    @property
    def n_tokens(self) -> int:
        """Counted tokens of all sequences."""
        return int(self.counts.sum())


def _is_counted(rows: np.ndarray, special: tuple[int, ...]) -> np.ndarray:
    mask = np.ones(rows.shape, bool)
    for id_ in special:
        mask &= rows != id_
    return mask


def _count(rows: np.ndarray, special: tuple[int, ...]) -> np.ndarray:
    starts = range(0, len(rows), COUNT_ROWS)
    parts = [_is_counted(rows[start : start + COUNT_ROWS], special).sum(1) for start in starts]
    return np.concatenate([np.empty(0, np.int64), *parts])


@dataclass(frozen=True)
class Corpus:
    """A training and a held-out split, and what was decided on the way."""

    train: SequenceSet
    held_out: SequenceSet
    name: str
    n_ctx: int
    bos: bool
    """Whether sequences start with BOS."""
    of_files: str | None = None
    """A hash of a folder of vectors, in the place of those of tokens."""

    @property
    def whole(self) -> SequenceSet:
        """Both splits of a text that is split by sequence, in its order."""
        return self.train.joined(self.held_out)

    @property
    def digest(self) -> str:
        """A hash of the training split's length and of its first and last 64 sequences."""
        if self.of_files is not None:
            return self.of_files
        n = len(self.train)
        ends = np.unique(np.r_[: min(n, 64), max(0, n - 64) : n])
        ids = self.train[ends].ids.numpy()
        head = repr((n, self.train.n_tokens, ids.shape)).encode()
        return sha256(head + ids.tobytes()).hexdigest()

    @property
    def starts(self) -> list[str]:
        """Hashes of the first 1, 4, 16, ... 4096 training sequences: a longer reading has them."""
        if self.of_files is not None:
            return [self.of_files[:16]]
        sizes = [4**i for i in range(7) if 4**i <= len(self.train)]
        ids = self.train[: max(sizes, default=0)].ids.numpy()
        return [sha256(ids[:size].tobytes()).hexdigest()[:16] for size in sizes]


# --- Reading as far as wanted, and the split

# `stdlib` can spare as many held-out tokens for a short run as a trustworthy loss takes.
HELD_OUT_TOKENS = 2**18


def load_corpus(
    cfg: DataConfig, tokenizer: Any, *, n_tokens: int | None, model_n_ctx: int, n_held_out: int = 0
) -> Corpus:
    """Return the sequences that `cfg` describes, from the token cache where it has them.

    A corpus for fewer tokens is a prefix of one for more, in both splits.

    Args:
        n_tokens: counted training tokens after which reading stops, rounded up to a sequence, plus
            the held-out sequences up to there (of `stdlib`: as many in proportion, or 2^18 tokens).
            None reads all there is.
        n_held_out: counted held-out tokens wanted. Where there are fewer up to there, reading goes
            on, and takes of what follows only held-out sequences, as far as the text goes.
    """
    with permitted(cfg.source):
        reader = _Reader(cfg, tokenizer, model_n_ctx)
        name, share = reader.source.name, cfg.held_out
        if reader.source.held_out is None:
            train, held_out, tokens = reader.splits(n_tokens, n_held_out)
        else:
            train, _, tokens = reader.splits(n_tokens)
            limit = None
            if n_tokens is not None:
                limit = max(HELD_OUT_TOKENS, math.ceil(n_tokens * share / (1 - share)), n_held_out)
            held_out, _, _ = reader.splits(limit, held_out=True)
    n_ctx = tokens.rows.shape[1]
    if not len(train) or not len(held_out):
        raise InputError(
            f"expected enough text in {name} for a training and a held-out sequence of {n_ctx} "
            f"tokens, got {len(tokens.rows)} in all: give more text, a smaller n_ctx or another "
            "held_out"
        )
    corpus = Corpus(train, held_out, name, n_ctx, tokens.starts_with_bos)
    sizes = (train.n_tokens, held_out.n_tokens, n_ctx, "with" if corpus.bos else "without")
    log.info("%s: %d training and %d held-out tokens in sequences of %d, %s BOS", name, *sizes)
    return corpus


class _Tokens(NamedTuple):
    """Rows (n, n_ctx) of a source, all that are wanted or a block of them."""

    rows: np.ndarray
    starts_with_bos: bool
    reach: float
    """Training tokens up to their end, if that was far enough; inf if the source ended first, and
    for every block but the last, which alone counts."""


class _Reader:
    def __init__(self, cfg: DataConfig, tokenizer: Any, model_n_ctx: int) -> None:
        self._cfg, self._tokenizer, self._model_n_ctx = cfg, tokenizer, model_n_ctx
        self._packing = _choose_packing(cfg, tokenizer, model_n_ctx)
        self._special = tuple(sorted(special_ids(tokenizer)))
        self.source = open_source(
            cfg,
            len(tokenizer),
            end_of_text=getattr(tokenizer, "eos_token", None),
            chats=ChatTemplate.of(tokenizer) if cfg.chat else None,
        )
        # Of token rows; without a padding token, EOS pads.
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._padding = None if cfg.reading == 1 else eos if pad is None else pad
        self._was_padded = False
        # Of the sequences that are held out; of documents that the source itself splits, none.
        self._share = cfg.held_out if self.source.held_out is None else 0.0
        settings = (cfg.n_ctx, cfg.bos, model_n_ctx, _tokenizer_key(tokenizer))
        self._settings = (FORMAT, *settings, self.source.stamp, self._share)

    def splits(
        self, n_tokens: int | None, n_held_out: int = 0, *, held_out: bool = False
    ) -> tuple[SequenceSet, SequenceSet, _Tokens]:
        """Return the training and the held-out sequences as far as wanted, and what they are of.

        `held_out`: of the documents that the source itself holds out.
        """
        tokens = self._tokens(n_tokens, n_held_out, held_out)
        counts = _count(tokens.rows, self._special)
        is_held_out = held_out_rows(0, len(counts), self._share)
        last = _reaching(np.where(is_held_out, 0, counts), n_tokens)
        # Of what follows, sequences that the split holds out, and no training one.
        beyond = max(last, _reaching(np.where(is_held_out, counts, 0), n_held_out))
        index = np.flatnonzero(~is_held_out[:last]), np.flatnonzero(is_held_out[:beyond])
        train, rest = (SequenceSet(tokens.rows, self._special, i, counts[i]) for i in index)
        return train, rest, tokens

    def _tokens(self, n_tokens: int | None, n_held_out: int, held_out: bool) -> _Tokens:
        key = sha256(repr((*self._settings, held_out)).encode()).hexdigest()[:32]
        # The shortest that is long enough: a resumed run has to read the rows it began with.
        known = _find(key, n_tokens, self._packing.dtype)
        for kept in known:
            # A whole source has no more of them.
            whole = kept.reach == math.inf
            if whole or not n_held_out or self._n_held_out(kept) >= n_held_out:
                log.info("tokens of an earlier reading of %s", self.source.name)
                return kept
        try:
            return self._read(key, n_tokens, n_held_out, held_out)
        except InputError as error:
            if not known:
                raise
            raise InputError(
                f"{error}; or ask for no more held-out tokens than were read before, "
                f"{max(map(self._n_held_out, known)):,}"
            ) from error

    def _read(self, key: str, n_tokens: int | None, n_held_out: int, held_out: bool) -> _Tokens:
        open_documents = self.source.held_out if held_out else self.source.train
        assert open_documents is not None
        parts = open_documents()
        head = list(islice(parts, HEAD))
        if not head:
            raise InputError(f"expected some text in {self.source.name}, got none")
        packing = self._settled(head)
        return _keep(self._blocks(chain(head, parts), packing, n_tokens, n_held_out), key)

    def _n_held_out(self, tokens: _Tokens) -> int:
        held_out = np.flatnonzero(held_out_rows(0, len(tokens.rows), self._share))
        return int(_count(tokens.rows[held_out], self._special).sum())

    def _settled(self, head: list[Part]) -> "_Packing":
        """Return the packing after a look at the first documents.

        Token arrays whose rows have one length, that of `cfg.n_ctx` or any if it is None, keep
        their rows if they start with BOS as `cfg.bos` asks.
        """
        cfg = self._cfg
        rows = [self._unpadded(part) for part in head if part.ends]
        rows = [row for row in rows if isinstance(row, np.ndarray)]
        lengths = {len(row) for row in rows}
        if len(rows) < len(head) or len(lengths) != 1 or lengths == {0}:
            return self._packing
        (length,) = lengths
        bos = self._tokenizer.bos_token_id
        with_bos = bos is not None and all(row[0] == bos for row in rows)
        fits = length == cfg.n_ctx if cfg.n_ctx else 2 <= length <= self._model_n_ctx
        if not fits or (cfg.bos == "always" and not with_bos) or (cfg.bos == "never" and with_bos):
            return self._packing
        kept = {"bos": None, "separator": None, "as_they_are": True, "starts_with_bos": with_bos}
        return self._packing._replace(n_ctx=length, **kept)

    def _unpadded(self, part: Part) -> str | np.ndarray:
        """Return a part's content: a row of token ids without the padding at its ends.

        Where BOS or EOS pads, one alone is no padding.
        """
        ids, pad = part.content, self._padding
        if isinstance(ids, str) or not part.ends or pad is None or not len(ids):
            return ids
        if pad not in (ids[0], ids[-1]):
            return ids
        text = np.flatnonzero(ids != pad)
        start, stop = (int(text[0]), int(text[-1]) + 1) if len(text) else (0, 0)
        least = 2 if pad in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id) else 1
        start = start if start >= least else 0
        stop = stop if len(ids) - stop >= least else len(ids)
        if stop - start < len(ids) and not self._was_padded:
            self._was_padded = True
            log.info("%s: padding at the ends of rows (id %d) is left out", self.source.name, pad)
        return ids[start:stop]

    def _blocks(
        self, parts: Iterator[Part], packing: "_Packing", n_tokens: int | None, n_held_out: int
    ) -> Iterator[_Tokens]:
        """Yield blocks of rows until there are as many counted tokens among them as wanted."""
        carry = np.empty(0, packing.dtype)
        width = packing.n_ctx - (packing.bos is not None)
        n_rows = n_train = n_rest = 0

        def missing() -> float:
            train = math.inf if n_tokens is None else float(n_tokens - n_train)
            return max(train, (n_held_out - n_rest) / self._share) if n_held_out > n_rest else train

        # Asked before each block, so that the last blocks are small and little too much is read.
        while block := _next_parts(parts, missing()):
            ids = np.concatenate([carry, *self._ids(block, packing)])
            n = len(ids) // width
            rows, carry = ids[: n * width].reshape(n, width), ids[n * width :]
            if packing.bos is not None:
                rows = np.insert(rows, 0, packing.bos, axis=1)
            counts = _count(rows, self._special)
            held_out = held_out_rows(n_rows, n_rows + n, self._share)
            n_rows += n
            n_train += int(counts[~held_out].sum())
            n_rest += int(counts[held_out].sum())
            enough = missing() <= 0
            yield _Tokens(rows, packing.starts_with_bos, float(n_train) if enough else math.inf)
            if enough:
                break

    def _ids(self, block: list[Part], packing: "_Packing") -> Iterator[np.ndarray]:
        """Yield the ids of each part and, after a document's end, the separator."""
        texts = [part.content for part in block if isinstance(part.content, str)]
        # Not verbose: no warning that a text exceeds the context, for it is cut.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = iter(self._tokenizer(texts, **options)["input_ids"] if texts else ())
        own = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        for part in block:
            if isinstance(part.content, str):
                ids = np.array(next(encoded), packing.dtype)
                # A template writes BOS and EOS, which packing puts where they belong.
                yield _inner(ids, own) if self._cfg.chat and part.ends else ids
            else:
                ids = part.content if packing.as_they_are else self._unpadded(part)
                if len(part.content) and not len(ids):
                    continue  # nothing but padding
                yield _checked(np.asarray(ids), packing, is_document=part.ends)
            if part.ends and packing.separator is not None:
                yield np.array([packing.separator], packing.dtype)


def held_out_rows(start: int, stop: int, share: float) -> np.ndarray:
    """Return which of the sequences `start` to `stop - 1` are held out: the first of every 1/share.

    Known without the number of sequences, so that a longer reading splits its prefix alike.
    """
    edges = np.ceil(np.arange(start, stop + 1) * share)
    return edges[1:] > edges[:-1]


def _reaching(counts: np.ndarray, n_tokens: int | None) -> int:
    """Return how many rows hold so many tokens; all where there are fewer, or None is said."""
    if n_tokens is None:
        return len(counts)
    return min(int(np.searchsorted(np.cumsum(counts), n_tokens)) + 1, len(counts))


# --- Documents to rows

# Documents that decide how a source is packed.
HEAD = 64

# Characters (or ids) that are tokenised in one call: enough to keep every core busy.
SMALLEST_BLOCK, LARGEST_BLOCK = 2**12, 2**22


class _Packing(NamedTuple):
    """How ids become rows: decided from a config, a tokenizer and, for token arrays, the data."""

    n_ctx: int
    vocabulary: int
    bos: int | None
    """Id in front of every row, or None."""
    separator: int | None
    """Id after every document: EOS, else BOS, else none."""
    starts_with_bos: bool
    """Whether rows start with BOS, put there by us or by the maker of the token array."""
    as_they_are: bool = False
    """Whether the source's own rows are kept."""

    @property
    def dtype(self) -> str:
        return narrowest(self.vocabulary)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that are never counted: BOS, EOS and padding."""
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


def _choose_packing(cfg: DataConfig, tokenizer: Any, model_n_ctx: int) -> _Packing:
    """Return how text is packed; InputError if n_ctx or BOS do not suit the model."""
    n_ctx = cfg.context_length(model_n_ctx)
    if n_ctx > model_n_ctx:
        raise InputError(
            f"expected n_ctx of at most {model_n_ctx}, the model's context, got {n_ctx}: lower "
            "n_ctx or leave it out"
        )
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if cfg.bos == "always" and bos is None:
        raise InputError(
            "expected a tokenizer with a BOS token for bos='always', got one without: use "
            "bos='auto' or 'never'"
        )
    if n_ctx < 2:
        raise InputError(f"expected n_ctx of at least 2, got {n_ctx}: nothing can be predicted")
    front = None if cfg.bos == "never" else bos
    return _Packing(n_ctx, len(tokenizer), front, bos if eos is None else eos, front is not None)


def _next_parts(parts: Iterator[Part], missing: float) -> list[Part]:
    """Return the next parts, of about `2 missing` characters together; none at the end."""
    # Text has three or four characters a token: two a token stops short rather than beyond.
    size = min(max(2 * missing, SMALLEST_BLOCK), LARGEST_BLOCK)
    block: list[Part] = []
    while size > 0 and (part := next(parts, None)) is not None:
        block.append(part)
        size -= len(part.content)
    return block


def _inner(ids: np.ndarray, edges: tuple[int | None, ...]) -> np.ndarray:
    """Return a document's ids without one of `edges` in front, and one at the end."""
    start = int(len(ids) > 0 and ids[0] in edges)
    return ids[start : len(ids) - int(len(ids) > start and ids[-1] in edges)]


def _checked(ids: np.ndarray, packing: _Packing, *, is_document: bool) -> np.ndarray:
    """Return the ids of a token array, without the BOS and EOS that packing puts there itself."""
    if len(ids) and (ids.min() < 0 or ids.max() >= packing.vocabulary):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            f"expected token ids from 0 to {packing.vocabulary - 1}, got {wrong}: were they made "
            "by another tokenizer, or stored in another width?"
        )
    if packing.as_they_are:
        if len(ids) != packing.n_ctx:
            raise InputError(
                f"expected rows of {packing.n_ctx} token ids like the first ones, got one of "
                f"{len(ids)}: give n_ctx to have the rows packed anew"
            )
    elif is_document:
        ids = _inner(ids, (packing.bos, packing.separator))
    return ids.astype(packing.dtype)


# --- The token cache

# Raise it when the same source and settings come to give other rows.
FORMAT = 1


def _tokenizer_key(tokenizer: Any) -> str:
    """Return what two tokenizers share if they give the same ids."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sha256(f"{text} {special}".encode()).hexdigest()


def _find(key: str, n_tokens: int | None, dtype: str) -> list[_Tokens]:
    """Return rows kept under `key` that reach `n_tokens` or the source's end, shortest first."""
    found: list[_Tokens] = []
    for path in sorted(cache_folder("tokens").glob(f"{key}.*.rows")):
        _, said, n_ctx, bos, _ = path.name.split(".")
        reach = math.inf if said == "all" else float(said)
        if reach >= (math.inf if n_tokens is None else n_tokens):
            found.append(_Tokens(_mapped(path, dtype, int(n_ctx)), bos == "bos", reach))
    return sorted(found, key=lambda tokens: tokens.reach)


def _keep(blocks: Iterator[_Tokens], key: str) -> _Tokens:
    """Return the rows of all blocks in a file under `key`, or in memory where none can be made."""
    folder = cache_folder("tokens")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{key}.", suffix=".tmp", dir=folder)
    except OSError as error:
        log.warning("no token cache, so tokens stay in memory: %s", error)
        every = list(blocks)
        return every[-1]._replace(rows=np.concatenate([block.rows for block in every]))
    last = first = next(blocks)
    try:
        # Unbuffered, so that a full disk is noticed here and not once more when it is closed.
        with os.fdopen(handle, "wb", buffering=0) as file:
            for last in chain([first], blocks):
                data = memoryview(last.rows.tobytes())
                with writing(folder, len(data)):
                    while data:
                        data = data[file.write(data) :]
        said = "all" if last.reach == math.inf else f"{last.reach:.0f}"
        n_ctx, bos = last.rows.shape[1], "bos" if last.starts_with_bos else "plain"
        path = folder / f"{key}.{said}.{n_ctx}.{bos}.rows"
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return last._replace(rows=_mapped(path, last.rows.dtype, n_ctx))


def _mapped(path: Path, dtype: Any, n_ctx: int) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty((0, n_ctx), dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").reshape(-1, n_ctx)
