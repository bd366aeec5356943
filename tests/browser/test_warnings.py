"""What a run is too short for, and SAEs that the mean activation would beat, in a real browser.

Run with `python -m pytest tests/browser/test_warnings.py -m browser`.
"""

import json
import shutil
from collections.abc import Iterator

import pytest
from driver import at_rest, opened, serving
from playwright.sync_api import Page, expect
from synthetic import config, write_run

from gsae_core.config import sweep
from gsae_core.runs.run import example_run

BAD = "⚠ FVU above 1: relu-0.2 reconstructs worse than the mean activation."
PEAK = "lie within the learning-rate warm-up of"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a run that ended inside its warm-up, its ReLU SAE with an FVU of 2.6."""
    root = tmp_path_factory.mktemp("runs")
    train = config().train.model_copy(update={"lr_warmup_steps": 1000})
    saes = sweep(["gated", "relu"], [0.1, 0.2, 0.4], 512)
    run = write_run(
        root, "short", run_config=config().model_copy(update={"train": train, "saes": saes})
    )
    evals = [row | ({"fvu": 2.6} if row["name"] == "relu-0.2" else {}) for row in run.evals()]
    (run.folder / "evals.json").write_text(json.dumps({"saes": evals}))
    path = run.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | ({"fvu": 2.6} if row["sae"] == "relu-0.2" else {}) for row in rows]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shipped = example_run()
    assert shipped is not None
    shutil.copytree(shipped.folder, root / "mine")
    path = root / "mine" / "evals.json"
    evals = json.loads(path.read_text())["saes"]
    path.write_text(json.dumps({"saes": [row | {"fvu": 1.5} for row in evals]}))
    with serving(root) as address:
        yield address


def test_train_says_what_the_run_is_too_short_for_and_hears_when_it_is_mended(
    page: Page, address: str
) -> None:
    opened(page, f"{address}/Train?tokens=40960")  # 20 steps, and a warm-up of 20
    warning = page.get_by_role("status").filter(has_text=PEAK)
    expect(warning).to_contain_text("All 20 steps lie within the learning-rate warm-up of 20")
    field = page.get_by_role("textbox", name="Tokens")
    field.fill("400000")
    field.press("Enter")
    expect(warning).to_have_count(0)
    expect(page.get_by_text("rises over 20 steps, falls over the last 39")).to_be_visible()


def test_live_says_it_and_marks_the_sae(page: Page, address: str) -> None:
    opened(page, f"{address}/Live?run=short")
    expect(page.get_by_role("status").filter(has_text=PEAK)).to_contain_text("All 512 steps")
    expect(page.get_by_role("status").filter(has_text="FVU above 1")).to_have_text(BAD)


def test_pareto_and_shrinkage_mark_the_sae(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=short&pick=short%2Frelu-0.2")
    expect(page.get_by_text(BAD)).to_have_count(2)  # the card and the table
    expect(page.locator(".legendtext").filter(has_text="FVU above 1")).to_be_visible()
    expect(page.get_by_text("⚠ 2.600")).to_be_visible()
    opened(page, f"{address}/Shrinkage?run=short&base=relu-0.2")
    expect(page.get_by_text(BAD)).to_be_visible()


@pytest.mark.parametrize("name", ["Features", "Prompt", "Steer"])
def test_pages_that_look_through_an_sae_mark_it(page: Page, address: str, name: str) -> None:
    opened(page, f"{address}/{name}?run=mine")
    at_rest(page)
    expect(page.get_by_role("status").filter(has_text="FVU above 1")).to_contain_text(
        "reconstruct worse than the mean activation."
    )


def test_home_counts_them(page: Page, address: str) -> None:
    opened(page, address)
    expect(page.get_by_text("⚠ 1 worse than the mean activation").first).to_be_visible()
