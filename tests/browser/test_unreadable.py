"""Runs with damaged files: the pages of the others, and of what can be read of them, are there."""

from collections.abc import Iterator

import pytest
from driver import opened, sees, serving
from playwright.sync_api import Page, expect
from synthetic import write_run


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a whole run and one without a config."""
    root = tmp_path_factory.mktemp("ward")
    write_run(root, "whole")
    (write_run(root, "bad").folder / "config.json").write_bytes(b"{")
    with serving(root) as address:
        yield address


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
