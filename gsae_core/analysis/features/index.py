"""The feature index: built once (`build`), asked anything, from mapped files, without torch.

index = open_index("runs/my-run/features/gated-0.1")   # or open_run(...).features("gated-0.1")
index.feature(7).top(20)                               # where it fires
"""

import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from gsae_core.analysis.features.feature import Feature
from gsae_core.analysis.features.files import (
    ARRAYS,
    TABLE,
    VECTOR,
    VOCABULARY,
    Manifest,
    load_array,
    read_manifest,
)
from gsae_core.analysis.features.filter import Range, within
from gsae_core.analysis.labels import Labels
from gsae_core.errors import InputError
from gsae_core.lm.stored import StoredVectors, open_vectors
from gsae_core.lm.texts import SPLIT, by_itself, in_sequence

if TYPE_CHECKING:
    import pandas as pd

MOST_TOKENS = 2**13  # that a query by token or text looks at


class FeatureIndex:
    """An index in a folder, as it was when it was opened; its `labels` alone grow.

    `index[number]` is a `Feature`; `gsae_core.open_index` opens one.

    Attributes:
        manifest: what it was made from: the SAE, its weights' hash, the model, the text.
        n_features: latents of the SAE, dead ones included.
        n_tokens: counted tokens that were read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.manifest: Manifest = read_manifest(folder)
        self.n_features: int = self.manifest.d_sae
        self.n_tokens: int = self.manifest.n_tokens
        self.labels: Labels = Labels(folder)
        self._data = data = folder / self.manifest.data
        # All are opened at once: a build that replaces this one may delete them later.
        self._arrays = {name: load_array(data, name) for name in ARRAYS}
        is_text = self.manifest.vectors is None
        self._numbers = None if is_text else load_array(data, VECTOR)

    def __getitem__(self, number: int) -> Feature:
        return self.feature(number)

    def array(self, name: str) -> np.ndarray:
        """Return one of `files.ARRAYS`, mapped into memory read-only."""
        return self._arrays[name]

    @property
    def n_places(self) -> int:
        """Positions of the text, masked ones included."""
        return self.array("ids").size

    def feature(self, number: int) -> Feature:
        """Return one feature, dead or alive; InputError if there is no such number."""
        if not 0 <= number < self.n_features:
            raise InputError(
                f"expected a feature from 0 to {self.n_features - 1}, got {number} "
                f"({self.manifest.sae} has {self.n_features} features)"
            )
        return Feature(self, number)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """A row per feature, by its number; `files.COLUMNS` says what the columns mean."""
        import pandas as pd

        return pd.read_parquet(self._data / TABLE).rename_axis("feature")

    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Return which features fired at least once."""
        return np.diff(self.array("offsets")) > 0

    def random_alive(self, *, seed: int) -> int:
        """Return the number of a feature that fired; InputError if none did."""
        alive = np.flatnonzero(self.alive())
        if not len(alive):
            raise InputError(
                f"expected a feature that fires, found none in {self.manifest.sae}: all "
                f"{self.n_features} are dead on these {self.n_tokens} {self.manifest.unit}s"
            )
        return int(np.random.default_rng(seed).choice(alive))

    def select(self, **ranges: Range) -> "pd.DataFrame":
        """Return the rows in ranges, like density=(1e-4, None); NaN lies in none."""
        table = self.table
        numbers = [column for column, dtype in table.dtypes.items() if dtype.kind in "if"]
        kept = np.ones(len(table), bool)
        for name, ends in ranges.items():
            if name not in numbers:
                raise InputError(f"expected a column out of {', '.join(numbers)}, got {name!r}")
            kept &= within(table[name].to_numpy(), ends)
        return table.loc[kept]

    def by_token(self, token: int) -> "pd.DataFrame":
        """Return the features that fire on a token of the vocabulary, as `by_positions` does."""
        if not 0 <= token < len(self.vocabulary):
            raise InputError(
                f"expected a token id from 0 to {len(self.vocabulary) - 1}, got {token}"
            )
        return self.by_positions(np.flatnonzero(self.array("ids").reshape(-1) == token))

    def by_text(self, text: str) -> "pd.DataFrame":
        """Return the features that fire on tokens with `text`.

        " the" finds words, "the" parts of words too.
        """
        if not text:
            raise InputError("expected some text to look for, got none")
        holds = np.array([text in token for token in self.vocabulary])
        return self.by_positions(np.flatnonzero(holds[self.array("ids").reshape(-1)]))

    def by_positions(self, positions: np.ndarray) -> "pd.DataFrame":
        """Return the features that fire on any of these tokens, largest `f1` first.

        Columns: `feature`; `on`, those tokens it fires on; `recall`, their share of the tokens;
        `precision`, their share of the feature's firings; `f1`, the harmonic mean of both. Of more
        than `MOST_TOKENS` an even sample is looked at, and `on` and `precision` are scaled to all;
        `attrs` holds the numbers of `tokens` and of those `looked_at`.
        """
        import pandas as pd

        counted = positions[self.array("mask").reshape(-1)[positions]]
        step = -(-len(counted) // MOST_TOKENS) or 1
        looked_at = counted[::step]
        counts = np.bincount(self.latents_at(looked_at), minlength=self.n_features)
        numbers = np.flatnonzero(counts)
        on, fired = counts[numbers], np.diff(self.array("offsets"))[numbers]
        scale = len(counted) / max(len(looked_at), 1)
        recall = on / max(len(looked_at), 1)
        precision = np.minimum(on * scale / fired, 1.0)
        frame = pd.DataFrame(
            {
                "feature": numbers,
                "on": np.rint(on * scale).astype(np.int64),
                "recall": recall,
                "precision": precision,
                "f1": 2 * recall * precision / (recall + precision),
            }
        )
        frame = frame.sort_values("f1", ascending=False, kind="stable", ignore_index=True)
        frame.attrs = {"tokens": len(counted), "looked_at": len(looked_at)}
        return frame

    def latents_at(self, positions: np.ndarray) -> np.ndarray:
        """Return which features fire on tokens, token after token, with repetitions."""
        row_offsets = self.array("row_offsets")
        start = row_offsets[positions]
        counts = row_offsets[positions + 1] - start
        # Firing e of token p is start[p] + e: ranges set end to end.
        shift = np.repeat(start - np.cumsum(counts) + counts, counts)
        return self.array("latent")[shift + np.arange(len(shift))]

    def tokens_of(self, sequence: int, first: int, last: int) -> list[str]:
        """Return the texts of a sequence's tokens from `first` up to `last`, read in a row."""
        start = max(0, first - SPLIT)
        ids = self.array("ids")[sequence, start : last + SPLIT].tolist()
        return in_sequence([self._raw_texts[i] for i in ids])[first - start : last - start]

    @cached_property
    def vocabulary(self) -> list[str]:
        """What each token id stands for by itself; part of a character is U+FFFD."""
        return [by_itself(raw) for raw in self._raw_texts]

    @cached_property
    def _raw_texts(self) -> list[str]:
        """`lm.texts.raw_texts` of every id; of an older index U+FFFD in parts of characters."""
        return json.loads((self._data / VOCABULARY).read_text(encoding="utf-8"))

    def vector(self, sequence: int) -> int | None:
        """Return the number in its folder of a vector that is of no text; None of a text's."""
        return None if self._numbers is None else int(self._numbers[sequence])

    def thumbnail(self, vector: int | None) -> str | None:
        """Return a vector's picture as a `data:` address; None without one.

        None too where the folder of the vectors is elsewhere now, or holds others.
        """
        return None if vector is None or self._folder is None else self._folder.thumbnail(vector)

    @cached_property
    def _folder(self) -> StoredVectors | None:
        with suppress(InputError, OSError):
            found = open_vectors(str(self.manifest.vectors))
            return found if found.digest == self.manifest.vectors_digest else None
        return None

    def split_of(self, sequence: int) -> str:
        """Return the split a sequence is from."""
        ends = np.cumsum([split.n_sequences for split in self.manifest.splits])
        return self.manifest.splits[int((ends <= sequence).sum())].name

    def cosines(
        self, numbers: list[int], other: "FeatureIndex"
    ) -> Float[np.ndarray, "d_sae numbers"]:
        """Return the cosines of some decoder directions with every one of another index."""
        directions = self.array("decoder")[numbers] / self.decoder_norms[numbers, None]
        return (other.array("decoder") @ directions.T) / other.decoder_norms[:, None]

    @cached_property
    def decoder_norms(self) -> np.ndarray:
        """Length of each decoder direction; 1 in place of 0, for what is divided by it."""
        W_dec = self.array("decoder")
        norms = np.sqrt(np.einsum("ij,ij->i", W_dec, W_dec))
        return np.where(norms > 0, norms, 1)

    def __repr__(self) -> str:
        made = self.manifest
        amount = f"{self.n_tokens} {made.unit}s"
        return f"FeatureIndex({made.sae}, {self.n_features} features, {amount})"


def open_index(folder: Path | str) -> FeatureIndex:
    """Return the feature index in a folder, such as `runs/<id>/features/<name>`.

    Raises:
        InputError: if there is none, it is cut short, or a newer version made it.
    """
    return FeatureIndex(Path(folder))
