"""A feature as HTML: the markup that pages, notebooks and one-file exports share.

Everything is inline, so that a file needs nothing from elsewhere; all text is escaped, and every
character of a token is visible.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gsae_core.analysis.features.examples import Example
from gsae_core.files import replace_durably
from gsae_core.text import STRONGEST, facts, unhidden, visible

if TYPE_CHECKING:
    from gsae_core.analysis.features.index import Feature, Histogram, Logit, Logits

LONGEST = 160
"""Characters of a token that are shown; some are 10 kB of spaces."""
TAB_STOP = 0.5
"""Share of the strongest value from which a token is a stop of the Tab key."""

STRIP_STYLE = (
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
    return f'<div><div class="gs-list" role="list">{items}</div><style>{STRIP_STYLE}</style></div>'


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


WIDTH, HEIGHT = 360, 90  # of a histogram, in pixels
BLUE, RED = "#0072B2", "#D55E00"
GRID = "display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem"

STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "line-height:1.4;color:#1a1a1a;background:#fff}"
    "h2{margin-top:2.5rem}h3{margin:.9rem 0 .3rem;font-size:1rem}"
)


def card(feature: "Feature", *, k: int = 10) -> str:
    """Return a feature at a glance: its numbers, how strongly it fires, what it writes, where."""
    parts = [heading(feature), facts(numbers(feature))]
    if feature.is_dead:
        n_tokens = feature.index.n_tokens
        parts.append(f"<p>It fired on none of {n_tokens:,} tokens: a dead feature.</p>")
    else:
        theta = float(feature.stats["theta"])
        parts += [histogram_svg(feature.histogram, theta=theta), logits_table(feature.logits)]
        parts += ["<h3>Top</h3>", examples(feature.top(k), top=feature.values[0])]
    return f'<section class="feature">{"".join(parts)}</section>'


def page(features: Sequence["Feature"], *, k: int = 20) -> str:
    """Return features as one HTML document that needs nothing from elsewhere."""
    title = f"Features of {features[0].index.manifest.sae}" if features else "No features"
    body = "".join(card(feature, k=k) + _more(feature, k=k) for feature in features)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{_provenance(features)}{body}</body></html>\n"
    )


def write_page(features: Sequence["Feature"], path: Path | str, *, k: int = 20) -> Path:
    """Write features as one self-contained HTML file; return its path.

    Raises:
        InputError: if the disk is full or the place cannot be written.
    """
    text, path = page(features, k=k), Path(path)

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    replace_durably(path, write, n_bytes=len(text.encode("utf-8")))
    return path


def heading(feature: "Feature") -> str:
    """Return a feature's number, its SAE and its label, with who wrote it."""
    said = feature.index.labels.of(feature.number).get("label")
    label = ""
    if said is not None:
        by = said.author if said.model is None else f"{said.author}, {said.model}"
        score = f"; {said.measured}" if said.measured else ""
        text = html.escape(unhidden(said.text))
        label = f"<p>“{text}” <small>({html.escape(by + score)})</small></p>"
    name = html.escape(feature.index.manifest.sae)
    return f"<h2>Feature {feature.number} of {name}</h2>{label}"


def numbers(feature: "Feature") -> dict[str, str]:
    """Return a feature's numbers as a person reads them."""
    row = feature.stats
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    found = {
        "density": f"{100 * row['density']:.3g} % ({fired:,} of {n_tokens:,} tokens)",
        "largest": _number(row["max"]),
        "mean, median, 99 %": ", ".join(_number(row[name]) for name in ("mean", "q50", "q99")),
        "γ": _number(row["gamma"]),
        "decoder norm": _number(row["decoder_norm"]),
        "encoder-decoder cosine": _number(row["encoder_cosine"]),
    }
    if feature.index.manifest.architecture == "gated":
        opened = int(row["gate_open"])
        found["gate open"] = f"{100 * row['gate_density']:.3g} % ({opened:,} tokens)"
        found["θ, exp(r_mag)"] = f"{_number(row['theta'])}, {_number(row['gain'])}"
    elif math.isfinite(row["theta"]) and row["theta"] > 0:
        found["θ"] = _number(row["theta"])
    tokens = feature.index.texts([int(token) for token in row["top_tokens"]])
    found["top tokens"] = "  ".join(
        f"{visible(text)} {100 * share:.0f} %"
        for text, share in zip(tokens, row["top_token_shares"], strict=True)
    )
    return found


