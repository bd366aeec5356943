"""What a page's address asks for, and what of that the page cannot give: said, never dropped.

Most widgets are bound to the address by Streamlit, under their key. Those of a name that another
page gives to something else have a key of their own, and are read from the address and written to
it here.
"""

import contextlib
from collections.abc import Collection, Mapping

import streamlit as st
from streamlit.errors import StreamlitAPIException

from gsae_core.pieces import plain

PAGE = "page"
"""Parameter that names the page an address is of, on the way to the browser: see history.js."""


def arrive() -> None:
    """Keep what the address of a page that was just opened asks for, until it is looked at."""
    st.session_state["shell.asked"] = st.query_params.to_dict()


def asked(param: str) -> str | None:
    """Return what the address asks for, the first time this is asked on a page; None later.

    Later the page's widgets say what is shown, and the address may lag behind them.
    """
    return st.session_state.get("shell.asked", {}).pop(param, None)


def settle(
    param: str, choices: Collection[str], *, key: str, default: str | None, what: str
) -> None:
    """Give a widget that is not bound the choice the address asks for, or a first one.

    Call it before the widget is drawn, which needs `persist_state="session"` to be as it was left.

    Args:
        what: what a choice would be, to complete "... is no ...".
    """
    wanted = asked(param)
    if wanted in choices:
        st.session_state[key] = wanted
    elif st.session_state.get(key) is None:
        st.session_state[key] = default
    if wanted is not None and wanted not in choices:
        _say_stranger(wanted, what=what, shown=st.session_state[key] or "none")


def write(values: Mapping[str, str | None]) -> None:
    """Have the address say what is shown; None takes a name out of it."""
    # A widget of the page that was just left (Pareto's `base`) may hold its name until this run
    # has ended; the next one writes it.
    with contextlib.suppress(StreamlitAPIException):
        for param in [name for name, value in values.items() if value is None]:
            st.query_params.pop(param, None)
        new = {name: value for name, value in values.items() if value is not None}
        if any(st.query_params.get(name) != value for name, value in new.items()):
            st.query_params.update(new)


def correct(key: str, choices: Collection[str], *, what: str, shown: str) -> None:
    """Say which of an address' values under `key` are none of the choices.

    Call it before the widget bound to `key` is drawn: binding clears them without a word.

    Args:
        what: what a value would be, to complete "... is no ...".
        shown: what is shown in its place.
    """
    strangers = [value for value in st.query_params.get_all(key) if value not in choices]
    for value in strangers[:3]:
        _say_stranger(value, what=what, shown=shown)
    # A list may only hold what it offers; a deleted run's SAEs are not offered any more.
    kept = st.session_state.get(key)
    if isinstance(kept, list):
        st.session_state[key] = [value for value in kept if value in choices]
    elif kept is not None and kept not in choices and isinstance(kept, str):
        del st.session_state[key]


def _say_stranger(value: str, *, what: str, shown: str) -> None:
    short = value if len(value) <= 80 else f"{value[:80]}…"
    plain(f"The address asks for {short!r}, which is no {what}; showing {shown}.", size=".9rem")
