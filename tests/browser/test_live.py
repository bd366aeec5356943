"""Live in a real browser: what a tab, a server or a worker that dies takes with it, and a zoom.

Run with `python -m pytest tests/browser -m browser`.
"""

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import Watch, at_rest, eventually, free_port, opened, sees, serving
from playwright.sync_api import BrowserContext, Locator, Page, expect
from synthetic import config, metric_lines, write_metrics, write_run

from gsae_core.config import RunConfig, sweep, validated
from gsae_core.runs.jobs.job import read_status, start
from gsae_core.runs.run import Run

RUNNING = "◑ running"


def long_run(root: Path, name: str) -> Run:
    """Make a run that trains for minutes on little text, and logs a point every few steps."""
    text = root / "words.txt"
    if not text.exists():
        words = random.Random(0)
        text.write_text(" ".join(f"def f{words.randrange(999)}(x):" for _ in range(20_000)))
    fields = {
        "saes": sweep(["gated"], [0.2], 512),
        "train": {"n_tokens": 8_388_608, "batch_size": 256, "lr": 1e-3},
        "data": {"source": str(text)},
        "device": "cpu",
    }
    return Run.create(root / name, validated(RunConfig, fields))


def trains(run: Run) -> None:
    """Wait until a run takes steps."""
    eventually(lambda: run.status.state == "running" and run.status.step > 0)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One run for all tests that need one: loading torch is most of a short one's time."""
    run = long_run(tmp_path_factory.mktemp("training"), "long")
    yield run
    process = read_status(run.folder).process if run.folder.exists() else None
    if process is not None:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def desk(long: Run) -> Iterator[str]:
    """A server over the folder of the run that trains."""
    with serving(long.folder.parent) as address:
        yield address


@pytest.fixture
def training(long: Run) -> Run:
    """The run, while its process trains."""
    if long.status.state != "running":
        start(long)
    trains(long)
    return long


def test_a_run_outlives_its_tab_and_its_server(
    page: Page, visitor: tuple[BrowserContext, Watch], long: Run
) -> None:
    visitor[1].server_may_go = True
    port = free_port()
    steps = page.get_by_text(re.compile(r"^step [\d,]+ of"))
    with serving(long.folder.parent, port=port) as address:
        opened(page, f"{address}/Live?run=long")
        start(long)
        trains(long)
        page.reload()
        expect(page.get_by_text("Reconnected to long: training continues")).to_be_visible()
        expect(page.get_by_text(RUNNING)).to_be_visible()
        # A server that goes while the browser fetches how charts are drawn leaves it without them.
        expect(page.locator("[data-testid=stVegaLiteChart] svg")).to_have_count(9)
        at_rest(page)
    pid, seen = long.status.pid, steps.inner_text()
    with serving(long.folder.parent, port=port):
        # The tab is not touched: it finds the new server by itself.
        expect(page.get_by_text("Reconnected to long: training continues")).to_be_visible()
        expect(steps).not_to_have_text(seen)
        assert long.status.pid == pid
        page.goto("about:blank")
    visitor[1].server_may_go = False


def test_a_killed_worker_is_lost_and_resume_goes_on(page: Page, desk: str, training: Run) -> None:
    opened(page, f"{desk}/Live?run=long")
    expect(page.get_by_text(RUNNING)).to_be_visible()
    pid = training.status.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    expect(page.get_by_text("The run was lost")).to_be_visible()
    expect(page.get_by_text("? lost").first).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    eventually(lambda: training.status.state == "running")
    assert training.status.pid != pid
    expect(page.get_by_text(RUNNING)).to_be_visible()


def test_a_second_run_waits_and_starts_by_itself(page: Page, desk: str, training: Run) -> None:
    second = long_run(training.folder.parent, "second")
    start(second)
    opened(page, f"{desk}/Live?run=second")
    expect(page.get_by_text("position 1 in the queue")).to_be_visible()
    expect(page.get_by_text("1 queued")).to_be_visible()
    page.goto("about:blank")  # nobody watches any more
    training.request_cancel()
    eventually(lambda: second.status.state == "running")
    second.request_cancel()
    eventually(lambda: second.status.state == "cancelled")


