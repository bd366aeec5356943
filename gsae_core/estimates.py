"""What earlier runs let one expect of a new one: L0 by interpolation over lambda."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from gsae_core.config import RunConfig, SAESpec


class Expected(NamedTuple):
    """The L0 that earlier runs at the same place had around one lambda."""

    low: float
    high: float
    runs: tuple[str, ...]
    """Ids of the runs it was interpolated in."""


class Finished(NamedTuple):
    """A run with its held-out evaluation."""

    id: str
    config: RunConfig
    evals: list[dict[str, Any]]


def alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether lambda means the same in both runs: one model, place and scale of activations.

    Of an imported run it does not: other libraries average and scale in ways of their own.
    """
    return (
        other.imported is None
        and config.model.name == other.model.name
        and config.model.layer == other.model.layer
        and config.model.site == other.model.site
        and config.activation_scale == other.activation_scale
    )


def expected_l0(spec: SAESpec, config: RunConfig, finished: Iterable[Finished]) -> Expected | None:
    """Return the range of L0 to expect of an SAE; None where no earlier run reaches its lambda.

    In each alike run log L0 is taken as linear in log lambda between neighbouring SAEs of the same
    architecture, loss norm and recipe, and never beyond the ends. The range is over the runs.
    """
    found = {}
    for run in finished:
        if alike(config, run.config):
            l0 = _interpolated(spec.sparsity, _curve(spec, run))
            if l0 is not None:
                found[run.id] = l0
    if not found:
        return None
    return Expected(min(found.values()), max(found.values()), tuple(found))


def _curve(spec: SAESpec, run: Finished) -> list[tuple[float, float]]:
    """Return (lambda, L0) of a run's SAEs that are like `spec`, by rising lambda."""
    like = {
        other.name
        for other in run.config.saes
        if (other.architecture, other.loss_norm, other.recipe)
        == (spec.architecture, spec.loss_norm, spec.recipe)
    }
    return sorted(
        (row["sparsity"], row["l0"])
        for row in run.evals
        # An SAE that fires on nothing has no logarithm, one that could not be measured no L0.
        if row["name"] in like and row["l0"] and math.isfinite(row["l0"])
    )


def _interpolated(sparsity: float, curve: list[tuple[float, float]]) -> float | None:
    for at, l0 in curve:
        if math.isclose(at, sparsity, rel_tol=1e-6):
            return float(l0)
    for (left, l0_left), (right, l0_right) in itertools.pairwise(curve):
        if left < sparsity < right:
            t = math.log(sparsity / left) / math.log(right / left)
            return math.exp((1 - t) * math.log(l0_left) + t * math.log(l0_right))
    return None
