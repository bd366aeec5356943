"""Runs with damaged files: the pages of the others, and of what can be read of them, are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import PAGES, opened, sees, serving
from playwright.sync_api import Page, expect
from synthetic import write_run


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a whole run, one without a config, one with torn events, one without evals."""
    root = tmp_path_factory.mktemp("ward")
    for name, file, content in [
        ("whole", "log.txt", b"done\n"),
        ("bad", "config.json", b"{"),
        ("torn", "events.jsonl", b'{"time": 5, "event": "created"}\n' + b"\0" * 200),
        ("no-evals", "evals.json", b'{"saes": ['),
    ]:
        path: Path = write_run(root, name).folder / file
        path.write_bytes(content)
    with serving(root) as address:
        yield address


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_and_says_which_run_it_cannot_read(
    page: Page, ward: str, name: str
) -> None:
    opened(page, f"{ward}/{name}?run=bad")
    sees(page, name or "Home")
    expect(page.get_by_text("bad cannot be opened")).to_be_visible()
    expect(page.get_by_text("1 run here cannot be read.")).to_be_visible()


def test_a_run_that_cannot_be_read_is_still_the_one_asked_for_after_a_link_a_reload_and_back(
    page: Page, ward: str
) -> None:
    opened(page, f"{ward}/Live?run=bad")
    page.get_by_test_id("stSidebar").get_by_role("link", name="Pareto").click()
    sees(page, "Pareto")
    for title, move in (("Pareto", page.reload), ("Live", page.go_back)):
        move()
        sees(page, title)
        expect(page).to_have_url(f"{ward}/{title}?run=bad")
        expect(page.get_by_text("bad cannot be opened")).to_be_visible()
    page.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name="whole").click()
    expect(page).to_have_url(f"{ward}/Live?run=whole")
    sees(page, "Live")
    expect(page.get_by_text("bad cannot be opened")).to_be_hidden()


def test_live_says_what_is_left_out_and_pareto_how_to_mend(page: Page, ward: str) -> None:
    opened(page, f"{ward}/Live?run=torn")
    expect(
        page.get_by_text("1 line of events.jsonl cannot be read and is left out.")
    ).to_be_visible()
    expect(page.get_by_text("Tokens seen")).to_be_visible()
    opened(page, f"{ward}/Pareto?run=no-evals")
    expect(page.get_by_text("This run cannot be read")).to_be_visible()
