"""The runs that the paper (arXiv:2404.16014v2) published, as data."""

import csv
import functools
from importlib import resources
from typing import NamedTuple

from pydantic import TypeAdapter

from gsae_core.config import Architecture, Site


class PaperRun(NamedTuple):
    """One row of the paper's Tables 1-8 (appendix B), as printed there."""

    model: str
    """Preset name: `gemma-7b` or `pythia-2.8b`."""
    site: Site
    layer: int
    architecture: Architecture
    d_sae: int
    lr: float
    sparsity: float
    """lambda against squared error / n (Gated), or / (n E|x|^2) (these baselines)."""
    l0: float
    """Firing latents per token; a few printed values are negative."""
    loss_recovered: float
    """Percent of cross-entropy recovered."""
    alive: float
    """Percent of latents alive."""
    gamma: float
    """Relative reconstruction bias, Eq. 10."""


@functools.cache
def paper_runs() -> tuple[PaperRun, ...]:
    """Return the paper's 283 Gemma-7B and Pythia-2.8B runs in the order of Tables 1-8."""
    table = resources.files("gsae_core").joinpath("assets/paper-results.csv")
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    return TypeAdapter(tuple[PaperRun, ...]).validate_python(tuple(rows))
