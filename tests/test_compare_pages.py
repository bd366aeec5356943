"""Pareto and Shrinkage in every state, without a browser; what is clicked is set by its key."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import streamlit as st
from app_pages import HOSTILE, labelled, opened, text
from streamlit.testing.v1 import AppTest
from synthetic import config, two_places, write_run

from gsae_core.config import RunConfig, sweep
from gsae_core.runs.run import Run

PARETO, SHRINKAGE = "pages/3_Pareto.py", "pages/4_Shrinkage.py"


def one_pair(width: int = 64, **fields: object) -> RunConfig:
    return config().model_copy(
        update={"saes": sweep(["gated", "relu"], [0.2], width), **fields}  # two SAEs
    )


def table_of_saes(at: AppTest) -> pd.DataFrame:
    (found,) = [t for t in at.dataframe if "architecture" in t.value]
    return found.value


# Pareto


def test_the_ratio_on_the_page_is_that_of_the_frontiers(root: Path) -> None:
    # Recovery is 0.70 + 0.055 ln L0 for gated and 0.035 less for the baseline, so that at equal
    # recovery ln L0 differs by 0.035 / 0.055 everywhere: a ratio of exp(7/11) = 1.89.
    write_run(root, "done")
    at = opened(PARETO)
    assert at.metric[0].value == "1.89×"


def test_two_picks_show_what_changes(root: Path) -> None:
    write_run(root, "done")
    at = opened(PARETO)
    at.multiselect(key="pick").set_value(["done/gated-0.1", "done/gated-0.2"]).run()
    # L0 is 12 / lambda: 120 and 60, half as many.
    assert "-60.0 (-50.0 %)" in [metric.delta for metric in at.metric]
    # Recovery 0.70 + 0.055 ln L0: less by 5.5 ln 2 = 3.81 points.
    assert "-3.81 points" in [metric.delta for metric in at.metric]


def test_a_link_opens_both_cards_and_the_difference(root: Path) -> None:
    write_run(root, "done")
    said = text(opened(PARETO, run="done", pick=["done/relu-0.4", "done/gated-0.4"]))
    assert "ReLU baseline, λ 0.4, 768 features" in said
    assert "Change from 1, done/relu-0.4, to 2, done/gated-0.4" in said


def test_every_number_of_a_card_has_its_definition(root: Path) -> None:
    write_run(root, "done")
    at = opened(PARETO, run="done", pick=["done/relu-0.4"])
    assert len(at.metric) == 1 + 9
    assert all(len(metric.help) > 20 for metric in at.metric)


def test_runs_are_shown_side_by_side_each_with_its_ratio(root: Path) -> None:
    write_run(root, "done")
    write_run(root, "other", run_config=one_pair())
    at = opened(PARETO, run="done", runs="other")
    assert set(table_of_saes(at)["run"]) == {"done", "other"}
    assert "other: " in text(at)


def test_saes_share_a_frontier_with_those_of_their_own_hook_point(root: Path) -> None:
    write_run(root, "both", run_config=two_places())
    at = opened(PARETO)
    # As of one hook point; those of two on one frontier would give other pairs.
    assert at.metric[0].value == "1.89×"
    said = text(at)
    for layer in (1, 3):
        assert f"blocks.{layer}.hook_resid_post: At equal loss recovered" in said
        assert f"at blocks\\.{layer}\\.hook" in said.partition("with zero ablation")[2]
    assert set(table_of_saes(at)["hook point"]) == {
        "blocks.1.hook_resid_post",
        "blocks.3.hook_resid_post",
    }
    at.multiselect(key="places").set_value(["blocks.3.hook_resid_post"]).run()
    assert len(table_of_saes(at)) == 8
    assert "blocks.1" not in text(at)
    picked = opened(PARETO, run="both", pick=["both/relu-0.4-l3"])
    assert "blocks.3.hook_resid_post" in text(picked)


@pytest.mark.slow
def test_gamma_over_the_sweep_is_of_one_hook_point(root: Path) -> None:
    write_run(root, "both", run_config=two_places())
    at = opened(SHRINKAGE, gated="gated-0.2-l3", base="relu-0.2-l3")
    spec = json.loads(at.get("plotly_chart")[0].proto.spec)
    # Four lambdas: the Gated SAEs' output and gate path, and the baselines'.
    assert [len(trace["x"]) for trace in spec["data"]] == [4, 4, 4]
    assert "SAEs at blocks\\.3\\.hook" in text(at)


def test_a_pinned_baseline_adds_columns_of_differences(root: Path) -> None:
    write_run(root, "base")
    run = write_run(root, "done")
    evals = run.evals()
    for row in evals:
        row["l0"] += 5
    (run.folder / "evals.json").write_text(json.dumps({"saes": evals}), encoding="utf-8")
    at = opened(PARETO, run="done", base="base")
    table = table_of_saes(at)
    assert table.loc[table["run"] == "done", "change_l0"].to_list() == pytest.approx([5] * 8)
    assert "change_l0" not in table_of_saes(opened(PARETO, run="done"))


def test_runs_of_other_sites_are_not_compared_in_silence(root: Path) -> None:
    write_run(root, "done")
    moved = config().model.model_copy(update={"layer": 3, "name": HOSTILE})
    write_run(root, "moved", run_config=one_pair(model=moved))
    at = opened(PARETO, run="done", runs="moved")
    assert "Different model, site or text: not comparable" in text(at)
    assert "<img" not in text(at)
    assert "not comparable" not in text(opened(PARETO, run="done"))


def test_the_papers_runs_are_named_with_their_tables(root: Path) -> None:
    write_run(root, "done")
    at = opened(PARETO, run="done", paper="gemma-7b resid_post 20")
    assert "Faint: 21 runs of gemma-7b, resid_post of block 20, as printed in arXiv" in text(at)
    at.segmented_control(key="ym").set_value("KL").run()
    assert "The paper published L0 and loss recovered" in text(at)


def test_settings_are_compared_and_only_what_differs_is_shown(root: Path) -> None:
    write_run(root, "done")
    at = opened(PARETO, run="done", pick=["done/gated-0.1", "done/gated-0.2"])
    table = at.dataframe[-1].value
    assert list(table.columns) == ["done/gated-0.1", "done/gated-0.2"]
    assert table.index.to_list() == ["sae.sparsity"]
    at.toggle(key="diff").set_value(False).run()
    assert "train.lr" in at.dataframe[-1].value.index


def test_what_the_address_gets_wrong_is_said(root: Path) -> None:
    write_run(root, "done")
    at = opened(
        PARETO,
        run="done",
        ym="beauty",
        xm="?",
        runs="gone",
        base=HOSTILE,
        paper="gpt-5",
        pick="a/b",
    )
    said = text(at)
    for value in ("beauty", "?", "gone", "gpt-5", "a/b"):
        assert f"asks for &#x27;{value}&#x27;" in said
    assert "<img" not in said
    assert at.segmented_control(key="ym").value == "loss recovered"


def test_a_run_chosen_beside_itself_is_shown_once(root: Path) -> None:
    write_run(root, "one")
    write_run(root, "two")
    at = opened(PARETO, run="one", runs="two", base="two")
    at.selectbox(key="run").set_value("two").run()
    assert at.multiselect(key="runs").value == []
    assert len(table_of_saes(at)) == 8


def test_a_click_is_kept_and_the_third_replaces_the_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(root, "done")
    clicks = []
    chart = st.plotly_chart

    def spy(*args: object, **settings: object) -> object:
        clicks.append(settings["on_select"])
        return chart(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(st, "plotly_chart", spy)
    opened(PARETO)
    points = [{"customdata": ["done/a", "λ 1"]}, {"x": 1}]  # the paper's have no name
    state = {"pareto.plane": {"selection": {"points": points}}, "pick": ["done/b", "done/c"]}
    monkeypatch.setattr(st, "session_state", state)
    clicks[0]()
    assert state["pick"] == ["done/c", "done/a"]


def test_evaluations_are_read_again_when_they_change_and_only_then(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(root, "done")
    read = []
    evals = Run.evals

    def counted(self: Run) -> list[dict]:
        read.append(self.id)
        return evals(self)

    monkeypatch.setattr(Run, "evals", counted)
    write_run(root, "other")
    at = opened(PARETO, run="done", runs="other")
    before = read.count("other")
    at.run()
    assert (before, read.count("other")) == (1, 1)
    other = Run.open(root / "other")
    rows = evals(other)[:3]
    (other.folder / "evals.json").write_text(json.dumps({"saes": rows}), encoding="utf-8")
    at.run()
    assert len(table_of_saes(at)) == 8 + 3
    assert run.id == "done"


def rewrite(run: Run, **said: str | int | None) -> None:
    """Replace keys of each SAE's evaluation; those that are None are left out."""
    rows = [row | said for row in run.evals()]
    rows = [{key: value for key, value in row.items() if key not in said or value} for row in rows]
    (run.folder / "evals.json").write_text(json.dumps({"saes": rows}), encoding="utf-8")


