"""How large each room is: a number is lowered when its room shrinks, and raised with a reason.

Last raised for any decoder's sites, any text, vectors from folders, several places in one pass,
fine-tuning, and the formats of more libraries: lm and runs grew most.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gsae_core"
LINES = {
    "ground": 2130,
    "sae": 3190,
    "lm": 5580,
    "training": 1186,
    "checkpoints": 3020,
    "analysis": 5000,
    "plots": 1310,
    "runs": 4770,
    "cli": 1870,
    "app": 3880,
}
FILES, TOP_ENTRIES, LONGEST_FUNCTION = 140, 21, 80


def modules(room: str) -> list[Path]:
    if room == "ground":
        return sorted(PACKAGE.glob("*.py"))
    return sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", LINES)
def test_a_room_is_no_larger_than_it_has_to_be(room: str) -> None:
    n_lines = sum(len(path.read_text("utf-8").splitlines()) for path in modules(room))
    assert LINES[room] - 200 < n_lines <= LINES[room]


def test_there_are_few_files_and_every_one_is_in_a_room() -> None:
    found = [path for room in LINES for path in modules(room)]
    assert len(found) <= FILES
    assert set(found) == {p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts}
    entries = {path.name for path in PACKAGE.iterdir()} - {"assets", "__pycache__"}
    assert len(entries) <= TOP_ENTRIES


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for room in LINES
        for path in modules(room)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
        # A Triton kernel is one function by nature, and cannot call what is not compiled with it.
        and not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert not long
