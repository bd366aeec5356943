"""Hold the pages to their budgets: `python benchmarks/pages.py`, on an idle machine.

Two hundred runs lie in the folder, and the one that is shown has SAEs of 16 384 features. Times are
taken inside headless Chromium, on a clock that no network and no driver's own waiting is part of:
from the press to the frame in which the page shows what was asked for. Medians of several rounds; a
first view is taken in a browser that has seen nothing.

    --only WORD     leave out what does not hold the word
    --rounds N
    --against CLONE serve another clone too, and print how changes of page compare, in turns
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "browser"))

from driver import FLAGS, at_rest, chromium_path, serving
from synthetic import config, metric_lines, write_run

from gsae_core.config import sweep
from gsae_core.runs.run import EXAMPLE_ID

N_RUNS, WIDTH = 200, 16_384
WINDOW: ViewportSize = {"width": 1360, "height": 1000}
# Seconds from now until the page satisfies `ready`, seen at each frame; the press comes first.
CLOCK = """([press, ready]) => new Promise((done, failed) => {
  const is = new Function('return ' + ready), go = new Function(press)
  const start = performance.now()
  go()
  const look = () => {
    if (is()) return done((performance.now() - start) / 1000)
    if (performance.now() - start > 60000) return failed(new Error('never: ' + ready))
    requestAnimationFrame(look)
  }
  requestAnimationFrame(look)
})"""
MAIN = "document.querySelector('[data-testid=stMain]')"
DRAWN = f"{MAIN}.querySelectorAll('.js-plotly-plot .main-svg').length"
HEADING = "document.querySelector('h1')?.textContent"
RESTS = (
    "document.querySelector('[data-testid=stApp]').dataset.testScriptState == 'notRunning' && "
    "!document.querySelector('[data-testid=stSkeleton]')"
)


class Budget(NamedTuple):
    """What one thing may take, and what it took."""

    name: str
    limit: float
    measured: float
    unit: str = "s"


def press_link(name: str) -> str:
    """Return the script that follows a link of the sidebar."""
    links = "[...document.querySelectorAll('[data-testid=stSidebar] a')]"
    return f"{links}.find(a => a.textContent.trim().endsWith('{name}')).click()"


def press_option(name: str) -> str:
    """Return the script that presses an option of a row of buttons."""
    return f"[...document.querySelectorAll('button')].find(b => b.textContent == '{name}').click()"


def timed(page: Page, press: str, ready: str) -> float:
    """Return the seconds from a press to what it brings."""
    return float(page.evaluate(CLOCK, [press, ready]))


def tab(browser: Browser) -> Page:
    """Return a tab of a browser that has seen nothing."""
    page = browser.new_context(viewport=WINDOW).new_page()
    page.set_default_timeout(60_000)
    return page


def home(browser: Browser, rounds: int) -> Iterator[Budget]:
    """Measure a cold server, from its first request to a button that can be pressed."""
    answers, ready = [], []
    with tempfile.TemporaryDirectory() as runs:
        for _ in range(rounds):
            begun = time.perf_counter()
            with serving(Path(runs)) as address:
                answers.append(time.perf_counter() - begun)
                page = tab(browser)
                page.goto(address)
                page.get_by_role("button", name="Start training").click(trial=True)
                ready.append(time.perf_counter() - begun - answers[-1])
                page.context.close()
    yield Budget("cold server answers", 3.0, median(answers))
    yield Budget("cold server → Home, after that", 3.0, median(ready))


def first_plotly(browser: Browser, address: str, rounds: int) -> Iterator[Budget]:
    """Measure the first page with a Plotly figure that a browser sees."""
    for name in ("Pareto", "Shrinkage"):
        found = []
        for _ in range(rounds):
            page = tab(browser)
            page.goto(f"{address}/Help?run=wide")
            at_rest(page)
            n_figures = 1 if name == "Pareto" else 4
            found.append(timed(page, press_link(name), f"{DRAWN} >= {n_figures}"))
            page.context.close()
        yield Budget(f"first Plotly page of a browser: {name}", 2.0, median(found))


LIMITS = {"Features": 1.0, "Pareto": inf, "Shrinkage": inf}
"""Seconds for a change to a page with a budget of its own; Plotly's pages have none."""
FIGURES = {
    "Live": f"{MAIN}.querySelectorAll('svg.marks, canvas.marks').length >= 9",
    "Pareto": f"{DRAWN} >= 1",
    "Shrinkage": f"{DRAWN} >= 4",
}
"""What is there when all figures of a page are drawn."""


