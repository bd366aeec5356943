"""Help: what words and numbers mean, how they are computed, what the app does and does not do."""

import streamlit as st

from gsae_core.app import glossary, shell
from gsae_core.app.parts import asset, copy_link, plain
from gsae_core.machine import versions

frame = shell.page(
    "Help",
    icon="❔",
    purpose="What words and numbers mean, how they are computed, and what stays on this machine.",
)


def written(name: str) -> None:
    """Show one of the texts that ship with the package."""
    st.markdown(asset(f"help/{name}.md"))


def words() -> None:
    """Show every number's definition, or those that a search leaves."""
    sought = st.text_input(
        "Find", key="find", bind="query-params", placeholder="a word of a name or a definition"
    )
    found = glossary.search(sought or "")
    for term in found:
        with st.container(border=True):
            st.markdown(f"**{glossary.TERMS[term].title}**")
            plain(glossary.definition(term))
    if not found:
        plain(f"No definition holds {sought!r}.")
        st.button("Show all", on_click=st.session_state.update, args=({"find": ""},))


def formulas() -> None:
    """Show the equations of each architecture and its loss."""
    st.caption("x is an activation, f its features, x_hat its reconstruction.")
    for formula in glossary.FORMULAS.values():
        st.markdown(f"**{formula.title}**")
        st.code(formula.definition, language=None, wrap_lines=True)


def about() -> None:
    """Show what is installed, to be copied into a report."""
    st.code("\n".join(f"{name} {number}" for name, number in versions().items()), language=None)


SECTIONS = {
    "Start": lambda: written("start"),
    "Glossary": words,
    "Formulas": formulas,
    "Keyboard": lambda: written("keyboard"),
    "Limits": lambda: written("limits"),
    "Versions": about,
    "Privacy": lambda: written("privacy"),
}

asked = st.query_params.get("topic")
if asked in glossary.TERMS and asked not in SECTIONS:
    # A link to one number opens the glossary at it.
    st.session_state.update(topic="Glossary", find=glossary.TERMS[asked].title)
elif asked is not None and asked not in SECTIONS:
    short = asked if len(asked) <= 80 else f"{asked[:80]}…"
    plain(f"There is no topic {short!r}; showing Start.", size=".9rem")
topic = st.segmented_control(
    "Topic", list(SECTIONS), default="Start", required=True, key="topic", bind="query-params"
)
SECTIONS[topic]()
with st.popover("Copy link", icon=":material/link:", type="tertiary"):
    copy_link()
