"""Examples of a feature on a page, and its best match in another SAE under the same tokens."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from gsae_core.analysis.features.export import TEMPLATE, example_row, strips
from gsae_core.app.components import Link, feature_links
from gsae_core.app.feature_list import Opened
from gsae_core.app.parts import correct, escaped, legend_row, segments, swatch
from gsae_core.errors import InputError
from gsae_core.text import macros

if TYPE_CHECKING:
    from gsae_core.analysis.features.feature import Example, Feature, Pair
    from gsae_core.analysis.features.index import FeatureIndex

VIEWS = {
    "Top": "The tokens it fires on most, each context once.",
    "Quantiles": "Its firings in five slices of equal size, strongest first, some drawn from each.",
    "Random": "Drawn evenly from all it fires on: the honest sample.",
    "Near threshold": "The tokens it fires on least, weakest first: just above the threshold.",
    "Just missed": "Tokens just under its threshold, nearest first; the number is the margin that "
    "was missing.",
}
CONTEXTS = {"snippet": (20, 8), "full": (None, None)}
SHOWN = {"snippet": 12, "full": 5}
MORE = 4
"""How many times as many are shown on demand."""
N_LINKS = 6


def _segments(key: str, choices: Sequence[str], label: str, *, what: str, shown: str) -> str:
    """Draw a choice that the address holds; return it. The first is the usual one."""
    correct(key, choices, what=what, shown=shown)
    chosen = st.segmented_control(
        label,
        choices,
        default=choices[0],
        required=True,
        key=key,
        bind="query-params",
        label_visibility="collapsed",
    )
    return chosen or choices[0]


def examples(feature: "Feature", other: "Feature | None", *, name: str, beside: str) -> None:
    """Draw where it fires, and the other SAE's feature under the same tokens."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        view = _segments(
            "view", list(VIEWS), "Examples", what="list of examples", shown="the top ones"
        )
        context = _segments(
            "ctx", list(CONTEXTS), "Context", what="length of context", shown="snippets"
        )
        breaks = st.toggle("line breaks", key="lines", bind="query-params")
        more = st.toggle("more", key="features.more")
    st.caption(VIEWS[view])
    below_top = 0.0
    if other is not None:
        st.html(macros(TEMPLATE).legend(name, f"{beside} · {other.number}"))
        below_top = 0.0 if other.is_dead else float(other.values[0])
    before, after = CONTEXTS[context]
    n = SHOWN[context] * (MORE if more else 1)
    for title, found in _lists(feature, view, n, before=before, after=after):
        if title:
            st.html(f'<div style="font-weight:600;font-size:.9rem">{escaped(title)}</div>')
        if not found:
            near = "No token came near its threshold without passing it."
            dead = f"It fired on none of {feature.index.n_tokens:,} tokens."
            st.caption(near if view == "Just missed" else dead)
            continue
        rows = [
            example_row(
                example,
                margin=view == "Just missed",
                below=None if other is None else other.on_example(example).tolist(),
            )
            for example in found
        ]
        top = 0.0 if feature.is_dead else float(feature.values[0])
        st.html(strips(rows, top=top, below_top=below_top, breaks=breaks))


def just_missed(feature: "Feature") -> None:
    """Draw what a feature that never fired came nearest to firing on."""
    rows = [example_row(each, margin=True) for each in feature.just_missed(SHOWN["snippet"])]
    st.html(strips(rows, top=0.0))