def test_fewer_held_out_tokens_than_asked_for_are_said_where_they_were_measured(
    root: Path,
) -> None:
    no_more = "the held-out text has no more"
    short = {"n_tokens": 4335, "n_tokens_asked": 50_000, "n_predictions": 4318, "shortage": no_more}
    rewrite(write_run(root, "short"), **short)
    at = opened(PARETO, run="short", pick=["short/gated-0.1"])
    said = text(at).replace("\\", "")  # Markdown's
    amount = f"4,335 held-out tokens of 50,000 asked for: {no_more}"
    assert f"short: {amount}. Cross-entropy of the language model:" in said
    assert "(mean over 4,318 predictions; zeros at every position" in said
    assert said.count(amount) == 2  # under the table, and on the card


def test_losses_of_an_earlier_version_are_marked_and_not_compared(root: Path) -> None:
    write_run(root, "new")
    rewrite(write_run(root, "old"), zeroed=None, replaced=None)
    at = opened(PARETO, run="new")
    assert "earlier" not in text(at)
    assert "predictions; zeros at every position; reconstructions at counted tokens, BOS," in text(
        at
    )
    at = opened(PARETO, run="new", base="old", pick=["new/gated-0.1", "old/gated-0.1"])
    said = text(at)
    assert "old was measured under an earlier definition" in said
    # Above the figure, and on its card.
    assert said.count(f"Measure again: python -m gsae_core evaluate {root / 'old'}") == 2
    assert "new was measured" not in said
    # Nothing is subtracted across the two definitions; L0 has only one.
    table = table_of_saes(at)
    assert not any(table["change_loss_recovered"].notna().to_list())
    assert sum(table["change_l0"].notna().to_list()) == 8
    deltas = {metric.label: metric.delta for metric in at.metric if metric.delta}
    assert deltas["loss recovered"] == "–"
    assert deltas["L0"] == "+0.0 (+0.0 %)"
    at = opened(PARETO, run="old")
    assert "old was measured under an earlier definition" in text(at)
    assert "predictions; zeros and reconstructions at counted tokens alone, BOS," in text(at)


