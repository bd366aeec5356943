"""The transformer block as a picture in which one clicks the site to read at."""

from collections.abc import Callable

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.config import SITES, Site
from gsae_core.keys import own
from gsae_core.pieces import asset

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
