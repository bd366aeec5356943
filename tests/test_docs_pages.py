"""What the pages under docs/ say: Python runs, commands are taken, defaults are today's."""

import re
from pathlib import Path

import pytest
from documents import check_command, commands, examples
from hub_server import Hub

from gsae_core.cli.arguments import SETS
from gsae_core.files import EXAMPLE
from scripts.paper_index import INDEX, index_page, pages

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
ASKS_THE_HUB = "OWNER/NAME"
"""The repository of the pages' examples; the tests' Hub has the bundled SAEs in it."""


@pytest.fixture
def bundled_on_hub(hub: Hub) -> None:
    files = [path for path in (EXAMPLE / "saes").rglob("*") if path.is_file()]
    content = {path.relative_to(EXAMPLE / "saes").as_posix(): path.read_bytes() for path in files}
    hub.add(ASKS_THE_HUB, content)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own call
@pytest.mark.parametrize("name", [name for name in TEXTS if "```python\n" in TEXTS[name]])
def test_python_of_a_page_runs_and_prints_what_the_page_says(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(examples(TEXTS[name]))
    if any(ASKS_THE_HUB in example.code for example in found):
        request.getfixturevalue("bundled_on_hub")
    names: dict[str, object] = {"__name__": "page"}
    for example in found:
        exec(compile(example.code, name, "exec"), names)
        printed = capsys.readouterr().out
        if example.printed is not None:
            assert printed == example.printed


@pytest.mark.parametrize(
    ("name", "command"), [(name, line) for name, text in TEXTS.items() for line in commands(text)]
)
def test_every_command_of_a_page_is_one_the_program_takes(name: str, command: str) -> None:
    check_command(command)


def flags_told() -> list[tuple[str, str, str]]:
    """Return page, flag and default of every line of a table of flags."""
    row = re.compile(r"^\| `--([a-z0-9-]+)` \| ([^|]*?) \|", re.MULTILINE)
    return [(name, *found) for name, text in TEXTS.items() for found in row.findall(text)]


@pytest.mark.parametrize(("name", "flag", "told"), flags_told())
def test_a_flag_in_a_table_has_the_default_that_is_told(name: str, flag: str, told: str) -> None:
    config, field = SETS.get(flag.replace("-", "_"), (None, None))
    if config is None or field is None:
        # The sweep's own: it has none.
        assert flag in {"arch", "sparsity", "jumprelu-sparsity", "k", "width", "equal-width"}
        return
    default = config.model_fields[field].default
    if default is None or config.model_fields[field].is_required():
        # What takes its place depends on the run: it is said in words.
        assert not re.fullmatch(r"`?[\w.-]+`?", told)
    elif isinstance(default, float):
        assert float(told.strip("`")) == default
    else:
        assert told.strip("`") == str(default)


def test_the_index_of_the_papers_figures_is_that_of_its_pages() -> None:
    assert INDEX.read_text(encoding="utf-8") == index_page(), "run python -m scripts.paper_index"


def test_every_figure_and_table_of_the_paper_has_a_page() -> None:
    numbers = {"figure": set[int](), "table": set[int]()}
    for page in pages():
        kind, _, which = page.path.stem.partition("-")
        first, _, last = which.partition("-")
        numbers[kind] |= set(range(int(first), int(last or first) + 1))
    assert numbers == {"figure": set(range(1, 22)), "table": set(range(1, 11))}
