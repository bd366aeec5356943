"""Outliers, activations many times as long as the median: counted, named, and left out if asked."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_cases import built, dense, some_parts, some_sae
from test_fidelity import N_PREDICTIONS, N_TOKENS, SEQUENCES, identity
from torch import Tensor

from gsae_core.analysis.fidelity import Evaluation, fidelity
from gsae_core.config import Positions
from gsae_core.lm.model import LanguageModel
from gsae_core.norms import lengths, longer, ordinary
from gsae_core.runs.outliers import outliers_measured, outliers_met
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE

# Lengths 1, 1, 1, 2, 50 and 1000 medians of 1, in two directions.
SIX = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 2], [30, 40], [0, 1000]])


def test_outliers_are_counted_and_the_scale_is_of_the_others() -> None:
    found = lengths(SIX)
    assert (found.median, found.n, found.n_outliers) == (1, 6, 2)
    assert found.mean_square == (1 + 1 + 1 + 4 + 2500 + 1_000_000) / 6
    assert found.outlier_share == 1_002_500 / 1_002_507
    assert found.ordinary == 7 / 4
    # What is kept by request sets no scale either, and what is left out does so even less.
    some, few = lengths(SIX, max_ratio=100.0), lengths(SIX, max_ratio=1.5)
    assert (some.n_outliers, some.ordinary) == (1, 7 / 4)
    assert (few.n_outliers, few.ordinary) == (3, 1)
    assert longer(SIX, 50.0).tolist() == [False] * 5 + [True]


def test_where_there_are_none_the_scale_has_the_bits_of_the_mean() -> None:
    x = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
    found = lengths(x)
    assert found.ordinary == found.mean_square
    # As it was before: in parts of 4096, each summed in float64.
    assert found.mean_square == sum(float(p.double().square().sum()) for p in x.split(2**12)) / 9000
    assert (found.n_outliers, found.outlier_share) == (0, 0)


def test_where_most_are_zero_none_is_an_outlier() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [7.0]])
    assert lengths(x)._replace(median=0) == (0, 49 / 4, 49 / 4, 4, 0, 0)
    assert ordinary(torch.tensor([0.0, 0, 0, 49])).tolist() == [0, 0, 0, 49]


def test_the_unit_of_thresholds_is_the_length_of_ordinary_activations() -> None:
    for last, unit in ((300.0, 3.0), (3.0, 3.0), (6.0, math.sqrt((3 * 9 + 36) / 4))):
        sae = JumpReluSAE(2, 4)
        sae.measure_unit_(torch.tensor([[3.0, 0], [0, 3], [3, 0], [last, 0]]))
        assert sae.threshold_unit == unit


# Evaluation


def evaluated(model: LanguageModel, *saes: Any, **told: Any) -> list[Evaluation]:
    place: dict[str, Any] = {"layer": 0, "site": "resid_post", "n_tokens": 10**6}
    return fidelity(model, saes, SEQUENCES, **place, **told)


@pytest.fixture
def x(tiny_lm: LanguageModel) -> Tensor:
    """Activations at the site, (sequences, positions, d_in)."""
    return tiny_lm.harvest(SEQUENCES[:].ids, layer=0, site="resid_post")


@pytest.fixture
def limit(x: Tensor) -> float:
    """A length that six counted activations are above."""
    norms = x[SEQUENCES[:].mask].norm(dim=1).sort(descending=True).values
    return float(norms[5:7].mean())


def fvu(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_an_evaluation_tells_what_outliers_hold_and_the_fvu_of_the_others(
    tiny_lm: LanguageModel, x: Tensor, limit: float
) -> None:
    sae, other = GatedSAE(12, 30), GatedSAE(12, 20)
    (plain,) = evaluated(tiny_lm, sae)
    assert plain.outliers is None
    found, second = evaluated(tiny_lm, sae, other, median_norm=limit / 10)
    # All else is measured as before.
    assert found.fidelity == plain.fidelity
    assert found.metrics.fvu == plain.metrics.fvu
    counted = x[SEQUENCES[:].mask]
    long = counted.norm(dim=1) > limit
    told = found.outliers
    assert told is not None
    assert (told.n, told.ratio) == (6, 10)
    power = counted.double().square().sum(1)
    assert told.share == pytest.approx(float(power[long].sum() / power.sum()))
    with torch.no_grad():
        assert told.fvu == pytest.approx(fvu(counted[~long], sae(counted[~long])), rel=1e-5)
        assert found.metrics.fvu == pytest.approx(fvu(counted, sae(counted)), rel=1e-5)
        assert second.outliers is not None
        assert second.outliers.fvu == pytest.approx(
            fvu(counted[~long], other(counted[~long])), rel=1e-5
        )
    (none,) = evaluated(tiny_lm, sae, median_norm=1e6)
    assert none.outliers == (10, 0, 0, plain.metrics.fvu)


@pytest.mark.parametrize("replace", ["counted", "all"])
def test_left_out_tokens_are_read_as_they_are_and_measured_nowhere_but_in_losses(
    tiny_lm: LanguageModel, x: Tensor, limit: float, replace: Positions
) -> None:
    sae = GatedSAE(12, 30)
    told: dict[str, Any] = {"median_norm": limit / 4, "max_norm_ratio": 4.0, "replace": replace}
    found, same = evaluated(tiny_lm, sae, identity(12), **told)
    ids, mask = SEQUENCES[:]
    long = mask & (x.norm(dim=-1) > limit)
    kept = x[mask & ~long]
    assert found.metrics.n_tokens == len(kept) == N_TOKENS - 6
    assert found.fidelity.n_tokens == N_PREDICTIONS
    assert found.norms.sums[0].sum() == len(kept)
    assert found.outliers is not None
    assert (found.outliers.n, found.outliers.ratio) == (6, 4)
    with torch.no_grad():
        assert found.metrics.fvu == found.outliers.fvu == pytest.approx(fvu(kept, sae(kept)))
    assert same.fidelity.ce_sae == same.fidelity.ce_clean
    read = (mask & ~long if replace == "counted" else torch.ones_like(mask))[..., None]
    spliced = tiny_lm.logits(
        ids, layer=0, site="resid_post", edit=lambda y: torch.where(read, sae(y), y)
    )
    log_q = spliced[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    ce = -float(log_q[mask[:, :-1] & mask[:, 1:]].mean())
    assert found.fidelity.ce_sae == pytest.approx(ce, rel=1e-5)


def test_a_batch_of_outliers_alone_is_no_mistake(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    monkeypatch.setattr("gsae_core.analysis.fidelity.LOGITS_CPU", 1)  # a sequence at a time
    norms = [each[each > 0] for each in x.norm(dim=-1) * SEQUENCES[:].mask]
    limit = 0.999 * float(norms[0].min())
    (found,) = evaluated(tiny_lm, GatedSAE(12, 30), median_norm=limit / 2, max_norm_ratio=2.0)
    assert found.metrics.n_tokens == sum(int((each <= limit).sum()) for each in norms)
    assert found.metrics.n_tokens <= N_TOKENS - len(norms[0])


# The feature index


def test_an_index_leaves_them_out_as_it_does_special_tokens(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.analysis.features.build.SHARD_TOKENS", 100)
    sae = some_sae("gated")
    every = dense(tiny_lm, sae)
    norms = every.x.norm(dim=1)
    limit = float(norms.sort(descending=True).values[30:32].mean())
    index = built(tiny_lm, sae, tmp_path, max_norm=limit)
    kept = (norms <= limit).numpy()
    n = len(norms) - 31
    made = index.manifest
    assert (made.n_left_out, made.n_tokens, int(kept.sum())) == (31, n, n)
    assert made.amount() == "150 held-out and 450 train tokens; 31 outliers of them left out"
    assert np.flatnonzero(index.array("mask")).tolist() == every.places[kept].tolist()
    f = every.f[kept]
    fired = (f > 0).sum(0).numpy()
    assert np.diff(index.array("offsets")).tolist() == fired.tolist()
    assert index.table["density"].to_numpy() == pytest.approx(fired / n)
    top = int(fired.argmax())
    assert (
        sorted(index.feature(top).positions.tolist())
        == every.places[kept][f[:, top].numpy() > 0].tolist()
    )
    assert made.fvu == pytest.approx(fvu(every.x[kept], sae.decode(f).detach()), rel=1e-4)
    # Over all tokens it is another index, and says nothing of outliers.
    whole = built(tiny_lm, sae, tmp_path / "whole").manifest
    assert (whole.n_left_out, whole.n_tokens, whole.amount()) == (
        0,
        len(norms),
        "150 held-out and 450 train tokens",
    )


def test_an_interrupted_build_goes_on_with_its_own_limit_alone(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis.features.build import build_index

    monkeypatch.setattr("gsae_core.analysis.features.build.SHARD_TOKENS", 100)
    sae = some_sae("relu")
    norms = dense(tiny_lm, sae).x.norm(dim=1)
    named: dict[str, Any] = {"layer": 1, "site": "mlp_hidden", "name": "small", "text": "words"}
    named |= {"weights_sha256": "0" * 64}
    cut = build_index(tiny_lm, sae, some_parts(), tmp_path, **named, max_norm=math.inf)
    for progress in cut:
        if progress.done > 100:
            break
    cut.close()  # pyright: ignore[reportAttributeAccessIssue]
    index = built(tiny_lm, sae, tmp_path, max_norm=float(norms.median()))
    assert index.manifest.n_left_out == len(norms) // 2


# What is said of it


def row(name: str = "gated-0.1", **fields: Any) -> dict[str, Any]:
    told = {"n_outliers": 1234, "outlier_share": 0.912, "fvu_ordinary": 0.334}
    return {"name": name, "n_tokens": 36_000, "max_norm_ratio": None} | told | fields


def test_a_summary_that_outliers_hold_says_so_once() -> None:
    assert outliers_measured([row(), row("relu-0.1", fvu_ordinary=0.619)]) == [
        "1,234 tokens with activations longer than 10 times the median (3.43 % of all) hold 91 % "
        "of E|x|^2: FVU of the others is 0.3340 to 0.6190; train without them: --max-norm-ratio 10"
    ]
    assert outliers_measured([row(max_norm_ratio=5.0, outlier_share=0.99911)]) == [
        "1,234 tokens with activations longer than 5 times the median, 99.91 % of E|x|^2, were "
        "left out of all but losses and KL"
    ]


def test_a_run_that_begins_with_them_says_what_they_hold() -> None:
    found = {"n": 32_768, "n_outliers": 131, "outlier_share": 0.83, "median_norm": 1.0}
    place = "blocks.1.hook_resid_post"
    tokens = "0.40 % of tokens have activations longer than"
    assert list(outliers_met({"max_norm_ratio": None, "lengths": {place: found}})) == [
        f"{tokens} 10 times the median and hold 83 % of E|x|^2; leave them out with "
        "--max-norm-ratio 10"
    ]
    none = found | {"n_outliers": 0, "outlier_share": 0.0}
    assert list(
        outliers_met({"max_norm_ratio": 20.0, "lengths": {place: found, "other": none}})
    ) == [
        f"0.40 % of tokens at {place} have activations longer than 20 times the median and hold "
        "83 % of E|x|^2; others take their places"
    ]
    few = found | {"outlier_share": 0.004}
    assert list(outliers_met({"max_norm_ratio": None, "lengths": {place: few}})) == []
    assert len(list(outliers_met({"max_norm_ratio": 10.0, "lengths": {place: few}}))) == 1
    assert list(outliers_met({})) == []  # an earlier version's


def test_of_vectors_of_a_folder_the_vectors_themselves_are_long() -> None:
    found = {"n": 32_768, "n_outliers": 131, "outlier_share": 0.83, "median_norm": 1.0}
    noted = {"max_norm_ratio": None, "lengths": {"vectors": found}}
    assert list(outliers_met(noted, "vector")) == [
        "0.40 % of vectors are longer than 10 times the median and hold 83 % of E|x|^2; leave them "
        "out with --max-norm-ratio 10"
    ]
    assert outliers_measured([row(n_predictions=0, max_norm_ratio=5.0)]) == [
        "1,234 vectors longer than 5 times the median, 91 % of E|x|^2, were left out"
    ]


def test_where_there_is_nothing_to_say_nothing_is_said() -> None:
    older = {"name": "gated-0.1", "n_tokens": 36_000}
    nan = dict.fromkeys(("n_outliers", "outlier_share", "max_norm_ratio"), math.nan)
    assert outliers_measured([row(n_outliers=0), row(outlier_share=0.004), older, row(**nan)]) == []
    # But what was left out is always said.
    assert len(outliers_measured([row(outlier_share=0.004, max_norm_ratio=10.0)])) == 1
