"""Take the pictures in docs/screenshots: every page, light and dark, on a finished run.

    python -m gsae_core train --preset quick --out runs/quick
    python tests/browser/screenshots.py runs quick --to docs/screenshots

A page's pictures are a line of `SHOTS`. To look at a page as others see it: `--width 700`, another
folder of runs, or an empty one.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from driver import FLAGS, at_rest, chromium_path, serving
from playwright.sync_api import Page, sync_playwright


class Shot(NamedTuple):
    """A page and how much of it is on the picture."""

    address: str
    height: int


SHOTS = {
    "home": Shot("?run={run}", 900),
    "train": Shot("Train?from={run}", 1250),
    "live": Shot("Live?run={run}", 1500),
    "pareto": Shot("Pareto?run={run}&pick={run}/gated-0.2&pick={run}/relu-0.2", 1550),
    "shrinkage": Shot("Shrinkage?run={run}&gated=gated-0.2&base=relu-0.15", 1750),
    "features": Shot("Features?run=example&sae=gated-0.35&feature=293", 1500),
    "prompt": Shot(
        "Prompt?run=example&sae=gated-0.35&text=def read(self, size=-1):%0A    return self._file",
        1500,
    ),
    "steer": Shot("Steer?run=example&sae=gated-0.35&f=293&s=1&len=40&text=class Reader:", 1400),
    "hub": Shot("Hub?run={run}", 1300),
    "help": Shot("Help?run={run}", 900),
}


def shoot(page: Page, address: str, file: Path, *, width: int, height: int) -> None:
    """Save a picture of a page once it has come to rest."""
    page.set_viewport_size({"width": width, "height": height})
    page.goto(address)
    at_rest(page)
    page.mouse.move(width / 2, 5)
    page.wait_for_timeout(1500)  # charts draw after the script has ended
    page.screenshot(path=file, animations="disabled")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("run")
    parser.add_argument("--to", type=Path, default=Path("docs/screenshots"))
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--themes", nargs="+", default=["light", "dark"])
    parser.add_argument("--pages", nargs="+", default=list(SHOTS), choices=list(SHOTS))
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    with serving(options.runs.absolute()) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        for theme in options.themes:
            page = browser.new_page(color_scheme=theme)
            page.set_default_timeout(180_000)
            for name in options.pages:
                shot = SHOTS[name]
                target = f"{address}/{shot.address.format(run=options.run)}"
                file = options.to / f"{name}-{theme}.png"
                shoot(page, target, file, width=options.width, height=shot.height)
                print(file, file.stat().st_size)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
