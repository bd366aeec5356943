"""One feature: its numbers, its gate, its examples, its label, its relations, its exports."""

import getpass
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from gsae_core.analysis.features.export import (
    TEMPLATE,
    example_row,
    neuronpedia_batch,
    page,
    strips,
)
from gsae_core.analysis.features.feature import Example, Feature, Pair
from gsae_core.analysis.features.files import COLUMNS
from gsae_core.analysis.features.filter import Chosen
from gsae_core.analysis.features.filter import beside as next_to
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.analysis.labels import Kind, Labels
from gsae_core.app import shell
from gsae_core.app.components import feature_links
from gsae_core.app.feature_index import Opened
from gsae_core.app.feature_list import go_to
from gsae_core.app.parts import (
    OVERLAP,
    PAGE_TEMPLATE,
    attempt,
    copy_link,
    escaped,
    facts,
    figure_tools,
    key_for,
    plain,
)
from gsae_core.app.pickers import architecture, choice, correct_number
from gsae_core.errors import InputError
from gsae_core.files import left_out
from gsae_core.plots.features import activation_histogram, gate_plane, histogram_table
from gsae_core.plots.palette import Theme
from gsae_core.text import macros, percent, short


def summary(feature: Feature) -> None:
    """Say in two lines what the feature is: how often, on what, to what end."""
    fired, n_tokens = int(feature.stats["fired"]), int(feature.stats["n_tokens"])
    often = "no token"
    if fired:
        one_in = n_tokens / fired
        digits = max(0, len(str(int(one_in))) - 2)
        often = f"1 token in {round(one_in, -digits):,.0f}".replace(",", " ")
    tokens = [(token, percent(share, 0)) for token, share in feature.top_tokens]
    logits = feature.logits
    st.html(macros(TEMPLATE).summary(often, tokens, logits.top[:4], logits.bottom[:2]))


def numbers(feature: Feature) -> None:
    """Draw the feature's numbers, each with its definition on hovering."""
    row, kind = feature.stats, feature.index.manifest.architecture
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    share = f"{fired:,} of {n_tokens:,} tokens"
    tiles = [
        ("feature density", percent(row["density"], 2), share, "density"),
        ("strongest", short(row["max"]), f"median {short(row['q50'])}", "max"),
    ]
    if kind in ("gated", "jumprelu"):
        gain = f"e^r {short(row['gain'])}" if math.isfinite(row["gain"]) else "threshold"
        tiles.append(("θ", short(row["theta"]), gain, "theta"))
    tiles.append(("γ", short(row["gamma"]), _shrinkage(row["gamma"]), "gamma"))
    if kind == "gated":
        silent = int(row["gate_open"]) - fired
        note = f"no output {silent:,} times" if silent else "always with output"
        tiles.append(("gate open", percent(row["gate_density"], 2), note, "gate_density"))
    st.html(macros(TEMPLATE).tiles([(*cell, COLUMNS[column]) for *cell, column in tiles]))


def _shrinkage(gamma: float) -> str:
    if not math.isfinite(gamma):
        return "never fired"
    if abs(gamma - 1) < 0.02:
        return "no shrinkage"
    return f"{100 * abs(1 - gamma):.0f} % too {'short' if gamma < 1 else 'long'}"


def pictures(feature: Feature, theme: Theme) -> None:
    """Draw how strongly it fires, and how its gate decides."""
    theta, kind = float(feature.stats["theta"]), feature.index.manifest.architecture
    plane = gate_plane(feature, theme=theme) if kind == "gated" else None
    spots = st.columns([1, 1.1]) if plane is not None else [st.container()]
    top = float(feature.histogram.edges[-1])
    alt = f"How often it fires how strongly, from 0 to {top:.3g}"
    words = {
        "relu": "One path decides whether and how much: no gate, no empty band at 0.",
        "topk": "It fires where it is among the k largest of a token.",
    }
    caption = words.get(kind, "Its gate never binds: no jump.")
    if math.isfinite(theta) and theta > 0:
        alt += f"; nothing between 0 and {theta:.3g}"
        caption = f"Nothing between 0 and θ = {theta:.3g}: it jumps."
    with spots[0]:
        _picture(
            "How strongly it fires",
            activation_histogram(feature.histogram, theta=theta, theme=theme, architecture=kind),
            name="activations",
            alt=alt,
            caption=caption,
            table=histogram_table(feature.histogram),
            about="\n".join(f"{name}: {COLUMNS[name]}" for name in ("max", "q50", "theta")),
        )
    if plane is None:
        return
    with spots[1]:
        _picture(
            "How its gate decides",
            plane,
            name="gate_and_magnitude",
            alt="Tokens by gate and magnitude: all lie on one line, which crosses the gate's "
            f"opening at theta, {theta:.3g}",
            caption="A dot is a token, hollow: just missed. Slope: e^r.",
            table=feature.gate_line(),
            about=COLUMNS["theta"],
        )


