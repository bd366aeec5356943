"""Imports run one way, room by room, and in no circle; wherever in a file they stand."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lowest first; rooms of one line are strangers to each other.
ORDER = (
    "ground",
    "sae lm",
    "training checkpoints analysis",
    "plots",
    "runs",
    "cli",
    "app",
    "app.py pages",
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
STRICT = {  # rooms that may not use all that is below them
    "training": {"ground", "sae"},
    "checkpoints": {"ground", "sae"},
    "plots": {"ground", "analysis"},
}
FILES = sorted(
    path
    for pattern in ("app.py", "pages/*.py", "gsae_core/**/*.py")
    for path in ROOT.glob(pattern)
    # The package's own __init__ only names where its exports live, and __main__ starts `cli`.
    if path.parent != ROOT / "gsae_core" or path.stem not in ("__init__", "__main__")
)


def room(path: Path) -> str:
    first, *rest = path.relative_to(ROOT).parts
    if first != "gsae_core":
        return first
    return rest[0] if rest[0] in LEVELS else "ground"


def imported(node: ast.AST) -> Iterator[str]:
    """Yield every module that import statements below a node can load, inside functions too."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno} imports relatively"
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def file_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    found = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in found if path in FILES), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_its_own_room_or_below(path: Path) -> None:
    here = room(path)
    below = {other for other, level in LEVELS.items() if level < LEVELS[here]}
    allowed = STRICT.get(here, below) | {here}
    used = {room(found) for name in imported(parsed(path)) if (found := file_of(name))}
    assert used <= allowed


def without_type_checking(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def test_no_module_imports_itself_by_way_of_others() -> None:
    uses = {
        path: {
            found
            for name in imported(without_type_checking(parsed(path)))
            if (found := file_of(name)) and found != path
        }
        for path in FILES
    }
    while removable := [path for path, used in uses.items() if not used & uses.keys()]:
        for path in removable:
            del uses[path]
    assert not [str(path.relative_to(ROOT)) for path in uses]


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(parsed(path))}


def test_only_the_lm_room_knows_transformer_lens() -> None:
    assert {room(path) for path in FILES if "transformer_lens" in packages(path)} <= {"lm"}


def test_only_the_app_knows_streamlit() -> None:
    app = {"app", "app.py", "pages"}
    assert {room(path) for path in FILES if "streamlit" in packages(path)} <= app


def test_the_mathematics_knows_no_files_and_no_screens() -> None:
    forbidden = {"streamlit", "plotly", "tqdm", "tyro", "pathlib", "json", "os", "transformers"}
    assert not {p for path in FILES if room(path) == "sae" for p in packages(path)} & forbidden


def test_pages_hold_no_mathematics() -> None:
    pages = [path for path in FILES if room(path) in ("app.py", "pages")]
    assert not {p for path in pages for p in packages(path)} & {"torch", "numpy", "transformers"}