def test_losses_with_reconstructions_at_other_positions_are_not_mixed_in_silence(
    root: Path,
) -> None:
    write_run(root, "kept")
    rewrite(write_run(root, "whole"), replaced="all")
    assert "different positions" not in text(opened(PARETO, run="whole"))
    said = text(opened(PARETO, run="kept", runs="whole"))
    assert "These runs replaced different positions" in said
    assert "(kept: counted; whole: all)" in said
    assert "python -m gsae_core evaluate RUN --replace counted" in said


def test_numbers_of_another_text_are_marked_on_every_page_that_shows_them(root: Path) -> None:
    write_run(root, "own")
    rewrite(write_run(root, "other"), text="a.txt")
    mark = "other: measured on a.txt, not on the run"  # then an apostrophe, as HTML has it
    for page in (PARETO, SHRINKAGE):
        assert mark in text(opened(page, run="other"))
        assert "measured on a.txt" not in text(opened(page, run="own"))
    said = text(opened(PARETO, run="own", runs="other", pick=["other/gated-0.1"]))
    assert mark in said
    assert "Different model, site or text: not comparable (own: " in said
    assert "tokens of a.txt, not the run" in said


def test_a_run_whose_saes_all_failed_says_so(root: Path) -> None:
    run = write_run(root, "empty")
    (run.folder / "evals.json").write_text(json.dumps({"saes": []}), encoding="utf-8")
    for page in (PARETO, SHRINKAGE):
        at = opened(page)
        assert "none of its SAEs could be evaluated" in text(at)


