"""What the paper (arXiv:2404.16014v2) published: its runs as data, its recipe as configs."""

import csv
import functools
from importlib import resources
from typing import NamedTuple

from pydantic import TypeAdapter

from gsae_core.config import Architecture, DataConfig, EvalConfig, SAESpec, Site, TrainRecipe


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


# The paper evaluates on "over 1 M" held-out tokens (D.2); 2048 sequences of 1024 are Gemma Scope's.
PAPER_EVALUATION = EvalConfig(n_tokens=2048 * 1024)


def paper_data(n_ctx: int) -> DataConfig:
    """Return the text, in contexts of `n_ctx` tokens."""
    # The paper names no corpus; the Pile without its withdrawn parts is ours.
    return DataConfig(source="monology/pile-uncopyrighted", text_column="text", n_ctx=n_ctx)


def paper_recipe(n_steps: int) -> TrainRecipe:
    """Return appendix D.1: Adam (0, 0.999), batches of 4096, Bricken et al.'s resampling."""
    return TrainRecipe(
        n_tokens=n_steps * 4096,
        batch_size=4096,
        lr=3e-4,
        beta1=0.0,
        beta2=0.999,
        # Cosine from 0.1x to 1x over 1000 steps after each resampling (D.1.1). For the start the
        # paper only says "warm-up"; the same is ours (and Gemma Scope's, section 3.2).
        lr_warmup_steps=1000,
        lr_decay_fraction=0.0,
        sparsity_warmup_steps=0,
        # Steps 25k, 50k, 75k and 100k; dead = silent for the 12 500 steps before (Bricken et al.
        # 2023, which D.1.1 follows without repeating the numbers).
        revive_every=25_000,
        revive_window=12_500,
        revive_until=110_000 / n_steps,
    )


def paper_saes(model: str, layer: int, site: Site) -> tuple[SAESpec, ...]:
    """Return one SAE for each distinct setting published for this place; repeats are left out."""
    runs = [run for run in paper_runs() if (run.model, run.layer, run.site) == (model, layer, site)]
    settings = list(dict.fromkeys(run[3:7] for run in runs))
    coeffs = [(architecture, sparsity) for architecture, _, _, sparsity in settings]
    specs = []
    for architecture, d_sae, lr, sparsity in settings:
        name = f"{architecture}-{sparsity:g}"
        if coeffs.count((architecture, sparsity)) > 1:
            name += f"-lr{lr:g}"
        specs.append(
            SAESpec(
                name=name,
                architecture=architecture,
                d_sae=d_sae,
                sparsity=sparsity,
                # D.1.1-D.1.2: squared error over n, and these baselines once more over E|x|^2.
                loss_norm="mean" if architecture == "gated" else "mean_power",
                lr=lr,
            )
        )
    return tuple(specs)
