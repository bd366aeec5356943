"""Imports run down the floors of docs/architecture.md, whatever their place in a file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        [
            "errors validation config schedule sweeps paper presets glossary wording footprint "
            "threads catalogue estimates notebook_cell measured token_strip example_strips "
            "markup versions hub_errors "
            "sae_catalogue",
            "lm sae",
            "training analysis store",
            "plots job indexing learning samples workshop machine progress failures flags "
            "preflight preview model_card card_figure hub_flags hub_work label_flags",
            "bench",
            "controls live_view cli command_line report doctor __main__ launch shell "
            "exchange exchange_flags "
            "pieces keys job_badge collector "
            "label_command hub_command hub_view hub_library hub_transfers hub_catalogue "
            "cached cards address app pages "
            "train_form train_view train_widgets block_diagram "
            "feature_bar feature_dashboard feature_examples feature_files feature_links "
            "feature_relations features_view index_panel make_example example "
            "loaded inspect_parts prompt_reading prompt_view steer_job steer_view token_picker",
        ]
    )
    for room in rooms.split()
}
STRANGERS = {frozenset({"lm", "sae"})}
FILES = sorted(
    path
    for pattern in ("app.py", "pages/*.py", "gsae_core/**/*.py")
    for path in ROOT.glob(pattern)
    # The package's own __init__ only names where its exports live, and loads none of them.
    if path != ROOT / "gsae_core" / "__init__.py"
)


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "gsae_core" else parts[0]


def imported(path: Path) -> Iterator[str]:
    """Yield every module an import statement of the file can load, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_used(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path)]
    return {n[1] for n in names if n[0] == "gsae_core" and len(n) > 1} & FLOORS.keys()


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_its_own_floor_or_below(path: Path) -> None:
    above = {used for used in rooms_used(path) if FLOORS[used] > FLOORS[room(path)]}
    assert not above
    met = {used for used in rooms_used(path) if frozenset({room(path), used}) in STRANGERS}
    assert not met


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_only_the_lm_room_knows_transformer_lens() -> None:
    assert {room(path) for path in FILES if "transformer_lens" in packages(path)} <= {"lm"}


def test_the_mathematics_knows_no_files_and_no_screens() -> None:
    forbidden = {"streamlit", "plotly", "tqdm", "tyro", "pathlib", "json", "os", "transformers"}
    assert not {p for path in FILES if room(path) == "sae" for p in packages(path)} & forbidden


def test_pages_hold_no_mathematics() -> None:
    pages = [path for path in FILES if room(path) in ("app", "pages")]
    assert not {p for path in pages for p in packages(path)} & {"torch", "numpy", "transformers"}
