"""The feature index as files: what lies where, whether it is whole, and of which weights it is.

    features/<name>/  manifest.json  labels.jsonl  status.json  log.txt
                      data-<id>/  offsets token value            (feature-major, strongest first)
                                  near_offsets near_token near_margin      (just under the gate)
                                  row_offsets latent             (token-major)
                                  ids mask  histogram  neighbours ...  features.parquet

A token is named by its place: sequence * n_ctx + position. manifest.json names the data folder and
the size of every file in it and is replaced last, so that a reader sees one build, whole. Arrays
are plain .npy, mapped into memory. Nothing here needs torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from gsae_core.config import Architecture, Config, Site, validated
from gsae_core.errors import InputError
from gsae_core.files import read_json, read_sae_cfg, readable, sha256

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

N_BINS = 40
"""Bins of a feature's histogram, of equal width from 0 to its maximum."""
N_NEIGHBOURS = 20
"""Neighbours and companions kept of each feature."""
NEAR_KEPT = 256
"""Near misses kept of each feature, nearest first."""

ARRAYS = (
    "offsets",
    "token",
    "value",
    "near_offsets",
    "near_token",
    "near_margin",
    "row_offsets",
    "latent",
    "ids",
    "mask",
    "histogram",
    "neighbours",
    "neighbour_cosines",
    "companions",
    "companion_counts",
    "decoder",
)
TABLE, VOCABULARY = "features.parquet", "vocabulary.json"

COLUMNS = {
    "fired": "Tokens it fires on: the numerator of its density.",
    "n_tokens": "Tokens read: the denominator.",
    "density": "Share of the tokens it fires on.",
    "gate_open": "Tokens on which pi_gate > 0; without a gate, those it fires on.",
    "gate_density": "Their share; above the density, gates open onto nothing.",
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
    "top_tokens": "Vocabulary's tokens it fires on most, by summed value.",
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
    """Of the weights file, or of the tensors of an SAE that came from none."""
    model: str
    revision: str | None = None
    numerics: str = "raw"
    layer: int
    site: Site
    text: str
    """Name of the corpus."""
    n_ctx: int
    splits: tuple[Split, ...]
    tokens_sha256: str
    """Of the ids: two indices with the same one are over the same tokens."""
    n_tokens_asked: int
    shortage: str | None = None
    """Why `n_tokens` are fewer, where they are."""
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
    """Companions are counted on every so-many-th place; 1: on all."""
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

    def amount(self, text: str = "") -> str:
        """Return how many tokens of which split were read, and of how many asked for if fewer.

        Args:
            text: what stands behind the tokens, such as ` of stdlib`.
        """
        splits = " and ".join(
            f"{each.n_tokens:,} {each.name.replace('_', '-')}" for each in self.splits
        )
        if self.n_tokens >= self.n_tokens_asked:
            return f"{splits} tokens{text}"
        # Earlier versions read no further for held-out text than training would have.
        why = self.shortage or "an earlier version read no more"
        return f"{splits} tokens{text} ({self.n_tokens_asked:,} asked for: {why})"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the index in a folder, its files checked to be there and whole.

    Raises:
        InputError: if there is no index, a newer version made it, or a file is not there whole.
    """
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


def load_array(folder: Path, name: str) -> np.ndarray:
    """Return one of the arrays, mapped into memory read-only."""
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def check_weights(manifest: Manifest, sae_folder: Path) -> None:
    """Check that an index is of the weights in an SAE's folder.

    Raises:
        InputError: if it is of others, which have been trained on or replaced since.
    """
    found = weights_sha256(sae_folder)
    if found != manifest.weights_sha256:
        raise InputError(
            f"expected the feature index of the weights in {sae_folder} (SHA-256 {found[:12]}...), "
            f"got one of {manifest.weights_sha256[:12]}...: the SAE has changed since; build the "
            "index again"
        )


def weights_sha256(sae_folder: Path) -> str:
    """Return the SHA-256 of an SAE's weights: as its cfg.json says, which loading holds it to.

    Raises:
        InputError: if there is no SAE.
    """
    cfg = read_sae_cfg(sae_folder / "cfg.json")
    said = (cfg.get("metadata") or {}).get("weights_sha256")
    return said or sha256(sae_folder / "sae_weights.safetensors")


WEIGHTS = "sae_weights.safetensors"


def weight_table(sae_folder: Path) -> "pd.DataFrame":
    """Return `theta`, `gain`, `b_gate`, `b_mag`, `decoder_norm`, `encoder_cosine` of each feature.

    Raises:
        InputError: if the SAE's files are not there or damaged.
    """
    import pandas as pd

    cfg = read_sae_cfg(sae_folder / "cfg.json")
    W = _tensors(sae_folder / WEIGHTS)
    norms = np.linalg.norm(W["W_dec"], axis=1)
    columns = {
        **_paths(cfg, W),
        "decoder_norm": norms,
        "encoder_cosine": _cosine(W["W_enc"], W["W_dec"], norms),
    }
    return pd.DataFrame(columns).rename_axis("feature")


def _paths(cfg: dict[str, Any], W: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what decides, and how strongly, by feature; NaN where an SAE has no such number."""
    none = np.full(len(W["W_dec"]), np.nan)
    found = {"theta": none, "gain": none, "b_gate": none, "b_mag": none}
    match cfg["architecture"]:
        case "gated":
            gain = np.exp(W["r_mag"])
            # `GatedSAE.jumprelu_threshold`, which tests hold this to.
            theta = np.maximum(W["b_mag"] - gain * W["b_gate"], 0.0)
            return {"theta": theta, "gain": gain, "b_gate": W["b_gate"], "b_mag": W["b_mag"]}
        case "gated_untied":
            return found | {"b_gate": W["b_gate"], "b_mag": W["b_mag"]}
        case "jumprelu":
            return found | {"theta": np.maximum(W["threshold"], 0.0)}
        case "standard":
            return found | {"theta": np.zeros(len(none))}
        case _:
            return found


def _cosine(
    W_enc: Float64[np.ndarray, "d_in d_sae"],
    W_dec: Float64[np.ndarray, "d_sae d_in"],
    norms: Float64[np.ndarray, " d_sae"],
) -> Float64[np.ndarray, " d_sae"]:
    lengths = np.linalg.norm(W_enc, axis=0) * norms
    return np.einsum("ij,ji->i", W_dec, W_enc) / np.where(lengths > 0, lengths, 1)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except FileNotFoundError:
        raise InputError(f"expected the weights of an SAE at {path}, found nothing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"expected whole safetensors in {path}, found something else ({error}); copy or train "
            "the SAE again"
        ) from None
    missing = {"W_enc", "W_dec"} - found.keys()
    if missing:
        raise InputError(f"expected {' and '.join(sorted(missing))} in {path}, found none")
    return {name: tensor.astype(np.float64) for name, tensor in found.items()}
