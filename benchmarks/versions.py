"""Two versions of the repository against each other: `python -m benchmarks.versions OTHER_CLONE`.

Each benchmark runs in this clone and in the other, turn about, a process each; the ratio of a round
is this clone's time over the other's, and the median of the rounds is printed with their range.
Pages are compared by `benchmarks/pages.py --against`, both served at once.

    --rounds N      rounds that count (7)
    --only WORD     leave out benchmarks whose name does not hold the word
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
Times = dict[str, float]


def rows_of(printed: str) -> Times:
    """Return the milliseconds of each row of a table in JSON."""
    return {row["name"]: row["ms"] for row in json.loads(printed)["rows"]}


def bench(*words: str, rounds: int = 1) -> tuple[str, ...]:
    """Return the words of a benchmark by `python -m gsae_core bench`, by its own ways alone."""
    return ("-m", "gsae_core", "bench", *words, "--json", "--rounds", str(rounds))


JOBS = {
    # Seven steps a process: one alone, early in a process, says little.
    "step": bench("step", "--no-peers", "--brief", "--batch", "2048", "--d-sae", "8192", rounds=7),
    # A quarter of the latents active: every architecture's step is dense.
    "dense": bench("step", "--no-peers", "--batch", "1024", "--d-sae", "4096", "--l0", "1024"),
    "harvest": bench("harvest", "--passes", "2"),
    "train": bench("train", "--no-peers", "--tokens", "65536", "--width", "1024", "--saes", "4"),
    "index": bench("index", "--no-peers", "--tokens", "32768", "--width", "8192"),
}


def measure(clone: Path, job: tuple[str, ...]) -> Times:
    """Return the times of one run in one clone."""
    environment = os.environ | {"PYTHONPATH": str(clone)}
    done = subprocess.run(
        [sys.executable, *job],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return rows_of(done.stdout)


def compare(other: Path, job: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Return the ratios of each row that both clones have, a round each; the first is left out."""
    ratios: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        order = (HERE, other) if turn % 2 else (other, HERE)
        found = {clone: measure(clone, job) for clone in order}
        if turn:
            for name in found[HERE].keys() & found[other].keys():
                ratios.setdefault(name, []).append(found[HERE][name] / found[other][name])
    return ratios


def main() -> None:
    """Print the ratios of each benchmark as they are found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", type=Path, help="folder of the other clone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    for name, job in JOBS.items():
        if asked.only in name:
            for row, ratios in sorted(compare(asked.other.resolve(), job, asked.rounds).items()):
                print(
                    f"{name:8} {row:56} {median(ratios):.3f}  "
                    f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
