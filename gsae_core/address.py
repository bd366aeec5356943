"""What a page's address asks for and the page cannot give: said, never silently dropped.

And the keys of widgets that offer what depends on data.
"""

import zlib
from collections.abc import Collection

import streamlit as st

from gsae_core.pieces import plain


def key_for(name: str, *about: object) -> str:
    """Return the key of a widget whose choices depend on data: another one for other data.

    A browser keeps showing what was chosen under a key, whatever the next list under it holds.

    Args:
        name: the page's and the widget's.
        about: what the choices depend on; equal where their `repr` is.
    """
    return f"{name}.{zlib.crc32(repr(about).encode()):08x}"


def correct(key: str, choices: Collection[str], *, what: str, shown: str) -> None:
    """Say which of an address' values under `key` are none of the choices.

    Call it before the widget bound to `key` is drawn: binding clears them without a word.

    Args:
        what: what a value would be, to complete "... is no ...".
        shown: what is shown in its place.
    """
    strangers = [value for value in st.query_params.get_all(key) if value not in choices]
    for value in strangers[:3]:
        short = value if len(value) <= 80 else f"{value[:80]}…"
        plain(f"The address asks for {short!r}, which is no {what}; showing {shown}.", size=".9rem")
    # A list may only hold what it offers; a deleted run's SAEs are not offered any more.
    kept = st.session_state.get(key)
    if isinstance(kept, list):
        st.session_state[key] = [value for value in kept if value in choices]
    elif kept is not None and kept not in choices and isinstance(kept, str):
        del st.session_state[key]
