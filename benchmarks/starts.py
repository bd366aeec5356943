"""What a sparse start is worth: `python -m benchmarks.starts`.

Gated and ReLU SAEs of three seeds learn at the quick preset's place and recipe from biases of zero
and from a sparse start, on the same batches, at several widths and lengths. Printed: the mean over
seeds and its range, on held-out tokens, and the ratio of the two L0.

    --tokens N ...  lengths (131072 524288)
    --width N ...   latents; a ReLU SAE has 1.5x as many (1024 4096)
    --lr LR         learning rate (the preset's)
    --seeds N       seeds of the weights (3)
    --threads N     processor threads; without it as many as torch takes
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import torch

from gsae_core.config import EvalConfig, RunConfig, Start, sweep
from gsae_core.files import read_json
from gsae_core.presets import preset
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import train_run

STARTS: tuple[Start, ...] = ("zero", "sparse")
MEASURES = {"L0": "l0", "recovered": "loss_recovered", "FVU": "fvu", "alive": "alive_fraction"}
Measured = dict[str, list[float]]


def measured(
    start: Start, *, width: int, tokens: int, lr: float | None, seeds: int
) -> dict[str, Measured]:
    """Train and evaluate the SAEs of one row; return the numbers of each architecture, by seed."""
    base = preset("quick").config()
    saes = [
        spec.model_copy(update={"name": f"{spec.name}-{seed}", "seed": seed})
        for spec in sweep(["gated", "relu"], [0.2], width)
        for seed in range(seeds)
    ]
    told = {"n_tokens": tokens, "start": start} | ({} if lr is None else {"lr": lr})
    config = RunConfig(
        **base.model_dump(exclude={"saes", "train", "evaluation", "preset"}),
        saes=tuple(saes),
        train=base.train.model_copy(update=told),
        evaluation=EvalConfig(n_tokens=32_768),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", config)
        for _ in train_run(run):
            pass
        rows = read_json(run.folder / "evals.json")["saes"]
    return {
        kind: {
            key: [row[key] for row in rows if row["architecture"] == kind]
            for key in MEASURES.values()
        }
        for kind in ("gated", "relu")
    }


def cell(values: list[float]) -> str:
    """Return a mean and how far values lie from it."""
    middle = mean(values)
    digits = 1 if middle > 1 else 3
    return f"{middle:.{digits}f} ± {max(abs(value - middle) for value in values):.{digits}f}"


def main() -> None:
    """Print a row for each width, length and architecture as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 524_288])
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    print(f"{'SAE':28} {'start':7}", *(f"{title:>16}" for title in MEASURES), "L0 to zero's")
    for width in flags.width:
        for tokens in flags.tokens:
            found = {
                start: measured(start, width=width, tokens=tokens, lr=flags.lr, seeds=flags.seeds)
                for start in STARTS
            }
            for kind in ("gated", "relu"):
                for start in STARTS:
                    own = found[start][kind]
                    ratio = mean(own["l0"]) / mean(found["zero"][kind]["l0"])
                    name = f"{kind}, width {width}, {tokens // 1000} k"
                    cells = (f"{cell(own[key]):>16}" for key in MEASURES.values())
                    print(f"{name:28} {start:7}", *cells, f"{ratio:10.2f}x", flush=True)


if __name__ == "__main__":
    main()
