"""Hooks of mkdocs.yml: pages that live elsewhere in the repository, and the links between all.

A text is written once, with links that work in the repository. Here it gets its address on the
site and its links follow; a page may link to any file that has a page.
"""

import contextlib
import html
import io
import os
import posixpath
import re
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gsae_core.cli.main import main as command

ROOT = Path(__file__).resolve().parents[1]
HELP = "gsae_core/assets/help"

PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/RESULTS.md",
    "bundled-model.md": "gsae_core/assets/stdlib-gpt2/README.md",
    **{f"help/{text.name}": f"{HELP}/{text.name}" for text in (ROOT / HELP).glob("*.md")},
}
"""Page -> the file of the repository that it shows."""


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for note in sorted(ROOT.glob("notebooks/*.ipynb")):
        # mkdocs-jupyter asks where the file lies, not what was generated.
        place = note.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "command-line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page's text with headings and links as the site needs them."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    if page.file.src_uri.startswith("help/"):
        markdown = help_page(markdown, Path(source).stem)
    places = {str(file.abs_src_path): file.src_uri for file in files}
    return with_links(markdown, Path(source), page.file.src_uri, places)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its formulas in MathML, which browsers draw without a script.

    A notebook comes without the scripts that it would fetch from other hosts; a search finds its
    text alone, as each piece of code is in it twice.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return with_formulas(content)
    scripts = re.compile(r"<script\b.*?</script>", re.DOTALL)
    content = scripts.sub(lambda found: "" if "https://" in found[0] else found[0], content)
    # Elements that hold none of their own kind: search forgets the mark at the first end tag.
    code = r'<(pre|span(?= class="(?:notice|cell-tag)")|div(?= class="clipboard-copy-txt"))\b'
    return re.sub(code, r"<\1 data-search-exclude", content)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page asks another host for anything, or links to what is not there."""
    mistakes = faults(Path(config.site_dir))
    if mistakes:
        raise PluginError("\n".join(mistakes))


def faults(site: Path) -> list[str]:
    """Return what a built site would fetch from elsewhere, and its links that lead nowhere."""
    site = site.resolve()
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    found = []
    for path, text in texts.items():
        for tag, address in re.findall(r'<(\w+)[^>]*?\s(?:src|href)="([^"]*)"', text):
            url = urlsplit(html.unescape(address))
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    found.append(f"{path.name}: <{tag}> asks {url.netloc}")
                continue
            base = site if url.path.startswith("/") else path.parent
            place = (base / unquote(url.path).lstrip("/")).resolve() if url.path else path
            if not place.exists():
                found.append(f"{path.name}: no {address}")
            elif url.fragment and place in ids and unquote(url.fragment) not in ids[place]:
                found.append(f"{path.name}: nothing is called {address}")
    return found


def help_page(text: str, name: str) -> str:
    """Return a text of the Help page with a title, headings by key, and equations as code."""
    text = re.sub(r"^## (\w+): (.+)$", r"## \2 { #\1 }", text, flags=re.MULTILINE)
    if name == "glossary":
        # The last paragraph of a term is its equation, if it is no sentence.
        text = re.sub(r"\n\n((?!#).*[^.\n])\n(?=\n## |\Z)", r"\n\n    \1\n", text)
    return f"# {name.capitalize()}\n\n{text}"


def with_links(text: str, source: Path, page: str, places: dict[str, str]) -> str:
    """Return a text whose links to files of the repository lead to their pages.

    A link to a file without a page becomes its words alone.

    Args:
        source: the file that the text is of.
        page: its page.
        places: file -> page.
    """

    def moved(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path, hash, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        place = Path(os.path.normpath(source.parent / unquote(path)))
        if str(place) not in places:
            return words if place.exists() else found[0]  # mkdocs says what is not there
        address = posixpath.relpath(places[str(place)], posixpath.dirname(page))
        pictures = [
            place.with_name(re.sub("-(light|dark)$", f"-{kind}", place.stem) + place.suffix)
            for kind in ("light", "dark")
        ]
        if mark and pictures[0] != pictures[1] and all(each.exists() for each in pictures):
            return "".join(
                f"![{words}]({posixpath.dirname(address)}/{each.name}#only-{kind})"
                for each, kind in zip(pictures, ("light", "dark"), strict=True)
            )
        return f"{mark}[{words}]({address}{hash}{anchor})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", moved, text)


def with_formulas(content: str) -> str:
    """Return HTML with the formulas that pymdownx.arithmatex marked in MathML."""
    # Here: links, flags and names are tested where it is not installed.
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        formula = convert(
            html.unescape(found[3]), display="block" if found[1] == "div" else "inline"
        )
        if "\\" in formula:
            raise PluginError(f"expected LaTeX that latex2mathml knows, got {found[3]}")
        return f'<{found[1]} class="formula">{formula}</{found[1]}>'

    marked = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    return re.sub(marked, drawn, content, flags=re.DOTALL)


def help_of(*words: str) -> str:
    """Return what a command's --help prints, on lines as long as they like."""
    out = io.StringIO()
    plain = {"COLUMNS": "2000", "NO_COLOR": "1", "TERM": "dumb"}
    with patch.dict(os.environ, plain), contextlib.redirect_stdout(out):
        try:
            command([*words, "--help"])
        except SystemExit:
            return out.getvalue()
    raise PluginError(f"expected the help of {' '.join(words)}, got none")


def subcommands(text: str) -> list[str]:
    """Return the commands that a help's first line names."""
    found = re.search(r"\{(.+)\}$", text.partition("\n")[0])
    return found[1].split(",") if found else []


def command_line() -> str:
    """Return the page of all commands: what each does, and the help of each of its flags."""
    parts = [
        "# Command line",
        "What `--help` says of each command. A mistake is one sentence, and exit code 2.",
    ]
    for name in subcommands(help_of()):
        parts.append(command_section(name))
        parts += [command_section(name, each) for each in subcommands(help_of(name))]
    return "\n\n".join(parts) + "\n"


def command_section(*words: str) -> str:
    """Return a command's heading, usage, description, and flags with their help."""
    usage, _, rest = help_of(*words).partition("\n")
    rest = re.split(r"^ subcommands\s*$", rest, flags=re.MULTILINE)[0]  # have their own sections
    description, *groups = re.split(
        r"^ (?:positional arguments|options)\s*$", rest, flags=re.MULTILINE
    )
    name = "-".join(words)
    parts = [
        f"{'#' * (len(words) + 1)} {' '.join(words)} {{ #{name} }}",
        f"```text\n{usage.removeprefix('usage: ')}\n```",
        html.escape(description.strip(), quote=False),
    ]
    for flag, said in flags("\n".join(groups)):
        anchor = re.match(r"(?:-\w, )?--([\w-]+)|(\w+)", flag)
        assert anchor, flag
        link = f"{name}-{anchor[1] or anchor[2]}"
        if flag.startswith("-h"):
            continue
        parts.append(f"`{flag}` {{ #{link} }}\n:   {html.escape(said, quote=False)}")
    return "\n\n".join(parts)


def flags(text: str) -> list[tuple[str, str]]:
    """Return each flag or argument of a help, as it is written, and what is said of it."""
    entries = re.findall(r"^ {2}(\S.*\n(?:^ {3,}\S.*\n)*)", text + "\n", flags=re.MULTILINE)
    pairs = [re.split(r" {2,}|\n", entry.strip(), maxsplit=1) for entry in entries]
    return [(flag, " ".join(said.split())) for flag, said in pairs]
