"""Examples of a feature on a page, and beside them the like of it in another SAE."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from gsae_core.analysis.features.html import example_row, strips
from gsae_core.analysis.features.index import Pair, pair, values_on
from gsae_core.app.components import Link, feature_links
from gsae_core.app.feature_list import Opened
from gsae_core.app.parts import correct, escaped
from gsae_core.errors import InputError
from gsae_core.text import visible

if TYPE_CHECKING:
    from gsae_core.analysis.features.examples import Example
    from gsae_core.analysis.features.index import Feature, FeatureIndex

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


def view_choices() -> tuple[str, str, bool, bool]:
    """Draw which examples are shown and how much of each; return view, context, breaks, more."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        correct("view", list(VIEWS), what="list of examples", shown="the top ones")
        view = st.segmented_control(
            "Examples",
            list(VIEWS),
            default="Top",
            required=True,
            key="view",
            bind="query-params",
            label_visibility="collapsed",
        )
        correct("ctx", list(CONTEXTS), what="length of context", shown="snippets")
        context = st.segmented_control(
            "Context",
            list(CONTEXTS),
            default="snippet",
            required=True,
            key="ctx",
            bind="query-params",
            label_visibility="collapsed",
        )
        breaks = st.toggle("line breaks", key="lines", bind="query-params")
        more = st.toggle("more", key="features.more")
    return view or "Top", context or "snippet", breaks, more


def examples(feature: "Feature", other: "Feature | None", *, name: str, beside: str) -> None:
    """Draw where it fires, and the other SAE's feature under the same tokens."""
    view, context, breaks, more = view_choices()
    before, after = CONTEXTS[context]
    n = SHOWN[context] * (MORE if more else 1)
    st.caption(VIEWS[view])
    if other is not None:
        _legend(name, f"{beside} · {other.number}")
    top = float(feature.values[0]) if not feature.is_dead else 0.0
    below_top = float(other.values[0]) if other is not None and not other.is_dead else 0.0
    for title, found in _lists(feature, view, n, before=before, after=after):
        if title:
            st.html(f'<div style="font-weight:600;font-size:.9rem">{escaped(title)}</div>')
        if not found:
            st.caption(_none(view, feature))
            continue
        rows = [
            example_row(
                example,
                margin=view == "Just missed",
                below=None if other is None else values_on(other, example).tolist(),
            )
            for example in found
        ]
        st.html(strips(rows, top=top, below_top=below_top, breaks=breaks))


def just_missed(feature: "Feature") -> None:
    """Draw what a feature that never fired came nearest to firing on."""
    rows = [example_row(each, margin=True) for each in feature.just_missed(SHOWN["snippet"])]
    st.html(strips(rows, top=0.0))


def _lists(
    feature: "Feature", view: str, n: int, *, before: int | None, after: int | None
) -> "list[tuple[str, Sequence[Example]]]":
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


def _none(view: str, feature: "Feature") -> str:
    if view == "Just missed":
        return "No token came near its threshold without passing it."
    return f"It fired on none of {feature.index.n_tokens:,} tokens."


def _legend(name: str, beside: str) -> None:
    st.html(
        '<div style="display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.8125rem">'
        '<span><span style="background:rgba(0,114,178,.5);border-radius:3px;padding:0 .5em">'
        f"ground</span> {escaped(name)}</span>"
        '<span><span style="box-shadow:inset 0 -3px #D55E00;padding:0 .5em">line</span> '
        f"{escaped(beside)}</span></div>"
    )


def compare(feature: "Feature", other: "Feature", *, beside: str, cosine: float) -> None:
    """Say how the matched feature of the other SAE compares on the same tokens."""
    found = pair(feature, other)
    st.html(_compared(found, beside=beside, number=other.number, cosine=cosine))
    _overlap(found, beside=beside)


def _compared(found: Pair, *, beside: str, number: int, cosine: float) -> str:
    if not found.both:
        text = f"They never fire on the same token; their directions have cosine {cosine:.2f}."
    elif math.isclose(found.first, found.second, rel_tol=0.01):
        text = f"Where both fire they write as much; their directions have cosine {cosine:.2f}."
    else:
        more, share = ("less", found.shorter) if found.shorter > 0 else ("more", -found.shorter)
        text = (
            f"Where both fire, it writes <b>{100 * share:.0f} % {more}</b> "
            f"({found.second:.3g} against {found.first:.3g}); cosine {cosine:.2f}."
        )
    return f"<div>{escaped(beside)} · {number}: {text}</div>"


