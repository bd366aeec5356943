"""Train in a real browser: click the site, see what it takes, start; by the keyboard alone too.

Run with `python -m pytest tests/browser/test_train.py -m browser`.
"""

import re
from pathlib import Path

import pytest
from driver import FOCUSED, at_rest, filtered, sees, tab_to
from playwright.sync_api import Page, expect
from synthetic import config

from gsae_core.runs.run import Run, list_runs

TINY = "tokens=8192&batch_size=1024&width=64&sparsity=0.3&eval_tokens=2048&device=cpu"


def opened(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.get_by_role("radiogroup", name="Site in the block")).to_be_visible()
    at_rest(page)


def started_by(runs: Path, before: list[Run]) -> Run:
    (new,) = [run for run in list_runs(runs) if run.id not in {old.id for old in before}]
    return new


def test_a_click_in_the_block_changes_the_field_the_address_and_what_it_takes(
    page: Page, address: str
) -> None:
    opened(page, f"{address}/Train")
    memory = page.get_by_role("meter", name="Memory")
    before = memory.get_attribute("aria-valuenow")
    page.get_by_role("radio", name=re.compile("^mlp_hidden")).click()
    page.wait_for_url(re.compile("site=mlp_hidden"))
    chosen = page.get_by_role("radio", name=re.compile("^mlp_hidden"))
    expect(chosen).to_have_attribute("aria-checked", "true")
    expect(page.get_by_text("after the activation function, 1,024 wide")).to_be_visible()
    expect(memory).not_to_have_attribute("aria-valuenow", before or "")
    page.get_by_role("radio", name="block 1").click()
    page.wait_for_url(re.compile("layer=1"))
    expect(page.get_by_label("Layer", exact=True)).to_have_value("1")


def test_the_field_beside_it_moves_the_picture(page: Page, address: str) -> None:
    opened(page, f"{address}/Train?site=attn_out")
    picture = page.get_by_role("radiogroup", name="Site in the block")
    expect(picture.locator("[aria-checked=true]")).to_contain_text("attn_out")
    filtered(page, "Site", "resid_pre")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("site=resid_pre"))
    expect(picture.locator("[aria-checked=true]")).to_contain_text("resid_pre")


def test_by_the_keyboard_alone_from_the_site_to_a_finished_run(
    page: Page, address: str, runs: Path
) -> None:
    before = list_runs(runs)
    opened(page, f"{address}/Train?{TINY}")
    tab_to(page, "resid_post")
    page.keyboard.press("ArrowDown")  # from the last site round to none: the one before it
    page.wait_for_url(re.compile("site=mlp_out"))
    expect(page.get_by_text("What the mlp adds to the residual stream, 256 wide")).to_be_visible()
    at_rest(page)
    assert page.evaluate(FOCUSED).startswith("mlp_out")  # the focus stays where one works
    tab_to(page, "play_arrow")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Live")
    run = started_by(runs, before)
    page.wait_for_url(re.compile(run.id))
    assert run.config.model.site == "mlp_out"
    expect(page.get_by_text("● finished")).to_be_visible(timeout=300_000)
    assert run.status.state == "finished"


def test_two_presses_at_once_start_one_run(page: Page, address: str, runs: Path) -> None:
    before = list_runs(runs)
    opened(page, f"{address}/Train?{TINY}&seed=5")
    page.get_by_role("button", name=re.compile("Start 8.19 k")).dblclick()
    expect(page.get_by_role("heading", level=1)).to_have_text("Live")
    at_rest(page)
    assert started_by(runs, before).config.seed == 5


def test_duplicating_a_run_fills_the_form_whatever_stood_in_it(page: Page, address: str) -> None:
    opened(page, f"{address}/Train")
    page.get_by_label("Tokens", exact=True).fill("5000")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("tokens=5000"))
    page.get_by_role("link", name="Live").click()
    sees(page, "Live")
    page.goto(f"{address}/Live?run=done")
    page.get_by_role("button", name=re.compile("Duplicate")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Train")
    expect(page.get_by_label("λ", exact=True)).to_have_value("0.1 0.2 0.4 0.8")
    expect(page.get_by_label("Tokens", exact=True)).to_have_value("1,048,576")
    assert [spec.sparsity for spec in config().saes[:2]] == [0.1, 0.2]


@pytest.mark.parametrize("width", [700, 1400])
def test_nothing_sticks_out_of_the_page(page: Page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    opened(page, f"{address}/Train?peek=true")
    expect(page.get_by_role("list", name="First lines as tokens")).to_be_visible()
    main = page.get_by_test_id("stMain")
    assert main.evaluate("node => node.scrollWidth <= node.clientWidth")
