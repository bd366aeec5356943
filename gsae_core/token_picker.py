"""A text as a strip of tokens in which one is picked, by pointer or by keyboard."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.keys import own
from gsae_core.pieces import asset
from gsae_core.token_strip import visible

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
        index = read_pick(st.session_state[key].get("picked"), len(cells))
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


def read_pick(sent: object, n_tokens: int) -> int | None:
    """Return which token a browser says was picked; None if that is no token there is."""
    # True is an int to Python, and no place in a text.
    if isinstance(sent, bool) or not isinstance(sent, int | float):
        return None
    # NaN is neither below nor above anything.
    return int(sent) if 0 <= sent < n_tokens and sent == int(sent) else None
