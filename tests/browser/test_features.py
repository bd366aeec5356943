"""Features in a real browser: the list, links, keys, history, building, zoom, and hostile words.

Run with `python -m pytest tests/browser/test_features.py -m browser`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_pages import NASTY
from driver import Watch, at_rest, eventually, filtered, opened, sees, serving, tab_to
from playwright.sync_api import Locator, Page, expect
from synthetic import config, write_run
from synthetic_index import write_index

from gsae_core.config import sweep
from gsae_core.runs.run import example_run

SHOWN = "gated-0.35"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server over a wide synthetic SAE, and over one with hostile words."""
    root = tmp_path_factory.mktemp("features")
    for name, width, words in (("wide", 16_384, None), ("hostile", 64, [*NASTY, "\n", " "])):
        saes = {"saes": sweep(["gated", "relu"], [0.3], width)}
        run = write_run(root, name, run_config=config().model_copy(update=saes))
        for spec in run.config.saes:
            write_index(run, spec, vocabulary=words)
    with serving(root) as address:
        yield address, root


@pytest.fixture
def address(served: tuple[str, Path]) -> str:
    return served[0]


def feature(page: Page, number: int) -> Locator:
    """Wait until a feature is shown, and return its heading."""
    heading = page.get_by_role("heading", name=f"Feature {number}", exact=True)
    expect(heading).to_be_visible()
    at_rest(page)
    assert page.get_by_test_id("stException").count() == 0
    return heading


def tick(page: Page, row: int) -> None:
    """Tick a row of the list, from 0."""
    grid = page.get_by_test_id("stDataFrame").first
    grid.scroll_into_view_if_needed()
    box = grid.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 14, box["y"] + 35 * (row + 2) - 17)


def test_home_opens_the_example_on_a_feature_one_understands(page: Page, address: str) -> None:
    opened(page, f"{address}/")
    page.get_by_role("button", name="Explore the bundled example").click()
    sees(page, "Features")
    feature(page, 293)
    assert example_run() is not None
    expect(page.get_by_text("1 token in 8")).to_be_visible()
    expect(page.locator(".gs-strip .p").first).to_have_text(re.compile("def"))
    page.wait_for_url(re.compile(r"run=example"))
    page.wait_for_url(re.compile(r"feature=293"))


def test_a_ticked_row_opens_its_feature_and_next_goes_on(page: Page, address: str) -> None:
    opened(page, f"{address}/Features?run=wide&feature=7")
    feature(page, 7)
    tick(page, 4)
    feature(page, 4)
    page.wait_for_url(re.compile("feature=4"))
    page.get_by_role("button", name="Next").click()
    feature(page, 5)
    page.get_by_role("button", name="Previous").click()
    feature(page, 4)
    expect(page.get_by_text("2,000 of 16,384 features.")).to_be_visible()


def test_a_clicked_bar_lists_its_features(page: Page, address: str) -> None:
    opened(page, f"{address}/Features?run=wide")
    at_rest(page)
    bars = page.locator("[data-testid=stVegaLiteChart]").first.locator("path[aria-label]")
    expect(bars.first).to_be_attached()
    sizes = [b["height"] if (b := bars.nth(i).bounding_box()) else 0 for i in range(bars.count())]
    bars.nth(sizes.index(max(sizes))).click(force=True)
    page.wait_for_url(re.compile("dens="))
    expect(page.get_by_text(re.compile(r"of 16,384 features"))).to_be_visible()
    expect(page.get_by_role("button", name="Filters (1)")).to_be_visible()


def test_a_link_shows_another_visitor_the_same(
    new_visitor: Callable[..., tuple[Page, Watch]], address: str
) -> None:
    page, _ = new_visitor()
    opened(page, f"{address}/Features?run=example&sae={SHOWN}&feature=12&view=Quantiles&ctx=full")
    feature(page, 12)
    expect(page.get_by_role("radio", name="Quantiles")).to_be_checked()
    expect(page.get_by_role("radio", name="full")).to_be_checked()
    page.get_by_role("button", name="Share and export").click()
    expect(page.get_by_test_id("stCode")).to_contain_text("feature=12")
    with page.expect_download() as html:
        page.get_by_role("button", name="One HTML file").click()
    assert html.value.suggested_filename == f"{SHOWN}-12.html"
    text = Path(html.value.path()).read_text(encoding="utf-8")
    assert "Feature 12" in text
    assert not re.search(r"(src|href)=|url\(|<script", text)
    with page.expect_download() as batch:
        page.get_by_role("button", name="Neuronpedia JSON").click()
    assert '"feature_index": 12' in Path(batch.value.path()).read_text(encoding="utf-8")


