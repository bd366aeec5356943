"""evals.json and the per-latent statistics: what was measured on held-out tokens."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import BaseModel
from safetensors.numpy import save_file

from gsae_core.config import Architecture
from gsae_core.store.files import replace_durably, write_json


class EvalRow(BaseModel, frozen=True, extra="forbid"):
    """One SAE on held-out tokens; the keys of evals.json. NaN is written as null."""

    name: str
    architecture: Architecture
    sparsity: float
    """lambda as the config gives it."""
    d_in: int
    d_sae: int
    l0: float
    loss_recovered: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    kl: float
    gamma: float
    gamma_gate: float
    fvu: float
    cosine: float
    alive_fraction: float
    n_tokens: int


def write_evals(folder: Path, rows: list[EvalRow]) -> None:
    """Replace a run's evals.json."""
    # mode="python": JSON's own NaN rule is ours to apply, in one place.
    write_json(folder / "evals.json", {"saes": [row.model_dump() for row in rows]})


def write_feature_stats(
    folder: Path,
    *,
    fired: Int64[np.ndarray, " d_sae"],
    gate_open: Int64[np.ndarray, " d_sae"],
    density: Float64[np.ndarray, " d_sae"],
    gamma: Float64[np.ndarray, " d_sae"],
) -> None:
    """Replace an SAE's feature_stats.safetensors.

    Args:
        folder: of the SAE.
        fired: tokens on which each latent fired.
        gate_open: tokens on which its gate was open; those it fired on, where there is no gate.
        density: share of tokens on which it fired.
        gamma: its own shrinkage; NaN where it never fired.
    """
    columns = {"fired": fired, "gate_open": gate_open, "density": density, "gamma": gamma}
    replace_durably(
        folder / "feature_stats.safetensors",
        lambda path: save_file(columns, path),
        n_bytes=sum(column.nbytes for column in columns.values()),
    )
