"""Time a cold server to an interactive Home: `python benchmarks/home.py`.

From the first request to a visible, enabled button in headless Chromium, the browser's start left
out; the time the server takes to answer at all is the reference in the same run.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "browser"))

from driver import FLAGS, chromium_path, serving

ROUNDS = 5


def main() -> None:
    """Print both times, medians over fresh servers."""
    answers, home = [], []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as runs:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            with serving(Path(runs)) as address:
                answers.append(time.perf_counter() - start)
                page = browser.new_page()
                page.goto(address)
                page.get_by_role("button", name="Start training").click(trial=True)
                home.append(time.perf_counter() - start - answers[-1])
                page.close()
        browser.close()
    print(f"server answers after {median(answers):.2f} s, Home {median(home):.2f} s after that")


if __name__ == "__main__":
    main()
