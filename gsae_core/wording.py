"""Numbers as a person writes them: the pages print no raw float."""

import itertools
import math
import unicodedata
from collections.abc import Mapping

# Marks, joiners and overrides of these categories are invisible, or move what stands beside them.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


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
    if seconds < 2:
        return "just now"
    return f"{duration(seconds).split(' ')[0]} {duration(seconds).split(' ')[1]} ago"


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


def unhidden(text: str, *, keep: str = "\n\t") -> str:
    """Return text in which what cannot be seen is written out, e.g. `⟨202E⟩`.

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        f"⟨{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN and c not in keep else c
        for c in text
    )
