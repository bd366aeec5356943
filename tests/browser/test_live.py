"""Live in a real browser: what a tab, a server or a worker that dies takes with it, and a zoom.

Run with `python -m pytest tests/browser -m browser`.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import FLAGS, chromium_path, serving
from playwright.sync_api import Browser, Page, expect, sync_playwright
from synthetic import config, metric_lines, write_metrics, write_run

from gsae_core.config import RunConfig, sweep, validated
from gsae_core.store.jobs import start
from gsae_core.store.runs import Run
from gsae_core.store.status import read_status

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(chromium_path() is None, reason="no chromium on this machine's PATH"),
]

PATIENCE = 240_000  # ms: seconds on an idle machine, minutes on a loaded one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)


def tab(browser: Browser) -> Page:
    """Return a page of a visitor of its own."""
    page = browser.new_context(viewport={"width": 1360, "height": 1000}).new_page()
    page.set_default_timeout(PATIENCE)
    return page


def at_rest(page: Page) -> None:
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_function("!document.querySelector('[data-testid=\"stSkeleton\"]')")


def eventually(what: Callable[[], bool], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def long_run(root: Path, name: str) -> Run:
    """Make a run that trains for minutes, and would log a point every few steps."""
    fields = {
        "saes": sweep(["gated"], [0.2], 512),
        "train": {"n_tokens": 8_388_608, "batch_size": 256, "lr": 1e-3},
        "device": "cpu",
    }
    return Run.create(root / name, validated(RunConfig, fields))


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Run]:
    """A run whose process trains."""
    run = long_run(tmp_path, "long")
    start(run)
    eventually(lambda: run.status.state == "running" and run.status.step > 0)
    yield run
    process = read_status(run.folder).process if run.folder.exists() else None
    if process is not None:
        process.kill()
        process.wait()


def test_a_run_outlives_its_tab_and_its_server(browser: Browser, training: Run) -> None:
    pid = training.status.pid
    page = tab(browser)
    with serving(training.folder.parent) as address:
        page.goto(f"{address}/Live?run=long")
        expect(page.get_by_text("◑ running")).to_be_visible()
        page.reload()
        expect(page.get_by_text("◑ running")).to_be_visible()
    before = training.status.step
    with serving(training.folder.parent) as address:
        page.goto(f"{address}/Live?run=long")
        expect(page.get_by_text("◑ running")).to_be_visible()
        eventually(lambda: training.status.step > before)
        assert training.status.pid == pid
    page.context.close()


def test_a_killed_worker_is_lost_and_resume_goes_on(browser: Browser, training: Run) -> None:
    page = tab(browser)
    with serving(training.folder.parent) as address:
        page.goto(f"{address}/Live?run=long")
        expect(page.get_by_text("◑ running")).to_be_visible()
        pid = training.status.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        expect(page.get_by_text("The run was lost")).to_be_visible()
        page.get_by_role("button", name="Resume").click()
        eventually(lambda: training.status.state == "running")
        assert training.status.pid != pid
        expect(page.get_by_text("◑ running")).to_be_visible()
    page.context.close()


def test_two_visitors_see_one_cancellation_to_its_end(browser: Browser, training: Run) -> None:
    one, other = tab(browser), tab(browser)
    with serving(training.folder.parent) as address:
        for page in (one, other):
            page.goto(f"{address}/Live?run=long")
            expect(page.get_by_text("◑ running")).to_be_visible()
        one.get_by_role("button", name="Cancel").click()
        dialog = one.get_by_role("dialog")
        expect(dialog).to_be_visible()
        one.wait_for_timeout(3500)  # the page refreshes itself beneath it
        expect(dialog).to_be_visible()
        dialog.get_by_role("button", name="Cancel the run").click()
        for page in (one, other):
            expect(page.get_by_text("The run was cancelled")).to_be_visible()
        assert training.status.state == "cancelled"
        assert read_status(training.folder).process is None
        one.get_by_role("button", name="Delete").click()
        one.get_by_role("dialog").get_by_role("button", name="Delete for good").click()
        expect(one.get_by_text("long was deleted")).to_be_visible()
        assert not training.folder.exists()
        expect(other.get_by_role("heading", level=1)).to_have_text("Live")
        other.reload()
        expect(other.get_by_text("is not on this machine")).to_be_visible()
    for page in (one, other):
        page.context.close()


def test_a_second_run_waits_and_starts_by_itself(browser: Browser, training: Run) -> None:
    second = long_run(training.folder.parent, "second")
    start(second)
    page = tab(browser)
    with serving(training.folder.parent) as address:
        page.goto(f"{address}/Live?run=second")
        expect(page.get_by_text("number 1 in line")).to_be_visible()
        expect(page.get_by_text("1 queued")).to_be_visible()
        page.goto("about:blank")
    # No server any more.
    training.request_cancel()
    eventually(lambda: second.status.state == "running")
    second.request_cancel()
    eventually(lambda: second.status.state == "cancelled")
    page.context.close()


def labels(page: Page, chart: int) -> list[str]:
    """Return the numbers along the horizontal axis of a chart."""
    groups = page.get_by_test_id("stVegaLiteChart").nth(chart).locator(".role-axis-label")
    return groups.first.locator("text").all_text_contents()


def test_a_zoom_outlives_the_next_data(browser: Browser, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "900"], start_new_session=True)
    run = write_run(tmp_path, "moving", "running", share=0.3, pid=process.pid)
    lines = metric_lines(config(), share=1.0)
    page = tab(browser)
    try:
        with serving(tmp_path) as address:
            page.goto(f"{address}/Live?run=moving")
            at_rest(page)
            chart = page.get_by_test_id("stVegaLiteChart").nth(1)
            expect(chart.locator("svg, canvas").first).to_be_visible()
            box = chart.bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90)
            for _ in range(4):
                page.mouse.wheel(0, -200)
                page.wait_for_timeout(200)
            before = labels(page, 1)
            for share in (0.6, 0.9):
                n = round(len(lines) * share)
                write_metrics_in_place(run, lines[:n])
                page.wait_for_timeout(2500)
            assert labels(page, 1) == before
            assert labels(page, 3) != before  # beside it, one that nobody zoomed
    finally:
        process.kill()
        process.wait()
        page.context.close()


def write_metrics_in_place(run: Run, lines: list[dict]) -> None:
    """Append what is new, as a process that trains does."""
    path = run.folder / "metrics.jsonl"
    old = path.stat()
    fresh = run.folder / "fresh"
    kept = path.read_bytes()
    write_metrics(run, lines)
    fresh.write_bytes(path.read_bytes())
    assert fresh.read_bytes().startswith(kept)
    assert path.stat().st_ino == old.st_ino
    fresh.unlink()


def test_a_hostile_page_of_tokens_stays_text(browser: Browser, tmp_path: Path) -> None:
    from test_home_live import NASTY, write_samples

    run = write_run(tmp_path, "done")
    write_samples(run, NASTY)
    asked: list[str] = []
    page = tab(browser)
    page.on("request", lambda request: asked.append(request.url))
    with serving(tmp_path) as address:
        page.goto(f"{address}/Live?run=done")
        at_rest(page)
        expect(page.get_by_text("Feature 17").first).to_be_visible()
        expect(page).to_have_title(re.compile("^Live"))
        width = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert width
        assert not [url for url in asked if "evil" in url]
    page.context.close()
