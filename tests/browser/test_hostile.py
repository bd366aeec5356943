"""A corpus, names and files that are after the browser: shown as text on every page, never obeyed.

Run with `python -m pytest tests/browser/test_hostile.py -m browser`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from app_pages import NASTY, hostile_run, write_hostile_corpus
from driver import PAGES, opened, sees, serving
from playwright.sync_api import Page, expect

TINY = (
    "--arch gated relu --sparsity 0.3 --width 64 --tokens 4096 --batch-size 512 --device cpu "
    "--eval-tokens 1024"
)
# What an injected script, style, image, form or overlay would leave behind.
TRACES = """() => ({
  scripts: [...document.querySelectorAll('[data-testid=stMain] script')].length,
  frames: document.querySelectorAll('[data-testid=stMain] iframe').length,
  forms: document.querySelectorAll('form[action*=evil]').length,
  images: [...document.images].filter(i => /^x$|evil/.test(i.getAttribute('src'))).length,
  hidden: getComputedStyle(document.querySelector('[data-testid=stMain]')).display == 'none',
  direction: getComputedStyle(document.querySelector('[data-testid=stMain]')).direction,
  owned: document.title.includes('owned') || !!window.owned,
  wide: document.documentElement.scrollWidth > window.innerWidth,
})"""
NONE = {"scripts": 0, "frames": 0, "forms": 0, "images": 0, "hidden": False, "direction": "ltr"}
NONE |= {"owned": False, "wide": False}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server over a run trained on a hostile corpus, and one whose every file is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    corpus = write_hostile_corpus(root / "corpus.txt")
    trained = str(root / "trained")
    train = [sys.executable, "-m", "gsae_core", "train", *TINY.split(), "--data", str(corpus)]
    subprocess.run([*train, "--out", trained], check=True, capture_output=True)
    hostile_run(root)
    with serving(root) as address:
        yield address, corpus


@pytest.mark.parametrize("name", PAGES)
def test_no_page_obeys_what_a_run_holds(page: Page, hostile: tuple[str, Path], name: str) -> None:
    address, corpus = hostile
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    for run in ("trained", "hostile"):
        more = f"&data={quote(str(corpus))}&peek=true" if name == "Train" else ""
        opened(page, f"{address}/{name}?run={run}{more}")
        sees(page, name or "Home")
        if more:
            expect(page.get_by_role("list", name="First lines as tokens")).to_be_visible()
        assert page.evaluate(TRACES) == NONE


def test_no_address_is_obeyed(page: Page, hostile: tuple[str, Path]) -> None:
    address, _ = hostile
    for name, parameter in (("Pareto", "pick"), ("Shrinkage", "gated"), ("Live", "overlay")):
        for text in NASTY[:2]:
            opened(page, f"{address}/{name}?run=trained&{parameter}={quote(text)}")
            expect(page.get_by_text("The address asks for").first).to_be_visible()
            assert page.evaluate(TRACES) == NONE
