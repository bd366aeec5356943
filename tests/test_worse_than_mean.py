"""An SAE that the mean activation would beat (FVU above 1) is marked wherever it is shown."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from app_pages import opened, text
from synthetic import config, write_run

from gsae_core.analysis.results import evaluation_frame, several_runs
from gsae_core.app.live_view import latest_values
from gsae_core.cli import main
from gsae_core.cli.report import evals_table
from gsae_core.config import sweep
from gsae_core.plots.pareto import traces, tradeoff
from gsae_core.plots.shrinkage import gamma_over_sweep
from gsae_core.runs.run import Run, example_run
from gsae_core.runs.work.publish import make_card
from gsae_core.text import is_worse_than_mean, marked_fvu, worse_than_mean

BAD = "relu-0.2"
SENTENCE = f"⚠ FVU above 1: {BAD} reconstructs worse than the mean activation"


def set_fvu(run: Run, name: str, fvu: float) -> None:
    rows = [row | ({"fvu": fvu} if row["name"] == name else {}) for row in run.evals()]
    (run.folder / "evals.json").write_text(json.dumps({"saes": rows}), encoding="utf-8")


@pytest.fixture
def bad(root: Path) -> Run:
    """A finished run of two SAEs, the ReLU one with an FVU of 2.643."""
    pair = config().model_copy(update={"saes": sweep(["gated", "relu"], [0.2], 64)})
    run = write_run(root, "bad", run_config=pair)
    set_fvu(run, BAD, 2.643)
    return run


def test_the_mark_stands_from_above_one_on() -> None:
    worse = [is_worse_than_mean(fvu) for fvu in (0.5, 1.0, 1.0001, math.nan, None)]
    assert worse == [False, False, True, False, False]
    assert marked_fvu(2.64321) == "⚠ 2.643"
    assert marked_fvu(1.0, 4) == "1.0000"
    assert marked_fvu(None) == "–"


def test_the_sentence_names_them() -> None:
    assert worse_than_mean({"a": 0.2, "b": 1.5}) == (
        "⚠ FVU above 1: b reconstructs worse than the mean activation"
    )
    assert worse_than_mean({"a": 7.6, "b": 1.5}) == (
        "⚠ FVU above 1: a, b reconstruct worse than the mean activation"
    )
    assert worse_than_mean({"a": 1.0, "b": None}) == ""


def test_the_table_of_train_and_evaluate_marks_it(bad: Run) -> None:
    *_, line, last = evals_table(bad.evals())
    assert line.split()[:1] == [BAD]
    assert "⚠ 2.6430" in line
    assert last == SENTENCE
    set_fvu(bad, BAD, 0.9)
    assert len(evals_table(bad.evals())) == 3  # head and two SAEs


def test_list_marks_it_in_a_run_and_among_runs(
    bad: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(root, "good")
    assert main.main(["list", str(bad.folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[-3:] == ["L0", "FVU", "from"]
    (line,) = [line for line in said if line.startswith(BAD)]
    assert "⚠ 2.6430" in line
    assert said[-1] == SENTENCE
    assert main.main(["list", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"bad: {SENTENCE}"


def test_a_damaged_evaluation_costs_list_a_line(
    bad: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bad.folder / "evals.json").write_text("{")
    assert main.main(["list", str(root)]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("bad: expected")


def test_pareto_marks_its_row_its_point_and_its_card(bad: Run) -> None:
    at = opened("pages/3_Pareto.py", run="bad", pick=[f"bad/{BAD}"])
    (table,) = [t.value for t in at.dataframe if "architecture" in t.value]
    assert dict(zip(table["name"], table["worse"], strict=True)) == {"gated-0.2": "", BAD: "⚠"}
    assert list(table.columns).index("worse") == list(table.columns).index("d_sae") + 1
    assert "⚠ 2.643" in [metric.value for metric in at.metric]
    assert text(at).count(SENTENCE) == 2  # the card and the table


def test_pareto_keeps_the_marks_beside_changes_against_a_baseline(bad: Run, root: Path) -> None:
    write_run(root, "good")
    at = opened("pages/3_Pareto.py", run="bad", base="good")
    (table,) = [t.value for t in at.dataframe if "architecture" in t.value]
    assert list(table["worse"]).count("⚠") == 1
    assert "change_fvu" in table
    assert f"bad/{BAD} reconstructs" in text(at)


def test_without_such_an_sae_there_is_no_mark(root: Path) -> None:
    write_run(root, "good")
    at = opened("pages/3_Pareto.py", run="good")
    (table,) = [t.value for t in at.dataframe if "architecture" in t.value]
    assert "worse" not in table
    assert "⚠" not in text(at)


def crosses(figure: object) -> list[tuple[float, float]]:
    return [
        (trace.x[0], trace.y[0])
        for trace in traces(figure)  # pyright: ignore[reportArgumentType]
        if trace.name and trace.name.startswith("⚠ FVU above 1")
    ]


def test_its_points_are_crossed(bad: Run) -> None:
    frame = evaluation_frame(bad.evals())
    row = next(row for row in bad.evals() if row["name"] == BAD)
    plane = tradeoff(several_runs({"bad": frame}), "loss_recovered")
    assert crosses(plane) == [(row["l0"], row["loss_recovered"])]
    assert crosses(gamma_over_sweep(frame)) == [(row["l0"], row["gamma"])]
    assert crosses(tradeoff(pd.DataFrame(frame[frame["name"] != BAD]))) == []


def test_shrinkage_home_and_live_mark_it(bad: Run) -> None:
    assert SENTENCE in text(opened("pages/4_Shrinkage.py", run="bad"))
    home = opened("app.py")
    (table,) = [t.value for t in home.dataframe]
    assert list(table["note"]) == ["⚠ 1 worse than the mean activation"]
    assert "bad is the newest result: 2 SAEs; ⚠ 1 worse than the mean activation." in text(home)


def test_live_marks_it_by_the_latest_values(bad: Run) -> None:
    lines = [json.loads(line) for line in (bad.folder / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row["fvu"] = 7.6 if row["sae"] == BAD else 0.3
    (bad.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    assert SENTENCE in text(opened("pages/2_Live.py", run="bad"))
    rows = latest_values({BAD: {"fvu": 7.6}, "gated-0.2": {"fvu": 0.3}})
    assert [row["FVU"] for row in rows] == ["⚠ 7.600", "0.300"]


def test_the_card_of_the_hub_marks_it(bad: Run) -> None:
    card = make_card(bad, ["gated-0.2", BAD], "ada/mine")["README.md"]
    assert "| ⚠ 2.6430 |" in card
    assert "⚠ FVU above 1: relu-0.2 reconstructs worse than the mean activation." in card
    assert "⚠" not in make_card(bad, ["gated-0.2"], "ada/mine")["README.md"]


@pytest.mark.parametrize(
    "page",
    [
        "pages/5_Features.py",
        # These load a language model; their pickers are the same.
        pytest.param("pages/6_Prompt.py", marks=pytest.mark.slow),
        pytest.param("pages/7_Steer.py", marks=pytest.mark.slow),
    ],
)
def test_pages_that_look_through_an_sae_say_it_first(root: Path, page: str) -> None:
    shipped = example_run()
    assert shipped is not None
    shutil.copytree(shipped.folder, root / "mine")
    run = Run.open(root / "mine")
    name = run.config.saes[0].name
    set_fvu(run, name, 1.2)
    at = opened(page, run="mine", sae=name)
    assert f"⚠ FVU above 1: {name} reconstructs worse than the mean activation." in text(at)