def _lists(
    feature: "Feature", view: str, n: int, *, before: int | None, after: int | None
) -> "list[tuple[str, Sequence[Example]]]":
    """Return what a view shows, each list under its title."""
    if view == "Quantiles":
        groups = feature.quantiles(5, k=max(2, n // 4), before=before, after=after)
        return [
            (f"{each.low:.3g} to {each.high:.3g} · {each.n_fired:,} tokens", each.examples)
            for each in groups
        ] or [("", ())]
    ways: dict[str, Callable[..., list[Example]]] = {
        "Top": feature.top,
        "Random": feature.random,
        "Near threshold": feature.near_threshold,
        "Just missed": feature.just_missed,
    }
    return [("", ways[view](n, before=before, after=after))]


class Match(NamedTuple):
    """The feature of another SAE that is most like one."""

    feature: "Feature"
    cosine: float
    mutual: bool
    """Whether the one is in turn most like it."""


def match(feature: "Feature", other: "FeatureIndex | None") -> tuple[Match | None, str]:
    """Return the best match in another index, or why there is none to show."""
    if other is None:
        return None, ""
    try:
        best = feature.matched(other, k=1).iloc[0]
    except InputError as error:
        return None, str(error)
    like = other.feature(int(best["feature"]))
    return Match(like, float(best["cosine"]), bool(best["mutual"])), ""


def relations(
    sae: Opened,
    feature: "Feature",
    found: Match | None,
    *,
    base: str | None,
    problem: str,
    go: Callable[[int], None],
) -> None:
    """Draw similar decoder directions, features on the same tokens, and the best match."""
    left, right = st.columns(2)
    with left:
        similar(sae, feature, go=go)
    with right:
        _linked(
            sae,
            feature.co_firing.rename(columns={"jaccard": "share"}),
            "Fires on the same tokens",
            about="of the tokens of either: both",
            none="No other feature fires on its tokens.",
            key="features.together",
            go=go,
        )
    if base is None:
        return
    _title(f"Best match in {base}")
    if found is None:
        st.caption(problem or "Index the other SAE to compare.")
        return
    pair = feature.pair(found.feature)
    st.html(f"<div>{escaped(f'{base} · {found.feature.number}')}: {_compared(pair, found)}</div>")
    counts = (pair.only_first, pair.both, pair.only_second)
    colours = ("#0072B2", "#009E73", "#D55E00")
    bar = segments(counts, colours, whole=max(sum(counts), 1))
    st.html(f'<div style="display:flex;height:.6rem;border-radius:4px;overflow:hidden">{bar}</div>')
    words = zip(counts, colours, ("only here", "both", f"only {base}"), strict=True)
    legend_row([swatch(colour, f"{n:,} {name}") for n, colour, name in words])
    st.caption("Mutual match." if found.mutual else "Not a mutual match.")


def _compared(pair: "Pair", match: Match) -> str:
    """Return how the matched feature compares on the same tokens, as HTML."""
    if not pair.both:
        return f"They never fire on the same token; cosine {match.cosine:.2f}."
    if math.isclose(pair.first, pair.second, rel_tol=0.01):
        return f"Where both fire, it writes as much; cosine {match.cosine:.2f}."
    more, share = ("less", pair.shorter) if pair.shorter > 0 else ("more", -pair.shorter)
    return (
        f"Where both fire, it writes <b>{100 * share:.0f} % {more}</b> "
        f"({pair.second:.3g} against {pair.first:.3g}); cosine {match.cosine:.2f}."
    )


def similar(
    sae: Opened, feature: "Feature", *, go: Callable[[int], None], alive_only: bool = False
) -> None:
    """Draw the features whose decoder directions are nearest."""
    near = feature.neighbours
    if alive_only:
        near = near.loc[feature.index.alive()[near["feature"].to_numpy()]]
    _linked(
        sae,
        near.rename(columns={"cosine": "share"}),
        "Nearest features that fire" if alive_only else "Similar decoder directions",
        about="cosine of decoder directions",
        none="None of the nearest features fires." if alive_only else "There is no other feature.",
        key="features.near",
        go=go,
    )


def _linked(
    sae: Opened,
    rows: pd.DataFrame,
    title: str,
    *,
    about: str,
    none: str,
    key: str,
    go: Callable[[int], None],
) -> None:
    """Draw the first of some features as links, each with its `share` as a bar."""
    _title(title)
    labels = sae.index.labels.latest("label") if sae.index is not None else {}
    shown = rows.head(N_LINKS)
    links = [
        Link(
            feature=number,
            text=labels[number].text if number in labels else str(sae.rows["tokens"].iat[number]),
            said=f"{value:.2f}",
            share=value,
            about=f"Feature {number}: {value:.3f} {about}",
            href="Features?" + urlencode({"run": sae.run.id, "sae": sae.name, "feature": number}),
        )
        for number, value in zip(shown["feature"].tolist(), shown["share"].tolist(), strict=True)
    ]
    if links:
        feature_links(links, label=title, key=key, go=go)
    else:
        st.caption(none)


def _title(text: str) -> None:
    st.html(f'<div style="font-weight:600">{escaped(text)}</div>')
