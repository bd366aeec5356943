"""Markup that pages, notebooks and exported files share: all text in it is escaped."""

import html
from collections.abc import Mapping

from gsae_core.wording import unhidden


def facts(rows: Mapping[str, str]) -> str:
    """Return names and values in two columns."""
    cells = "".join(
        f'<div style="opacity:.75">{html.escape(unhidden(name))}</div>'
        f'<div style="overflow-wrap:anywhere">{html.escape(unhidden(value))}</div>'
        for name, value in rows.items()
    )
    grid = "display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem"
    return f'<div style="{grid}">{cells}</div>'
