"""Pareto and Shrinkage in a real browser: what is clicked, what the address keeps, how fast.

Run with `python -m pytest tests/browser/test_compare.py -m browser`.
"""

import re
from collections.abc import Iterator

import pytest
from driver import FLAGS, chromium_path, serving
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from synthetic import config, write_run

from gsae_core.config import sweep

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(chromium_path() is None, reason="no chromium on this machine's PATH"),
]

KNOWN_404 = re.compile(r"/_stcore/(health|host-config)$")
PATIENCE = 240_000  # ms: seconds on an idle machine, minutes on a loaded one
# As far as names may go: letters, digits, dots, dashes, underscores, 64 of them.
HOSTILE_RUN = "-".join(["Z..__--script", "javascript-alert", "x" * 33])[:64]
HOSTILE_TEXT = "<img src=x onerror=alert(1)>![](http://evil.example/x.png)\u202e\u200b"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    hostile = config().model_copy(
        update={
            "saes": sweep(["gated", "relu"], [0.3, 0.5], 64),
            "model": config().model.model_copy(update={"name": HOSTILE_TEXT}),
            "preset": HOSTILE_TEXT,
        }
    )
    write_run(root, HOSTILE_RUN, run_config=hostile)
    write_run(root, "done")
    with serving(root) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A tab that must ask nobody else for anything, and complain about nothing."""
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    home = (address, address.replace("http", "ws"), "data:", "blob:")
    asked: list[str] = []
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error" and not KNOWN_404.search(message.location.get("url", "")):
            complaints.append(message.text)

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", listen)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(home)] == []
    assert complaints == []


def opened(page: Page, address: str) -> None:
    page.goto(address)
    at_rest(page)


def at_rest(page: Page) -> None:
    """Wait until the script has ended and every piece of the page is there."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_function("!document.querySelector('[data-testid=\"stSkeleton\"]')")


def click(page: Page, mark: Locator) -> None:
    """Click a mark of a Plotly figure."""
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(500)  # Plotly ignores a click before it has noticed the pointer
    page.mouse.click(x, y, delay=60)


def points(page: Page) -> Locator:
    """The marks of the plane, in drawing order: rings and matches first, the baseline last."""
    return page.locator(".js-plotly-plot .scatterlayer .points path")


def test_one_click_opens_a_card_and_two_the_difference(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done")
    click(page, points(page).last)  # the baseline with the most active features, lambda 0.1
    expect(page.get_by_text("1 · ReLU baseline, λ 0.1, 768 features")).to_be_visible()
    at_rest(page)
    page.wait_for_timeout(1000)  # the figure is drawn anew, with a ring
    click(page, points(page).nth(-5))  # the Gated SAE with the most
    expect(page.get_by_text("2 · Gated, λ 0.1, 512 features")).to_be_visible()
    # L0 160 and 120: 40 fewer, a quarter.
    expect(page.get_by_text("-40.0 (-25.0 %)")).to_be_visible()
    page.wait_for_url(re.compile(r"pick=done(/|%2F)relu-0\.1&pick=done(/|%2F)gated-0\.1"))
    page.reload()
    at_rest(page)
    expect(page.get_by_text("-40.0 (-25.0 %)")).to_be_visible()


def test_a_cold_link_shows_every_choice_it_names(browser: Browser, address: str) -> None:
    chosen = (
        "run=done&ym=FVU&xm=KL&logx=false&pick=done/gated-0.2&pick=done/relu-0.2"
        f"&runs={HOSTILE_RUN}&base={HOSTILE_RUN}&diff=false"
    )
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE)
    opened(page, f"{address}/Pareto?{chosen}")
    expect(page.get_by_text("From 1, done/gated-0.2, to 2, done/relu-0.2")).to_be_visible()
    expect(page.get_by_text("fraction of variance unexplained").first).to_be_visible()
    expect(page.get_by_text("KL divergence (nats per token)").first).to_be_visible()
    expect(page.get_by_text(f"Gated · {HOSTILE_RUN}")).to_be_visible()
    page.get_by_role("button", name="Data").first.click()
    link = page.get_by_test_id("stCode").first
    expect(link).to_contain_text("pick=done%2Fgated-0.2&pick=done%2Frelu-0.2")
    expect(link).to_contain_text("ym=FVU")
    page.close()


def test_back_and_forward_lead_through_the_pages_seen(page: Page, address: str) -> None:
    heading = page.get_by_role("heading", level=1)
    opened(page, f"{address}/Pareto?run=done&ym=KL")
    page.get_by_role("link", name="Shrinkage").click()
    expect(heading).to_have_text("Shrinkage")
    at_rest(page)
    page.go_back()
    page.go_back()  # a change of page leaves an entry without parameters in between
    expect(heading).to_have_text("Pareto")
    at_rest(page)
    expect(page.get_by_text("KL divergence (nats per token)").first).to_be_visible()
    page.go_forward()
    page.go_forward()
    expect(heading).to_have_text("Shrinkage")
    at_rest(page)
    assert page.get_by_test_id("stException").count() == 0


def test_a_card_leads_to_shrinkage_of_its_sae(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done&pick=done/gated-0.1")
    page.get_by_test_id("stMain").get_by_role("button", name="Shrinkage").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Shrinkage")
    expect(page.get_by_text("Gated, λ 0.1 · L0 120.0")).to_be_visible()


def test_a_click_on_a_bar_lists_its_features(page: Page, address: str) -> None:
    opened(page, f"{address}/Shrinkage?run=done")
    bars = page.locator(".js-plotly-plot .barlayer .point path")
    # The tallest bar of the first SAE.
    sizes = [box["height"] if (box := bars.nth(i).bounding_box()) else 0 for i in range(40)]
    click(page, bars.nth(sizes.index(max(sizes))))
    expect(page.get_by_text(re.compile(r"of \d+ features, most firings first"))).to_be_visible()
    page.wait_for_url(re.compile("bin="))


def test_points_are_chosen_by_keyboard_alone(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done")
    page.get_by_label("Compare").focus()
    page.keyboard.type("relu-0.8")
    page.wait_for_timeout(500)
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 · ReLU baseline, λ 0.8, 768 features")).to_be_visible()


@pytest.mark.parametrize("name", ["Pareto", "Shrinkage"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hangs_out_of_a_narrow_window(
    page: Page, address: str, name: str, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 400, "height": 900})
    opened(page, f"{address}/{name}?run={HOSTILE_RUN}&runs=done&pick={HOSTILE_RUN}/gated-0.3")
    main = page.get_by_test_id("stMain")
    assert main.evaluate("node => node.scrollWidth - node.clientWidth") <= 1
    assert page.get_by_test_id("stException").count() == 0


def test_names_from_elsewhere_are_shown_and_never_obeyed(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run={HOSTILE_RUN}&runs=done&pick={HOSTILE_RUN}/gated-0.3")
    expect(page.get_by_text("not measured on the same ground")).to_contain_text("<img src=x")
    page.get_by_text("What it was made from").click()
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("img[src*='evil']").count() == 0
    opened(page, f"{address}/Pareto?run=done&pick=%3Cimg%20src%3Dx%3E&ym=%3Cscript%3E")
    expect(page.get_by_text("The address asks for '<img src=x>'")).to_be_visible()
    assert page.locator("img[src='x']").count() == 0
