"""Two versions side by side: ratios of each round, in turns, the first round left out."""

import json
from pathlib import Path

import pytest

from benchmarks import versions


def test_ratios_are_of_this_clone_over_the_other_round_by_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {versions.HERE: iter([9.0, 3.0, 4.0]), tmp_path: iter([1.0, 2.0, 5.0])}
    asked: list[Path] = []

    def measure(clone: Path, job: tuple[str, ...]) -> versions.Times:
        asked.append(clone)
        return {"our step": next(times[clone]), f"only in {clone}": 1.0}

    monkeypatch.setattr(versions, "measure", measure)
    found = versions.compare(tmp_path, versions.JOBS["step"], rounds=2)
    assert found == {"our step": [3.0 / 2.0, 4.0 / 5.0]}
    assert asked == [tmp_path, versions.HERE, versions.HERE, tmp_path, tmp_path, versions.HERE]


def test_what_benchmarks_print_is_read() -> None:
    rows = [{"name": "ours", "ms": 2.5, "ratio": 1.0}, {"name": "dense", "ms": 5.0, "ratio": 2.0}]
    assert versions.rows_of(json.dumps({"rows": rows})) == {"ours": 2.5, "dense": 5.0}
