"""The transformer block as a picture in which one clicks the site to read at."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.app.parts import asset, own
from gsae_core.config import SITES, Site
from gsae_core.text import visible

ABOUT: dict[Site, str] = {
    "resid_pre": "the residual stream as it enters the block",
    "resid_post": "the residual stream as it leaves the block",
    "mlp_hidden": "the MLP's hidden units, after the activation function",
    "mlp_out": "what the MLP adds to the residual stream",
    "attn_z": "the heads' outputs side by side, before W_O",
    "attn_out": "what attention adds to the residual stream",
}
"""What is read at each site."""


_diagram = component(
    "gsae_block_diagram",
    html='<div class="block"></div>',
    css=asset("block-diagram.css"),
    js=asset("block-diagram.js"),
)


def block_diagram(
    *,
    site: Site,
    layer: int,
    n_layers: int | None,
    parallel: bool,
    pick: Callable[[str, str | int], None],
) -> None:
    """Draw the block; the widgets beside it stay the truth, and are told of a click by `pick`.

    Args:
        n_layers: blocks of the model; None, where that is not known, draws no row of them.
        parallel: whether attention and MLP both read what enters the block (GPT-NeoX).
        pick: called with `"site"` or `"layer"` and the choice, before the page runs again.
    """

    key = own("block")

    def picked() -> None:
        choice = read_choice(st.session_state[key].get("picked"), n_layers)
        if choice is not None:
            pick(*choice)

    _diagram(
        key=key,
        data={
            "site": site,
            "layer": layer,
            "n_layers": n_layers or 0,
            "parallel": parallel,
            "about": ABOUT,
        },
        on_picked_change=picked,
    )


def read_choice(sent: object, n_layers: int | None) -> tuple[str, str | int] | None:
    """Return what a browser says was clicked; None if that is no site or block there is."""
    kind, _, value = sent.partition(" ") if isinstance(sent, str) else ("", "", "")
    if kind == "site" and value in SITES:
        return kind, value
    if kind == "layer" and value.isdecimal() and int(value) < (n_layers or 0):
        return kind, int(value)
    return None


_picker = component(
    "gsae_token_picker",
    html='<div class="picker"></div>',
    css=asset("token-picker.css"),
    js=asset("token-picker.js"),
)


class Cell(NamedTuple):
    """One token of the strip."""

    text: str
    about: str
    """What hovering and focusing it say."""
    shade: float
    """Opacity of its ground, 0 to 0.6: body text keeps a contrast of 5:1 on it."""
    below: float
    """Opacity of the line under it, 0 to 1: the other SAE."""
    special: bool
    """BOS and the like, on which no SAE is trained."""


def token_picker(
    cells: Sequence[Cell],
    *,
    picked: int,
    two: bool,
    pick: Callable[[int], None],
) -> None:
    """Draw the strip; the widget beside it stays the truth, and is told of a click by `pick`.

    Args:
        picked: index of the token that is marked.
        two: whether the lines under the tokens are drawn.
        pick: called with the index of a token, before the page runs again.
    """

    key = own("tokens")

    def chosen() -> None:
        index = read_token_pick(st.session_state[key].get("picked"), len(cells))
        if index is not None:
            pick(index)

    _picker(
        key=key,
        data={
            "picked": picked,
            "two": two,
            "tokens": [
                {
                    # A line ends where the text's does, and the sign for it stays in sight.
                    "text": visible(cell.text).replace("↵", "↵\n"),
                    "about": cell.about,
                    "shade": round(cell.shade, 3),
                    "below": round(cell.below, 3),
                    "special": cell.special,
                }
                for cell in cells
            ],
        },
        on_picked_change=chosen,
    )


def read_token_pick(sent: object, n_tokens: int) -> int | None:
    """Return which token a browser says was picked; None if that is no token there is."""
    # True is an int to Python, and no place in a text.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    # NaN is neither below nor above anything.
    return int(sent) if 0 <= sent < n_tokens and sent == int(sent) else None


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
        number = read_feature_pick(st.session_state[key].get("picked"), links)
        if number is not None:
            go(number)

    rows = [
        link._asdict()
        | {"number": str(link.feature), "share": round(min(max(link.share, 0), 1), 3)}
        for link in links
    ]
    _links(key=key, data={"label": label, "rows": rows}, on_picked_change=picked)


def read_feature_pick(sent: object, links: Sequence[Link]) -> int | None:
    """Return which of the features a browser says was picked; None if it is none of them."""
    # True is an int to Python.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    return next((link.feature for link in links if link.feature == sent), None)