def _overlap(found: Pair, *, beside: str) -> None:
    counts = (
        (found.only_first, "only here", "#0072B2"),
        (found.both, "both", "#009E73"),
        (found.only_second, f"only {beside}", "#D55E00"),
    )
    whole = max(sum(n for n, _, _ in counts), 1)
    bars = "".join(
        f'<div style="width:{100 * n / whole:.2f}%;background:{colour}"></div>'
        for n, _, colour in counts
    )
    words = "".join(
        f'<span><span style="display:inline-block;width:.7em;height:.7em;border-radius:2px;'
        f'background:{colour}"></span> {n:,} {escaped(name)}</span>'
        for n, name, colour in counts
    )
    st.html(
        '<div style="display:flex;height:.6rem;border-radius:4px;overflow:hidden;margin:.3rem 0">'
        f'{bars}</div><div style="display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8125rem">'
        f"{words}</div>"
    )


N_SHOWN = 6


class Match(NamedTuple):
    """The feature of another SAE that is most like one."""

    feature: "Feature"
    cosine: float
    mutual: bool
    """Whether the one is in turn most like it."""


def match(feature: "Feature", other: "FeatureIndex | None") -> tuple[Match | None, str]:
    """Return the most alike feature of another index, or why there is none to show."""
    if other is None:
        return None, ""
    try:
        found = feature.matched(other, k=1)
    except InputError as error:
        return None, str(error)
    best = found.iloc[0]
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
    """Draw who is near."""
    left, right = st.columns(2)
    with left:
        near(sae, feature, go=go)
    with right:
        st.html('<div style="font-weight:600">Fires on the same tokens</div>')
        together = feature.co_firing.head(N_SHOWN)
        numbers = together["jaccard"].to_numpy()
        about = "of the tokens of either: both"
        links = _links(sae, together["feature"].to_numpy(), numbers, about)
        if links:
            feature_links(
                links, label="Features that fire together", key="features.together", go=go
            )
        else:
            st.caption("None fires with it.")
    if base is None:
        return
    st.html(f'<div style="font-weight:600">Its like in {_name(base)}</div>')
    if found is None:
        st.caption(problem or "Build the other SAE's index to see it beside this one.")
        return
    compare(feature, found.feature, beside=base, cosine=found.cosine)
    mutual = "Each is the other's nearest." if found.mutual else "The other's nearest is another."
    st.caption(mutual)


def near(
    sae: Opened, feature: "Feature", *, go: Callable[[int], None], alive_only: bool = False
) -> None:
    """Draw the features whose decoder directions are nearest."""
    title = "Nearest features that fire" if alive_only else "Writes in the same direction"
    st.html(f'<div style="font-weight:600">{title}</div>')
    found = feature.neighbours
    if alive_only:
        found = found.loc[feature.index.alive()[found["feature"].to_numpy()]]
    found = found.head(N_SHOWN)
    numbers, about = found["cosine"].to_numpy(), "cosine of decoder directions"
    links = _links(sae, found["feature"].to_numpy(), numbers, about)
    if links:
        feature_links(links, label=title, key="features.near", go=go)
    else:
        st.caption("None of its nearest fires either." if alive_only else "It has no neighbours.")


def _links(sae: Opened, features: np.ndarray, numbers: np.ndarray, about: str) -> Sequence[Link]:
    labels = sae.index.labels.latest("label") if sae.index is not None else {}
    shared = {"run": sae.run.id, "sae": sae.name}
    return [
        Link(
            feature=number,
            text=labels[number].text if number in labels else str(sae.rows["tokens"].iat[number]),
            said=f"{value:.2f}",
            share=value,
            about=f"Feature {number}: {value:.3f} {about}",
            href=f"Features?{urlencode(shared | {'feature': number})}",
        )
        for number, value in zip(features.tolist(), numbers.tolist(), strict=True)
    ]


def _name(text: str) -> str:
    import html

    return html.escape(visible(text))
