"""Lengths of reconstructions by the length of what they reconstruct: by hand and by sorting."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import numbers
from refusals import refusal
from torch import Tensor

from gsae_core.analysis.fidelity import Decile, NormDeciles
from gsae_core.files import write_json
from gsae_core.runs.run import Run


def measured(x: Tensor, x_hat: Tensor, *cuts: int) -> list[Decile]:
    found, edges = NormDeciles(), [0, *cuts, len(x)]
    for start, end in pairwise(edges):
        found.add(x=x[start:end], x_hat=x_hat[start:end])
    assert int(found.sums[0].sum()) == int((x.norm(dim=1) > 0).sum())
    return found.deciles()


def test_ten_tokens_are_a_decile_each() -> None:
    # Token k: x = (k, 0) and x_hat = (k / 2, k / 2): |x_hat| / |x| = sqrt(1/2), and
    # |x_hat|^2 = k^2 / 2 = x . x_hat. Unbiased, though shorter.
    k = torch.arange(1.0, 11.0)
    x, x_hat = torch.stack([k, 0 * k], 1), torch.stack([k / 2, k / 2], 1)
    shuffled = torch.tensor([3, 0, 9, 1, 7, 5, 2, 8, 4, 6])
    deciles = measured(x[shuffled], x_hat[shuffled])
    assert [d.norm for d in deciles] == pytest.approx(range(1, 11))
    assert [d.ratio for d in deciles] == pytest.approx([math.sqrt(0.5)] * 10)
    assert [d.gamma for d in deciles] == pytest.approx([1] * 10)


def test_halved_reconstructions_are_half_as_long_and_shrunk_by_half() -> None:
    x = numbers(40, 3)
    for decile in measured(x, x / 2):
        assert decile.ratio == pytest.approx(0.5)
        assert decile.gamma == pytest.approx(0.5)  # (x/2)^2 / (x . x/2)


def test_a_token_that_lies_in_two_tenths_counts_in_both_by_its_share() -> None:
    # Four tokens, 0.4 in each tenth; the third tenth is 0.2 of the first and 0.2 of the second.
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    x_hat = torch.tensor([[0.1], [0.4], [1.2], [3.2]])  # ratios 0.1 to 0.4
    third = measured(x, x_hat)[2]
    assert third.norm == pytest.approx((0.2 * 1 + 0.2 * 2) / 0.4)
    assert third.ratio == pytest.approx((0.2 * 0.1 + 0.2 * 0.2) / 0.4)
    # Sums of |x_hat|^2: 0.2 (0.01 + 0.16); of x . x_hat: 0.2 (0.1 + 0.8).
    assert third.gamma == pytest.approx(0.17 / 0.9)


def test_deciles_equal_those_of_sorted_tokens() -> None:
    # 2000 tokens of lengths spread over four powers of ten, so that few share a bin of 0.27 %.
    x = numbers(2000, 5, seed=1)
    x = x / x.norm(dim=1, keepdim=True) * torch.logspace(-2, 2, 2000, dtype=x.dtype)[:, None]
    x_hat = 0.8 * x + 0.1 * x.norm(dim=1, keepdim=True) * numbers(2000, 5, seed=2)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    deciles = measured(x[order], x_hat[order], 1, 700, 701)
    for i, decile in enumerate(deciles):
        own, own_hat = x[200 * i : 200 * (i + 1)], x_hat[200 * i : 200 * (i + 1)]
        ratios = own_hat.norm(dim=1) / own.norm(dim=1)
        assert decile.norm == pytest.approx(own.norm(dim=1).mean().item(), rel=1e-4)
        assert decile.ratio == pytest.approx(ratios.mean().item(), rel=2e-3)
        gamma = own_hat.square().sum() / (own * own_hat).sum()
        assert decile.gamma == pytest.approx(gamma.item(), rel=2e-3)


def test_equal_lengths_share_one_bin_and_have_equal_tenths() -> None:
    x = torch.tensor([[3.0, 4.0]] * 7)
    deciles = measured(x, x * torch.linspace(0.4, 1.0, 7)[:, None])
    assert [d.norm for d in deciles] == pytest.approx([5] * 10)
    assert [d.ratio for d in deciles] == pytest.approx([0.7] * 10)


def test_deciles_do_not_depend_on_how_tokens_fall_into_batches() -> None:
    x, x_hat = numbers(50, 4, seed=3), numbers(50, 4, seed=4)
    whole = measured(x, x_hat)
    for one, other in zip(measured(x, x_hat, 7, 8, 33), whole, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_lengths_beyond_the_bins_and_zeros_are_taken_as_they_come() -> None:
    x = torch.tensor([[0.0], [1e-20], [1e20]], dtype=torch.float64)
    deciles = measured(x, x * 0.5)
    assert len(deciles) == 10
    assert [d.ratio for d in deciles] == pytest.approx([0.5] * 10)
    assert deciles[0].norm == pytest.approx(1e-20)
    assert deciles[-1].norm == pytest.approx(1e20)


def test_no_tokens_have_no_deciles_and_a_silent_sae_no_gamma() -> None:
    assert NormDeciles().deciles() == []
    assert all(
        math.isnan(d.gamma) and d.ratio == 0 for d in measured(numbers(20, 3), 0 * numbers(20, 3))
    )


def test_deciles_are_read_as_they_were_written(finished: Run) -> None:
    rows = [{"norm": float(i), "ratio": 0.5, "gamma": math.nan} for i in range(10)]
    name = finished.config.saes[0].name
    write_json(finished.sae_folder(name) / "norm_deciles.json", {"deciles": rows})
    frame = finished.norm_deciles(name)
    assert frame["decile"].to_list() == list(range(1, 11))
    assert frame["norm"].to_list() == [float(i) for i in range(10)]
    assert np.isnan(frame["gamma"]).all()


def test_an_evaluation_leaves_the_deciles_of_every_sae(finished: Run) -> None:
    for row in finished.evals():
        frame = finished.norm_deciles(row["name"])
        assert len(frame) == 10
        assert frame["norm"].is_monotonic_increasing


def test_a_run_evaluated_before_there_were_deciles_is_told_the_command(finished: Run) -> None:
    name = finished.config.saes[0].name
    folder: Path = finished.sae_folder(name)
    (folder / "norm_deciles.json").unlink()
    assert refusal(finished.norm_deciles, name) == (
        f"expected lengths of reconstructions of '{name}', found none in {folder}; "
        f"measure them: python -m gsae_core evaluate {finished.folder}"
    )
