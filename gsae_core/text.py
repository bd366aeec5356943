"""Numbers as a person writes them: the pages print no raw float."""

import functools
import html
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Marks, joiners and overrides of these categories are invisible, or move what stands beside them.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class Progress(NamedTuple):
    """How far a job is: training, evaluation, indexing, a transfer, labelling."""

    stage: str
    """What is done now: `waiting`, `loading`, `training`, ...; at last `finished`, `cancelled`."""
    done: int
    total: int
    """How much there is to do; 0 where that is not known."""
    unit: str = ""
    """What is counted: `step`, `token`, `vector`, `feature`, `byte`, `run`; in the stage `loading`
    what a run counts."""
    report: Any = None
    """What was measured on the way: of training, the last step's `StepReport`."""


def in_units(sentence: str, unit: str) -> str:
    """Return a sentence about tokens as one about another unit.

    `unit`: `RunConfig.unit` or `Manifest.unit`, a `token` or a `vector` of a folder.
    """
    return sentence.replace("token", unit).replace("Token", unit.capitalize())


class Words(NamedTuple):
    """What sentences call what a run reads."""

    read: str
    """What there may be more of, or other than it was."""
    source: str
    """What gives the activations."""
    loading: str


WORDS = {
    "token": Words("text", "language model", "loading the model and the text"),
    "vector": Words("vectors", "files", "loading the vectors"),
}
"""By unit."""


def count(number: float | int) -> str:
    """Return a count with at most three digits, e.g. `1.05 M`."""
    # Rounded before a unit is chosen: 999 936 is 1 M, not 1e+03 k.
    rounded = float(f"{number:.3g}")
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            many = rounded / size
            return f"{many:,.0f} {unit}" if many >= 100 else f"{many:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float | int) -> str:
    """Return a length of time in its two largest units, e.g. `3 min 20 s`."""
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    for (large, size), (small, part) in itertools.pairwise(units):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {large} {rest} {small}" if rest else f"{whole // size} {large}"
    return f"{whole} s"


def ago(seconds: float | int) -> str:
    """Return how long ago something was, e.g. `5 min ago`."""
    number, unit, *_ = duration(seconds).split(" ")
    return "just now" if seconds < 2 else f"{number} {unit} ago"


def fixed(number: float | int | None, digits: int = 3) -> str:
    """Return a number with so many decimals, or a dash where there is none."""
    if number is None or not math.isfinite(number):
        return "–"
    return f"{number:,.{digits}f}"


WORSE = "⚠"
"""Beside an FVU above 1: predicting the mean activation would do better."""


def is_worse_than_mean(fvu: float | int | None) -> bool:
    """Whether an SAE of this FVU reconstructs worse than the mean activation would."""
    return fvu is not None and fvu > 1


def explained_variance(fvu: float | int | None) -> float | None:
    """Return 1 - FVU; None without one."""
    return None if fvu is None else 1 - fvu


def marked_fvu(fvu: float | int | None, digits: int = 3) -> str:
    """Return an FVU with so many decimals, behind `WORSE` where it is above 1."""
    return f"{WORSE} {fixed(fvu, digits)}" if is_worse_than_mean(fvu) else fixed(fvu, digits)


def worse_than_mean(fvus: Mapping[str, float | int | None]) -> str:
    """Return the sentence about SAEs whose FVU is above 1, by name; empty where there are none."""
    names = [name for name, fvu in fvus.items() if is_worse_than_mean(fvu)]
    if not names:
        return ""
    reconstruct = "reconstructs" if len(names) == 1 else "reconstruct"
    return f"{WORSE} FVU above 1: {', '.join(names)} {reconstruct} worse than the mean activation"


def short(number: float) -> str:
    """Return a number with three digits that count, or a dash where there is none."""
    return f"{number:.3g}" if math.isfinite(number) else "–"


def percent(share: float | int | None, digits: int = 1) -> str:
    """Return a share as a percentage, or a dash where there is none."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.{digits}f} %"


def signed_percent(before: float | int, after: float | int) -> str:
    """Return the change from one number to another as a share of the first, e.g. `+12.5 %`."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "–"
    return f"{100 * (after - before) / abs(before):+.1f} %"


def unhidden(text: str) -> str:
    """Return text in which what cannot be seen is written out, but for ends of lines and tabs."""
    if text.isprintable():
        return text
    return "".join(
        f"⟨{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN and c not in "\n\t" else c
        for c in text
    )


def facts(rows: Mapping[str, str]) -> str:
    """Return names and values in two columns."""
    cells = "".join(
        f'<div style="opacity:.75">{html.escape(unhidden(name))}</div>'
        f'<div style="overflow-wrap:anywhere">{html.escape(unhidden(value))}</div>'
        for name, value in rows.items()
    )
    grid = "display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem"
    return f'<div style="{grid}">{cells}</div>'


SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
NOTHING = "∅"
STRONGEST = 0.6  # opacity of the strongest highlight: body text keeps a contrast of 5:1 on it


def visible(text: str) -> str:
    """Return a token's text with a sign for all that cannot be seen, e.g. `·the` or `⟨200F⟩`.

    `∅`: one without text, such as one that holds the rest of the character before it.
    """
    return "".join(SIGNS.get(c) or unhidden(c) for c in text) or NOTHING


def quoted(token: str, *, most: int = 24) -> str:
    """Return a token as it is shown inside a sentence or a list: nothing hidden, nothing long."""
    shown = visible(token)
    return shown if len(shown) <= most else f"{shown[:most]}…"


@functools.cache
def macros(template: str) -> Any:
    """Return the macros of a template in `assets`; text they are given is escaped and unhidden."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gsae_core", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: unhidden(value) if type(value) is str else value,
    )
    environment.filters |= {"quoted": quoted, "visible": visible}
    return environment.get_template(template).module


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return each row as a line: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in rows
    ]
