"""The feature index as files: what lies where, whether it is whole, and of which weights it is.

    features/<name>/  manifest.json  labels.jsonl  status.json  log.txt
                      data-<id>/  offsets token value            (feature-major, strongest first)
                                  near_offsets near_token near_margin      (just under the gate)
                                  row_offsets latent             (token-major)
                                  ids mask  histogram  neighbours ...  features.parquet

A token is named by its position: sequence * n_ctx + position in it. manifest.json names the data
folder and the size of every file in it and is replaced last, so that a reader sees one build,
whole. Nothing here needs torch.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from gsae_core.config import IF_SAID, Architecture, Config, Site, validated
from gsae_core.errors import InputError
from gsae_core.files import read_json, read_sae_cfg, readable, sha256, writing

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

# Of each feature: bins of its histogram, neighbours and companions, and near misses.
N_BINS, N_NEIGHBOURS, NEAR_KEPT = 40, 20, 256

ARRAYS = (
    *("offsets", "token", "value"),
    *("near_offsets", "near_token", "near_margin"),
    *("row_offsets", "latent"),
    *("ids", "mask", "histogram", "decoder"),
    *("neighbours", "neighbour_cosines"),
    *("companions", "companion_counts"),
)
TABLE, VOCABULARY, VECTOR = "features.parquet", "vocabulary.json", "vector"
COLUMNS = {
    "fired": "Tokens it fires on: the numerator of its density.",
    "n_tokens": "Tokens read: the denominator.",
    "density": "Share of the tokens it fires on.",
    "gate_open": "Tokens on which pi_gate > 0; without a gate, those it fires on.",
    "gate_density": "Their share; where it is above the density, the gate opens without output.",
    "max": "Its largest value; 0 of a dead feature.",
    "mean": "Mean value over the tokens it fires on; NaN of a dead feature.",
    "q50": "Median value over the tokens it fires on.",
    "q90": "90th percentile of the same.",
    "q99": "99th percentile of the same: the unit of steering.",
    "theta": "Its values lie above theta, never between 0 and theta; NaN where none decides.",
    "gain": "exp(r_mag); 1 where gate and magnitude share their scale, NaN without a tied gate.",
    "b_gate": "The gate's bias; NaN without a gate.",
    "b_mag": "The magnitude's bias; NaN without a gate.",
    "gamma": "Its own shrinkage: 1 is right, below 1 too short (`Metrics.gamma_per_feature`).",
    "decoder_norm": "Length of its decoder direction.",
    "encoder_cosine": "Cosine of its encoder and decoder directions.",
    "near_misses": "Near misses kept.",
    "top_tokens": "What it fires on most, by summed value.",
    "top_token_shares": "Their shares of its summed value.",
    "top_logit_tokens": "Next tokens it raises most; empty where logit effects are unknown.",
    "top_logits": "Change of their logits per unit of the feature (times a token's scale where "
    "the SAE normalises its inputs).",
    "bottom_logit_tokens": "Next tokens it lowers most.",
    "bottom_logits": "Change of their logits per unit of the feature.",
}
"""What each column of the table means."""


class Split(Config):
    """Sequences of one split of the text; splits follow each other in the index."""

    name: str
    """`held_out` or `train`."""
    n_sequences: int
    n_tokens: int
    """Counted tokens: masked positions left out."""


class Manifest(Config):
    """What an index is of and made from."""

    schema_version: int = SCHEMA_VERSION
    sae: str
    architecture: Architecture
    d_in: int
    d_sae: int
    weights_sha256: str
    """Of the weights file."""
    model: str
    """Name of the language model; `config.NO_MODEL` of vectors from elsewhere."""
    revision: str | None = None
    numerics: str = "raw"
    layer: int
    site: Site
    text: str
    """Name of the corpus."""
    vectors: Annotated[str | None, IF_SAID] = None
    """Folder of the vectors, where they are of no text: each is then a sequence of one token, which
    stands for its caption, and `vector.npy` has its number in the folder."""
    vectors_digest: Annotated[str | None, IF_SAID] = None
    """What `StoredVectors.digest` of that folder was."""
    n_ctx: int
    splits: tuple[Split, ...]
    tokens_sha256: str
    """Of the ids: two indices with the same one are over the same tokens."""
    n_tokens_asked: int
    shortage: str | None = None
    """Why `n_tokens` are fewer, where they are."""
    n_left_out: Annotated[int, Field(exclude_if=lambda n: n == 0)] = 0
    """Tokens of the splits that are not among `n_tokens`: their activations are too long."""
    n_tokens: int
    """Counted tokens read: the denominator of every density."""
    n_entries: int
    """Pairs of a token and a feature that fires on it."""
    n_near: int
    """Near misses kept."""
    l0: float
    fvu: float | None
    gamma: float | None
    """Of the whole SAE on these tokens, as `sae.metrics` defines them."""
    companion_stride: int = 1
    """Companions are counted on every so-many-th token; 1: on all."""
    logit_tokens: int = 0
    """Tokens over which the derivative of the final norm is averaged; 0: no logit effects."""
    made: float
    """When, in seconds since 1970."""
    seconds: float
    versions: dict[str, str]
    data: str
    """Folder of the arrays, beside the manifest."""
    files: dict[str, int]
    """Bytes of every file in it."""

    @property
    def n_bytes(self) -> int:
        """Room the index takes on disk."""
        return sum(self.files.values())

    @property
    def unit(self) -> str:
        """What a feature fires on: a `token`, or a `vector` of no text."""
        return "token" if self.vectors is None else "vector"

    def amount(self, text: str = "") -> str:
        """Return how many tokens of each split were read; `text`: such as ` of stdlib`."""
        splits = " and ".join(
            f"{each.n_tokens:,} {each.name.replace('_', '-')}" for each in self.splits
        )
        left_out = f"; {self.n_left_out:,} outliers of them left out" if self.n_left_out else ""
        if self.n_tokens + self.n_left_out >= self.n_tokens_asked:
            return f"{splits} {self.unit}s{text}{left_out}"
        # Earlier versions read no further for held-out text than training would have.
        why = self.shortage or "an earlier version read no more"
        asked = f"{self.n_tokens_asked:,} asked for: {why}"
        return f"{splits} {self.unit}s{text} ({asked}){left_out}"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the index in a folder; InputError if it is not one, and whole."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"expected a feature index with a {MANIFEST}, found none in {folder}; build it: "
            "python -m gsae_core index RUN --sae NAME"
        )
    fields = read_json(path)
    version = fields.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"expected a feature index of layout {SCHEMA_VERSION} or older, got {version} in "
            f"{folder}; a newer version of gsae-core made it: update to open it"
        )
    manifest = validated(Manifest, fields)
    for name, size in manifest.files.items():
        file = folder / manifest.data / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise InputError(
                f"expected {readable(size)} in {file}, found {readable(found)}: the index is cut "
                "short or was copied in part; copy or build it again"
            )
    return manifest


def allocate(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return a new array in `name`.npy, mapped; InputError if the disk is full."""
    path, n_bytes = folder / f"{name}.npy", math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes == 0:
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    with writing(path, n_bytes):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        # To write to a mapped file without room would end the process.
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def unsigned(n: int) -> Any:
    """Return the dtype in which files hold numbers below `n`."""
    return np.uint16 if n <= 2**16 else np.uint32


def evenly(n: int, of: int) -> np.ndarray:
    """Return about `n` numbers spread evenly over 0 to `of` - 1, ascending."""
    return np.unique(np.linspace(0, of - 1, n).round().astype(np.int64))


def load_array(folder: Path, name: str) -> np.ndarray:
    """Return one of `ARRAYS`, or `VECTOR`, mapped into memory read-only."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def check_weights(manifest: Manifest, sae_folder: Path) -> None:
    """Raise InputError unless an index is of the weights that are in an SAE's folder now."""
    found = weights_sha256(sae_folder)
    if found != manifest.weights_sha256:
        raise InputError(
            f"expected the feature index of the weights in {sae_folder} (SHA-256 {found[:12]}...), "
            f"got one of {manifest.weights_sha256[:12]}...: the SAE has changed since; build the "
            "index again"
        )


def weights_sha256(sae_folder: Path) -> str:
    """Return the SHA-256 of an SAE's weights: as its cfg.json says, which loading verifies."""
    cfg = read_sae_cfg(sae_folder / "cfg.json")
    said = (cfg.get("metadata") or {}).get("weights_sha256")
    return said or sha256(sae_folder / "sae_weights.safetensors")