def _picture(
    title: str, chart: Any, *, name: str, alt: str, caption: str, table: pd.DataFrame, about: str
) -> None:
    _title(title)
    st.vega_lite_chart(chart.data, chart.spec, key=f"features.{name}", alt=alt)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(caption)
        figure_tools(table, name=name, about=about)


def _title(text: str, *, size: str = "1rem") -> None:
    st.html(f'<div style="font-weight:600;font-size:{size}">{escaped(text)}</div>')


def logits(feature: Feature) -> None:
    """Draw the next tokens that it raises and lowers most."""
    found = feature.logits
    if found.top:
        st.html(macros(TEMPLATE).logits(found.top, found.bottom))
    else:
        st.caption("Logit effects are not known: the model's head could not be followed.")


TERMS = {
    "density": "feature density",
    "max": "strongest",
    "q50": "median",
    "theta": "θ",
    "gain": "e^r",
    "gamma": "γ",
    "gate_density": "gate open",
    "top_tokens": "fires on",
    "top_logits": "makes more likely",
}
"""Columns of the table, by what people call them."""


def from_weights(sae: Opened, row: Mapping[str, Any]) -> None:
    """Draw what the weights alone say of a feature."""
    kind = architecture(sae.run, sae.name)
    shown = {"theta": "θ", "gain": "e^r", "b_gate": "b_gate", "b_mag": "b_mag"}
    shown = shown if kind == "gated" else {"theta": "θ"} if kind == "jumprelu" else {}
    shown |= {"decoder_norm": "decoder norm", "encoder_cosine": "encoder-decoder cosine"}
    facts({title: short(row[name]) for name, title in shown.items()})
    with st.popover("What these mean", icon=":material/help:", type="tertiary"):
        _define(shown)


def _define(terms: Mapping[str, str]) -> None:
    for name, title in terms.items():
        plain(f"{title}: {COLUMNS[name]}", size=".9rem")


def which(sae: Opened, landing: int) -> int:
    """Settle which feature is shown, before its field is drawn: what is asked for, or `landing`."""
    last = len(sae.rows) - 1
    held = st.session_state.get("feature")
    if held is None:
        if correct_number("feature", 0, last, what="feature", shown=str(landing)):
            return int(st.query_params["feature"])
    elif held <= last:
        return int(held)
    else:
        st.caption(f"{sae.name} has features 0 to {last}, no {held}; showing {landing}.")
    go_to(landing)
    return landing


def navigation(sae: Opened, chosen: Chosen) -> int:
    """Draw the ways to go on; return the feature that is shown."""
    held = st.session_state.get("feature")

    def step(by: int) -> None:
        number = next_to(chosen.rows, st.session_state.get("feature") or 0, by)
        if number is not None:
            go_to(number)

    def random() -> None:
        assert sae.index is not None
        # As many draws as presses: the next one is another.
        drawn = st.session_state["features.draws"] = st.session_state.get("features.draws", 0) + 1
        go_to(sae.index.random_alive(seed=drawn))

    with st.container(
        horizontal=True, vertical_alignment="bottom", gap="small", key="features.going_on"
    ):
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            key="features.previous",
            shortcut="p",
            on_click=step,
            args=(-1,),
            help="The one above in the list",
        )
        number = st.number_input(
            "Feature",
            0,
            len(sae.rows) - 1,
            value=None,
            step=1,
            key="feature",
            bind="query-params",
            width=130,
            label_visibility="collapsed",
            placeholder="number",
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            icon_position="right",
            key="features.next",
            shortcut="n",
            on_click=step,
            args=(1,),
            help="The one below in the list",
        )
        if sae.index is not None:
            st.button(
                "Random",
                icon=":material/shuffle:",
                key="features.random",
                on_click=attempt,
                args=(random, "No feature fires"),
                help="Any feature that fires",
            )
            terms = st.popover(
                "Terms",
                icon=":material/help:",
                type="tertiary",
                key="features.terms",
                on_change="rerun",
            )
            if terms.open:
                with terms:
                    _define(TERMS)
    return int(number if number is not None else held or 0)


