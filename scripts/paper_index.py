"""docs/paper/index.md from the heads of the pages beside it: `python -m scripts.paper_index`."""

from pathlib import Path
from typing import NamedTuple

import yaml

PAPER = Path(__file__).parent.parent / "docs" / "paper"
INDEX = PAPER / "index.md"

STATES = {
    "here": "The same experiment runs here, on the bundled model or on the page itself.",
    "part": "Its parts run here; what is missing is named on the page.",
    "numbers": "The published numbers are here; the experiment is not.",
    "missing": "Nothing of it is here but a description.",
}


class Page(NamedTuple):
    """The head of a page, between its two lines of dashes."""

    path: Path
    title: str
    shows: str
    state: str
    run: str
    """The command, notebook or page of the app that shows it."""


def pages() -> list[Page]:
    """Return the page of every figure and table of the paper, in the paper's order."""
    found = []
    for path in sorted([*PAPER.glob("figure-*.md"), *PAPER.glob("table-*.md")]):
        head = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        page = Page(path, head["title"], head["shows"], head["state"], head["run"])
        assert page.state in STATES, f"expected a state of {', '.join(STATES)} in {path}"
        found.append(page)
    return found


def index_page() -> str:
    """Return what docs/paper/index.md holds."""
    states = "\n".join(f"| {state} | {meaning} |" for state, meaning in STATES.items())
    rows = "\n".join(
        f"| [{page.title.partition(':')[0]}]({page.path.name}) | {page.shows} | {page.state} | "
        f"{page.run} |"
        for page in pages()
    )
    return f"""# The paper, figure by figure

Every figure and table of *Improving Dictionary Learning with Gated Sparse Autoencoders*
(Rajamanoharan et al. 2024, arXiv:2404.16014v2): what it shows, and what of it can be run here
today. Of the paper's own models nothing was run in this repository: no number of the paper is
claimed to be reproduced.

| state | meaning |
|---|---|
{states}

| | what it shows | state | where |
|---|---|---|---|
{rows}

Made by `python -m scripts.paper_index` from the pages' heads.
"""


if __name__ == "__main__":
    INDEX.write_text(index_page(), encoding="utf-8")
