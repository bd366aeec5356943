"""The whole path in a real browser: from Home to the results; links, history, zoom, keyboard.

Run with `python -m pytest tests/browser -m browser`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from app_pages import circuit
from driver import (
    FOCUSED,
    PAGES,
    Watch,
    at_rest,
    eventually,
    opened,
    sees,
    serving,
    tab_to,
)
from playwright.sync_api import Page, expect
from synthetic import write_run

from gsae_core.runs.run import Run, list_runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, for servers that nobody has asked anything yet."""
    root = tmp_path_factory.mktemp("cold")
    write_run(root, "done")
    return root


@pytest.mark.parametrize("name", PAGES)
def test_a_link_is_the_first_thing_asked_of_a_server_and_opens_in_its_frame(
    page: Page, results: Path, name: str
) -> None:
    with serving(results) as address:
        opened(page, f"{address}/{name}?run=done")
        sees(page, name or "Home")
        assert "run=done" in page.url
        assert page.title().startswith(name or "Home")
        expect(page.get_by_test_id("stSidebar").get_by_role("link", name="Pareto")).to_be_visible()
        page.goto("about:blank")


def started_since(runs: Path, before: set[str]) -> Run:
    eventually(lambda: {run.id for run in list_runs(runs)} > before)
    (new,) = [run for run in list_runs(runs) if run.id not in before]
    return new


def fill(page: Page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    at_rest(page)


def test_from_home_to_the_results_with_a_refresh_on_the_way(
    page: Page, address: str, runs: Path
) -> None:
    before = {run.id for run in list_runs(runs)}
    opened(page, address)
    page.get_by_role("button", name="Choose settings").click()
    sees(page, "Train")
    fill(page, "Tokens", "32768")
    fill(page, "λ", "0.2 0.6")
    fill(page, "Learning rate", "0.002")
    page.get_by_text("Advanced").click()
    fill(page, "Evaluation tokens", "8192")
    page.get_by_role("button", name=re.compile("Start 32.8 k")).click()
    sees(page, "Live")
    run = started_since(runs, before)
    page.wait_for_url(re.compile(run.id))
    expect(page.get_by_text("◑ running")).to_be_visible()
    page.reload()  # the job is its own process
    expect(page.get_by_text(f"Reconnected to {run.id}")).to_be_visible()
    expect(page.get_by_text("● finished")).to_be_visible(timeout=300_000)
    assert run.status.state == "finished"
    expect(page.get_by_text("Reconnected")).to_have_count(0)
    page.get_by_role("button", name="See the results").click()
    sees(page, "Pareto")
    expect(page.get_by_text("Matched L0 ratio")).to_be_visible()
    page.get_by_role("link", name="Shrinkage").click()
    sees(page, "Shrinkage")
    expect(page.get_by_text("γ gated, gate path")).to_be_visible()
    expect(page.get_by_text(re.compile(r"^ReLU baseline, λ .* · L0"))).to_be_visible()
    assert run.id in page.url
    page.get_by_role("link", name="Home").click()
    sees(page, "Home")
    page.get_by_role("button", name="Latest results").click()
    sees(page, "Pareto")
    page.wait_for_url(re.compile(run.id))


def test_home_opens_the_latest_results_whatever_run_was_chosen(
    page: Page, address: str, runs: Path
) -> None:
    write_run(runs, "failed", "failed", share=0.5, error="the disk was full")
    opened(page, f"{address}/?run=failed")
    page.get_by_role("button", name="Latest results").click()
    sees(page, "Pareto")
    assert "run=failed" not in page.url


# Text of the page's own that its box does not hold: cut off, or behind an ellipsis.
CUT = """() => [...document.querySelectorAll('[data-testid=stMain] *')].filter(node => {
  if (node.closest('svg, canvas, [data-testid=stDataFrame], [role=listitem], pre, input')) return
  const style = getComputedStyle(node)
  const text = [...node.childNodes].some(c => c.nodeType == 3 && c.textContent.trim())
  const hides = style.overflowX != 'visible' && style.overflowX != 'auto'
  return text && hides && node.clientWidth > 1 && node.scrollWidth > node.clientWidth + 1
}).map(node => node.textContent.trim().slice(0, 60))"""


def test_at_two_hundred_percent_nothing_hangs_out_and_nothing_is_cut(
    new_visitor: Callable[..., tuple[Page, Watch]], address: str
) -> None:
    # A window of 1360 pixels at 200 %: half as many of twice the size.
    page, _ = new_visitor(viewport={"width": 680, "height": 500}, device_scale_factor=2)
    for name in PAGES:
        opened(page, f"{address}/{name}?run=done")
        sees(page, name or "Home")
        page.wait_for_timeout(300)
        for part in ("document.documentElement", "document.querySelector('[data-testid=stMain]')"):
            wider = page.evaluate(f"{part}.scrollWidth - {part}.clientWidth")
            assert wider <= 1, f"{name or 'Home'} is {wider} px too wide"
        assert page.evaluate(CUT) == [], name or "Home"


def test_back_and_forward_lead_through_the_pages_seen(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done&ym=KL")
    page.get_by_role("link", name="Shrinkage").click()
    sees(page, "Shrinkage")
    page.go_back()
    sees(page, "Pareto")
    expect(page.get_by_text("KL divergence (nats per token)").first).to_be_visible()
    page.go_forward()
    sees(page, "Shrinkage")


def parameters(page: Page) -> dict[str, str]:
    """Return what the address says now; `page.url` is of the last time the browser was asked."""
    return dict(parse_qsl(page.evaluate("location.search.slice(1)")))


def shows_run(page: Page, name: str) -> None:
    """Wait until a page shows a run, and its address says so."""
    expect(page.get_by_label("Run", exact=True)).to_have_value(name)
    eventually(lambda: parameters(page).get("run") == name)


@pytest.mark.parametrize("reload", [True, False])
def test_the_run_of_an_address_stays_while_pages_change_and_after_a_reload(
    page: Page, address: str, reload: bool
) -> None:
    opened(page, f"{address}/?run=other")  # not the newest
    shows_run(page, "other")
    for name in ("Pareto", "Features", "Help", "Live", "Train", "Shrinkage", "Home", "Hub"):
        page.get_by_test_id("stSidebar").get_by_role("link", name=name).click()
        sees(page, name)
        shows_run(page, "other")
        assert "page" not in parameters(page)
        if reload:
            page.reload()
            sees(page, name)
            shows_run(page, "other")


def test_as_many_presses_of_back_as_pages_were_seen_and_each_is_as_it_was_left(
    page: Page, address: str
) -> None:
    begin = page.url
    opened(page, f"{address}/Prompt?run=example")
    strip = page.locator(".picker [role=option]")
    strip.nth(1).click()
    page.wait_for_url(re.compile("tok=1"))
    page.get_by_role("textbox", name="Text").fill("import os, sys")
    # The text is sent as the field is left, by the same press.
    page.get_by_role("button", name="Open in Features").click()
    sees(page, "Features")
    shows_run(page, "example")
    expect(page.get_by_role("heading", name="Logit effects")).to_be_visible()
    at_rest(page)
    left = parameters(page)
    assert {"sae", "feature"} <= left.keys()
    page.get_by_role("button", name=re.compile("Next")).click()
    eventually(lambda: parameters(page)["feature"] != left["feature"])
    left = parameters(page)
    page.get_by_role("button", name="Steer this feature").click()
    sees(page, "Steer")
    eventually(lambda: parameters(page).get("f") == left["feature"])
    page.get_by_test_id("stSidebar").get_by_role("link", name="Pareto").click()
    sees(page, "Pareto")
    page.get_by_text("KL", exact=True).click()
    eventually(lambda: parameters(page).get("ym") == "KL")
    page.get_by_test_id("stSidebar").get_by_role("link", name="Shrinkage").click()
    sees(page, "Shrinkage")
    for name in ("Pareto", "Steer", "Features", "Prompt"):
        page.go_back()
        sees(page, name)
        shows_run(page, "example")
        if name == "Pareto":
            assert parameters(page)["ym"] == "KL"
        if name == "Features":
            assert parameters(page) == left
    expect(page.get_by_role("textbox", name="Text")).to_have_value("import os, sys")
    expect(strip.filter(has_text="sys")).to_have_count(1)
    page.reload()
    sees(page, "Prompt")
    expect(page.get_by_role("textbox", name="Text")).to_have_value("import os, sys")
    page.go_back()
    expect(page).to_have_url(begin)


def test_an_address_without_a_run_is_no_page_of_its_own(
    page: Page, address: str, runs: Path
) -> None:
    begin, newest = page.url, list_runs(runs)[0].id
    asked: list[object] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: asked.append(frame)))
    opened(page, f"{address}/Live")
    shows_run(page, newest)
    page.wait_for_timeout(1000)
    assert len(asked) == 1  # the page ran once
    page.get_by_test_id("stSidebar").get_by_role("link", name="Home").click()
    sees(page, "Home")
    page.go_back()
    sees(page, "Live")
    shows_run(page, newest)
    page.go_back()
    expect(page).to_have_url(begin)


