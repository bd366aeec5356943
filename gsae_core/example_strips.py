"""Examples of a feature as HTML: tokens in their context, shaded on one scale over the whole list.

Pages, notebooks and exported files show the same markup. Values are said on hovering and on
focus; a second SAE's feature is a line under the same tokens.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from gsae_core.token_strip import STRONGEST, visible

LONGEST = 160
"""Characters of a token that are shown; some are 10 kB of spaces."""
TAB_STOP = 0.5
"""Share of the strongest value from which a token is a stop of the Tab key."""

STYLE = (
    ".gs-list{font-size:.875rem}"
    ".gs-list>div{display:grid;grid-template-columns:3.2rem 1fr;gap:.75rem;padding:.4rem 0;"
    "border-top:1px solid color-mix(in srgb,currentColor 14%,transparent);align-items:baseline}"
    ".gs-list>div:first-child{border-top:0}"
    ".gs-list .gs-v{text-align:right;font-variant-numeric:tabular-nums;opacity:.8}"
    ".gs-strip{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;line-height:1.75;"
    "overflow-wrap:anywhere;min-width:0}"
    ".gs-strip>span{unicode-bidi:isolate;white-space:pre-wrap;position:relative;padding:2px 0;"
    "border-radius:3px}"
    ".gs-strip>.f{background:rgba(0,114,178,var(--a,0));"
    "box-shadow:inset 0 -3px rgba(213,94,0,var(--b,0))}"
    ".gs-strip>.p{outline:1.5px solid #0072B2;outline-offset:0}"
    ".gs-strip>.w{opacity:.55}"
    ".gs-strip>.f:hover::after,.gs-strip>.f:focus::after{content:attr(data-v);position:absolute;"
    "left:0;top:100%;z-index:9;white-space:pre;padding:.15rem .45rem;border-radius:5px;"
    "font:.8125rem/1.4 system-ui,sans-serif;color:#fff;background:#1c2630;pointer-events:none;"
    "border:1px solid #55606c}"
    ".gs-strip>.f:focus{outline:2px solid currentColor;outline-offset:1px}"
)


class Row(NamedTuple):
    """One example: its tokens, and what one or two features are there."""

    tokens: Sequence[str]
    values: Sequence[float]
    at: int
    said: str
    """What stands in front of it, such as the value it is about."""
    about: str = ""
    """Where it is from, said on hovering what stands in front."""
    below: Sequence[float] | None = None
    """The other SAE's feature on the same tokens."""


def strips(rows: Sequence[Row], *, top: float, below_top: float = 0.0, breaks: bool = False) -> str:
    """Return examples as a list in HTML, all text escaped, nothing of it hidden.

    Args:
        top, below_top: values of the strongest shade and of the strongest line.
        breaks: begin a new line after a token that ends one.
    """
    items = "".join(_item(row, top=top, below_top=below_top, breaks=breaks) for row in rows)
    # Behind the list: a sanitiser takes a style sheet away that comes first.
    return f'<div><div class="gs-list" role="list">{items}</div><style>{STYLE}</style></div>'


def readable_token(text: str) -> str:
    """Return a token as it is read in running text: a sign for all that cannot be seen.

    Spaces beside other characters stay spaces; a token of nothing but white space is signs.
    """
    if not text.strip():
        return visible(text)
    shown = visible(text).replace("·", " ") if "·" not in text else visible(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}… ({len(text):,} characters)"


def _item(row: Row, *, top: float, below_top: float, breaks: bool) -> str:
    about = f' title="{html.escape(row.about)}"' if row.about else ""
    said = f'<div class="gs-v"{about}>{html.escape(row.said)}</div>'
    below = row.below if row.below is not None else [0.0] * len(row.tokens)
    spans = "".join(
        _span(token, value, under, at=i == row.at, top=top, below_top=below_top, breaks=breaks)
        for i, (token, value, under) in enumerate(zip(row.tokens, row.values, below, strict=True))
    )
    return f'<div role="listitem">{said}<div class="gs-strip" dir="ltr">{spans}</div></div>'


def _span(
    token: str, value: float, under: float, *, at: bool, top: float, below_top: float, breaks: bool
) -> str:
    kinds = [
        name
        for name, on in (
            ("f", value > 0 or under > 0 or at),
            ("p", at),
            ("w", not token.strip() and value <= 0),
        )
        if on
    ]
    attributes = f' class="{" ".join(kinds)}"' if kinds else ""
    if "f" in kinds:
        attributes += f' data-v="{_values(value, under, two=below_top > 0)}"'
        styles = []
        if value > 0:
            styles.append(f"--a:{_share(value, top) * STRONGEST:.2f}")
        if under > 0:
            styles.append(f"--b:{0.25 + 0.75 * _share(under, below_top):.2f}")
        if styles:
            attributes += f' style="{";".join(styles)}"'
        if at or _share(value, top) >= TAB_STOP:
            attributes += ' tabindex="0"'
    end = "<br>" if breaks and "\n" in token else ""
    return f"<span{attributes}>{html.escape(readable_token(token))}</span>{end}"


def _values(value: float, under: float, *, two: bool) -> str:
    first = f"{value:.4g}" if value > 0 else "does not fire"
    if not two:
        return first
    return f"{first} · beside: {f'{under:.4g}' if under > 0 else 'does not fire'}"


def _share(value: float, top: float) -> float:
    return min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
