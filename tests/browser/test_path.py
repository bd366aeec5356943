"""The whole path in a real browser: one press at home, watch it train, read the results.

Run with `python -m pytest tests/browser -m browser`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import FLAGS, chromium_path, serving
from playwright.sync_api import ConsoleMessage, Page, Request, expect, sync_playwright
from synthetic import write_run

from gsae_core.store.listing import list_runs

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(chromium_path() is None, reason="no chromium on this machine's PATH"),
]

# Streamlit asks for these beside each page before it finds them at the root.
KNOWN_404 = re.compile(r"/_stcore/(health|host-config)$")
PAGE_SECONDS = 240  # what a page may take: seconds on an idle machine, minutes on a loaded one


class Watch:
    """What a page asked for and complained about."""

    def __init__(self, page: Page, address: str) -> None:
        self.strangers: list[str] = []
        self.complaints: list[str] = []
        self._address = address
        page.on("request", self._request)
        page.on("console", self._console)

    def _request(self, request: Request) -> None:
        home = (self._address, self._address.replace("http", "ws"), "data:", "blob:")
        if not request.url.startswith(home):
            self.strangers.append(request.url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not KNOWN_404.search(message.location.get("url", "")):
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that is finished."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root, "done")
    return root


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as address:
        yield address


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.set_default_timeout(PAGE_SECONDS * 1000)
        yield page
        browser.close()


def at_rest(page: Page) -> None:
    """Wait until the script has ended and every piece of the page is there."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_function("!document.querySelector('[data-testid=\"stSkeleton\"]')")


@pytest.mark.parametrize("name", ["", "Train", "Live", "Pareto", "Shrinkage"])
def test_a_deep_link_opens_in_its_frame_and_asks_nobody_else(
    page: Page, address: str, name: str
) -> None:
    watch = Watch(page, address)
    page.goto(f"{address}/{name}?run=done")
    expect(page.get_by_role("heading", level=1)).to_have_text(
        name or "Home", timeout=PAGE_SECONDS * 1000
    )
    at_rest(page)
    assert "run=done" in page.url
    assert page.get_by_test_id("stException").count() == 0
    assert watch.strangers == []
    assert watch.complaints == []


def test_a_click_on_a_point_opens_its_card(page: Page, address: str) -> None:
    page.goto(f"{address}/Pareto?run=done")
    at_rest(page)
    point = page.locator(".js-plotly-plot .scatterlayer .points path").last
    box = point.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(500)  # Plotly ignores a click before it has noticed the pointer
    page.mouse.click(x, y, delay=60)
    # Drawn last: the baseline with the most active features, lambda 0.1.
    card = page.get_by_text("ReLU baseline, λ 0.1, 768 features")
    expect(card).to_be_visible(timeout=PAGE_SECONDS * 1000)


def test_home_opens_the_latest_results_whatever_run_was_chosen(
    page: Page, address: str, runs: Path
) -> None:
    write_run(runs, "failed", "failed", share=0.5, error="the disk was full")
    page.goto(f"{address}/?run=failed")
    at_rest(page)
    page.get_by_role("button", name="Sparsity against fidelity").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_have_text("Pareto", timeout=PAGE_SECONDS * 1000)
    page.wait_for_url(re.compile("run=done"))


def test_from_one_press_to_the_results(page: Page, address: str, runs: Path) -> None:
    watch = Watch(page, address)
    page.goto(f"{address}/Train?run=done")
    at_rest(page)
    for label, value in (("Tokens", "65536"), ("λ", "0.2 0.6"), ("Learning rate", "0.002")):
        page.get_by_label(label, exact=True).fill(value)
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        at_rest(page)
    page.get_by_role("button", name=re.compile("Start 65.5 k")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Live", timeout=PAGE_SECONDS * 1000)
    (new,) = [run for run in list_runs(runs) if run.id.startswith("quick")]
    page.wait_for_url(re.compile(new.id))
    page.reload()  # nothing is lost: the job is its own process
    expect(page.get_by_text("● finished")).to_be_visible(timeout=900_000)
    assert new.status.state == "finished"
    page.get_by_role("link", name="See the results").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Pareto", timeout=PAGE_SECONDS * 1000)
    at_rest(page)
    expect(page.get_by_text("L0 baseline / L0 gated")).to_be_visible()
    page.get_by_role("link", name="Shrinkage").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(
        "Shrinkage", timeout=PAGE_SECONDS * 1000
    )
    at_rest(page)
    expect(page.get_by_text("γ gated, gate path")).to_be_visible()
    assert new.id in page.url
    assert page.get_by_test_id("stException").count() == 0
    assert watch.strangers == []
    assert watch.complaints == []
