"""The estimate of a step's memory against what the step holds by the kernel's account."""

import platform
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import contest, our_entry
from benchmarks.ours import make_problem, save_problem
from gsae_core.config import Architecture, RunConfig, SAESpec, TrainRecipe
from gsae_core.runs.plan.cost import FLOAT32, memory_parts, n_parameters

BATCH, D_IN, D_SAE = 1024, 128, 8192
ARCHITECTURES: tuple[Architecture, ...] = ("gated", "relu", "jumprelu", "topk")


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="the kernel's high-water mark is Linux's")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_step_holds_more_than_the_estimate_nor_a_third_of_it(
    architecture: Architecture, tmp_path: Path
) -> None:
    # Just below the density at which the dense step is the faster one, and half of the latents.
    l0 = 0.14 * D_SAE
    save_problem(make_problem(batch=BATCH, d_in=D_IN, d_sae=D_SAE, l0=l0), tmp_path / "problem")
    job: dict[str, Any] = {
        "problem": str(tmp_path / "problem"),
        "device": "cpu",
        "threads": 2,
        "architecture": architecture,
        "l0": l0,
    }
    entries = [our_entry("cpu", "sparse", job), our_entry("gpu", "autograd", job | {"half": True})]
    dense = "dense by hand" if architecture in ("gated", "relu") else "autograd"
    entries.append(our_entry("blocks", dense, job | {"half": True}))
    held = {r.name: r.temporary for r in contest(entries, rounds=1, warm_up=1, say=print).results}

    sae = SAESpec(name="a", architecture=architecture, d_sae=D_SAE, sparsity=round(l0))
    cfg = RunConfig(saes=(sae,), train=TrainRecipe(n_tokens=10 * BATCH, batch_size=BATCH))
    gradients = FLOAT32 * n_parameters(sae, D_IN)
    for name, n_cores in (("cpu", 2), ("gpu", None), ("blocks", 2)):
        step = memory_parts(cfg, lambda _: D_IN, chunk_vectors=1, n_cores=n_cores)["one step"]
        measured = held[name]
        assert measured is not None
        # A few matrices of the shape of x beside those of (batch, d_sae).
        assert measured - gradients <= 1.1 * step, name
        assert measured - gradients >= step / 3, name
