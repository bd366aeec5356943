"""What each number on the screen means, and the equations of each architecture.

Kept as text: importing the code that computes the numbers would import torch, which no page does.
"""

import re
from typing import NamedTuple

from gsae_core.app.parts import asset


class Term(NamedTuple):
    """A number or a formula."""

    title: str
    """What people call it, as pages do."""
    definition: str


def _read(name: str) -> dict[str, Term]:
    """Return the sections `## KEY: TITLE`, a blank line, paragraphs of a text, by their key."""
    text = asset(f"help/{name}.md")
    sections = re.findall(r"^## (\w+): (.+)\n\n((?:(?!## ).*\n)+)", text, re.M)
    assert len(sections) == len(re.findall("^##", text, re.M)), f"a section of {name}.md is not so"
    return {key: Term(title, body.strip()) for key, title, body in sections}


FORMULAS = _read("formulas")
TERMS = {
    key: Term(term.title, re.sub(r"(?<!\n)\n(?!\n)", " ", term.definition))
    for key, term in _read("glossary").items()
}
"""Paragraphs are one line each; an equation is the last."""


def definition(term: str) -> str:
    """Return what a number means, with its equation at the end."""
    return TERMS[term].definition


def search(words: str) -> tuple[str, ...]:
    """Return the terms whose title or definition holds all words; case is ignored.

    A title in full finds its own term alone, so that a link to one number shows one.
    """
    exact = tuple(name for name, term in TERMS.items() if term.title == words)
    sought = words.casefold().split()
    return exact or tuple(
        name for name, t in TERMS.items() if all(w in " ".join(t).casefold() for w in sought)
    )
