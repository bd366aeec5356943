"""Evaluations as tables: several runs, differences from a baseline run, the paper's own numbers."""

import math

import pandas as pd
import pytest
from synthetic import config, evaluation

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.analysis.results import (
    NUMBERS,
    PaperSite,
    against,
    changes,
    evaluation_frame,
    model_site_text,
    of_architecture,
    paper_sites,
    published,
    settings,
    settings_table,
    several_runs,
)
from gsae_core.config import sweep

SAES = sweep(["gated", "relu"], [0.1, 0.2], 8)
EVALS = evaluation_frame([evaluation(spec) for spec in SAES])


def test_an_sae_of_several_runs_is_named_by_run_and_name() -> None:
    frame = several_runs({"b": EVALS.head(1), "empty": pd.DataFrame(), "a": EVALS.tail(1)})
    assert frame["run"].to_list() == ["b", "a"]
    assert frame["id"].to_list() == ["b/gated-0.2", "a/relu-0.1"]
    assert several_runs({}).empty


def test_an_empty_evaluation_is_an_empty_table() -> None:
    assert evaluation_frame([]).empty


def test_saes_of_several_places_are_in_groups_in_the_order_of_the_run() -> None:
    rows = [
        evaluation(spec) | {"layer": layer, "site": site}
        for layer, site in ((2, "resid_post"), (1, "mlp_out"))
        for spec in SAES
    ]
    rows[0] |= {"l0": 1e6}
    frame = evaluation_frame(rows)
    assert list(frame["layer"]) == [2] * len(SAES) + [1] * len(SAES)
    for _, place in frame.groupby("layer"):
        for _, each in place.groupby("architecture"):
            assert each["l0"].is_monotonic_increasing


def test_differences_are_taken_from_the_baselines_sae_of_the_same_architecture_and_lambda() -> None:
    ours = EVALS.assign(l0=EVALS["l0"] + 3, kl=EVALS["kl"] * 2)
    frame = several_runs({"new": ours, "base": EVALS})
    found = against(frame, "base")
    new = pd.DataFrame(found[frame["run"] == "new"])
    assert new["change_l0"].to_list() == pytest.approx([3] * 4)
    assert new["change_kl"].to_list() == pytest.approx(EVALS["kl"].to_list())
    # A baseline does not differ from itself: nothing rather than a column of zeros.
    assert found[frame["run"] == "base"].isna().to_numpy().all()


def test_an_sae_without_a_counterpart_has_no_difference() -> None:
    frame = several_runs({"new": EVALS, "base": of_architecture(EVALS, "gated")})
    missing = against(frame, "base")["change_l0"].isna()
    assert frame.loc[missing & (frame["run"] == "new"), "architecture"].unique().tolist() == [
        "relu"
    ]


def test_two_counterparts_do_not_double_the_rows() -> None:
    twice = pd.concat([EVALS, EVALS.assign(name=EVALS["name"] + "-again", l0=1.0)])
    frame = several_runs({"new": EVALS, "base": twice})
    found = against(frame, "base")
    assert len(found) == len(frame)
    assert (
        found.loc[frame["run"] == "new", "change_l0"].to_list() == [0] * 4
    )  # of several the first


def test_changes_are_the_numbers_before_and_after() -> None:
    rows = {row["name"]: row for row in EVALS.to_dict("records")}
    found = changes(rows["gated-0.1"], rows["relu-0.1"])
    assert list(found) == list(NUMBERS)
    assert found["l0"] == pytest.approx((120, 160))  # 12 / 0.1, 16 / 0.1
    assert math.isnan(found["gamma_gate"][1])  # a baseline has no gate


def test_losses_measured_at_other_positions_are_not_compared() -> None:
    earlier = EVALS.assign(zeroed="counted", l0=EVALS["l0"] - 1)
    frame = several_runs({"new": EVALS, "base": earlier})
    found = pd.DataFrame(against(frame, "base")[frame["run"] == "new"])
    # Zero ablation weighs in loss recovered alone.
    assert found["change_loss_recovered"].to_list() == pytest.approx([math.nan] * 4, nan_ok=True)
    assert found["change_kl"].to_list() == found["change_delta_ce"].to_list() == [0] * 4
    assert found["change_l0"].to_list() == pytest.approx([1] * 4)
    row = EVALS.iloc[0].to_dict()
    other = changes(row | {"replaced": "all"}, row)
    assert [number for number, (before, _) in other.items() if math.isnan(before)] == [
        "loss_recovered",
        "delta_ce",
        "kl",
    ]


def test_the_paper_has_27_sites_and_each_its_runs() -> None:
    places = paper_sites()
    # Gemma-7B: 3 sites of 4 blocks; Pythia-2.8B: 3 of 5.
    assert len(places) == 12 + 15
    assert sum(len(published(place)) for place in places) == 283
    assert places[0].label == "gemma-7b resid_post 6"


def test_published_losses_are_shares_of_one() -> None:
    first = published(PaperSite("gemma-7b", "resid_post", 6)).iloc[0]
    assert (first["l0"], first["loss_recovered"], first["gamma"]) == (18.1, 0.9528, 0.982)


def test_the_published_ratio_at_block_20_is_that_of_its_tables() -> None:
    # Worked out in test_pareto.py at the top level, 97.95 %: 46.4 / 18.6055 = 2.4939.
    ratio = matched_ratio(published(PaperSite("gemma-7b", "resid_post", 20)).to_dict("records"))
    assert ratio.pairs[-1].loss_recovered == pytest.approx(0.9795)
    assert ratio.pairs[-1].ratio == pytest.approx(2.4939, abs=1e-4)


def test_a_published_number_names_its_tables() -> None:
    assert PaperSite("gemma-7b", "resid_post", 20).source.endswith("Tables 1-4")
    assert PaperSite("pythia-2.8b", "mlp_out", 4).source.endswith("Tables 5-8")


def test_settings_are_text_by_dotted_name() -> None:
    found = settings(config(), config().saes[0])
    assert found["train.lr"] == "0.001"
    assert found["train.n_tokens"] == "1,048,576"
    assert found["model.revision"] == "default"
    assert found["sae.detach_b_dec"] == "no"
    assert found["sae.architecture"] == "gated"
    assert "sae.name" not in found


def test_only_what_differs_is_shown_and_what_is_missing_is_a_dash() -> None:
    columns = {"a": {"lr": "1", "same": "x"}, "b": {"lr": "2", "same": "x", "own": "y"}}
    table = settings_table(columns, differences=True)
    assert table.index.to_list() == ["lr", "own"]
    assert table.loc["own"].to_list() == ["–", "y"]
    assert settings_table(columns, differences=False).index.to_list() == ["lr", "same", "own"]
    # One SAE differs from nothing, and all its settings are shown.
    assert len(settings_table({"a": columns["a"]}, differences=True)) == 2


def test_no_more_than_ten_columns_are_compared() -> None:
    assert settings_table({str(i): {"n": str(i)} for i in range(12)}, differences=True).shape == (
        1,
        10,
    )


def test_runs_on_another_site_do_not_compare() -> None:
    here = config()
    moved = here.model_copy(update={"model": here.model.model_copy(update={"layer": 3})})
    assert model_site_text(here) == "bundled, blocks.2.hook_resid_post, stdlib"
    assert model_site_text(moved) != model_site_text(here)
    assert model_site_text(here, "a.txt") == "bundled, blocks.2.hook_resid_post, a.txt"
    assert model_site_text(here, float("nan")) == model_site_text(here)