@pytest.mark.timeout(1800)
def test_every_page_leads_to_every_other_twice_in_one_tab(page: Page, address: str) -> None:
    way = circuit([name or "Home" for name in PAGES])
    opened(page, f"{address}/?run=example")
    for name in [*way[1:], *way[1:]]:
        page.get_by_test_id("stSidebar").get_by_role("link", name=name).click()
        sees(page, name)
        assert parameters(page)["run"] == "example"


def test_by_the_keyboard_alone_from_home_to_shrinkage(page: Page, address: str) -> None:
    opened(page, f"{address}/?run=done")
    tab_to(page, "tune")  # the icon of "Choose settings" comes before its words
    page.keyboard.press("Enter")
    sees(page, "Train")
    for name in ("Live", "Pareto", "Shrinkage"):
        page.keyboard.press("Control+Home")
        focus_link(page, name)
        page.keyboard.press("Enter")
        sees(page, name)
    assert "run=done" in page.url


def focus_link(page: Page, name: str) -> None:
    """Tab until a link of the sidebar has the focus, which has to be seen there."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).endswith(name):
            at = "document.activeElement"
            if page.evaluate(f"{at}.tagName") == "A":
                ring = page.evaluate(
                    f"[getComputedStyle({at}).outlineStyle, getComputedStyle({at}).boxShadow]"
                )
                assert ring != ["none", "none"], "the focus cannot be seen"
                return
    raise AssertionError(f"expected to reach the link {name!r} by Tab")
