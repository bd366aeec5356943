"""Run folders with made-up numbers, as the training process writes them: for pages and figures."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gsae_core.config import RunConfig, SAESpec, sweep, validated
from gsae_core.runs.jobs.job import State, Status, of_process, write_status
from gsae_core.runs.run import Run

LAMBDAS = [0.1, 0.2, 0.4, 0.8]
N_EVAL = 65_536


def config(*, width: int = 512, preset: str | None = "quick") -> RunConfig:
    """Return four lambdas of both architectures on the bundled model."""
    return validated(
        RunConfig,
        {
            "saes": sweep(["gated", "relu"], LAMBDAS, width),
            "train": {"n_tokens": 1_048_576, "batch_size": 2048, "lr": 1e-3},
            "preset": preset,
        },
    )


def two_places() -> RunConfig:
    """Return the sweep of `config` at two hook points."""
    saes = [
        spec.model_copy(update={"name": f"{spec.name}-l{layer}", "layer": layer})
        for layer in (1, 3)
        for spec in config().saes
    ]
    return config().model_copy(update={"saes": tuple(saes)})


def final_l0(spec: SAESpec) -> float:
    """Return L0 in the end: 12 / lambda for gated, 16 / lambda for the baseline."""
    return (12 if spec.architecture == "gated" else 16) / spec.sparsity


def evaluation(spec: SAESpec, d_in: int = 256) -> dict[str, Any]:
    """Return what evals.json holds for an SAE; recovery grows with log L0."""
    l0 = final_l0(spec)
    gated = spec.architecture == "gated"
    recovered = 0.70 + 0.055 * math.log(l0) - (0.0 if gated else 0.035)
    clean, zero = 3.25, 9.75
    gamma = 0.985 + 0.02 * spec.sparsity if gated else 0.95 - 0.22 * spec.sparsity
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "sparsity": spec.sparsity,
        "d_in": d_in,
        "d_sae": spec.d_sae,
        "l0": l0,
        "loss_recovered": recovered,
        "ce_clean": clean,
        "ce_sae": zero - recovered * (zero - clean),
        "ce_zero": zero,
        "kl": 0.8 * (1 - recovered) * (zero - clean),
        "gamma": gamma,
        "gamma_gate": 0.9 - 0.3 * spec.sparsity if gated else None,
        "fvu": 0.9 - 0.13 * math.log(l0) + (0 if gated else 0.04),
        "cosine": 0.93,
        "alive_fraction": 0.97,
        "n_tokens": N_EVAL,
        "n_tokens_asked": N_EVAL,
        "shortage": None,
        "n_predictions": N_EVAL - N_EVAL // 256,
        "zeroed": "all",
        "replaced": "counted",
    }


def metric_lines(
    run_config: RunConfig, *, share: float, n_points: int = 60
) -> list[dict[str, Any]]:
    """Return metrics.jsonl's objects for the first `share` of a run of `n_points` logged steps."""
    n_steps = run_config.train.n_tokens // run_config.train.batch_size
    lines = []
    for point in range(1, round(n_points * share) + 1):
        step = round(n_steps * point / n_points)
        progress = 1 - math.exp(-5 * point / n_points)
        wiggle = 0.01 * math.sin(point)
        for spec in run_config.saes:
            end = evaluation(spec)
            gated = spec.architecture == "gated"
            fvu = 1 - (1 - end["fvu"]) * progress + wiggle
            l0 = end["l0"] + (spec.d_sae / 2 - end["l0"]) * math.exp(-9 * point / n_points)
            penalty = spec.sparsity * 0.5 * progress
            auxiliary = fvu * 1.4 if gated else 0.0
            lines.append(
                {
                    "step": step,
                    "tokens": step * run_config.train.batch_size,
                    "seconds": 0.4 * step,
                    "sae": spec.name,
                    "loss": fvu + penalty + auxiliary,
                    "reconstruction": fvu,
                    "sparsity_loss": penalty,
                    "auxiliary": auxiliary,
                    "l0": l0,
                    "fvu": fvu,
                    "gamma": end["gamma"] * progress,
                    "gamma_gate": end["gamma_gate"] * progress if gated else None,
                    "dead_gate": 0.02 * progress,
                    "dead_magnitude": 0.005 * progress if gated else 0.0,
                    "lr": 1e-3,
                    "sparsity_coeff": spec.sparsity,
                }
            )
    return lines


def write_metrics(run: Run, lines: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_evaluation(run: Run) -> None:
    """Write evals.json, and per-feature statistics of every SAE."""
    saes = [evaluation(spec) for spec in run.config.saes]
    (run.folder / "evals.json").write_text(json.dumps({"saes": saes}), encoding="utf-8")
    rng = np.random.default_rng(0)
    for spec, numbers in zip(run.config.saes, saes, strict=True):
        density = 10 ** rng.normal(-2.6, 0.7, spec.d_sae).clip(-5, -0.3)
        fired = rng.binomial(N_EVAL, density)
        noise = rng.normal(0, 1, spec.d_sae) * (0.03 + 0.6 / np.sqrt(fired + 1))
        folder = run.folder / "saes" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "fired": fired.astype(np.int64),
                "gate_open": fired.astype(np.int64),
                "density": fired / N_EVAL,
                "gamma": np.where(fired > 0, numbers["gamma"] + noise, np.nan),
            },
            folder / "feature_stats.safetensors",
        )
        tenths = [
            {"norm": 10.0 + i, "ratio": 0.8 + 0.01 * i, "gamma": numbers["gamma"]}
            for i in range(10)
        ]
        text = json.dumps({"deciles": tenths})
        (folder / "norm_deciles.json").write_text(text, encoding="utf-8")


def write_run(
    root: Path,
    run_id: str,
    state: State = "finished",
    *,
    share: float = 1.0,
    error: str | None = None,
    run_config: RunConfig | None = None,
    pid: int | None = None,
) -> Run:
    """Make a run that got `share` of the way and stands in `state`; finished ones are evaluated.

    Args:
        pid: a living process that plays the training one, for states that need one.
    """
    run = Run.create(root / run_id, run_config or config())
    write_metrics(run, metric_lines(run.config, share=share))
    n_steps = run.config.train.n_tokens // run.config.train.batch_size
    status = Status(
        state=state,
        step=round(n_steps * share),
        n_steps=n_steps,
        pid=None,
        process_started=None,
        heartbeat=time.time(),
        error=error,
    )
    write_status(run.folder, status if pid is None else of_process(status, state, pid))
    log = f"loading the model\nstep {status.step}\n"
    (run.folder / "log.txt").write_text(log, encoding="utf-8")
    if state == "finished":
        write_evaluation(run)
    return run
