"""What is said of outliers, activations many times as long as the median: when a run begins, and
beside what was measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gsae_core.config import OUTLIER_RATIO
from gsae_core.runs.evals import unit_of
from gsae_core.text import fixed, percent

TELLING_SHARE = 0.01
"""Of the sum of |x|^2: where outliers hold less, no scale and no summary is theirs."""
# What is long of a token are its activations, and a vector itself.
ARE = {"token": "have activations", "vector": "are"}
WITH = {"token": "tokens with activations", "vector": "vectors"}


def outliers_met(noted: Mapping[str, Any], unit: str = "token") -> Iterator[str]:
    """Yield what a run's first activations hold, by place, as its event `set up` noted it.

    `unit`: the run's, `RunConfig.unit`.

    Nothing of places without outliers, or with some that hold too little to show.
    """
    ratio, places = noted.get("max_norm_ratio"), noted.get("lengths") or {}
    for place, found in places.items():
        n, share = found["n_outliers"], found["outlier_share"]
        if not n or (ratio is None and share < TELLING_SHARE):
            continue
        so = (
            f"leave them out with --max-norm-ratio {OUTLIER_RATIO:g}"
            if ratio is None
            else "others take their places"
        )
        yield (
            f"{percent(n / found['n'], 2)} of {unit}s{f' at {place}' if len(places) > 1 else ''} "
            f"{ARE[unit]} {_longer(ratio)} and hold {_most(share)} of E|x|^2; {so}"
        )


def outliers_measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what outliers hold of evaluations, once for SAEs that read the same.

    Nothing where there are none, where they hold too little to show, or in older evaluations.
    """
    found: dict[tuple[int, float, float | None, int, str], list[float]] = {}
    for row in rows:
        n, share, ratio, fvu = (
            # A table has NaN for None.
            None if value is None or math.isnan(value) else value
            for value in map(
                row.get, ("n_outliers", "outlier_share", "max_norm_ratio", "fvu_ordinary")
            )
        )
        if n and share is not None and (ratio or share >= TELLING_SHARE):
            of = (int(n), float(share), ratio, int(row["n_tokens"]), unit_of(row))
            found.setdefault(of, []).append(math.nan if fvu is None else fvu)
    return [_measured(*of, sorted(fvus)) for of, fvus in found.items()]


def _measured(
    n: int, share: float, ratio: float | None, n_tokens: int, unit: str, fvus: Sequence[float]
) -> str:
    what = f"{n:,} {WITH[unit]} {_longer(ratio)}"
    if ratio is not None:
        but = " of all but losses and KL" if unit == "token" else ""
        return f"{what}, {_most(share)} of E|x|^2, were left out{but}"
    spread = dict.fromkeys(fixed(fvu, 4) for fvu in (fvus[0], fvus[-1]))
    return (
        f"{what} ({percent(n / n_tokens, 2)} of all) hold {_most(share)} of E|x|^2: FVU of the "
        f"others is {' to '.join(spread)}; train without them: --max-norm-ratio {OUTLIER_RATIO:g}"
    )


def _longer(ratio: float | None) -> str:
    return f"longer than {ratio or OUTLIER_RATIO:g} times the median"


def _most(share: float) -> str:
    return percent(share, 0 if 0.01 <= share < 0.99 else 2)
