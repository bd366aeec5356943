"""Tokens in their context as HTML: escaped, every character visible, each kept to itself."""

import html
from collections.abc import Sequence

from gsae_core.wording import unhidden

SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
NOTHING = "∅"
STRONGEST = 0.6  # opacity of the strongest highlight: body text keeps a contrast of 5:1 on it


def visible(text: str) -> str:
    """Return a token's text with a sign for all that cannot be seen, e.g. `·the` or `⟨200F⟩`.

    A token without text of its own, such as one that holds the rest of the character before it, is
    `∅`.
    """
    return "".join(SIGNS.get(c) or unhidden(c) for c in text) or NOTHING


def token_strip(tokens: Sequence[str], values: Sequence[float], *, at: int, top: float) -> str:
    """Return tokens as a line of HTML, shaded by a latent's value, the token `at` outlined.

    Args:
        values: the latent's value on each token.
        top: value of the strongest shade.
    """
    spans = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        opacity = STRONGEST * min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
        style = "unicode-bidi:isolate;border-radius:3px;padding:1px 1px;white-space:pre-wrap"
        if value > 0:
            style += f";background:rgba(0,114,178,{opacity:.2f})"
        if index == at:
            style += ";outline:1.5px solid #0072B2"
        label = f"{value:.4g}" if value > 0 else "does not fire"
        focus = ' tabindex="0"' if index == at else ""
        spans.append(
            f'<span style="{style}" title="{label}"{focus}>{html.escape(visible(token))}</span>'
        )
    return f'<span dir="ltr" style="font-family:monospace;font-size:.85rem">{"".join(spans)}</span>'