def said(feature: Feature) -> None:
    """Draw the star, the label and the notes of a feature; what is changed is appended at once."""
    labels, number = feature.index.labels, feature.number
    known = labels.of(number)
    with st.container(
        horizontal=True, vertical_alignment="center", gap="small", key="features.said"
    ):
        heading(number)
        star = "star" in known
        st.button(
            "Starred" if star else "Star",
            icon=":material/star:" if star else ":material/star_border:",
            key="features.star_it",
            type="primary" if star else "secondary",
            on_click=_say,
            args=(labels, number, "star", "off" if star else "on"),
        )
        _field(
            st.text_input,
            feature,
            "label",
            label_visibility="collapsed",
            placeholder="What does it mean? Your label",
            max_chars=200,
            width="stretch",
        )
        notes = st.popover(
            "Notes ●" if "note" in known else "Notes",
            icon=":material/edit_note:",
            key="features.notes",
            on_change="rerun",
        )
        if notes.open:
            with notes:
                _field(st.text_area, feature, "note", height=160, max_chars=10_000)
                st.caption("Kept as you leave the field; earlier versions stay in labels.jsonl.")
    if labels.damaged:
        st.caption(f"{left_out(labels.damaged, 'labels.jsonl')}.")
    if by := known.get("label"):
        who = f"{by.model} ({by.author})" if by.model else by.author
        score = f"; {by.measured}" if by.measured else ""
        plain(f"written by {who}{score}", size=".8125rem")


def heading(number: int) -> None:
    """Draw the feature's number as the heading of all below."""
    st.html(
        '<div role="heading" aria-level="2" style="font-size:1.3rem;font-weight:700;'
        f'white-space:nowrap">Feature {number}</div>',
        width="content",
    )


def _field(draw: Callable[..., Any], feature: Feature, kind: Kind, **looks: Any) -> None:
    labels, number = feature.index.labels, feature.number
    key = key_for(f"features.{kind}", feature.index.folder, number)
    known = labels.of(number)
    st.session_state.setdefault(key, known[kind].text if kind in known else "")

    def keep() -> None:
        _say(labels, number, kind, st.session_state[key])

    draw("Label" if kind == "label" else "Notes", key=key, on_change=keep, **looks)


def _say(labels: Labels, number: int, kind: Kind, text: str) -> None:
    try:
        author = getpass.getuser()
    except (KeyError, OSError):
        author = "somebody"  # a container without a user of this number
    attempt(lambda: labels.add(number, kind, text.strip(), author=author), "Not kept")
    # The list shows labels and stars too.
    st.session_state["features.list_is_old"] = True


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


def examples(feature: Feature, other: Feature | None, *, name: str, beside: str) -> None:
    """Draw where it fires, and the other SAE's feature under the same tokens."""
    hidden: Any = {"label_visibility": "collapsed"}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        what = "list of examples"
        view = choice("Examples", VIEWS, key="view", what=what, shown="the top ones", **hidden)
        what = "length of context"
        context = choice("Context", CONTEXTS, key="ctx", what=what, shown="snippets", **hidden)
        breaks = st.toggle("line breaks", key="lines", bind="query-params")
        more = st.toggle("more", key="features.more")
    st.caption(VIEWS[view])
    missed, top, below_top = view == "Just missed", _top(feature), 0.0
    if other is not None:
        st.html(macros(TEMPLATE).legend(name, f"{beside} · {other.number}"))
        below_top = _top(other)
    before, after = CONTEXTS[context]
    n = SHOWN[context] * (MORE if more else 1)
    for title, found in _lists(feature, view, n, before=before, after=after):
        if title:
            _title(title, size=".9rem")
        if not found:
            near = "No token came near its threshold without passing it."
            dead = f"It fired on none of {feature.index.n_tokens:,} tokens."
            st.caption(near if missed else dead)
            continue
        below = [None if other is None else other.on_example(each).tolist() for each in found]
        rows = [
            example_row(example, margin=missed, below=under)
            for example, under in zip(found, below, strict=True)
        ]
        st.html(strips(rows, top=top, below_top=below_top, breaks=breaks))


def _top(feature: Feature) -> float:
    return 0.0 if feature.is_dead else float(feature.values[0])


def just_missed(feature: Feature) -> None:
    """Draw what a feature that never fired came nearest to firing on."""
    rows = [example_row(each, margin=True) for each in feature.just_missed(SHOWN["snippet"])]
    st.html(strips(rows, top=0.0))


def _lists(
    feature: Feature, view: str, n: int, *, before: int | None, after: int | None
) -> list[tuple[str, Sequence[Example]]]:
    """Return the lists of a view by title."""
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
    """The feature of another SAE that is most like one; mutual if the one is most like it too."""

    feature: Feature
    cosine: float
    mutual: bool


