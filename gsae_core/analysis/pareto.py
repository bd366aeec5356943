"""Frontiers of sparsity against fidelity, and how many latents one architecture saves."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gsae_core.config import Place


class Point(NamedTuple):
    """Where one SAE stands: fewer firing latents is better, and so is more loss recovered."""

    l0: float
    loss_recovered: float
    """Eq. 5, as a share or in percent: the same for all points."""
    name: str = ""


class MatchedPair(NamedTuple):
    """The two frontiers at one height."""

    loss_recovered: float
    l0_baseline: float
    l0_gated: float

    @property
    def ratio(self) -> float:
        """L0 of the baseline over L0 of the Gated SAE at the same loss recovered."""
        return self.l0_baseline / self.l0_gated


class MatchedRatio(NamedTuple):
    """L0(baseline) / L0(gated) at matched loss recovered; above 1 favours the Gated SAEs."""

    median: float
    """Of the pairs' ratios; NaN when the frontiers share no height."""
    pairs: tuple[MatchedPair, ...]
    """One for each frontier run whose height the other frontier reaches, lowest first."""
    sentence: str
    """The result, or why there is none."""


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the Pareto-optimal points, sparsest first; L0 and loss recovered both rise along it.

    Of equal points the first stays. Points with a number that is not finite are left out.
    """
    optimal: list[Point] = []
    placed = (p for p in points if math.isfinite(p.l0) and math.isfinite(p.loss_recovered))
    for point in sorted(placed, key=lambda p: (p.l0, -p.loss_recovered)):
        if not optimal or point.loss_recovered > optimal[-1].loss_recovered:
            optimal.append(point)
    return optimal


def matched_l0_ratio(baseline: Sequence[Point], gated: Sequence[Point]) -> MatchedRatio:
    """Return how many times more latents the baseline fires at the same loss recovered.

    Both frontiers are read at the height of each frontier run that the other one reaches, with
    log L0 linear in loss recovered between neighbouring runs, and never beyond the ends.
    Runs with L0 <= 0 have no logarithm and are left out.
    """
    # A JSON file writes a whole number as an int; from here on they are floats.
    baseline, gated = (
        [Point(float(p.l0), float(p.loss_recovered)) for p in points if p.l0 > 0]
        for points in (baseline, gated)
    )
    curves = [frontier(baseline), frontier(gated)]
    none = "No ratio at equal loss recovered:"
    for curve, name in zip(curves, ("baseline", "Gated"), strict=True):
        if not curve:
            return MatchedRatio(math.nan, (), f"{none} there is no {name} run")
    low = max(curve[0].loss_recovered for curve in curves)
    high = min(curve[-1].loss_recovered for curve in curves)
    if low > high:
        ranges = [
            " to ".join(dict.fromkeys(f"{end.loss_recovered:.4g}" for end in (c[0], c[-1])))
            for c in curves
        ]
        return MatchedRatio(
            math.nan,
            (),
            f"{none} the baseline's loss recovered ({ranges[0]}) and the Gated SAEs' "
            f"({ranges[1]}) do not overlap; train more values of lambda between them",
        )
    heights = sorted(
        {p.loss_recovered for c in curves for p in c if low <= p.loss_recovered <= high}
    )
    pairs = tuple(MatchedPair(h, _l0_at(curves[0], h), _l0_at(curves[1], h)) for h in heights)
    median = statistics.median(pair.ratio for pair in pairs)
    points = f"{len(pairs)} matched point{'s' if len(pairs) > 1 else ''}"
    return MatchedRatio(
        median,
        pairs,
        f"At equal loss recovered the baseline fires {median:.1f}x as many features ({points})",
    )


def matched_ratio(evals: Iterable[Mapping[str, Any]]) -> MatchedRatio:
    """Return `matched_l0_ratio` of the ReLU and Gated SAEs of evals.json that have both numbers."""
    points: dict[str, list[Point]] = {"relu": [], "gated": []}
    evals = list(evals)
    if evals and all(row.get("n_predictions") == 0 for row in evals):
        return MatchedRatio(math.nan, (), "No ratio at equal loss recovered: no language model")
    for row in evals:
        l0, recovered = row["l0"], row["loss_recovered"]
        if row["architecture"] in points and l0 is not None and recovered is not None:
            points[row["architecture"]].append(Point(l0, recovered))
    return matched_l0_ratio(points["relu"], points["gated"])


def ratio_sentences(evals: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sentence of `matched_ratio` for each place that SAEs of `Run.evals` read."""
    places: dict[Place, list[Mapping[str, Any]]] = {}
    for row in evals:
        places.setdefault(Place(row["layer"], row["site"]), []).append(row)
    found = {place: matched_ratio(rows) for place, rows in places.items()}
    said = {place: ratio.sentence for place, ratio in found.items()}
    none = not any(ratio.pairs for ratio in found.values())  # such as without a baseline
    if len(said) < 2 or (none and len(set(said.values())) < 2):
        return [*dict.fromkeys(said.values())] or [matched_ratio([]).sentence]
    return [f"{place.hook_name}: {sentence}" for place, sentence in said.items()]


def _l0_at(curve: list[Point], height: float) -> float:
    """Return L0 of `curve` at a loss recovered within its range."""
    for left, right in itertools.pairwise(curve):
        if left.loss_recovered < height < right.loss_recovered:
            t = (height - left.loss_recovered) / (right.loss_recovered - left.loss_recovered)
            return math.exp((1 - t) * math.log(left.l0) + t * math.log(right.l0))
    (l0,) = [point.l0 for point in curve if point.loss_recovered == height]
    return l0
