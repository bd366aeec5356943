"""Features as HTML, escaped and with every character visible, and as Neuronpedia's JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from gsae_core.text import STRONGEST, facts, macros, short, visible

if TYPE_CHECKING:
    from gsae_core.analysis.features.feature import Example, Feature

TEMPLATE = "features.html.j2"
LONGEST = 160  # characters of a token that are shown; some are 10 kB of spaces
TAB_STOP = 0.5  # share of the strongest value from which the Tab key stops at a token


class Row(NamedTuple):
    """One example: its tokens, and what one or two features are there."""

    tokens: Sequence[str]
    values: Sequence[float]
    at: int
    label: str
    """Shown in front, such as the value it is about."""
    about: str = ""
    """Shown on hovering the label: where it is from."""
    below: Sequence[float] | None = None
    """The other SAE's feature on the same tokens."""
    image: str | None = None
    """A picture in a `data:` address, shown before the tokens."""


def strips(rows: Sequence[Row], *, top: float, below_top: float = 0.0, breaks: bool = False) -> str:
    """Return examples as a list in HTML: tokens shaded by value, the one it is about outlined.

    `top` and `below_top` are the values of the strongest shade and line; `breaks`: whether a token
    that ends a line ends it here.
    """
    drawn = [(row, list(_tokens(row, top, below_top, breaks))) for row in rows]
    return macros(TEMPLATE).strip_list(drawn) if drawn else ""


def _tokens(row: Row, top: float, below_top: float, breaks: bool) -> Iterator[tuple[Any, ...]]:
    """Yield a token's text, classes, title, style, if Tab stops, and if a line ends."""
    below = row.below if row.below is not None else [0.0] * len(row.tokens)
    for i, (text, value, under) in enumerate(zip(row.tokens, row.values, below, strict=True)):
        at, ends, style = i == row.at, breaks and "\n" in text, []
        if not (value > 0 or under > 0 or at):
            yield readable_token(text), "" if text.strip() else "w", "", "", False, ends
            continue
        share = _share(value, top)
        if value > 0:
            style.append(f"--a:{share * STRONGEST:.2f}")
        if under > 0:
            style.append(f"--b:{0.25 + 0.75 * _share(under, below_top):.2f}")
        blank = not text.strip() and value <= 0
        classes = " ".join(["f"] + ["p"] * at + ["w"] * blank)
        about = _value(value) + (f" · beside: {_value(under)}" if below_top > 0 else "")
        yield readable_token(text), classes, about, ";".join(style), at or share >= TAB_STOP, ends


def _value(value: float) -> str:
    return f"{value:.4g}" if value > 0 else "does not fire"


def _share(value: float, top: float) -> float:
    return min(max(value / top, 0.0), 1.0) if top > 0 else 0.0


def readable_token(text: str) -> str:
    """Return a token with signs for what cannot be seen, but for spaces beside other characters."""
    shown = visible(text)
    if not text.strip():
        return shown
    if "·" not in text:
        shown = shown.replace("·", " ")
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}… ({len(text):,} characters)"


def example_row(
    example: "Example",
    *,
    margin: bool = False,
    below: Sequence[float] | None = None,
    image: str | None = None,
) -> Row:
    """Return an example as a row of a list; `margin`: its value is that of a near miss."""
    split = example.split.replace("_", " ")
    label = (f"{example.value:#.2g}" if margin else f"{example.value:#.3g}").rstrip(".")
    about = f"{split} text, sequence {example.sequence}, token {example.position}"
    if example.vector is not None:
        about = f"{split} vector {example.vector}"
    return Row(example.tokens, example.values, example.at, label, about, below, image)


def card(feature: "Feature", *, k: int = 10) -> str:
    """Return a feature's numbers, histogram, logit effects and top examples as HTML."""
    label = feature.index.labels.of(feature.number).get("label")
    top = _drawn(feature, [("Top", feature.top(k))])
    return str(macros(TEMPLATE).card(feature, label, facts(_numbers(feature)), top))


