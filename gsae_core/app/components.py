"""Pictures and lists of our own in which one clicks: the block, a strip of tokens, feature links.

Each stands beside a widget that keeps the choice; a click only tells the page what to choose.
"""

from collections.abc import Callable, Collection
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.app.parts import asset
from gsae_core.config import SITES, Site

ABOUT: dict[Site, str] = {
    "resid_pre": "the residual stream as it enters the block",
    "resid_post": "the residual stream as it leaves the block",
    "mlp_hidden": "the MLP's hidden units, after the activation function",
    "mlp_out": "what the MLP adds to the residual stream",
    "attn_z": "the heads' outputs side by side, before W_O",
    "attn_out": "what attention adds to the residual stream",
}
"""What is read at each site."""


def _clickable(name: str, html: str) -> Callable[..., None]:
    """Return what draws a component of the script and style of that name, with the data it shows.

    `read` returns what a browser says was clicked, or None where that is nothing there is; `pick`
    is called with it before the page runs again.
    """
    tag = f"gsae_{name.replace('-', '_')}"
    mount = component(tag, html=html, css=asset(f"{name}.css"), js=asset(f"{name}.js"))

    def draw(
        *, key: str, read: Callable[[object], Any], pick: Callable[[Any], None], **data: Any
    ) -> None:
        def picked() -> None:
            choice = read(st.session_state[key].get("picked"))
            if choice is not None:
                pick(choice)

        mount(key=key, data=data, on_picked_change=picked)

    return draw


block_diagram: Callable[..., None] = _clickable("block-diagram", '<div class="block"></div>')
"""The transformer block, in which one clicks the `site` to read at, and the row of `n_layers`.

Its data are also `layer`, `about` (what each site is), and whether attention and MLP both read what
enters the block (`parallel`, as in GPT-NeoX). With 0 layers, not known, there is no row of them.
"""
token_picker: Callable[..., None] = _clickable("token-picker", '<div class="picker"></div>')
"""A text's `tokens`, as `prompt_view.cells` returns them, of which one, by its index, is `picked`.

With `two` SAEs there are lines under them.
"""
feature_links: Callable[..., None] = _clickable("feature-links", '<ul class="links"></ul>')
"""Features to go to, under a `label`.

Each of the `rows` has its `feature`, its `text` (what it fires on, or its label), how near it is as
`said` and as a `share` of a bar, what hovering says as `about`, and `href`.
"""


def read_choice(sent: object, n_layers: int) -> tuple[str, str | int] | None:
    """Return `"site"` or `"layer"` and which one a browser says was clicked; None: no such one."""
    kind, _, value = sent.partition(" ") if isinstance(sent, str) else ("", "", "")
    if kind == "site" and value in SITES:
        return kind, value
    if kind == "layer" and value.isdecimal() and int(value) < n_layers:
        return kind, int(value)
    return None


def read_number(sent: object, choices: Collection[int]) -> int | None:
    """Return which of the numbers there are a browser says was clicked; None if it is none."""
    # True is an int to Python; a number of JavaScript may come as 3.0.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    return int(sent) if sent in choices else None
