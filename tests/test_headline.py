"""What the quick preset has to show: the paper's effect, on the language model that ships."""

from pathlib import Path

import pytest
from tiny_runs import finish

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.presets import preset
from gsae_core.runs.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def evals(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The evaluation of a whole quick run: 1 M activations, eight SAEs, minutes."""
    folder: Path = tmp_path_factory.mktemp("runs") / "quick"
    run = Run.create(folder, preset("quick").config())
    finish(run)
    return run.evals()


def test_gated_reconstructions_are_not_shrunk_where_l0_is_moderate(evals: list[dict]) -> None:
    gammas = [
        row["gamma"] for row in evals if row["architecture"] == "gated" and 15 <= row["l0"] <= 100
    ]
    assert len(gammas) >= 2
    assert all(0.95 <= gamma <= 1.05 for gamma in gammas), gammas


def test_baseline_reconstructions_shrink_more_the_larger_lambda(evals: list[dict]) -> None:
    rows = sorted(
        (row for row in evals if row["architecture"] == "relu"), key=lambda row: row["sparsity"]
    )
    gammas = [row["gamma"] for row in rows]
    assert max(gammas) < 0.9
    assert gammas == sorted(gammas, reverse=True)


def test_the_baseline_needs_half_as_many_features_again_at_equal_fidelity(
    evals: list[dict],
) -> None:
    assert matched_ratio(evals).median > 1.5
