"""A page opened without a browser, and all that it says; the fixtures are in conftest.py."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest
from synthetic import config, write_run

from gsae_core.config import sweep
from gsae_core.runs.run import Run

APP = Path(__file__).resolve().parents[1] / "app.py"
PAGES = ["app.py", *sorted(f"pages/{file.name}" for file in APP.parent.glob("pages/[0-9]*.py"))]
"""Every page there is; a new one is held to what all are."""

HOSTILE = "<img src=x onerror=alert(1)>![](http://evil.example/x.png)"
NASTY = [
    "<script>document.title='owned'</script>",
    "![x](http://evil.example/x.png)<img src=x onerror='window.owned=1'>",
    "\u202e\u2067right to left\u200b\u200d\ufeff",
    "\x1b[31m\x00\x07\x7f\u2028",
    "x" * 10_000,
    "</span></div><style>*{display:none!important;direction:rtl}</style>",
    "<form action='http://evil.example'><button>",
    "<div style='position:fixed;inset:0;z-index:999999'>",
]
"""Tokens that are after the page: code, remote images, overlays, and what moves its neighbours."""


class Page(AppTest):
    """A page without a browser; no run of it may end in an exception."""

    def _run(self, *args: Any, **settings: Any) -> AppTest:
        super()._run(*args, **settings)
        assert not self.exception, self.exception[0].value
        return self


def opened(page: str, **parameters: str | list[str]) -> AppTest:
    at = Page(APP, default_timeout=120)
    if page != "app.py":
        at.switch_page(page)
    for name, value in parameters.items():
        at.query_params[name] = value
    return at.run()


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """Within, a JSON file's fields may be changed; then they are written back."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    yield fields
    path.write_text(json.dumps(fields), encoding="utf-8")


def circuit(places: list[str]) -> list[str]:
    """Return a way that goes from every place to every other place exactly once, and ends at home.

    Hierholzer's: walk until stuck, then go back to where a way was left out.
    """
    ways = {place: [other for other in places if other != place] for place in places}
    stack, found = [places[0]], []
    while stack:
        if ways[stack[-1]]:
            stack.append(ways[stack[-1]].pop())
        else:
            found.append(stack.pop())
    return found[::-1]


def labelled(widgets: Iterable[Any], label: str) -> Any:
    """Return the widget of a label; keys of what depends on data are spelled by nobody."""
    (found,) = [widget for widget in widgets if widget.label == label]
    return found


def text(at: AppTest) -> str:
    """Return all that a page says."""
    kinds = (at.html, at.caption, at.markdown, at.code, at.title, at.header, at.subheader)
    return "\n".join(
        str(element.value if hasattr(element, "value") else element.body)
        for kind in kinds
        for element in kind
    )


def write_samples(run: Run, tokens: list[str]) -> None:
    """Write samples.json: one latent of each SAE, which fires on all of these tokens."""
    example = {"tokens": tokens, "values": [1.5] * len(tokens), "at": 0}
    latent = {"latent": 17, "chosen": "random", "fired": 12, "examples": [example]}
    saes = {spec.name: {"alive": 300, "latents": [latent]} for spec in run.config.saes}
    samples = {"step": 50, "every": 25, "n_tokens": 2048, "saes": saes}
    (run.folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")


def write_hostile_corpus(path: Path) -> Path:
    """Write text for a run to read: every nasty token many times, and words between them."""
    # A NUL alone is refused: no text has one.
    tokens = [token.replace("\x00", "")[:1000] for token in NASTY]
    lines = [f"the function {token} returns a list of {n}" for n in range(400) for token in tokens]
    path.write_text("\n".join(lines) + "x" * 10_000, encoding="utf-8")
    return path


def hostile_run(root: Path) -> Run:
    """Make a finished run of whose every file that people see somebody else chose the words."""
    nasty = "".join(NASTY[:3])
    fields = {
        "saes": sweep(["gated", "relu"], [0.3, 0.5], 64),
        "model": config().model.model_copy(update={"name": nasty}),
        "data": config().data.model_copy(update={"source": nasty}),
        "preset": nasty,
    }
    run = write_run(root, "hostile", run_config=config().model_copy(update=fields))
    write_samples(run, NASTY)
    (run.folder / "log.txt").write_text("\n".join(NASTY), encoding="utf-8")
    return run
