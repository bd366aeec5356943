"""Help: what every number means, the equations, and what is installed."""

import re
from importlib.metadata import version

import pytest
from app_pages import HOSTILE, opened, text

from gsae_core.app import glossary
from gsae_core.config import ARCHITECTURES
from gsae_core.machine import PACKAGES, versions

HELP = "pages/9_Help.py"
SECTIONS = ["Start", "Glossary", "Formulas", "Keyboard", "Limits", "Versions", "Privacy"]


@pytest.mark.parametrize("topic", SECTIONS)
def test_every_topic_can_be_linked_to(root: object, topic: str) -> None:
    at = opened(HELP, topic=topic)
    assert at.segmented_control(key="topic").value == topic
    assert len(text(at)) > 300


def test_the_glossary_holds_every_number_of_the_pages(root: object) -> None:
    said = text(opened(HELP, topic="Glossary"))
    titles = {term.title for term in glossary.TERMS.values()}
    assert all(f"**{title}**" in said for title in titles)
    assert len(titles) == len(glossary.TERMS)


def test_a_link_to_a_number_opens_its_definition_alone(root: object) -> None:
    at = opened(HELP, topic="gamma")
    assert at.segmented_control(key="topic").value == "Glossary"
    assert "Relative reconstruction bias: 1 is unbiased" in text(at)
    assert "Cosine of the angle" not in text(at)


def test_a_search_finds_words_of_definitions_and_says_when_none_has_them(root: object) -> None:
    at = opened(HELP, topic="Glossary", find="ZERO ablation")
    assert "**loss recovered**" in text(at)
    assert "**FVU**" not in text(at)
    at.text_input(key="find").set_value(HOSTILE).run()
    assert "No definition holds" in text(at)
    assert "<img" not in text(at)
    at.button[0].click().run()
    assert "**FVU**" in text(at)


def test_a_topic_that_is_none_is_named(root: object) -> None:
    at = opened(HELP, topic="cooking")
    assert "There is no topic &#x27;cooking&#x27;; showing Start." in text(at)


def test_every_architecture_and_loss_has_its_equations(root: object) -> None:
    assert set(glossary.FORMULAS) == {f"{a}{end}" for a in ARCHITECTURES for end in ("", "_loss")}
    shown = [code.value for code in opened(HELP, topic="Formulas").code]
    for formula in glossary.FORMULAS.values():
        assert formula.definition in shown
        assert "x_hat" in formula.definition
    assert "1[pi_gate > 0] * relu(pi_mag)" in glossary.FORMULAS["gated"].definition


@pytest.mark.parametrize("term", glossary.TERMS)
def test_every_number_is_defined_in_a_sentence_about_features(term: str) -> None:
    found = glossary.definition(term)
    assert "." in found
    assert not re.search(r"\blatents?\b", found)


def test_equations_stand_with_their_numbers() -> None:
    assert glossary.definition("gamma").endswith("E|x_hat|^2 / E[x . x_hat]")
    assert "explained variance" in glossary.definition("fvu")
    assert glossary.definition("sparsity").startswith(
        "Sparsity coefficient: weight of the L1 penalty. Larger λ, fewer active features."
    )


def test_versions_are_those_installed() -> None:
    found = versions()
    assert set(PACKAGES.split()) < set(found)
    assert found["streamlit"] == version("streamlit")
