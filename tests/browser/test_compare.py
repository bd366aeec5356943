"""Pareto and Shrinkage in a real browser: what is clicked, what the address keeps, how fast.

Run with `python -m pytest tests/browser/test_compare.py -m browser`.
"""

import re
from collections.abc import Callable

from driver import Watch, at_rest, filtered, opened, sees
from playwright.sync_api import Locator, Page, expect


def click(page: Page, mark: Locator) -> None:
    """Click a mark of a Plotly figure."""
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    # Plotly ignores a click before it has noticed the pointer, and a while after.
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    expect(page.locator(".js-plotly-plot .hoverlayer .hovertext").first).to_be_visible()
    page.wait_for_timeout(500)
    page.mouse.click(x, y, delay=60)


def points(page: Page) -> Locator:
    """The marks of the plane, in drawing order: rings and matches first, the baseline last."""
    return page.locator(".js-plotly-plot .scatterlayer .points path")


def test_one_click_opens_a_card_and_two_the_difference(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done")
    drawn = points(page).count()
    click(page, points(page).last)  # the baseline with the most active features, lambda 0.1
    expect(page.get_by_text("1 · ReLU baseline, λ 0.1, 768 features")).to_be_visible()
    at_rest(page)
    expect(points(page)).to_have_count(drawn + 1)  # a ring
    click(page, points(page).nth(-5))  # the Gated SAE with the most
    expect(page.get_by_text("2 · Gated, λ 0.1, 512 features")).to_be_visible()
    # L0 160 and 120: 40 fewer, a quarter.
    expect(page.get_by_text("-40.0 (-25.0 %)")).to_be_visible()
    page.wait_for_url(re.compile(r"pick=done(/|%2F)relu-0\.1&pick=done(/|%2F)gated-0\.1"))
    page.reload()
    at_rest(page)
    expect(page.get_by_text("-40.0 (-25.0 %)")).to_be_visible()


def test_a_link_shows_another_visitor_every_choice_it_names(
    new_visitor: Callable[..., tuple[Page, Watch]], address: str
) -> None:
    chosen = (
        "run=done&ym=FVU&xm=KL&logx=false&pick=done/gated-0.2&pick=done/relu-0.2"
        "&runs=other&base=other&diff=false"
    )
    page, _ = new_visitor()
    opened(page, f"{address}/Pareto?{chosen}")
    expect(page.get_by_text("Change from 1, done/gated-0.2, to 2, done/relu-0.2")).to_be_visible()
    expect(page.get_by_text("fraction of variance unexplained").first).to_be_visible()
    expect(page.get_by_text("KL divergence (nats per token)").first).to_be_visible()
    expect(page.get_by_text("Gated · other")).to_be_visible()
    page.get_by_role("button", name="Data").first.click()
    link = page.get_by_test_id("stCode").first
    expect(link).to_contain_text("pick=done%2Fgated-0.2&pick=done%2Frelu-0.2")
    expect(link).to_contain_text("ym=FVU")


def test_a_card_leads_to_shrinkage_of_its_sae(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done&pick=done/gated-0.1")
    page.get_by_test_id("stMain").get_by_role("button", name="Shrinkage").click()
    sees(page, "Shrinkage")
    expect(page.get_by_text("Gated, λ 0.1 · L0 120.0")).to_be_visible()


def test_a_click_on_a_bar_lists_its_features(page: Page, address: str) -> None:
    opened(page, f"{address}/Shrinkage?run=done")
    bars = page.locator(".js-plotly-plot .barlayer .point path")
    # The tallest bar of the first SAE.
    sizes = [box["height"] if (box := bars.nth(i).bounding_box()) else 0 for i in range(40)]
    click(page, bars.nth(sizes.index(max(sizes))))
    expect(page.get_by_text(re.compile(r"of \d+ features, most firings first"))).to_be_visible()
    page.wait_for_url(re.compile("bin="))


def test_points_are_chosen_by_keyboard_alone(page: Page, address: str) -> None:
    opened(page, f"{address}/Pareto?run=done")
    filtered(page, "Compare", "done/relu-0.8")
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 · ReLU baseline, λ 0.8, 768 features")).to_be_visible()
