"""Who is near a feature: by direction, by firing together, and its like in another SAE."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from gsae_core.errors import InputError
from gsae_core.feature_examples import compare
from gsae_core.feature_files import Opened
from gsae_core.feature_links import Link, feature_links
from gsae_core.token_strip import visible

if TYPE_CHECKING:
    from gsae_core.analysis.feature import Feature
    from gsae_core.analysis.features import FeatureIndex

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
