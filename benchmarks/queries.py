"""Time what a feature index answers: `python benchmarks/queries.py INDEX [--other INDEX]`.

An INDEX is a folder that holds a manifest.json, as `runs/<id>/features/<name>`. Of features spread
evenly over the dictionary each query is asked once; the longest and the median time are printed,
and what the first of all took, which opens files.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gsae_core.analysis.features.feature import Feature
from gsae_core.analysis.features.index import FeatureIndex, open_index


def queries(other: FeatureIndex) -> dict[str, Callable[[Feature], Any]]:
    """Return what is asked of each feature."""
    return {
        "ten strongest": lambda feature: feature.top(10),
        "in groups of quantiles": lambda feature: feature.quantiles(),
        "at random": lambda feature: feature.random(10),
        "near the threshold": lambda feature: feature.near_threshold(10),
        "neighbours": lambda feature: feature.neighbours,
        "fire together": lambda feature: feature.co_firing,
        "matched in the other": lambda feature: feature.matched(other, k=1),
    }


def main() -> None:
    """Measure, and print a line for each query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("--other", type=Path, help="matched in; without it the same, opened anew")
    parser.add_argument("--features", type=int, default=50)
    options = parser.parse_args()
    began = time.perf_counter()
    index, other = open_index(options.index), open_index(options.other or options.index)
    print(f"opening two indices: {1e3 * (time.perf_counter() - began):.1f} ms")
    numbers = np.linspace(0, index.n_features - 1, options.features).astype(int).tolist()
    for name, ask in queries(other).items():
        taken = []
        for number in numbers:
            feature = index.feature(number)
            began = time.perf_counter()
            ask(feature)
            taken.append(1e3 * (time.perf_counter() - began))
        first, rest = taken[0], taken[1:]
        print(f"{name}: first {first:.1f}, longest {max(rest):.1f}, median {median(rest):.1f} ms")


if __name__ == "__main__":
    main()
