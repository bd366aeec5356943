"""Prompt and Steer in a real browser: what is clicked, what the address keeps, what is hostile.

Run with `python -m pytest tests/browser/test_prompt_steer.py -m browser`.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from app_pages import NASTY
from driver import at_rest, eventually, opened, serving
from playwright.sync_api import Page, expect
from tokenizers_of_each_kind import llama_run

from gsae_core.analysis.prompt import read_prompt
from gsae_core.cli import main as cli
from gsae_core.lm.model import load_model

SMALL = [
    *("train", "--model", "bundled", "--layer", "2", "--arch", "gated", "relu"),
    *("--sparsity", "0.2", "--width", "64", "--tokens", "16384", "--batch-size", "1024"),
    *("--eval-tokens", "4096", "--lr-warmup-steps", "2", "--device", "cpu"),
]
TEXT = "import%20json%0Adef%20f(x):%0A"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: small SAEs on the bundled model, and on a Llama."""
    root = tmp_path_factory.mktemp("runs")
    assert cli.main([*SMALL, "--out", str(root / "small")]) == 0
    assert cli.main(llama_run(root)) == 0
    return root


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as address:
        yield address


def strip(page: Page):
    return page.locator(".picker [role=option]")


def test_a_click_on_a_token_shows_its_features(page: Page, address: str) -> None:
    opened(page, f"{address}/Prompt?run=small&text={TEXT}")
    expect(strip(page).nth(1)).to_have_text("import")
    strip(page).nth(1).click()
    expect(page.get_by_text("token 1, ‘import’").first).to_be_visible()
    expect(strip(page).nth(1)).to_have_attribute("aria-selected", "true")
    page.wait_for_url(re.compile("tok=1"))
    page.reload()
    at_rest(page)
    expect(page.get_by_text("token 1, ‘import’").first).to_be_visible()


def next_token(page: Page) -> tuple[str, list[str], str]:
    """Return what the box of next tokens shows, its list, and the token attribution is to."""
    at_rest(page)
    box = page.get_by_label("Next token", exact=True)
    box.click()
    rows = page.get_by_role("option").filter(has_text="%")
    expect(rows.first).to_be_visible()
    offered = rows.all_inner_texts()
    box.press("Escape")
    table = page.get_by_label(re.compile("^Features that fire on the token:"))
    (to,) = table.evaluate_all("tables => tables.map(table => table.getAttribute('aria-label'))")
    words = [" ".join(text.split()) for text in (box.input_value(), *offered, to)]
    return words[0], words[1:-1], words[-1].partition("attribution to ")[2]


def test_the_next_token_is_of_the_token_that_was_clicked(page: Page, address: str) -> None:
    opened(page, f"{address}/Prompt?run=example")
    heads = {}
    for token in (9, 14, 20, 3):
        strip(page).nth(token).click()
        expect(page.get_by_text(f"token {token}, ‘").first).to_be_visible()
        at_rest(page)
        page.wait_for_timeout(1000)  # a box that keeps what it showed keeps it then
        shown, offered, to = next_token(page)
        assert shown == offered[0] == to, token
        assert "follows here" in shown
        heads[token] = shown
    assert heads[14].startswith("·open ")
    assert heads[20].startswith("utf ")
    field = page.get_by_role("textbox", name="Text")
    field.fill("import os\n")
    field.press("Control+Enter")
    expect(page.get_by_text("token 3, ‘↵").first).to_be_visible()  # the text's last
    page.wait_for_timeout(1000)
    shown, offered, to = next_token(page)
    assert shown == offered[0] == to
    assert "follows" not in shown


def test_a_token_is_picked_by_keyboard_and_says_its_value_on_focus(
    page: Page, address: str
) -> None:
    opened(page, f"{address}/Prompt?run=small&text={TEXT}&tok=1")
    strip(page).nth(1).focus()
    expect(page.locator(".picker .tip")).to_contain_text("active features")
    page.keyboard.press("ArrowRight")
    expect(strip(page).nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("token 2, ‘·j").first).to_be_visible()


def test_spaces_and_split_characters_of_sentencepiece_are_shown(
    page: Page, address: str, runs: Path
) -> None:
    opened(page, f"{address}/Prompt?run=spaces&text=the%20pond%20%F0%9F%98%80%20the&tok=5")
    expect(strip(page)).to_have_text(["<s>", "the", "·pond", "·", "😀", "∅", "∅", "∅", "·the"])
    expect(page.get_by_text("token 5, ‘∅’").first).to_be_visible()
    strip(page).nth(5).focus()
    expect(page.locator(".picker .tip")).to_contain_text("∅: the rest of the character before it")
    opened(page, f"{address}/Steer?run=spaces&text=the%20pond&f=1&s=0&len=20&temp=0")
    at_rest(page)
    model = load_model(str(runs / "llama"))
    ids = read_prompt(model, "the pond").ids[0].tolist()
    for _ in range(20):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    # What a whole text is decoded to, the library says rightly; of ours the prompt is in front.
    text = model.tokenizer.decode(ids)
    assert text.startswith("<s> the pond")
    assert " " in text.removeprefix("<s> the pond").strip()
    written = page.locator("div[dir=ltr]").first.text_content()
    assert f"<s> the pond{written}" == text


