"""One browser and one server for all tests: starting them takes longer than most tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import FLAGS, PATIENCE, Watch, chromium_path, serving
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from synthetic import write_run

WINDOW = {"width": 1360, "height": 1000}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs a browser, and the patience for it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(600))
            item.add_marker(
                pytest.mark.skipif(
                    chromium_path() is None, reason="no chromium on this machine's PATH"
                )
            )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that the shared server serves, with two that are finished."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root, "other")
    write_run(root, "done")
    return root


@pytest.fixture(scope="session")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as address:
        yield address


def new_context(browser: Browser, **options: object) -> BrowserContext:
    context = browser.new_context(**{"viewport": WINDOW} | options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE)
    return context


@pytest.fixture(scope="session")
def visitor(browser: Browser) -> Iterator[tuple[BrowserContext, Watch]]:
    """A visitor whose browser keeps what it has downloaded; each tab is a session of its own."""
    context = new_context(browser)
    yield context, Watch(context)
    context.close()


@pytest.fixture
def page(visitor: tuple[BrowserContext, Watch]) -> Iterator[Page]:
    """A tab that must ask nobody else for anything, and complain about nothing."""
    context, watch = visitor
    page = context.new_page()
    yield page
    page.close()
    watch.verdict()


@pytest.fixture
def new_visitor(browser: Browser) -> Iterator[Callable[..., tuple[Page, Watch]]]:
    """A function that returns a tab of a visitor of its own, held to the same."""
    made: list[tuple[BrowserContext, Watch]] = []

    def make(**options: object) -> tuple[Page, Watch]:
        context = new_context(browser, **options)
        made.append((context, Watch(context)))
        return context.new_page(), made[-1][1]

    yield make
    for context, watch in made:
        context.close()
        watch.verdict()