def page(features: Sequence["Feature"], *, k: int = 20) -> str:
    """Return features of one index as an HTML document that needs nothing from elsewhere."""
    made = features[0].index.manifest
    provenance = {
        "SAE": f"{made.sae} ({made.architecture}, {made.d_sae:,} features)",
        "place": f"{made.site} of layer {made.layer} of {made.model}",
        f"{made.unit}s": made.amount(f" of {made.text}"),
    }
    if made.vectors is not None:
        provenance["place"] = "vectors of no known language model"
    body = []
    for feature in features:
        lists: list[tuple[str, Sequence[Example]]] = []
        if not feature.is_dead:
            lists = [
                (
                    f"{group.low:.3g} to {group.high:.3g}, {group.n_fired:,} {made.unit}s",
                    group.examples,
                )
                for group in feature.quantiles(5, k=max(1, k // 4))
            ]
            lists += [
                ("Random", feature.random(k)),
                ("Near threshold", feature.near_threshold(k)),
                ("Just missed", feature.just_missed(k)),
            ]
        body.append((card(feature, k=k), _drawn(feature, lists)))
    return str(macros(TEMPLATE).page(f"Features of {made.sae}", facts(provenance), body))


def _drawn(
    feature: "Feature", lists: Sequence[tuple[str, Sequence["Example"]]]
) -> list[tuple[str, str]]:
    """Return lists of examples as strips on one colour scale."""
    top = 0.0 if feature.is_dead else float(feature.values[0])
    picture = feature.index.thumbnail
    return [
        (title, strips([example_row(e, image=picture(e.vector)) for e in found], top=top))
        for title, found in lists
    ]


def _numbers(feature: "Feature") -> dict[str, str]:
    row = feature.stats
    fired, n_tokens, unit = int(row["fired"]), int(row["n_tokens"]), feature.index.manifest.unit
    numbers = {
        "density": f"{100 * row['density']:.3g} % ({fired:,} of {n_tokens:,} {unit}s)",
        "largest": short(row["max"]),
        "mean, median, 99 %": ", ".join(short(row[name]) for name in ("mean", "q50", "q99")),
        "γ": short(row["gamma"]),
        "decoder norm": short(row["decoder_norm"]),
        "encoder-decoder cosine": short(row["encoder_cosine"]),
    }
    if feature.index.manifest.architecture == "gated":
        opened = int(row["gate_open"])
        numbers["gate open"] = f"{100 * row['gate_density']:.3g} % ({opened:,} {unit}s)"
        numbers["θ, exp(r_mag)"] = f"{short(row['theta'])}, {short(row['gain'])}"
    elif math.isfinite(row["theta"]) and row["theta"] > 0:
        numbers["θ"] = short(row["theta"])
    numbers[f"top {unit}s"] = "  ".join(
        f"{visible(text)} {100 * share:.0f} %" for text, share in feature.top_tokens
    )
    return numbers


# Neuronpedia's batch as SAEDashboard writes it; these may be empty, and are not computed here.
EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
# Its dashboards show 20 strongest examples and 5 of each of 10 groups.
N_TOP, N_GROUPS, N_IN_GROUP = 20, 10, 5


def neuronpedia_batch(
    features: Sequence["Feature"], *, model_id: str, sae_set: str
) -> dict[str, Any]:
    """Return features of one index as the importer's `batch-0.json`; names as Neuronpedia's."""
    return {
        "model_id": model_id,
        "layer": features[0].index.manifest.layer,
        "sae_set": sae_set,
        "features": [_neuronpedia(feature) for feature in features],
    }


def _neuronpedia(feature: "Feature") -> dict[str, Any]:
    manifest, histogram, logits = feature.index.manifest, feature.histogram, feature.logits
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    alike = feature.co_firing["feature"].to_numpy()
    cosine = feature.index.cosines([feature.number], feature.index)[alike, 0]
    return {name: [] for name in EMPTY} | {
        "feature_index": feature.number,
        "correlated_features_indices": alike.tolist(),
        # Its writer puts cosines of decoder directions under this name.
        "correlated_features_l1": cosine.astype(float).round(3).tolist(),
        "correlated_features_pearson": _correlations(feature).round(3).tolist(),
        "neg_str": [each.text for each in logits.bottom],
        "neg_values": [round(each.effect, 3) for each in logits.bottom],
        "pos_str": [each.text for each in logits.top],
        "pos_values": [round(each.effect, 3) for each in logits.top],
        "frac_nonzero": float(feature.stats["density"]),
        "freq_hist_data_bar_values": middles.round(3).tolist(),
        "freq_hist_data_bar_heights": histogram.counts.tolist(),
        "n_prompts_total": sum(split.n_sequences for split in manifest.splits),
        "n_tokens_in_prompt": manifest.n_ctx,
        "dataset": manifest.text,
        "activations": list(_activations(feature)),
    }


def _correlations(feature: "Feature") -> Float64[np.ndarray, " companions"]:
    """Return Pearson's correlation of firing or not, with each of `feature.co_firing`."""
    together = feature.co_firing
    n = feature.index.n_tokens / feature.index.manifest.companion_stride
    both = together["both"].to_numpy(float)
    # lift = both n / (a b), jaccard = both / (a + b - both): a + b and a b follow.
    product = both * n / together["lift"].to_numpy(float)
    total = both / together["jaccard"].to_numpy(float) + both
    spread = product * (n * n - n * total + product)
    return (n * both - product) / np.sqrt(spread)


def _activations(feature: "Feature") -> Iterator[dict[str, Any]]:
    """Yield the strongest (`bin_min` and `bin_contains` are -1), then examples of slices."""
    if feature.is_dead:
        return
    groups = [(-1.0, float(feature.values[0]), -1.0, feature.top(N_TOP))]
    for group in feature.quantiles(N_GROUPS, k=N_IN_GROUP):
        share = group.n_fired / len(feature.values)
        groups.append((group.low, group.high, share, list(group.examples)))
    for low, high, share, examples in groups:
        for example in examples:
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": list(example.tokens),
                "values": [round(value, 3) for value in example.values],
            }
