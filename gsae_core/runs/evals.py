"""evals.json and what is measured with it: per-latent statistics, norm deciles, held-out tokens."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64
from pydantic import BaseModel, ValidationError
from safetensors.numpy import save_file

from gsae_core.config import Architecture, Positions
from gsae_core.errors import InputError
from gsae_core.files import first_of, read_json, replace_durably, write_json


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
    """Activations measured: counted held-out tokens, in whole sequences."""
    n_tokens_asked: int
    shortage: str | None
    """Why they are fewer than asked for, where they are."""
    n_predictions: int
    """Predictions that losses and KL are averaged over: a sequence's last token has none."""
    zeroed: Positions
    """Positions that zero ablation set to zero; earlier versions zeroed counted ones alone."""
    replaced: Positions
    """Positions at which the language model read reconstructions."""


# What evaluations that do not say did.
EARLIER = {
    "zeroed": "counted",
    "replaced": "counted",
    "n_tokens_asked": None,
    "shortage": None,
    "n_predictions": None,
}


def check_row(row: Any, *, where: str, may_lack: Collection[str]) -> None:
    """Check that a row of evals.json has the numbers of an `EvalRow`.

    Args:
        may_lack: keys that earlier versions did not write.
        where: the file, and what to do, for the sentence.

    Raises:
        InputError: names the first key that is missing or of another type.
    """
    if not isinstance(row, dict):
        raise InputError(f"expected an object for each SAE in {where}")
    # null is NaN; what a newer version measures besides is its own.
    fields = {
        name: math.nan if row[name] is None and field.annotation is float else row[name]
        for name, field in EvalRow.model_fields.items()
        if name in row
    }
    try:
        EvalRow.model_validate(fields, strict=True)
    except ValidationError as error:
        wrong = first_of(error, may_lack=may_lack)
        if wrong is not None:
            raise InputError(f"expected numbers of each SAE, got {wrong} in {where}") from None


def read_evals(folder: Path, names: Collection[str]) -> list[dict[str, Any]]:
    """Return the rows of a run's evals.json; empty where there is none.

    Args:
        names: of the run's SAEs.

    Raises:
        InputError: if the file is damaged.
    """
    path = folder / "evals.json"
    again = f"measure again: python -m gsae_core evaluate {folder}"
    if not os.path.lexists(path):
        return []
    try:
        rows = read_json(path).get("saes")
    except InputError as error:
        raise InputError(f"{error}; {again}") from None
    if not isinstance(rows, list):
        raise InputError(f"expected a list `saes` in {path}, found none; {again}")
    for row in rows:
        check_row(row, where=f"{path}; {again}", may_lack=EARLIER)
        if row["name"] not in names:
            raise InputError(
                f"expected numbers of this run's SAEs ({', '.join(names)}) in {path}, got some "
                f"of {row['name']!r}; {again}"
            )
    return [EARLIER | row for row in rows]


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


DECILES = ("norm", "ratio", "gamma")
"""Numbers of each tenth of the tokens, as `sae.deciles.Decile` defines them."""


class _Decile(BaseModel):
    norm: float | None
    ratio: float | None
    gamma: float | None


class _Deciles(BaseModel):
    deciles: list[_Decile]


def write_norm_deciles(folder: Path, deciles: Sequence[Mapping[str, float]]) -> None:
    """Replace an SAE's norm_deciles.json.

    Args:
        folder: of the SAE.
        deciles: `DECILES` of each tenth of the tokens, shortest activations first.
    """
    write_json(folder / "norm_deciles.json", {"deciles": list(deciles)})


def read_norm_deciles(folder: Path, *, again: str) -> list[dict[str, float | None]]:
    """Return `DECILES` of each tenth of the tokens, shortest activations first.

    Args:
        folder: of the SAE.
        again: command that measures them.

    Raises:
        InputError: if they are damaged, or were not measured.
    """
    path = folder / "norm_deciles.json"
    if not os.path.lexists(path):
        raise InputError(
            f"expected lengths of reconstructions of {folder.name!r}, found none in {folder}; "
            f"measure them: {again}"
        )
    try:
        return _Deciles.model_validate(read_json(path), strict=True).model_dump()["deciles"]
    except ValidationError as error:
        raise InputError(
            f"expected lengths of reconstructions in {path}, got {first_of(error)}; measure them "
            f"again: {again}"
        ) from None
