"""A feature as HTML: the markup that pages, notebooks and one-file exports share.

Everything is inline, so that a file needs nothing from elsewhere; all text is escaped, and every
character of a token is visible.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsae_core.analysis.examples import Example
from gsae_core.example_strips import Row, strips
from gsae_core.markup import facts
from gsae_core.store.files import replace_durably
from gsae_core.token_strip import visible
from gsae_core.wording import unhidden

if TYPE_CHECKING:
    from gsae_core.analysis.feature import Feature, Histogram, Logit, Logits

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