def test_two_visitors_see_one_cancellation_to_its_end(
    new_visitor: Callable[..., tuple[Page, Watch]], desk: str, training: Run
) -> None:
    one, other = new_visitor()[0], new_visitor()[0]
    for page in (one, other):
        opened(page, f"{desk}/Live?run=long")
        expect(page.get_by_text(RUNNING)).to_be_visible()
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


def test_a_run_deleted_by_one_visitor_is_named_to_the_other(
    new_visitor: Callable[..., tuple[Page, Watch]], address: str, runs: Path
) -> None:
    run = write_run(runs, "unwanted", "cancelled", share=0.5)
    one, other = new_visitor()[0], new_visitor()[0]
    for page in (one, other):
        opened(page, f"{address}/Live?run=unwanted")
    one.get_by_role("button", name="Delete").click()
    one.get_by_role("dialog").get_by_role("button", name="Delete for good").click()
    expect(one.get_by_text("unwanted was deleted")).to_be_visible()
    assert not run.folder.exists()
    sees(other, "Live")
    other.reload()
    expect(other.get_by_text("Run unwanted is not on this machine")).to_be_visible()


def axis(page: Page, chart: int) -> Locator:
    """Return the numbers along the horizontal axis of a chart."""
    return page.get_by_test_id("stVegaLiteChart").nth(chart).locator(".role-axis-label").first


def read(numbers: Locator) -> str:
    """Return what the numbers of an axis are now, one after the other."""
    return numbers.text_content() or ""


def test_a_zoom_outlives_the_next_data(page: Page, address: str, runs: Path) -> None:
    process = subprocess.Popen(["sleep", "900"], start_new_session=True)
    run = write_run(runs, "moving", "running", share=0.3, pid=process.pid)
    lines = metric_lines(config(), share=1.0)
    try:
        opened(page, f"{address}/Live?run=moving")
        chart = page.get_by_test_id("stVegaLiteChart").nth(1)
        expect(chart.locator("svg, canvas").first).to_be_visible()
        box = chart.bounding_box()
        assert box is not None
        whole = read(axis(page, 1))
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90)
        for _ in range(4):
            page.mouse.wheel(0, -200)
            page.wait_for_timeout(200)
        expect(axis(page, 1)).not_to_have_text(whole)
        zoomed = read(axis(page, 1))
        for share in (0.6, 0.9):
            beside = read(axis(page, 3))  # of one that nobody zoomed
            append_metrics(run, lines[: round(len(lines) * share)])
            expect(axis(page, 3)).not_to_have_text(beside)
            expect(axis(page, 1)).to_have_text(zoomed)
    finally:
        process.kill()
        process.wait()


def append_metrics(run: Run, lines: list[dict]) -> None:
    """Append what is new, as a process that trains does."""
    path = run.folder / "metrics.jsonl"
    old, kept = path.stat(), path.read_bytes()
    write_metrics(run, lines)
    assert path.read_bytes().startswith(kept)
    assert path.stat().st_ino == old.st_ino


def test_a_folder_deleted_under_an_open_page_is_named_at_the_next_look(
    page: Page, address: str, runs: Path
) -> None:
    process = subprocess.Popen(["sleep", "900"], start_new_session=True)
    run = write_run(runs, "vanishing", "running", share=0.3, pid=process.pid)
    try:
        opened(page, f"{address}/Live?run=vanishing")
        expect(page.get_by_text(RUNNING)).to_be_visible()
        shutil.rmtree(run.folder)
        expect(page.get_by_text("was the run deleted?")).to_be_visible()
    finally:
        process.kill()
        process.wait()