def test_an_imported_run_says_how_to_measure_it(root: Path) -> None:
    run = write_run(root, "theirs", run_config=one_pair(imported="SAELens"))
    (run.folder / "evals.json").unlink()
    for page in (PARETO, SHRINKAGE):
        at = opened(page)
        said = text(at)
        assert (
            "theirs was imported and has not been measured here. Measure it: "
            f"python -m gsae_core evaluate {run.folder}"
        ) in said
        assert "could be evaluated" not in said


# Shrinkage


def test_hiding_rare_features_states_how_many_are_left(root: Path) -> None:
    run = write_run(root, "done")
    stats = run.feature_stats("gated-0.1")
    at = opened(SHRINKAGE, run="done", gated="gated-0.1", minfire="100")
    left = sum(count >= 100 for count in stats["fired"])
    assert f"{left:,} of 512 features fired on 100 tokens or more" in text(at)


def test_the_three_gammas_are_those_of_the_evaluation(root: Path) -> None:
    write_run(root, "done")
    at = opened(SHRINKAGE, run="done", gated="gated-0.4", base="relu-0.4")
    # 0.985 + 0.02 0.4, 0.9 - 0.3 0.4 and 0.95 - 0.22 0.4
    assert [metric.value for metric in at.metric] == ["0.993", "0.780", "0.862"]
    assert all(len(metric.help) > 20 for metric in at.metric)


def test_the_median_over_features_is_told_from_the_gamma_of_the_sae(root: Path) -> None:
    run = write_run(root, "done")
    own = sorted(run.feature_stats("gated-0.4").query("fired >= 30")["gamma"])
    half = len(own) // 2
    median = (own[half] + own[-1 - half]) / 2
    assert f"{median:.3f}" != "0.993"  # the SAE's
    at = opened(SHRINKAGE, run="done", gated="gated-0.4", base="relu-0.4")
    assert f"tokens or more; the median of their own γ is {median:.3f}." in text(at)
    assert (
        "γ at the top of the page measures whole reconstructions, over all tokens. γ here measures "
        "one feature's part of them, with all other parts left as they are. The median counts "
        "every feature once, rare and weak ones too, so it may be far from the SAE's γ."
    ) in [each.value for each in at.caption]


def test_no_baseline_run_on_pareto_is_not_no_baseline_here(root: Path) -> None:
    write_run(root, "done")
    at = opened(PARETO, run="done")
    assert at.selectbox(key="base").value is None
    at.switch_page(SHRINKAGE).run()
    assert labelled(at.selectbox, "Baseline").value.startswith("relu-")


def test_a_baseline_chosen_on_pareto_is_still_there_after_one_on_shrinkage(root: Path) -> None:
    for name in ("done", "other"):
        write_run(root, name)
    at = opened(PARETO, run="done", base="other")
    at.switch_page(SHRINKAGE).run()
    labelled(at.selectbox, "Baseline").set_value("relu-0.1").run()
    assert at.query_params["base"] == "relu-0.1"
    at.switch_page(PARETO).run()
    assert at.selectbox(key="base").value == "other"
    at.switch_page(SHRINKAGE).run()
    assert labelled(at.selectbox, "Baseline").value == "relu-0.1"


def test_a_bin_lists_its_features(root: Path) -> None:
    run = write_run(root, "done")
    at = opened(SHRINKAGE, run="done", gated="gated-0.4", bin="1.000 to 1.025")
    found = at.dataframe[-1].value
    assert {"sae", "latent", "gamma", "density", "fired", "gate_open"} == set(found.columns)
    assert found["gamma"].between(1.0, 1.025).all()
    own = found[found["sae"] == "gated-0.4"]
    stats = run.feature_stats("gated-0.4").query("fired >= 30 and 1 <= gamma < 1.025")
    assert sorted(own["latent"]) == sorted(stats.index)


