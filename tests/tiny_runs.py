"""A run that takes a moment: 30 steps of two SAEs on the tiny model, with revivals."""

import json
import random
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from gsae_core.config import DataConfig, EvalConfig, ModelConfig, RunConfig, SAESpec, TrainRecipe
from gsae_core.runs.jobs.job import ACTIVE, Job, escalate_cancel
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import load_state, train_run

N_STEPS = 30

# 320 activations of the tiny model in 20 steps; E|x|^2 = 1, so lambda 0.05 and 0.4 differ.
SMALL = shlex.split(
    "--layer 1 --site mlp_hidden --arch gated relu --sparsity 0.05 0.4 --width 6 --tokens 320 "
    "--batch-size 16 --eval-tokens 64 --lr-warmup-steps 2 --device cpu"
)


def write_text(path: Path, *, n_words: int = 1500, seed: int = 0) -> Path:
    """Write words that the tiny tokenizer knows."""
    words = random.Random(seed).choices(range(38), k=n_words)
    path.write_text(" ".join(f"w{i}" for i in words))
    return path


def tiny_config(lm_folder: Path, text: Path, **fields: Any) -> RunConfig:
    """Return a run whose dead latents are revived at steps 10 and 20, saved every few steps."""
    saes = (
        SAESpec(name="gated", architecture="gated", d_sae=24, sparsity=0.3),
        SAESpec(name="relu", architecture="relu", d_sae=20, sparsity=0.3),
    )
    values: dict[str, Any] = {
        "model": ModelConfig(name=str(lm_folder), layer=1, site="resid_pre"),
        "data": DataConfig(source=str(text), held_out=0.2),
        "saes": saes,
        "train": TrainRecipe(
            n_tokens=16 * N_STEPS,
            batch_size=16,
            lr=1e-2,
            lr_warmup_steps=2,
            revive_every=10,
            revive_window=5,
        ),
        "evaluation": EvalConfig(n_tokens=100),
        "device": "cpu",
        "checkpoint_minutes": 0.02 / 60,
    }
    return RunConfig(**values | fields)


def small_run(model: Path, text: Path, out: Path) -> list[str]:
    """Return `train` words that finish in about a second."""
    return ["train", "--model", str(model), "--data", str(text), "--out", str(out), *SMALL]


def finish(run: Run) -> None:
    """Train a run to its end."""
    for _ in train_run(run):
        pass


def ended(job: Job, *, seconds: float = 200) -> str:
    """Wait until a job's process has ended, and return its state."""
    deadline = time.monotonic() + seconds
    while job.status.state in ("queued", *ACTIVE):
        assert time.monotonic() < deadline, job.log_tail()
        escalate_cancel(job)
        time.sleep(0.05)
    return job.status.state


def leave_at(run: Run, step: int) -> None:
    """Train a run to a step, and close the iterator there."""
    progresses = train_run(run)
    for progress in progresses:
        if progress.stage == "training" and progress.done == step:
            break
    progresses.close()  # pyright: ignore[reportAttributeAccessIssue]


def outcome(run: Run) -> dict[str, Any]:
    """Return everything a run ends with that must not depend on how often it was interrupted."""
    metrics = [
        {k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.metrics()
    ]
    trainer = load_state(run.folder / "resume")["trainer"]
    del trainer["seconds"]
    return {
        "state": run.status.state,
        "step": run.status.step,
        "metrics": json.dumps(metrics),
        "evals": json.dumps(run.evals()),
        "trainer": flat(trainer),
        "files": {
            str(path.relative_to(run.folder)): path.read_bytes()
            for path in sorted((run.folder / "saes").rglob("*.*"))
            if path.is_file()
        },
    }


def flat(value: Any) -> Any:
    """Return a nested state with each tensor as its dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [flat(inner) for inner in value]
    return value