def test_neighbours_lead_on_within_the_page_and_back_returns(page: Page, address: str) -> None:
    opened(page, f"{address}/Features?run=wide&feature=7")
    feature(page, 7)
    # The synthetic neighbours of latent i are i + 1, i + 2 and so on.
    page.get_by_role("link", name=re.compile("^9")).first.click()
    feature(page, 9)
    page.get_by_test_id("stSidebar").get_by_role("link", name="Shrinkage").click()
    sees(page, "Shrinkage")
    page.go_back()
    sees(page, "Features")
    feature(page, 9)


def test_a_bin_of_gamma_leads_to_its_features(page: Page, address: str) -> None:
    opened(page, f"{address}/Shrinkage?run=example&minfire=1")
    filtered(page, "Features of a bin", "0.975").click()
    page.get_by_role("button", name=re.compile("^Features of gated")).click()
    sees(page, "Features")
    expect(page.get_by_role("button", name="Filters (1)")).to_be_visible()
    page.wait_for_url(re.compile(r"gamma=0\.975"))


def test_a_feature_is_reached_and_read_by_keyboard_alone(page: Page, address: str) -> None:
    opened(page, f"{address}/Features?run=example&sae={SHOWN}&feature=12")
    feature(page, 12)
    page.locator("body").press("n")
    feature(page, 13)
    page.locator("body").press("p")
    feature(page, 12)
    tab_to(page, "chevron_left")  # the sign of "Previous"
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("20")
    page.keyboard.press("Enter")
    feature(page, 20)
    strip = page.locator(".gs-strip .p").first
    strip.focus()
    said = strip.evaluate("e => getComputedStyle(e, '::after').content")
    assert re.search(r"\d", said)


def test_labels_are_kept_and_listed(page: Page, served: tuple[str, Path]) -> None:
    address, root = served
    opened(page, f"{address}/Features?run=example&sae={SHOWN}&feature=12")
    feature(page, 12)
    page.get_by_placeholder("What does it mean?").fill("a label")
    page.keyboard.press("Enter")
    said = root / ".example" / SHOWN / "labels.jsonl"
    eventually(lambda: said.exists() and "a label" in said.read_text())
    opened(page, f"{address}/Features?run=example&sae={SHOWN}&label=a+label")
    feature(page, 12)
    expect(page.get_by_text("1 of 512 features.")).to_be_visible()


def test_hostile_words_are_shown_and_never_obeyed(page: Page, address: str) -> None:
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    for view in ("Top", "Quantiles"):
        opened(page, f"{address}/Features?run=hostile&feature=9&view={view}&ctx=full&more=true")
        feature(page, 9)
        found = page.evaluate(
            """() => ({
              scripts: document.querySelectorAll('[data-testid=stMain] script').length,
              images: [...document.images].filter(i => /evil/.test(i.src)).length,
              forms: document.querySelectorAll('form[action*=evil]').length,
              hidden: getComputedStyle(document.querySelector('[data-testid=stMain]')).display,
              owned: !!window.owned || document.title.includes('owned'),
              wide: document.documentElement.scrollWidth > window.innerWidth,
            })"""
        )
        expected = {"scripts": 0, "images": 0, "forms": 0, "hidden": "flex", "owned": False}
        assert found == expected | {"wide": False}


def test_at_twice_the_size_nothing_is_cut_off(
    new_visitor: Callable[..., tuple[Page, Watch]], address: str
) -> None:
    # 200 % in a window of 1360 is what a window of 680 shows.
    page, _ = new_visitor(viewport={"width": 680, "height": 500}, device_scale_factor=2)
    opened(page, f"{address}/Features?run=example&sae={SHOWN}&feature=293")
    feature(page, 293)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    strip = page.locator(".gs-strip").first
    box = strip.bounding_box()
    assert box is not None
    assert 300 < box["width"] <= 680


def test_an_index_is_built_from_the_page(page: Page, finished: object, tmp_path: Path) -> None:
    # `finished` is a trained run of the tiny model in tmp_path / "run".
    with serving(tmp_path) as address:
        opened(page, f"{address}/Features?run=run&base=none")
        expect(page.get_by_text("Index this SAE to see its top examples.")).to_be_visible()
        page.get_by_role("button", name=re.compile("^Build the index")).click()
        # A process of its own imports torch first: long, on a machine that is busy.
        read = page.get_by_text(re.compile("Read from .* tokens of"))
        expect(read).to_be_visible(timeout=300_000)
        expect(page.get_by_role("heading", name="Where it fires")).to_be_visible()
        page.close()  # before the server goes, of which the tab would complain