TOURS = (
    ("wide", ("Home", "Train", "Live", "Help", "Pareto", "Shrinkage")),
    (EXAMPLE_ID, ("Features", "Prompt", "Steer", "Hub")),
)
"""Pages one after the other, by the run that they show."""


def switches(browser: Browser, address: str, rounds: int) -> Iterator[Budget]:
    """Measure changes of page, all seen once before: until it can be used, and all is drawn."""
    page = tab(browser)
    usable: dict[str, list[float]] = {}
    drawn: dict[str, list[float]] = {}
    for run, names in TOURS:
        page.goto(f"{address}/Help?run={run}")
        at_rest(page)
        for turn in range(2 * rounds + 2):
            for name in names:
                whole = turn % 2 == 1 and name in FIGURES
                end = FIGURES[name] if whole else RESTS
                took = timed(page, press_link(name), f"{HEADING} == '{name}' && {end}")
                if turn > 1:
                    (drawn if whole else usable).setdefault(name, []).append(took)
                at_rest(page)
                page.wait_for_timeout(600)
    page.context.close()
    for name, found in usable.items():
        budget = LIMITS.get(name, 0.4)
        yield Budget(f"page switch, until it can be used: {name}", budget, median(found))
    for name, found in drawn.items():
        yield Budget(f"page switch, until every figure is drawn: {name}", inf, median(found))


def compare(browser: Browser, ours: str, theirs: str, rounds: int) -> None:
    """Print how each change of page compares with that of another clone.

    Time until it can be used: median and range of the rounds' ratios. The server's processor time,
    which other work on the machine sways less: one ratio of all rounds.
    """
    pages = {address: (tab(browser), server_of(address)) for address in (ours, theirs)}
    for run, names in TOURS:
        for address, (page, _) in pages.items():
            page.goto(f"{address}/Help?run={run}")
            at_rest(page)
        ratios: dict[str, list[float]] = {name: [] for name in names}
        spent = {(name, address): 0.0 for name in names for address in pages}
        for turn in range(rounds + 1):
            for name in names:
                took = {}
                for address in (ours, theirs) if turn % 2 else (theirs, ours):
                    page, server = pages[address]
                    page.bring_to_front()
                    before = sum(server.cpu_times()[:2])
                    took[address] = timed(
                        page, press_link(name), f"{HEADING} == '{name}' && {RESTS}"
                    )
                    at_rest(page)
                    page.wait_for_timeout(600)
                    if turn:  # the first fills caches
                        spent[name, address] += sum(server.cpu_times()[:2]) - before
                if turn:
                    ratios[name].append(took[ours] / took[theirs])
        for name, each in ratios.items():
            spread = f"({min(each):.3f} to {max(each):.3f}, {len(each)} rounds)"
            processor = spent[name, ours] / spent[name, theirs]
            print(f"{name:10} {median(each):.3f} {spread}  processor {processor:.3f}", flush=True)


WIDGETS = (
    ("Pareto: measure", "Pareto", "KL", "KL divergence", "loss recovered", "loss recovered"),
    ("Shrinkage: lengths", "Shrinkage", "γ", "γ of the tenth", "length ratio", "length ratio"),
    ("Help: topic", "Help", "Limits", "others wait in line", "Start", "In five minutes"),
)


def widgets(browser: Browser, address: str, rounds: int) -> Iterator[Budget]:
    """Measure a press in a page, until what it changes is drawn."""
    page = tab(browser)
    titles = f"[...{MAIN}.querySelectorAll('.ytitle, .xtitle, p, li')]"
    for name, where, one, sees_one, other, sees_other in WIDGETS:
        page.goto(f"{address}/{where}?run=wide")
        at_rest(page)
        page.wait_for_timeout(1500)
        found = []
        for _ in range(rounds):
            for option, seen in ((one, sees_one), (other, sees_other)):
                ready = f"{titles}.some(t => t.textContent.includes('{seen}'))"
                found.append(timed(page, press_option(option), ready))
                at_rest(page)
                page.wait_for_timeout(400)
        yield Budget(f"widget → redraw, {name}", 0.25, median(found))
    page.context.close()


