"""One session is one space of names: no page is given what another page keeps under its names."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_pages import APP, PAGES, circuit, opened
from streamlit.testing.v1 import AppTest

from gsae_core.app.train_form import FIELDS
from gsae_core.runs.run import EXAMPLE_ID

SHARED = {"run": "selectbox", "paper": "selectbox"}
"""Keys that several pages give one meaning: the run, and the paper's site behind one's own runs."""
NAMES = [Path(page).stem.partition("_")[2].lower() or "home" for page in PAGES]
PREFIXES = tuple(f"{name}." for name in (*NAMES, "shell"))


def visit(at: AppTest, page: str) -> dict[str, str]:
    """Go to a page; return the type of every keyed element on it."""
    if page == "app.py":
        at.switch_page(str(APP))
    else:
        at.switch_page(page)
    at.run()
    assert at.selectbox(key="run").value == EXAMPLE_ID, page
    assert at.query_params["run"] == EXAMPLE_ID, page
    nodes = [node for block in (at.main, at.sidebar) for node in block]
    return {str(key): node.type for node in nodes if (key := getattr(node, "key", None))}


def walk(way: list[str]) -> dict[str, dict[str, str]]:
    """Go along in one session with the example chosen; return the keys of each page."""
    at = opened(way[0], run=EXAMPLE_ID)
    seen: dict[str, dict[str, str]] = {}
    for page in way:
        seen.setdefault(page, {}).update(visit(at, page))
    return seen


def hold_apart(seen: dict[str, dict[str, str]]) -> None:
    """No key is on two pages, but for those that are shared, which are of one type."""
    for page, keys in seen.items():
        others = [
            (key, kind) for other in seen if other != page for key, kind in seen[other].items()
        ]
        for key, kind in others:
            if key in keys and not key.startswith("shell."):
                assert SHARED.get(key) == kind == keys[key], (key, page)


def test_a_circuit_takes_every_way_once() -> None:
    way = circuit(list("abcd"))
    steps = list(itertools.pairwise(way))
    assert len(steps) == len(set(steps)) == 4 * 3
    assert all(a != b for a, b in steps)


def test_pages_that_broke_each_other_do_not(root: Path) -> None:
    train, live, pareto, shrinkage, features, prompt, steer, hub, help_ = PAGES[1:]
    way = [train, help_, steer, train, steer, features, PAGES[0], prompt, features, prompt]
    seen = walk([*way, pareto, shrinkage, pareto, hub, help_, hub, live, PAGES[0]])
    assert set(seen) == set(PAGES)
    hold_apart(seen)


@pytest.mark.slow
def test_every_page_leads_to_every_other_twice_in_one_session(root: Path) -> None:
    way = circuit(PAGES)
    assert len(way) == 10 * 9 + 1
    hold_apart(walk([*way, *way[1:]]))


# What is not drawn in those states is read from the source.

SOURCES = [
    path
    for path in (APP, *APP.parent.glob("pages/*.py"), *APP.parent.glob("gsae_core/app/*.py"))
    if "import streamlit" in path.read_text(encoding="utf-8")
]
SESSION = ("st.session_state", "state")


def spelled(node: ast.expr) -> str | None:
    """Return how a key begins, where the source spells it; None where something else makes it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        first = node.values[0]
        return str(first.value) if isinstance(first, ast.Constant) else None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "key_for":
        return spelled(node.args[0])
    return None


def keys_of(path: Path) -> Iterator[tuple[ast.expr, bool]]:
    """Yield the keys in a file, and whether the address holds each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if "key" in given:
                yield given["key"], "bind" in given or ast.unparse(node.func) == "choice"
            if ast.unparse(node.func).rpartition(".")[0] in SESSION and node.args:
                yield node.args[0], False
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in SESSION:
            yield node.slice, False


def test_what_the_address_does_not_hold_is_kept_under_its_page_s_name() -> None:
    pairs = [(spelled(key), held) for path in SOURCES for key, held in keys_of(path)]
    found = [(key, held) for key, held in pairs if key is not None]
    bound = {key for key, held in found if held} | FIELDS.keys()
    bound |= {"f", "dens"}  # their widgets are given a name from a list
    loose = {key for key, held in found if not held and not key.startswith(PREFIXES)}
    assert loose <= bound | {"run"}
    assert len(found) > 200
