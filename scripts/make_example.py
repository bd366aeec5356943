"""Train and index the pair of SAEs that ships with the package.

    python -m scripts.make_example --out gsae_core/assets/example

One Gated SAE and one ReLU baseline, 1.5x as wide, at the quick preset's place in the bundled model,
trained on 2 M activations, evaluated, and indexed over the same tokens. It fits 15 MB because
the two are small and few tokens are indexed; nothing is rounded or left out of the index.
"""

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gsae_core.config import RunConfig, sweep, validated
from gsae_core.files import readable, write_json
from gsae_core.presets import preset
from gsae_core.runs.jobs.job import write_status
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.train import train_run

WIDTH, SPARSITY = 512, 0.35
TRAINED_TOKENS, INDEXED_TOKENS = 2_097_152, 38_000
MOST_BYTES = 15_000_000

# What a finished run is read from; the rest is of the machine and the process that made it, or is
# written again by `evaluate` on a copy (the sequences that were measured).
KEPT = (
    "config.json",
    "evals.json",
    "metrics.jsonl",
    "samples.json",
    "status.json",
)
KEPT_EVENTS = ("created", "loading", "training", "evaluating", "finished")

log = logging.getLogger(__name__)


def example_config() -> RunConfig:
    """Return the run of the example."""
    base = preset("quick").config()
    return validated(
        RunConfig,
        base.model_dump()
        | {
            "preset": None,
            "saes": sweep(["gated", "relu"], [SPARSITY], WIDTH),
            "train": base.train.model_dump() | {"n_tokens": TRAINED_TOKENS},
        },
    )


def make(folder: Path, n_tokens: int) -> Run:
    """Return the example as a run in `folder`: trained, evaluated and indexed."""
    run = Run.create(folder, example_config())
    _follow(train_run(run))
    for spec in run.config.saes:
        _follow(index_run(run, spec.name, n_tokens=n_tokens))
    return run


def ship(run: Run, out: Path) -> int:
    """Copy to a new folder what a finished run is read from; return its size in bytes."""
    out.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(run.folder / name, out / name)
    shutil.copytree(run.folder / "saes", out / "saes")
    for spec in run.config.saes:
        _ship_index(run.folder / "features" / spec.name, out / "features" / spec.name)
    events = [event for event in run.events() if event["event"] in KEPT_EVENTS]
    lines = (json.dumps(event) + "\n" for event in events)
    (out / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    write_status(out, run.status._replace(pid=None, process_started=None))
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _ship_index(made: Path, out: Path) -> None:
    """Copy an index, its arrays in a folder with a name that does not change."""
    manifest: dict[str, Any] = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    shutil.copytree(made / manifest["data"], out / "data")
    write_json(out / "manifest.json", manifest | {"data": "data"})


def _follow(steps: Iterable[Any]) -> None:
    stage = None
    for progress in steps:
        if progress.stage != stage:
            stage = progress.stage
            log.info("%s", stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=int, default=INDEXED_TOKENS, help="tokens to index")
    parser.add_argument("--run", type=Path, help="a run made before, to be indexed and copied")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        run = make(Path(scratch) / "example", args.tokens) if args.run is None else args.run
        if isinstance(run, Path):
            run = Run.open(run)
            for spec in run.config.saes:
                _follow(index_run(run, spec.name, n_tokens=args.tokens))
        # What is at its place in the package is only read; so it is made elsewhere.
        size = ship(run, Path(scratch) / "shipped")
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(Path(scratch) / "shipped", args.out)
    log.info("%s in %s", readable(size), args.out)
    if size > MOST_BYTES:
        raise SystemExit(f"expected at most {readable(MOST_BYTES)}; index fewer tokens")


if __name__ == "__main__":
    main()