def prompts(browser: Browser, rounds: int) -> Iterator[Budget]:
    """Measure answers to a text: the first of a server whose Home was seen alone, and the next."""
    cold, warm, linked = [], [], []
    with tempfile.TemporaryDirectory() as runs:
        for _ in range(rounds):
            with serving(Path(runs)) as address:
                page = tab(browser)
                page.goto(f"{address}/?run={EXAMPLE_ID}")
                at_rest(page)
                begun = time.perf_counter()
                page.evaluate(press_link("Prompt"))
                text = page.get_by_label("Text", exact=True)
                text.fill("import json")
                text.press("Control+Enter")
                _answered(page, "import")
                cold.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                text.fill("return x")
                text.press("Control+Enter")
                _answered(page, "return")
                warm.append(time.perf_counter() - begun)
                page.context.close()
            with serving(Path(runs)) as address:
                page = tab(browser)
                begun = time.perf_counter()
                page.goto(f"{address}/Prompt?run={EXAMPLE_ID}&text=import%20json")
                _answered(page, "import")
                linked.append(time.perf_counter() - begun)
                page.context.close()
    yield Budget("Prompt's first answer, opened from Home", 6.0, median(cold))
    yield Budget("Prompt's next answer", 1.0, median(warm))
    yield Budget("Prompt's first answer, a link to a cold server", inf, median(linked))


def _answered(page: Page, token: str) -> None:
    page.locator(".picker [role=option]").filter(has_text=token).first.wait_for()
    at_rest(page)


def server_of(address: str) -> psutil.Process:
    """Return the process that serves an address."""
    port = address.rpartition(":")[2]
    found = (p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"])
    return next(p for p in found if p.info["cmdline"][-2:] == ["--server.port", port])


def ticks(browser: Browser, root: Path, address: str, rounds: int) -> Iterator[Budget]:
    """Measure what looking at a moving run costs: the server's processor time, and what it sends.

    A look comes each second and finds a new point of each of eight SAEs, behind 2000 others.
    """
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    run = write_run(root, "moving", "running", share=0.05, pid=process.pid)
    lines = metric_lines(config(), share=1.0, n_points=2000)
    path, server = run.folder / "metrics.jsonl", server_of(address)
    page, sent = tab(browser), []
    a_second = len(config().saes)
    written = len(lines) - a_second * 5 * (rounds + 1)
    seconds, sizes, before = [], [], 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:written]), encoding="utf-8")
    try:
        page.on("websocket", lambda s: s.on("framereceived", lambda f: sent.append(f)))
        page.goto(f"{address}/Live?run=moving")
        at_rest(page)
        for turn in range(rounds + 1):
            for _ in range(5):
                upto = written + a_second
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines[written:upto])
                written = upto
                page.wait_for_timeout(1000)
            if turn:
                spent = sum(server.cpu_times()[:2]) - before
                seconds.append(1000 * spent / 5)
                sizes.append(sum(map(len, sent)) / 5000)
            before = sum(server.cpu_times()[:2])
            sent.clear()
    finally:
        process.kill()
        process.wait()
        page.context.close()
    yield Budget("live tick, processor time of the server", 50, median(seconds), "ms")
    yield Budget("live tick, sent", 150, median(sizes), "kB")


@contextmanager
def folder() -> Iterator[Path]:
    """Make two hundred runs, of which one has wide SAEs."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for n in range(N_RUNS - 1):
            write_run(root, f"r{n:03d}")
        saes = sweep(["gated", "relu"], [0.1, 0.2, 0.4, 0.8], WIDTH)
        write_run(root, "wide", run_config=config().model_copy(update={"saes": saes}))
        yield root


def table(found: list[Budget]) -> str:
    """Return the table for benchmarks/RESULTS.md."""
    lines = ["| what | budget | measured | |", "|---|---|---|---|"]
    for one in found:
        limit = "–" if one.limit == inf else f"{one.limit:g} {one.unit}"
        measured = f"{one.measured:.3g} {one.unit}"
        verdict = "" if one.measured <= one.limit else "over"
        lines.append(f"| {one.name} | {limit} | {measured} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        if options.against is not None:
            other = options.against.resolve()
            with folder() as root, serving(root) as ours, serving(root, clone=other) as theirs:
                compare(browser, ours, theirs, options.rounds)
            return
        found: list[Budget] = []

        def add(name: str, measure: Callable[[], Iterator[Budget]]) -> None:
            if options.only in name:
                for budget in measure():
                    found.append(budget)
                    print(json.dumps(budget._asdict(), ensure_ascii=False), flush=True)

        add("home", lambda: home(browser, options.rounds))
        add("prompt", lambda: prompts(browser, options.rounds))
        with folder() as root, serving(root) as address:
            add("first", lambda: first_plotly(browser, address, options.rounds))
            add("switch", lambda: switches(browser, address, options.rounds))
            add("widget", lambda: widgets(browser, address, options.rounds))
            add("tick", lambda: ticks(browser, root, address, options.rounds))
        browser.close()
    print(table(found))


if __name__ == "__main__":
    main()