def match(feature: Feature, other: FeatureIndex | None) -> tuple[Match | None, str]:
    """Return the best match in another index, or why there is none to show."""
    if other is None:
        return None, "Index the other SAE to compare."
    try:
        best = feature.matched(other, k=1).iloc[0]
    except InputError as error:
        return None, str(error)
    like = other.feature(int(best["feature"]))
    return Match(like, float(best["cosine"]), bool(best["mutual"])), ""


def relations(
    sae: Opened, feature: Feature, found: Match | None, *, base: str | None, problem: str
) -> None:
    """Draw similar decoder directions, features on the same tokens, and the best match."""
    left, right = st.columns(2)
    with left:
        similar(sae, feature)
    with right:
        _linked(
            sae,
            feature.co_firing,
            "jaccard",
            title="Fires on the same tokens",
            about="of the tokens of either: both",
            none="No other feature fires on its tokens.",
            key="features.together",
        )
    if base is None:
        return
    _title(f"Best match in {base}")
    if found is None:
        st.caption(problem)
        return
    pair = feature.pair(found.feature)
    st.html(f"<div>{escaped(f'{base} · {found.feature.number}')}: {_compared(pair, found)}</div>")
    counts = (pair.only_first, pair.both, pair.only_second)
    named = zip(OVERLAP, counts, ("only here", "both", f"only {base}"), strict=True)
    shares = [(colour, n, f"{n:,} {name}") for colour, n, name in named]
    st.html(macros(PAGE_TEMPLATE).shares(shares))
    st.html(macros(PAGE_TEMPLATE).swatches(shares))
    st.caption("Mutual match." if found.mutual else "Not a mutual match.")


def _compared(pair: Pair, match: Match) -> str:
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


def similar(sae: Opened, feature: Feature, *, alive_only: bool = False) -> None:
    """Draw the features whose decoder directions are nearest."""
    near = feature.neighbours
    if alive_only:
        near = near.loc[feature.index.alive()[near["feature"].to_numpy()]]
    _linked(
        sae,
        near,
        "cosine",
        title="Nearest features that fire" if alive_only else "Similar decoder directions",
        about="cosine of decoder directions",
        none="None of the nearest features fires." if alive_only else "There is no other feature.",
        key="features.near",
    )


def _linked(
    sae: Opened, rows: pd.DataFrame, measure: str, *, title: str, about: str, none: str, key: str
) -> None:
    """Draw the first of some features as links, each with its measure, 0 to 1, as a bar."""
    _title(title)
    labels = sae.index.labels.latest("label") if sae.index is not None else {}
    shown = rows.head(N_LINKS)
    here = {"run": sae.run.id, "sae": sae.name}
    links = [
        {
            "feature": number,
            "text": labels[number].text if number in labels else sae.rows["tokens"].iat[number],
            "said": f"{value:.2f}",
            "share": round(min(max(value, 0), 1), 3),
            "about": f"Feature {number}: {value:.3f} {about}",
            "href": f"Features?{urlencode(here | {'feature': number})}",
        }
        for number, value in zip(shown["feature"].tolist(), shown[measure].tolist(), strict=True)
    ]
    if links:
        feature_links(links, label=title, key=key, go=go_to)
    else:
        st.caption(none)


def take_along(sae: Opened, feature: Feature) -> None:
    """Draw where to go with the feature: other pages, a link, files."""
    number = feature.number
    with st.container(horizontal=True, gap="small"):
        if st.button("Steer this feature", icon=":material/alt_route:", key="features.to_steer"):
            shell.go("pages/7_Steer.py", sae.run, sae=sae.name, f=str(number))
        share = st.popover(
            "Share and export", icon=":material/ios_share:", key="features.share", on_change="rerun"
        )
    if not share.open:
        return
    with share:
        copy_link()
        looks: Any = {"icon": ":material/download:", "on_click": "ignore"}
        st.download_button(
            "One HTML file",
            lambda: page([feature]),
            file_name=f"{sae.name}-{number}.html",
            mime="text/html",
            key="features.as_html",
            help="Numbers, pictures and examples; needs nothing from elsewhere.",
            **looks,
        )
        place = {"model_id": feature.index.manifest.model, "sae_set": sae.name}
        st.download_button(
            "Neuronpedia JSON",
            lambda: json.dumps(neuronpedia_batch([feature], **place)),
            file_name="batch-0.json",
            mime="application/json",
            key="features.as_json",
            help="A batch of one feature, as Neuronpedia's importer reads it.",
            **looks,
        )
