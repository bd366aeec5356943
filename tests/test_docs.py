"""Documentation: every public name, command and flag is in it; every link leads somewhere."""

import ast
import html
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import griffe
import pytest
import yaml
from contracts import COMMANDS, help_file
from markdown.extensions.toc import slugify

import gsae_core
import gsae_core.training
from scripts.site_hooks import PAGES, command_line, faults, help_page, with_formulas, with_links

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = "gsae_core."
HOSTS = {"arxiv.org", "huggingface.co", "keepachangelog.com", "semver.org"}
"""Hosts that texts may link to; no test asks them for anything."""

TEXTS = [ROOT / source for source in PAGES.values()] + sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def test_the_page_of_text_names_every_suffix_that_is_read() -> None:
    from gsae_core.lm import packed, readers, tables

    page = (DOCS / "text.md").read_text(encoding="utf-8")
    suffixes = {*tables.TABLE_SUFFIXES, *readers.TOKEN_SUFFIXES, *packed.PACKED}
    suffixes |= {*packed._PACKED_TARS, ".zip", ".tar", ".txt"}
    assert {suffix for suffix in suffixes if f"`{suffix}`" not in page} == set()
    assert "(docs/text.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def cells(notebook: Path, kind: str) -> list[str]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    """Return a text or a notebook's without its code."""
    if path.suffix == ".ipynb":
        return "\n\n".join(cells(path, "markdown"))
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```|`[^`\n]+`", "``", text, flags=re.MULTILINE | re.DOTALL)


def code(path: Path) -> Iterator[str]:
    """Yield the Python with this package that a text or a notebook shows."""
    if path.suffix == ".ipynb":
        # A line that is a command of the notebook's, not Python.
        yield from (
            re.sub(r"^( *)%.*", r"\1pass", cell, flags=re.M) for cell in cells(path, "code")
        )
    else:
        text = path.read_text(encoding="utf-8")
        shown = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        yield from (each for each in shown if "gsae_core" in each)


# What the reference holds


@cache
def package() -> griffe.Object:
    loaded = griffe.load("gsae_core", search_paths=[ROOT], resolve_aliases=True)
    assert isinstance(loaded, griffe.Object)
    return loaded


def home(name: str) -> griffe.Object:
    """Return what a dotted name of the package leads to."""
    found = package()[name.removeprefix(PACKAGE)]
    return found.final_target if isinstance(found, griffe.Alias) else found


def imported() -> set[str]:
    """Return the names of the package that README, documentation and notebooks import."""
    found = set()
    for path in [*TEXTS, *NOTEBOOKS]:
        for node in (node for text in code(path) for node in ast.walk(ast.parse(text))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(PACKAGE):
                found |= {f"{node.module}.{name.name}" for name in node.names}
    return {name for name in found if not home(name).is_module}


def handed_out(found: griffe.Object) -> set[str]:
    """Return the names of the package that a function returns, or a class's members hold."""
    members = [found]
    if isinstance(found, griffe.Class):
        members = [
            home(each.path) for each in found.all_members.values() if not each.name.startswith("_")
        ]
    types = [
        each.returns if isinstance(each, griffe.Function) else each.annotation
        for each in members
        if isinstance(each, griffe.Function | griffe.Attribute)
    ]
    return {
        part.canonical_path
        for kind in types
        if isinstance(kind, griffe.Expr)
        for part in kind.iterate(flat=True)
        if isinstance(part, griffe.ExprName) and part.canonical_path.startswith(PACKAGE)
    }


def public() -> set[str]:
    """Return what a user meets: names to import, and the classes that these hand out."""
    todo = imported()
    todo |= {f"gsae_core.{name}" for name in gsae_core.__all__}
    todo |= {f"gsae_core.training.{name}" for name in gsae_core.training.__all__}
    found = {home(name).path for name in todo}
    todo = set(found)
    while todo:
        new = {home(name) for name in handed_out(home(todo.pop()))}
        classes = {each.path for each in new if each.is_class and not each.name.startswith("_")}
        todo |= classes - found
        found |= classes
    return found


def documented() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))]
    return re.findall(r"^::: (\S+)$", "\n".join(texts), flags=re.MULTILINE)


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    names = public()
    assert {"gsae_core.runs.run.Run", "gsae_core.training.trainer.StepReport"} < names
    assert sorted(names - {home(name).path for name in documented()}) == []
    assert {f"gsae_core.{name}" for name in gsae_core.__all__} <= set(documented())


def test_no_name_has_two_entries() -> None:
    homes = [home(name).path for name in documented()]
    assert sorted(name for name in set(homes) if homes.count(name) > 1) == []


