"""`bench index`: arithmetic of its sentences, refusals, and the problem that everybody is given."""

from pathlib import Path

import pytest
import torch
from refusals import mistake

from benchmarks.flags import Index
from benchmarks.harness import Result
from benchmarks.index import ALONE, OURS, SAEDASHBOARD, _save_problem, comparisons
from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.lm.model import load_model


def result(name: str, ms: float) -> Result:
    # Of the processor, each takes a second more than on the clock.
    return Result(name, (ms,), None, None, {"disk_bytes": 5_000_000, "processor_s": 1 + ms / 1e3})


def test_the_whole_dictionary_is_counted_in_slices() -> None:
    results = {
        name: result(name, ms)
        for name, ms in ((ALONE, 900.0), (OURS, 1000.0), (SAEDASHBOARD, 500.0))
    }
    throughput, ratio = comparisons(results, Index(width=1024, slice=128))
    assert throughput.startswith("our index: 0.90x the throughput of reading and encoding alone")
    assert "(0.95x by processor time of the last round)" in throughput
    assert throughput.endswith("5.0 MB on disk")
    # 8 slices of half a second against a second.
    assert "all 1024, counted as 8 times that, take 4.0x as long as our index" in ratio
    assert len(comparisons({ALONE: results[ALONE], OURS: results[OURS]}, Index())) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokens", "0"], "--tokens: expected a number of at least 1, got 0"),
        (["--l0", "9", "--width", "8"], "--l0: expected a number above 0 and below --width (8)"),
        (["--slice", "9", "--width", "8", "--l0", "2"], "--slice: expected at most --width (8)"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in mistake(["bench", "index", *flags], capsys)


def test_the_sae_of_the_problem_fires_as_often_as_asked(tmp_path: Path) -> None:
    model = load_model("bundled")
    ids = torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    _save_problem(Index(width=512, l0=32.0), model, ids, tmp_path / "sae")
    x = model.harvest(ids, layer=2, site="resid_post").flatten(0, 1)
    fired = (load_sae(tmp_path / "sae").encode(x) > 0).sum(1).float().mean()
    # 256 tokens, a 16th of them: 16 of each latent, exactly, up to rounding at the edge.
    assert float(fired) == pytest.approx(32, abs=0.5)
