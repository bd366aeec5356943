"""The bundled language model's training script and its yardstick."""

import math

import numpy as np
import pytest

from gsae_core.lm.readers import is_held_out
from scripts.pretrain_lm import N_CTX, batches, learning_rate_scale, stdlib_files, trigram_ce


def test_trigram_model_predicts_a_period_of_three_but_for_the_uniform_share() -> None:
    ids = np.array([0, 1, 2] * 200)
    # Trigram, bigram and 1 % uniform over 4 ids: p >= 0.99 - unigram share; the grid holds
    # third + second = 0.95 at most, the unigram (1/3) takes 0.04 and the uniform (1/4) 0.01.
    expected = -math.log(0.95 + 0.04 * (180 + 1) / (540 + 4) + 0.01 / 4)
    assert trigram_ce(ids, ids[:60], vocabulary=4) == pytest.approx(expected, abs=2e-3)


def test_split_is_decided_by_the_name_alone_and_keeps_about_a_twentieth() -> None:
    names = [f"package/module_{i}.py" for i in range(4000)]
    share = np.mean([is_held_out(name) for name in names])
    assert 0.04 < share < 0.06


def test_stdlib_files_come_in_a_fixed_order_and_leave_third_parties_out(tmp_path) -> None:
    for name in ("b.py", "a.py", "site-packages/x.py", "d/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert [file.name for file in stdlib_files(tmp_path)] == ["a.py", "b.py", "d/c.py"]


def test_batches_are_windows_of_the_text_and_one_epoch_repeats_nothing() -> None:
    tokens = np.arange(N_CTX * 9, dtype=np.uint16)
    stream = batches(tokens, n_rows=4, seed=0)
    first, second = next(stream), next(stream)
    assert first.shape == (4, N_CTX + 1)
    assert (first[:, 1:] - first[:, :-1] == 1).all()
    starts = [*first[:, 0].tolist(), *second[:, 0].tolist()]
    assert len(set(starts)) == 8


def test_learning_rate_rises_holds_and_falls() -> None:
    scale = [learning_rate_scale(step, n_steps=1000) for step in (0, 29, 60, 600, 800, 999)]
    assert scale == pytest.approx([1 / 60, 0.5, 1.0, 1.0, 0.5, 0.02])