# What the command line page holds


@cache
def page() -> str:
    return command_line()


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w.,;-]+", text)


@pytest.mark.parametrize("command", [words for words in COMMANDS if words])
def test_every_flag_has_its_help_on_the_page(command: str) -> None:
    level = "##" + "#" * command.count(" ")
    sections = re.split(r"^(?=##)", page(), flags=re.MULTILINE)
    (section,) = [each for each in sections if each.startswith(f"{level} {command} {{")]
    told = help_file(command).read_text(encoding="utf-8").partition("\n subcommands")[0]
    flags = re.findall(r"^ {2}(--[\w-]+)", told, flags=re.MULTILINE)
    assert [f"`{flag}" in section for flag in flags] == [True] * len(flags)
    # Word by word: the page has lines of another length.
    _, _, told = told.partition("show this help message and exit\n")
    shown = " ".join(words_of(html.unescape(section)))
    for entry in re.findall(r"^ {2}\S.*\n(?:^ {3,}\S.*\n)*", told, flags=re.MULTILINE):
        text = re.split(r" {2,}|\n", entry.strip(), maxsplit=1)[1]
        assert " ".join(words_of(text)) in shown


# Links


@cache
def anchors(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    if "help" in path.parts:
        return set(re.findall(r"^## (\w+):", text, flags=re.MULTILINE))
    headings = re.findall(r"^#+ (.+?)(?: \{ ?#([\w-]+) ?\})?$", text, flags=re.MULTILINE)
    return {key or slugify(heading.replace("`", ""), "-") for heading, key in headings}


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=named)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https"
            assert url.hostname in HOSTS, link
            continue
        target = (path.parent / url.path).resolve() if url.path else path
        if target == DOCS / "command-line.md":  # made when the site is
            assert not url.fragment or f"{{ #{url.fragment} }}" in page(), link
            continue
        assert target.exists(), link
        if url.fragment and target.suffix == ".md":
            assert url.fragment in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        pass

    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else list(entry):  # pyright: ignore
                yield from pages(each)

    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    there |= {*PAGES, *map(named, NOTEBOOKS), "command-line.md"}
    assert sorted(pages(config["nav"])) == sorted(there)


def test_links_to_files_of_the_repository_lead_to_their_pages() -> None:
    places = {
        str(ROOT / "CONTRIBUTING.md"): "contributing.md",
        str(DOCS / "architecture.md"): "architecture.md",
        str(DOCS / "screenshots" / "pareto-light.png"): "screenshots/pareto-light.png",
    }
    moved = with_links(
        "[`a`](docs/architecture.md#rooms) [b](LICENSE) [c](#d) [e](https://arxiv.org/abs/1) "
        "![f](docs/screenshots/pareto-light.png) [g](nowhere.md)",
        ROOT / "README.md",
        "help/x.md",
        places,
    )
    assert moved == (
        "[`a`](../architecture.md#rooms) b [c](#d) [e](https://arxiv.org/abs/1) "
        "![f](../screenshots/pareto-light.png#only-light)"
        "![f](../screenshots/pareto-dark.png#only-dark) [g](nowhere.md)"
    )


def test_help_texts_become_pages_with_equations_as_code() -> None:
    page = help_page("## l0: L0\n\nHow many.\n\nE|f|_0\n\n## d: dead\n\nNone.\n", "glossary")
    assert page == (
        "# Glossary\n\n## L0 { #l0 }\n\nHow many.\n\n    E|f|_0\n\n## dead { #d }\n\nNone.\n"
    )


def test_formulas_are_drawn_without_a_script() -> None:
    shown = with_formulas('a <span class="arithmatex">\\(f &lt; 1\\)</span> b')
    assert shown.startswith('a <span class="formula"><math ')
    assert "<mi>f</mi><mo>&#x0003C;</mo><mn>1</mn>" in shown
    assert 'display="block"' in with_formulas('<div class="arithmatex">\\[\nx\n\\]</div>')


def test_a_built_page_that_asks_another_host_or_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#here">b</a>')
    (tmp_path / "b.html").write_text('<a href="/a.html#top"></a><a href="https://arxiv.org/">x</a>')
    assert faults(tmp_path) == ["a.html: nothing is called b.html#here"]
    (tmp_path / "b.html").write_text(
        '<p id="here"><script src="https://cdn.example/x.js"></script>'
    )
    assert faults(tmp_path) == ["b.html: <script> asks cdn.example"]
    (tmp_path / "b.html").write_text('<p id="here"><img alt="" src="c.png">')
    assert faults(tmp_path) == ["b.html: no c.png"]
