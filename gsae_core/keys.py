"""Keys of widgets, and of what a session holds: one session is one space of names for all pages.

A key begins with its page's name: two pages with a widget of one name would be given each other's
value. Those that the address holds are the address's names, and of one page each.
"""

import zlib

import streamlit as st


def own(name: str) -> str:
    """Return a key of the page that is drawn, for what several pages draw."""
    return f"{st.session_state['shell.page'].lower()}.{name}"


def key_for(name: str, *about: object) -> str:
    """Return the key of a widget whose choices depend on data: another one for other data.

    A browser keeps showing what was chosen under a key, even if the next list under it lacks it.

    Args:
        name: the page's and the widget's.
        about: what the choices depend on; equal where their `repr` is.
    """
    return f"{name}.{zlib.crc32(repr(about).encode()):08x}"
