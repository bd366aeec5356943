"""Features to go on to, as a list of links: a plain click stays in the page."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.pieces import asset

_links = component(
    "gsae_feature_links",
    html='<ul class="links"></ul>',
    css=asset("feature-links.css"),
    js=asset("feature-links.js"),
)


class Link(NamedTuple):
    """A feature to go to."""

    feature: int
    text: str
    """What it fires on, or its label; shown as it stands."""
    said: str
    """The number that tells how near it is."""
    share: float
    """That number as a share of a bar, 0 to 1."""
    about: str
    """What hovering says."""
    href: str
    """The page of its own."""


def feature_links(
    links: Sequence[Link], *, label: str, key: str, go: Callable[[int], None]
) -> None:
    """Draw the list; `go` is called with the number of the one that is clicked.

    Args:
        label: what the list is, for those who do not see it.
    """

    def picked() -> None:
        number = read_pick(st.session_state[key].get("picked"), links)
        if number is not None:
            go(number)

    rows = [
        link._asdict()
        | {"number": str(link.feature), "share": round(min(max(link.share, 0), 1), 3)}
        for link in links
    ]
    _links(key=key, data={"label": label, "rows": rows}, on_picked_change=picked)


def read_pick(sent: object, links: Sequence[Link]) -> int | None:
    """Return which of the features a browser says was picked; None if it is none of them."""
    # True is an int to Python.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    return next((link.feature for link in links if link.feature == sent), None)