def test_a_feature_is_taken_from_prompt_to_steer_with_its_text(page: Page, address: str) -> None:
    opened(page, f"{address}/Prompt?run=small&text={TEXT}&tok=1")
    page.get_by_role("button", name="Steer this feature").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Steer")
    at_rest(page)
    expect(page.get_by_label("Prompt")).to_have_value("import json\ndef f(x):\n")
    expect(page.get_by_label("Feature", exact=True)).not_to_have_value("")
    expect(page.get_by_text("KL, next token (nats)").first).to_be_visible()
    page.wait_for_url(re.compile(r"f=\d+"))
    assert page.get_by_test_id("stException").count() == 0


def test_a_cold_link_to_steer_shows_all_it_names(page: Page, address: str) -> None:
    opened(page, f"{address}/Steer?run=small&f=3&s=-2&mode=clamp&seed=7&len=20&text={TEXT}")
    expect(page.get_by_label("Seed")).to_have_value("7")
    expect(
        page.get_by_text("unsteered 20 tokens").or_(page.get_by_text("ended before 20"))
    ).to_be_visible()
    expect(page.get_by_text("decoder cosine")).to_be_visible()
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_test_id("stCode").first).to_contain_text("f=3")
    expect(page.get_by_test_id("stCode").first).to_contain_text("mode=clamp")


# The model writes no more than 30 tokens until a file is there: a fast machine would otherwise end
# before a browser has pressed a button.
WAITING = """
import time
from pathlib import Path
from gsae_core.app import steer_view

advance = steer_view.advance

def advance_when_told(run, generation):
    if sum(map(len, generation.tokens.values())) >= 30 and not Path({told!r}).exists():
        time.sleep(0.05)
        return True
    return advance(run, generation)

steer_view.advance = advance_when_told
"""


def test_a_long_continuation_is_stopped_and_goes_on(page: Page, runs: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    stopped = page.get_by_text("Stopped. Continue adds the remaining tokens.")
    with serving(runs, prepared=WAITING.format(told=str(told))) as address:
        page.goto(f"{address}/Steer?run=small&f=3&s=0&len=200&temp=2&seed=3&text={TEXT}")
        page.get_by_role("button", name="Stop generating").click()
        expect(stopped).to_be_visible()
        told.touch()
        page.get_by_role("button", name="Continue").click()
        expect(stopped).to_be_hidden()
        at_rest(page)
        ended = page.get_by_text("ended before 200")
        expect(page.get_by_text("unsteered 200 tokens").or_(ended)).to_be_visible()
        expect(page.get_by_role("button", name="Continue")).to_be_hidden()


def test_no_column_of_prompts_tables_is_cut(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 1360, "height": 1500})
    opened(page, f"{address}/Prompt?run=example&text={TEXT}")
    tables = page.locator(".dvn-scroller")
    expect(tables).to_have_count(2)
    hidden = "nodes => nodes.map(node => node.scrollWidth - node.clientWidth)"
    eventually(lambda: tables.evaluate_all(hidden) == [0, 0])


@pytest.mark.parametrize("name", ["Prompt", "Steer"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hangs_out_of_a_narrow_window(
    page: Page, address: str, name: str, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 400, "height": 900})
    opened(page, f"{address}/{name}?run=small&f=3&text={TEXT}")
    main = page.get_by_test_id("stMain")
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 1
    assert page.get_by_test_id("stException").count() == 0


def test_hostile_text_is_shown_and_never_obeyed(page: Page, address: str) -> None:
    opened(page, f"{address}/Prompt?run=small&text={TEXT}")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    field = page.get_by_role("textbox", name="Text")
    for nasty in NASTY:
        if len(nasty) > 500:
            continue
        field.fill(nasty)
        field.press("Control+Enter")
        expect(page.get_by_text("tokens, read in").first).to_be_visible()
        at_rest(page)
        assert page.get_by_test_id("stException").count() == 0
        assert page.locator("img[src='x'], img[src*='evil'], form[action*='evil']").count() == 0
        assert page.evaluate("window.owned") is None
        assert page.title().startswith("Prompt")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == body


def test_a_run_that_goes_while_it_is_looked_through_is_named(
    page: Page, address: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = next(Path(tmp_path_factory.getbasetemp()).glob("runs*/small")).parent
    shutil.copytree(root / "small", root / "victim")
    opened(page, f"{address}/Prompt?run=victim&text={TEXT}")
    expect(strip(page).nth(1)).to_have_text("import")
    shutil.rmtree(root / "victim")
    strip(page).nth(2).click()
    expect(page.get_by_text("Run victim is not on this machine")).to_be_visible()
    assert page.get_by_test_id("stException").count() == 0
