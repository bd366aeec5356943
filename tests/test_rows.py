"""The size of a forward pass: measured once where it pays, and the same ever after."""

from pathlib import Path

import pytest

from gsae_core.lm.harvest import fastest, rows_per_pass
from gsae_core.lm.model import LanguageModel


def test_the_smallest_size_that_hardly_another_beats_is_chosen() -> None:
    # 16 is half as long a row as 8; 32 and 64 are hardly faster, and take memory.
    seconds = {8: 2.0, 16: 1.0, 32: 0.98, 64: 0.975}
    assert fastest([8, 16, 32, 64], lambda rows: seconds[rows]) == 16


def test_sizes_beyond_the_first_that_does_not_fit_are_not_tried() -> None:
    tried: list[int] = []

    def seconds(rows: int) -> float | None:
        tried.append(rows)
        return None if rows > 16 else 1 / rows

    assert fastest([8, 16, 32, 64], seconds) == 16
    assert tried == [8, 16, 32]
    assert fastest([64], seconds) is None


def test_on_a_cpu_the_size_is_a_constant(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # 512 tokens in rows of 16.
    assert rows_per_pass(tiny_lm, layer=0, site="mlp_out", n_ctx=16) == 32
    assert list(tmp_path.iterdir()) == []