def histogram_svg(histogram: "Histogram", *, theta: float) -> str:
    """Return how often a feature fires how strongly, with a rule at theta where there is one.

    The empty band from 0 to theta is the jump. Heights are square roots, so that the rare strong
    firings are seen beside the many weak ones.
    """
    counts, top = histogram.counts, float(histogram.edges[-1])
    most = math.sqrt(max(counts.tolist(), default=1) or 1)
    width = WIDTH / len(counts)
    bars = []
    for i, count in enumerate(counts.tolist()):
        height = HEIGHT * math.sqrt(count) / most
        low, high = (float(edge) for edge in histogram.edges[i : i + 2])
        bars.append(
            f'<rect x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{width - 1:.1f}" '
            f'height="{height:.1f}" fill="{BLUE}"><title>{low:.3g} to {high:.3g}: {count:,} tokens'
            "</title></rect>"
        )
    rule = ""
    if math.isfinite(theta) and 0 < theta <= top:
        x = WIDTH * theta / top
        rule = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="{RED}" '
            f'stroke-width="2"><title>θ = {theta:.3g}</title></line>'
        )
    label = f"Activation histogram from 0 to {top:.3g}; heights are square roots of counts"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT + 16}" '
        f'width="{WIDTH}" height="{HEIGHT + 16}">{"".join(bars)}{rule}'
        f'<text x="0" y="{HEIGHT + 13}" font-size="11">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 13}" font-size="11" text-anchor="end">{top:.3g}</text>'
        "</svg>"
    )


def logits_table(logits: "Logits") -> str:
    """Return the next tokens raised and lowered most, side by side."""
    if not logits.top:
        return ""
    columns = _logit_column("Raises", logits.top) + _logit_column("Lowers", logits.bottom)
    return f'<div style="display:flex;flex-wrap:wrap;gap:2rem">{columns}</div>'


def examples(found: Sequence[Example], *, top: Any) -> str:
    """Return examples as strips, one under the other, on one colour scale."""
    rows = [example_row(example) for example in found]
    return strips(rows, top=float(top)) if rows else "<p>None.</p>"


def example_row(
    example: Example, *, margin: bool = False, below: Sequence[float] | None = None
) -> Row:
    """Return an example as a row of a list.

    Args:
        margin: its value is the margin of a near miss.
        below: another SAE's feature on the same tokens.
    """
    where = f"{example.split.replace('_', ' ')} text, sequence {example.sequence}"
    said = f"{example.value:#.2g}" if margin else f"{example.value:#.3g}"
    about = f"{where}, token {example.position}"
    return Row(example.tokens, example.values, example.at, said, about, below)


def _more(feature: "Feature", *, k: int) -> str:
    if feature.is_dead:
        return ""
    top, parts = feature.values[0], []
    for group in feature.quantiles(5, k=max(1, k // 4)):
        title = f"{group.low:.3g} to {group.high:.3g}, {group.n_fired:,} tokens"
        parts += [f"<h3>{title}</h3>", examples(group.examples, top=top)]
    lists = {
        "Random": feature.random(k),
        "Near threshold": feature.near_threshold(k),
        "Just missed": feature.just_missed(k),
    }
    for title, found in lists.items():
        parts += [f"<h3>{title}</h3>", examples(found, top=top)]
    return "".join(parts)


def _logit_column(title: str, logits: "Sequence[Logit]") -> str:
    rows = "".join(
        f"<div><code>{html.escape(visible(each.text))}</code></div><div>{each.effect:+.3f}</div>"
        for each in logits
    )
    return f'<div><h3>{title}</h3><div style="{GRID}">{rows}</div></div>'


def _provenance(features: Sequence["Feature"]) -> str:
    if not features:
        return ""
    made = features[0].index.manifest
    return facts(
        {
            "SAE": f"{made.sae} ({made.architecture}, {made.d_sae:,} features)",
            "place": f"{made.site} of layer {made.layer} of {made.model}",
            "tokens": made.amount(f" of {made.text}"),
        }
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
