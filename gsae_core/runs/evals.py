"""evals.json, per-latent statistics, norm deciles and the held-out tokens they were measured on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64
from pydantic import BaseModel, ValidationError
from safetensors.numpy import save_file

from gsae_core.config import first_of
from gsae_core.errors import InputError
from gsae_core.files import read_json, replace_durably, write_json
from gsae_core.runs.run import EvalRow, Run, _Decile

if TYPE_CHECKING:
    import pandas as pd

DECILES = ("norm", "ratio", "gamma")
"""Numbers of each tenth of the tokens, as `sae.deciles.Decile` defines them."""


class _Deciles(BaseModel):
    deciles: list[_Decile]


def write_evals(folder: Path, rows: list[EvalRow]) -> None:
    """Replace a run's evals.json."""
    # mode="python": JSON's own NaN rule is ours to apply, in one place.
    write_json(folder / "evals.json", {"saes": [row.model_dump() for row in rows]})


def measured_on(row: Mapping[str, Any]) -> str:
    """Return on how many tokens an SAE was measured, beside how many were asked for if fewer."""
    found = f"{int(row['n_tokens']):,} held-out tokens"
    # A table has NaN where an earlier version did not say.
    if not isinstance(row["shortage"], str):
        return found
    return f"{found} of {int(row['n_tokens_asked']):,} asked for: {row['shortage']}"


def averaged(row: Mapping[str, Any]) -> str:
    """Return what an SAE's losses and KL are: `mean over 4,320 predictions`."""
    n = row["n_predictions"]
    return "mean over predictions" if n is None or n != n else f"mean over {int(n):,} predictions"


def positions(row: Mapping[str, Any]) -> str:
    """Return at which positions an SAE's losses were measured with zeros and reconstructions."""
    if measured_earlier(row):
        return (
            "zeros and reconstructions at counted tokens alone, BOS, separators and padding as "
            "they are"
        )
    if row["replaced"] == "all":
        return "zeros and reconstructions at every position, BOS, separators and padding included"
    return (
        "zeros at every position; reconstructions at counted tokens, BOS, separators and padding "
        "as they are"
    )


def measured_earlier(row: Mapping[str, Any]) -> bool:
    """Whether CE zero and loss recovered are an earlier version's, which zeroed less."""
    return row["zeroed"] != "all"


def measure_again(run: str) -> str:
    """Return what an earlier version's losses are, and the command that replaces them.

    Args:
        run: folder of the run.
    """
    return (
        "CE zero and loss recovered were measured by an earlier version, which left BOS, "
        "separators and padding in place when it zeroed the site; they do not compare with those "
        f"of other runs. Measure again: python -m gsae_core evaluate {run}"
    )


def write_tokens(
    folder: Path, ids: Int[np.ndarray, "rows n_ctx"], counted: Bool[np.ndarray, "rows n_ctx"]
) -> None:
    """Replace a run's evaluated_tokens.safetensors: the sequences that were measured, in order.

    Args:
        folder: of the run.
        ids: what the language model read.
        counted: False at BOS, separators and padding.
    """
    narrow = ids.astype(np.uint16 if ids.max(initial=0) < 2**16 else np.int32)
    columns = {"ids": narrow, "counted": counted}
    replace_durably(
        folder / "evaluated_tokens.safetensors",
        lambda path: save_file(columns, path),
        n_bytes=narrow.nbytes + counted.nbytes,
    )


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


def write_norm_deciles(folder: Path, deciles: Sequence[Mapping[str, float]]) -> None:
    """Replace an SAE's norm_deciles.json.

    Args:
        folder: of the SAE.
        deciles: `DECILES` of each tenth of the tokens, shortest activations first.
    """
    write_json(folder / "norm_deciles.json", {"deciles": list(deciles)})


def norm_deciles(run: Run, name: str) -> "pd.DataFrame":
    """Return one row per tenth of the held-out tokens by |x|, shortest first.

    Columns: `decile` (1 to 10), and `DECILES`.

    Raises:
        InputError: if the SAE is unknown, or was evaluated before these numbers were gathered.
    """
    import pandas as pd

    path = run.sae_folder(name) / "norm_deciles.json"
    if not os.path.lexists(path):
        raise InputError(
            f"expected lengths of reconstructions of {name!r}, found none in {path.parent}; "
            f"measure them: python -m gsae_core evaluate {run.folder}"
        )
    try:
        rows = _Deciles.model_validate(read_json(path), strict=True).model_dump()["deciles"]
    except ValidationError as error:
        raise InputError(
            f"expected lengths of reconstructions in {path}, got {first_of(error)}; measure them "
            f"again: python -m gsae_core evaluate {run.folder}"
        ) from None
    # JSON has null for NaN, which would make a column of objects.
    frame = pd.DataFrame(rows, columns=list(DECILES)).astype(float)
    frame.insert(0, "decile", range(1, len(frame) + 1))
    return frame
