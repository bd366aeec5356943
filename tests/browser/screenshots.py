"""Take the pictures in docs/screenshots: every page, light and dark, on a run of your choice.

python tests/browser/screenshots.py RUNS_FOLDER RUN_ID --to docs/screenshots
"""

import argparse
from pathlib import Path

from driver import FLAGS, chromium_path, serving
from playwright.sync_api import Page, sync_playwright

PAGES = {"home": "", "train": "Train", "live": "Live", "pareto": "Pareto", "shrinkage": "Shrinkage"}
HEIGHTS = {"home": 900, "train": 1000, "live": 1300, "pareto": 1450, "shrinkage": 1500}


def shoot(page: Page, address: str, file: Path, *, width: int, height: int) -> None:
    """Save a picture of a page once it has come to rest."""
    page.set_viewport_size({"width": width, "height": height})
    page.goto(address)
    page.wait_for_selector(
        '[data-testid="stApp"][data-test-script-state="notRunning"]', timeout=180_000
    )
    page.wait_for_function(
        "!document.querySelector('[data-testid=\"stSkeleton\"]')", timeout=180_000
    )
    page.wait_for_timeout(1500)  # charts draw after the script has ended
    page.screenshot(path=file, timeout=120_000, animations="disabled")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("run")
    parser.add_argument("--to", type=Path, default=Path("docs/screenshots"))
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--themes", nargs="+", default=["light", "dark"])
    parser.add_argument("--pages", nargs="+", default=list(PAGES))
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    with serving(options.runs) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        for theme in options.themes:
            page = browser.new_page(color_scheme=theme)
            for name in options.pages:
                target = f"{address}/{PAGES[name]}?run={options.run}"
                file = options.to / f"{name}-{theme}.png"
                shoot(page, target, file, width=options.width, height=HEIGHTS[name])
                print(file, file.stat().st_size)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