def test_a_limit_that_hides_everything_says_so_and_can_be_lifted(root: Path) -> None:
    run = write_run(root, "done", run_config=one_pair())
    for spec in run.config.saes:
        from safetensors.numpy import load_file, save_file

        path = run.sae_folder(spec.name) / "feature_stats.safetensors"
        columns = load_file(path)
        save_file(columns | {"fired": columns["fired"].clip(0, 500)}, path)
    at = opened(SHRINKAGE, run="done", minfire="1000")
    assert "0 of 64 features fired on 1,000 tokens or more." in text(at)
    assert "hides every feature; lower it" in text(at)
    at.button(key="shrinkage.show_all").click().run()
    assert at.select_slider(key="minfire").value == 1
    assert "hides every feature" not in text(at)


def test_a_run_measured_before_lengths_were_is_told_the_command(root: Path) -> None:
    run = write_run(root, "old", run_config=one_pair())
    for spec in run.config.saes:
        (run.sae_folder(spec.name) / "norm_deciles.json").unlink()
    at = opened(SHRINKAGE, run="old")
    assert "Lengths cannot be shown" in text(at)
    assert at.code[0].value == f"python -m gsae_core evaluate {run.folder}"
    assert "Feature by feature" in text(at)  # the rest of the page is there


def test_a_run_without_feature_statistics_says_so(root: Path) -> None:
    run = write_run(root, "done", run_config=one_pair())
    for spec in run.config.saes:
        (run.sae_folder(spec.name) / "feature_stats.safetensors").unlink()
    assert "No per-feature numbers yet" in text(opened(SHRINKAGE))


def test_what_the_address_of_shrinkage_gets_wrong_is_said(root: Path) -> None:
    write_run(root, "done", run_config=one_pair())
    bad = {"gated": "none", "base": HOSTILE, "minfire": "-3", "bin": "left", "lengths": "km"}
    at = opened(SHRINKAGE, run="done", **bad)
    for value in ("none", "-3", "left", "km"):
        assert f"asks for &#x27;{value}&#x27;" in text(at)
    assert "<img" not in text(at)


def test_a_card_opens_shrinkage_with_its_sae(root: Path) -> None:
    write_run(root, "done")
    at = opened(SHRINKAGE, run="done")
    assert labelled(at.selectbox, "Gated SAE").value != "gated-0.1"
    at.session_state["shrinkage.open_sae"] = "gated-0.1"
    at.run()
    assert labelled(at.selectbox, "Gated SAE").value == "gated-0.1"


@pytest.mark.parametrize("page", [PARETO, SHRINKAGE])
def test_wide_saes_and_rows_without_numbers_are_shown(root: Path, page: str) -> None:
    run = write_run(root, "wide", run_config=one_pair(16_384))
    evals = run.evals()
    for name in ("kl", "gamma", "cosine"):
        evals[0][name] = None
    (run.folder / "evals.json").write_text(json.dumps({"saes": evals}), encoding="utf-8")
    at = opened(page, run="wide", ym="KL")
    if page == PARETO:
        assert "1 of 2 SAEs are not shown" in text(at)
    else:
        assert "16,384 features" in text(at)


@pytest.mark.parametrize("page", [PARETO, SHRINKAGE])
def test_all_four_architectures_are_shown(root: Path, page: str) -> None:
    saes = sweep(["gated", "relu", "jumprelu"], [0.2], 64) + sweep(["topk"], [16], 64)
    write_run(root, "four", run_config=config().model_copy(update={"saes": saes}))
    at = opened(page, run="four", pick=["four/topk-16"])
    if page == PARETO:
        assert "TopK, k 16, 64 features" in text(at)
    else:
        assert labelled(at.selectbox, "Baseline").options[0] == "relu-0.2"


def test_helpers_of_the_address_leave_what_it_gets_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from gsae_core.app import parts

    said: list[str] = []
    query = SimpleNamespace(get_all=lambda key: {"runs": ["a", "x" * 200]}.get(key, []))
    state = {"runs": ["a", "gone"], "base": "gone", "other": 3}
    monkeypatch.setattr(parts, "st", SimpleNamespace(query_params=query, session_state=state))
    monkeypatch.setattr(parts, "plain", lambda words, size: said.append(words))
    parts.correct("runs", ["a"], what="run", shown="a")
    parts.correct("base", ["a"], what="run", shown="a")
    parts.correct("other", ["a"], what="run", shown="a")
    assert state == {"runs": ["a"], "other": 3}
    (sentence,) = said
    assert sentence == f"The address asks for '{'x' * 80}…', which is no run; showing a."
