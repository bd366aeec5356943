"""Vectors of a folder in the place of a language model and its text: splits, and their vectors.

Where `harvest` wrote the folder, sequences and splits are those of the text, so that a run on it
has the batches, the scale and the bits of the run that it was harvested for. Of any other folder a
sequence is `BLOCK` vectors that follow each other, and sequences are held out as those of a text.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gsae_core.config import NO_MODEL, Site
from gsae_core.errors import InputError
from gsae_core.files import read_bytes
from gsae_core.lm.corpus import Corpus, SequenceSet, held_out_rows, special_ids
from gsae_core.lm.harvest import Harvest, default_rows, side_by_side
from gsae_core.lm.load import open_tokenizer
from gsae_core.lm.stored import VOCABULARY, StoredVectors, open_vectors
from gsae_core.lm.texts import in_sequence, raw_texts

log: logging.Logger = logging.getLogger(__name__)

# Tokens of context that stand before a token of an activation cache.
BEFORE = 12

# Vectors that are drawn together: the order of 10^8 of them is then one of 6 million numbers.
BLOCK = 16

Result = TypeVar("Result")


class VectorSource:
    """A folder of vectors, asked what a run and an index ask of a language model.

    Attributes:
        name: of the language model that the vectors are of; `config.NO_MODEL` of unknown ones.
        is_harvested: whether sequences, splits and tokens are those of a text.
    """

    def __init__(self, folder: str, *, device: torch.device) -> None:
        self.vectors: StoredVectors = open_vectors(folder)
        self.device: torch.device = device
        self.d_in: int = self.vectors.d_in
        about = self.vectors.about
        self.name: str = str(about.get("model", NO_MODEL))
        self.numerics: str = str(about.get("numerics", "raw"))
        self.is_harvested: bool = "splits" in about

    def corpus(self, held_out: float) -> Corpus:
        """Return the splits: those of the text, or else every so-many-th block is held out."""
        if self.is_harvested:
            about = self.vectors.about
            train, rest = (self._of_text(name) for name in ("train", "held_out"))
            said = (str(about["text"]), int(about["n_ctx"]), bool(about["bos"]))
            return Corpus(train, rest, *said, self.vectors.digest)
        n = len(self.vectors)
        first = np.arange(0, n, BLOCK)
        # No tokens: a block is so many vectors of anything.
        rows = np.broadcast_to(np.uint8(0), (len(first), BLOCK))
        every = SequenceSet(rows, counts=np.minimum(BLOCK, n - first), first=first)
        is_held_out = held_out_rows(0, len(first), held_out)
        train, rest = every.take(~is_held_out), every.take(is_held_out)
        if not len(train):
            raise InputError(
                f"expected more than {BLOCK} vectors in {self.vectors.folder}, some to train on "
                f"and some to hold out, got {n}: give more"
            )
        return Corpus(train, rest, str(self.vectors.folder), 1, False, self.vectors.digest)

    def _of_text(self, split: str) -> SequenceSet:
        vectors, about = self.vectors, self.vectors.about
        shards = vectors.split(split) or []
        # Another program that wrote the shards anew may have left ids out.
        none = np.empty((0, about["n_ctx"]), "<i4")
        ids = [vectors.shards[k].ids for k in shards]
        fits = [own for own in ids if own is not None and own.shape[1] == about["n_ctx"]]
        rows = np.concatenate([none, *fits])
        found = SequenceSet(rows, tuple(about["special"]))
        n = sum(len(vectors.shards[k].x) for k in shards)
        if found.n_tokens != n:
            raise InputError(
                f"expected {found.n_tokens:,} vectors of the {split} split in {vectors.folder}, as "
                f"its tokens say, got {n:,}: harvest them again"
            )
        found.first = vectors.edges[shards[0]] + np.cumsum(found.counts) - found.counts
        return found

    def check(self, layer: int, site: Site) -> None:
        """Do nothing: there is one place."""

    def width(self, site: Site) -> int:
        """Return d_in."""
        return self.d_in

    def readable(
        self, parts: Sequence[tuple[SequenceSet, np.ndarray]]
    ) -> tuple[list[SequenceSet], list[str]]:
        """Return some sequences of some splits as tokens, and what each token id stands for.

        Without a text every vector is a sequence of one token, which stands for its caption; of an
        activation cache, for the token it is of, in brackets, behind those before it.
        """
        if self.is_harvested:
            chosen = [own.take(which) for own, which in parts]
            return chosen, self._vocabulary(chosen)
        known: dict[str, int] = {}
        chosen = []
        for own, which in parts:
            numbers = own.numbers(which)
            captions = self._in_context(numbers) or self.vectors.captions(numbers)
            ids = np.array([known.setdefault(each, len(known)) for each in captions], np.uint32)
            chosen.append(SequenceSet(ids[:, None], first=numbers))
        return chosen, list(known)

    def _vocabulary(self, chosen: Sequence[SequenceSet]) -> list[str]:
        """Return the text of each token id of a harvested folder."""
        path, again = self.vectors.folder / VOCABULARY, "give its command again"
        lacks = f"expected {path}, which harvest writes, found none; {again}"
        data = read_bytes(path, missing=lacks)
        texts: Any = None
        with suppress(ValueError, RecursionError):
            texts = json.loads(data)
        need = max((each.largest_id for each in chosen), default=-1) + 1
        texts = texts if isinstance(texts, list) else []
        if len(texts) < need or not all(isinstance(each, str) for each in texts):
            raise InputError(f"expected {need:,} texts of tokens in {path}, got others; {again}")
        return texts

    def _in_context(self, numbers: Int64[np.ndarray, " n"]) -> list[str] | None:
        """Return the token of each vector of an activation cache; None where it cannot be told."""
        if not self.vectors.about or self.vectors.has_captions:
            return None
        edges, said = self.vectors.edges, list[str]()
        try:
            tokenizer = open_tokenizer(self.name)
            raw = raw_texts(tokenizer, range(len(tokenizer)))
            special = sorted(special_ids(tokenizer))
            for shard, start, stop in zip(self.vectors.shards, edges, edges[1:], strict=False):
                own = numbers[(start <= numbers) & (numbers < stop)] - start
                if not len(own):
                    continue
                ids = np.empty((0, 1), "<i4") if shard.ids is None else shard.ids
                counted = np.flatnonzero(~np.isin(ids, special))
                if len(counted) != len(shard.x) or not 0 <= ids.min() <= ids.max() < len(raw):
                    raise InputError(
                        f"expected token ids of {self.name} beside the vectors in {shard.path}, "
                        "got none or others"
                    )
                flat, n_ctx = ids.reshape(-1), ids.shape[1]
                for at in counted[own].tolist():
                    first = max(at - BEFORE, at // n_ctx * n_ctx)
                    *before, token = in_sequence([raw[i] for i in flat[first : at + 1].tolist()])
                    said.append(f"{''.join(before)}[{token}]")
        except InputError as error:
            why = "the files' names and rows are shown in place of texts; harvest writes a folder"
            log.warning("%s: %s that has them", error, why)
            return None
        return said


class StoredHarvest(Harvest):
    """The vectors of a folder's sequences, float32, on the source's device."""

    unit: str = "vector"

    def __init__(
        self, source: VectorSource, sequences: SequenceSet, *, layer: int, site: Site
    ) -> None:
        assert sequences.first is not None, "other sequences have no vectors"
        super().__init__(source, sequences, layer=layer, site=site)
        self._source = source

    def parts(self, which: np.ndarray) -> Iterator[tuple[Float[Tensor, "vectors d_in"]]]:
        """Yield the vectors of ascending sequences, a part at a time.

        InputError, with the file and the row, if one is not finite.
        """
        assert (np.diff(which) > 0).all(), "shards are read in ascending order"
        for x in self._source.vectors.rows(self.sequences.numbers(which)):
            yield (torch.from_numpy(x).to(self.device),)

    def through(
        self, work: Callable[[Float[Tensor, "vectors d_in"]], Result], which: np.ndarray
    ) -> Iterator[Result]:
        """Yield what `work` makes of the vectors, as many at a time as tokens go into a pass."""
        size = default_rows(1, self.device)
        parts = (part for x in self.vectors(which) for part in x.split(size))
        return side_by_side(work, parts, self.device)
