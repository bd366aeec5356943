"""Pictures and lists of our own in which one clicks: the block, a strip of tokens, feature links.

Each stands beside a widget that keeps the choice; a click only tells the page what to choose.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.app.parts import asset, own
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
    """Return what draws a component of the script and style of that name.

    `read` returns what a browser says was clicked, or None where that is nothing there is; `pick`
    is called with it before the page runs again.
    """
    tag = f"gsae_{name.replace('-', '_')}"
    mount = component(tag, html=html, css=asset(f"{name}.css"), js=asset(f"{name}.js"))

    def draw(
        *, key: str, data: Any, read: Callable[[object], Any], pick: Callable[[Any], None]
    ) -> None:
        def picked() -> None:
            choice = read(st.session_state[key].get("picked"))
            if choice is not None:
                pick(choice)

        mount(key=key, data=data, on_picked_change=picked)

    return draw


_diagram = _clickable("block-diagram", '<div class="block"></div>')
_picker = _clickable("token-picker", '<div class="picker"></div>')
_links = _clickable("feature-links", '<ul class="links"></ul>')


def block_diagram(
    *,
    site: Site,
    layer: int,
    n_layers: int | None,
    parallel: bool,
    pick: Callable[[str, str | int], None],
) -> None:
    """Draw the transformer block, in which one clicks the site to read at.

    Args:
        n_layers: blocks of the model; None, where that is not known, draws no row of them.
        parallel: whether attention and MLP both read what enters the block (GPT-NeoX).
        pick: called with `"site"` or `"layer"` and the choice.
    """
    _diagram(
        key=own("block"),
        data={
            "site": site,
            "layer": layer,
            "n_layers": n_layers or 0,
            "parallel": parallel,
            "about": ABOUT,
        },
        read=lambda sent: read_choice(sent, n_layers),
        pick=lambda choice: pick(*choice),
    )


def read_choice(sent: object, n_layers: int | None) -> tuple[str, str | int] | None:
    """Return what a browser says was clicked; None if that is no site or block there is."""
    kind, _, value = sent.partition(" ") if isinstance(sent, str) else ("", "", "")
    if kind == "site" and value in SITES:
        return kind, value
    if kind == "layer" and value.isdecimal() and int(value) < (n_layers or 0):
        return kind, int(value)
    return None


def read_number(sent: object, choices: Collection[int]) -> int | None:
    """Return which of the numbers there are a browser says was clicked; None if it is none."""
    # True is an int to Python; a number of JavaScript may come as 3.0.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    return int(sent) if sent in choices else None


def token_picker(
    tokens: Sequence[dict[str, Any]], *, picked: int, two: bool, pick: Callable[[int], None]
) -> None:
    """Draw a text's tokens; `pick` is called with the index of the one that is clicked.

    Args:
        tokens: of each its `text`, what hovering says as `about`, the opacity of its shading and of
            the line under it as `shade` and `below`, and whether it is `special`.
        picked: index of the one that is marked.
        two: whether lines are drawn under them.
    """
    _picker(
        key=own("tokens"),
        data={"picked": picked, "two": two, "tokens": tokens},
        read=lambda sent: read_number(sent, range(len(tokens))),
        pick=pick,
    )


def feature_links(
    rows: Sequence[dict[str, Any]], *, label: str, key: str, go: Callable[[int], None]
) -> None:
    """Draw features to go to; `go` is called with the number of the one that is clicked.

    Args:
        rows: of each its `feature`, its `text` (what it fires on, or its label), how near it is as
            `said` and as a `share` of a bar, what hovering says as `about`, and `href`.
    """
    _links(
        key=key,
        data={"label": label, "rows": rows},
        read=lambda sent: read_number(sent, [row["feature"] for row in rows]),
        pick=go,
    )
