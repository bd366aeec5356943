"""evals.json and what is said of it; what else an evaluation measures: norm deciles, arrays."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator
from safetensors.numpy import save_file

from gsae_core.config import Architecture, Positions, Site
from gsae_core.errors import InputError
from gsae_core.files import read_checked, replace_durably, write_json

# NaN is written as null.
Number = Annotated[float, BeforeValidator(lambda read: math.nan if read is None else read)]


class EvalRow(BaseModel, frozen=True):
    """One SAE on held-out tokens; the keys of evals.json. Defaults: what earlier versions did."""

    name: str
    architecture: Architecture
    sparsity: Number
    """lambda as the config gives it."""
    d_in: int
    d_sae: int
    l0: Number
    loss_recovered: Number
    ce_clean: Number
    ce_sae: Number
    ce_zero: Number
    kl: Number
    gamma: Number
    gamma_gate: Number
    fvu: Number
    cosine: Number
    alive_fraction: Number
    n_tokens: int
    """Activations measured: counted held-out tokens, in whole sequences."""
    n_tokens_asked: int | None = None
    shortage: str | None = None
    """Why they are fewer than asked for, where they are."""
    n_predictions: int | None = None
    """Predictions that losses and KL are averaged over: a sequence's last token has none; 0 where
    there is no language model."""
    zeroed: Positions = "counted"
    """Positions that zero ablation set to zero."""
    replaced: Positions = "counted"
    """Positions at which the language model read reconstructions."""
    text: str | None = None
    """The text, where it is another one than what the run itself holds out."""
    layer: int | None = None
    """Block that the SAE reads, from 0; None: the run's, of which there was but one."""
    site: Site | None = None
    """Place in that block, likewise."""
    n_outliers: int | None = None
    """Held-out tokens longer than `max_norm_ratio` medians of |x|, or than `OUTLIER_RATIO`."""
    outlier_share: Number | None = None
    """Their share of the sum of |x|^2."""
    fvu_ordinary: Number | None = None
    """FVU of all other tokens."""
    max_norm_ratio: float | None = None
    """Where there is one, outliers were left out of every number but losses and KL."""


class _Evals(BaseModel):
    saes: list[EvalRow]


def read_evals(folder: Path, names: Collection[str]) -> list[dict[str, Any]]:
    """Return the rows of a run's evals.json, defaults filled in; empty where there is none.

    An `InputError` names the first key that is missing or of another type, or an unknown SAE.
    """
    path = folder / "evals.json"
    if not os.path.lexists(path):
        return []
    try:
        rows = read_checked(path, _Evals, what="numbers of each SAE")["saes"]
        for row in rows:
            if row["name"] not in names:
                raise InputError(
                    f"expected numbers of this run's SAEs ({', '.join(names)}) in {path}, got "
                    f"some of {row['name']!r}"
                )
    except InputError as error:
        again = f"measure again: python -m gsae_core evaluate {folder}"
        raise InputError(f"{error}; {again}") from None
    fields = EvalRow.model_fields.items()
    earlier = {name: field.default for name, field in fields if not field.is_required()}
    return [earlier | row for row in rows]


def write_evals(folder: Path, rows: list[EvalRow]) -> None:
    """Replace a run's evals.json."""
    # mode="python": JSON's own NaN rule is ours to apply, in one place.
    write_json(folder / "evals.json", {"saes": [row.model_dump() for row in rows]})


def write_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Replace a safetensors file."""
    n_bytes = sum(column.nbytes for column in columns.values())
    replace_durably(path, lambda sibling: save_file(columns, sibling), n_bytes=n_bytes)


def measured_on(row: Mapping[str, Any]) -> str:
    """Return on how many tokens an SAE was measured, beside how many were asked for if fewer."""
    n, what, end = int(row["n_tokens"]), f"held-out {unit_of(row)}s", ""
    if isinstance(row.get("text"), str):
        what, end = f"tokens of {row['text']}, not the run's own text", ","
    # A table has NaN where an earlier version did not say.
    if not isinstance(row["shortage"], str):
        return f"{n:,} {what}"
    return f"{n:,} {what}{end} of {int(row['n_tokens_asked']):,} asked for: {row['shortage']}"


def measured_elsewhere(evals: Sequence[Mapping[str, Any]], run: str) -> str | None:
    """Return what is said of a run that was measured on another text; None if it was not."""
    texts = [row["text"] for row in evals if isinstance(row.get("text"), str)]
    if not texts:
        return None
    return (
        f"measured on {texts[0]}, not on the run's own held-out text; measure that again: "
        f"python -m gsae_core evaluate {run}"
    )


NO_LOSSES = "no language model: loss recovered is not measured"


def without_model(row: Mapping[str, Any]) -> bool:
    """Whether an SAE was measured on vectors of a folder alone: it has no losses and no KL."""
    return row.get("n_predictions") == 0


def unit_of(row: Mapping[str, Any]) -> str:
    """Return what an SAE was measured on: each a `token`, or a `vector` of a folder."""
    return "vector" if without_model(row) else "token"


def losses(row: Mapping[str, Any]) -> str:
    """Return what an SAE's losses were averaged over and measured with, or that it has none."""
    return NO_LOSSES if without_model(row) else f"losses: {averaged(row)}; {positions(row)}"


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
    """Return what an earlier version's losses are, and the command that replaces them."""
    return (
        "CE zero and loss recovered were measured by an earlier version, which left BOS, "
        "separators and padding in place when it zeroed the site; they do not compare with those "
        f"of other runs. Measure again: python -m gsae_core evaluate {run}"
    )


class _Decile(BaseModel):
    norm: float | None
    ratio: float | None
    gamma: float | None


class NormDeciles(BaseModel):
    """norm_deciles.json: tenths of the tokens by |x|, shortest first; see `fidelity.Decile`."""

    deciles: list[_Decile]
