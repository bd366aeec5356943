"""One feature: its numbers, its gate, its examples, its label, its relations, its exports."""

import getpass
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from gsae_core.analysis.features.feature import Example, Feature
from gsae_core.analysis.features.files import COLUMNS
from gsae_core.analysis.features.filter import Chosen
from gsae_core.analysis.features.filter import beside as next_to
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.analysis.labels import Kind, Labels
from gsae_core.app import shell
from gsae_core.app.components import feature_links, read_number
from gsae_core.app.feature_index import Opened
from gsae_core.app.feature_list import go_to
from gsae_core.app.parts import attempt, copy_link, escaped, figure_tools, key_for, overlap, plain
from gsae_core.app.pickers import architecture, choice, correct_number
from gsae_core.errors import InputError
from gsae_core.files import left_out
from gsae_core.plots.features import activation_histogram, gate_plane, histogram_table
from gsae_core.plots.palette import Theme
from gsae_core.runs.run import Run
from gsae_core.text import count, in_units, macros, percent, short

CHIP = 60  # characters of a caption in the summary


def summary(feature: Feature) -> None:
    """Say in two lines what a feature that fires is: how often, on what, to what end."""
    unit, one_in = _unit(feature), feature.stats["n_tokens"] / feature.stats["fired"]
    often = (
        f"1 {unit} in {count(one_in)}" if one_in >= 2 else f"{percent(1 / one_in, 1)} of {unit}s"
    )
    is_caption = unit == "vector"
    tokens = [(token, percent(share, 0)) for token, share in feature.top_tokens]
    if is_caption:  # each of them a small share of many
        tokens = [(token[:CHIP], "") for token, _ in feature.top_tokens]
    logits = feature.logits
    effects = logits.top[:4], logits.bottom[:2]
    st.html(macros(TEMPLATE).summary(often, tokens, *effects, is_caption))


def numbers(feature: Feature) -> None:
    """Draw the feature's numbers, each with its definition on hovering."""
    row, kind = feature.stats, feature.index.manifest.architecture
    fired, n_tokens = int(row["fired"]), int(row["n_tokens"])
    tiles = [
        ("density", percent(row["density"], 2), f"{fired:,} of {n_tokens:,} {_unit(feature)}s"),
        ("max", short(row["max"]), f"median {short(row['q50'])}"),
    ]
    if kind in ("gated", "jumprelu"):
        gain = f"e^r {short(row['gain'])}" if math.isfinite(row["gain"]) else "threshold"
        tiles.append(("theta", short(row["theta"]), gain))
    tiles.append(("gamma", short(row["gamma"]), _shrinkage(row["gamma"])))
    if kind == "gated":
        silent = int(row["gate_open"]) - fired
        note = f"no output {silent:,} times" if silent else "always with output"
        tiles.append(("gate_density", percent(row["gate_density"], 2), note))
    _tiles(tiles, _unit(feature))


def _unit(feature: Feature) -> str:
    return feature.index.manifest.unit


def _tiles(cells: Sequence[tuple[str, str, str]], unit: str) -> None:
    """Draw columns of the table with a value and a note each."""
    found = [(TERMS[name], *said, in_units(COLUMNS[name], unit)) for name, *said in cells]
    st.html(macros(TEMPLATE).tiles(found))


def _shrinkage(gamma: float) -> str:
    if not math.isfinite(gamma):
        return "never fired"
    if abs(gamma - 1) < 0.02:
        return "no shrinkage"
    if gamma < 0:  # the best multiple of what it writes is 1 / gamma
        return "better with the other sign"
    return f"{100 * abs(1 - gamma):.0f} % too {'short' if gamma < 1 else 'long'}"


def pictures(feature: Feature, theme: Theme) -> None:
    """Draw how strongly it fires, and how its gate decides."""
    theta, kind = float(feature.stats["theta"]), feature.index.manifest.architecture
    unit = _unit(feature)
    plane = gate_plane(feature, theme=theme) if kind == "gated" else None
    spots = st.columns([1, 1.1]) if plane is not None else [st.container()]
    top = float(feature.histogram.edges[-1])
    alt = f"How often it fires how strongly, from 0 to {top:.3g}"
    words = {
        "relu": "One path decides whether and how much: no gate, no empty band at 0.",
        "topk": f"It fires where it is among the k largest of a {unit}.",
    }
    caption = words.get(kind, "Its gate never binds: no jump.")
    if math.isfinite(theta) and theta > 0:
        alt += f"; nothing between 0 and {theta:.3g}"
        caption = f"Nothing between 0 and θ = {theta:.3g}: it jumps."
    with spots[0]:
        _picture(
            "How strongly it fires",
            activation_histogram(
                feature.histogram, theta=theta, theme=theme, architecture=kind, unit=unit
            ),
            name="activations",
            alt=alt,
            caption=caption,
            table=histogram_table(feature.histogram, unit=unit),
            about=in_units(
                "\n".join(f"{name}: {COLUMNS[name]}" for name in ("max", "q50", "theta")), unit
            ),
        )
    if plane is None:
        return
    with spots[1]:
        _picture(
            "How its gate decides",
            plane,
            name="gate_and_magnitude",
            alt=f"Each {unit} by gate and magnitude: all lie on one line, which crosses the gate's "
            f"opening at theta, {theta:.3g}",
            caption=f"A dot is a {unit}, hollow: just missed. Slope: e^r.",
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


def logits(feature: Feature, run: Run) -> None:
    """Draw the next tokens that it raises and lowers most."""
    found = feature.logits
    if found.top:
        st.html(macros(TEMPLATE).logits(found.top, found.bottom))
    elif run.config.activations is not None:
        st.caption("No language model: this run was trained on vectors from a folder.")
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
    "b_gate": "b_gate",
    "b_mag": "b_mag",
    "decoder_norm": "decoder norm",
    "encoder_cosine": "encoder-decoder cosine",
    "top_tokens": "fires on",
    "top_logits": "makes more likely",
}
"""Columns of the table, by what people call them."""


def from_weights(sae: Opened, row: Mapping[str, Any]) -> None:
    """Draw what the weights alone say of a feature."""
    of_kind = {"gated": ("theta", "gain", "b_gate", "b_mag"), "jumprelu": ("theta",)}
    names = (*of_kind.get(architecture(sae.run, sae.name), ()), "decoder_norm", "encoder_cosine")
    _tiles([(name, short(row[name]), "") for name in names], sae.unit)


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

    def way(label: str, icon: str, by: int, about: str) -> None:
        st.button(
            label,
            icon=f":material/{icon}:",
            icon_position="right" if by > 0 else "left",
            key=f"features.{label.lower()}",
            shortcut=label[0].lower(),
            on_click=step,
            args=(by,),
            help=about,
        )

    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        way("Previous", "chevron_left", -1, "The one above in the list")
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
        way("Next", "chevron_right", 1, "The one below in the list")
        if (index := sae.index) is not None:
            st.button(
                "Random",
                icon=":material/shuffle:",
                key="features.random",
                on_click=attempt,
                args=(lambda: go_to(index.random_alive(seed=time.time_ns())), "No feature fires"),
                help="Any feature that fires",
            )
        with st.popover("Terms", icon=":material/help:", type="tertiary", key="features.terms"):
            terms = "\n\n".join(f"{title}: {COLUMNS[name]}" for name, title in TERMS.items())
            plain(in_units(terms, sae.unit))
    return int(number if number is not None else held or 0)


def said(feature: Feature) -> None:
    """Draw the star, the label and the notes of a feature; what is changed is appended at once."""
    labels, number = feature.index.labels, feature.number
    known = labels.of(number)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.header(f"Feature {number}", anchor=False, width="content", wrap=False)
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
        title, icon = "Notes ●" if "note" in known else "Notes", ":material/edit_note:"
        notes = st.popover(title, icon=icon, key="features.notes", on_change="rerun")
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


VIEWS: dict[str, tuple[Callable[..., Any], str]] = {
    "Top": (Feature.top, "The tokens it fires on most, each context once."),
    "Quantiles": (Feature.quantiles, "Five equal slices of its firings, some drawn from each."),
    "Random": (Feature.random, "Drawn evenly from all it fires on: the honest sample."),
    "Near threshold": (Feature.near_threshold, "Tokens it fires on least: just above threshold."),
    "Just missed": (Feature.just_missed, "Tokens just under its threshold, and by how much."),
}
"""What finds the examples of each list, and what they are."""
CONTEXTS: dict[str, tuple[int, int | None, int | None]] = {
    "snippet": (12, 20, 8),
    "full": (5, None, None),
}
"""How many are shown, and of how many tokens before and after the one they are about."""
MORE = 4  # times as many are shown on demand
N_LINKS = 6


def examples(feature: Feature, other: Feature | None, *, name: str, beside: str) -> None:
    """Draw where it fires, and the other SAE's feature under the same tokens."""
    hidden: Any = {"label_visibility": "collapsed"}
    context, breaks, unit = "snippet", False, _unit(feature)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        what = "list of examples"
        view = choice("Examples", VIEWS, key="view", what=what, shown="the top ones", **hidden)
        if unit == "token":  # a caption is all there is of a vector
            what = "length of context"
            context = choice("Context", CONTEXTS, key="ctx", what=what, shown="snippets", **hidden)
            breaks = st.toggle("line breaks", key="lines", bind="query-params")
        more = st.toggle("more", key="features.more")
    about = VIEWS[view][1]
    st.caption(
        in_units(about, unit).replace("context", "context" if unit == "token" else "caption")
    )
    missed, top, below_top = view == "Just missed", _top(feature), 0.0
    if other is not None:
        st.html(macros(TEMPLATE).legend(name, f"{beside} · {other.number}"))
        below_top = _top(other)
    n, before, after = CONTEXTS[context]
    for title, found in _lists(feature, view, n * MORE if more else n, before=before, after=after):
        if title:
            _title(title, size=".9rem")
        if not found:
            st.caption(f"No {unit} came near its threshold without passing it.")
            continue
        rows = [
            example_row(
                each,
                margin=missed,
                below=other and other.on_example(each).tolist(),
                image=feature.index.thumbnail(each.vector),
            )
            for each in found
        ]
        st.html(strips(rows, top=top, below_top=below_top, breaks=breaks))


def _top(feature: Feature) -> float:
    return 0.0 if feature.is_dead else float(feature.values[0])


def just_missed(feature: Feature) -> None:
    """Draw what a feature that never fired came nearest to firing on."""
    picture = feature.index.thumbnail
    found = feature.just_missed()
    rows = [example_row(each, margin=True, image=picture(each.vector)) for each in found]
    st.html(strips(rows, top=0.0))


def _lists(
    feature: Feature, view: str, n: int, **context: int | None
) -> list[tuple[str, Sequence[Example]]]:
    find = VIEWS[view][0]
    if view != "Quantiles":
        return [("", find(feature, n, **context))]
    return [
        (f"{each.low:.3g} to {each.high:.3g} · {each.n_fired:,} {_unit(feature)}s", each.examples)
        for each in find(feature, 5, k=max(2, n // 4), **context)
    ]


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
            title=f"Fires on the same {_unit(feature)}s",
            about=f"of the {_unit(feature)}s of either: both",
            none=f"No other feature fires on its {_unit(feature)}s.",
            key="features.together",
        )
    if base is None:
        return
    _title(f"Best match in {base}")
    if found is None:
        st.caption(problem)
        return
    pair, mutual = feature.pair(found.feature), "mutual" if found.mutual else "not mutual"
    both = f"They never fire on the same {_unit(feature)}"
    if pair.both:
        both = f"Where both fire, it writes {percent(1 - pair.shorter, 0)} as much "
        both += f"({pair.second:.3g} against {pair.first:.3g})"
    plain(f"{base} · {found.feature.number}: {both}; cosine {found.cosine:.2f}, {mutual}.")
    overlap({"only here": pair.only_first, "both": pair.both, f"only {base}": pair.only_second})


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
    known = shown["feature"].tolist()
    links = [
        {
            "feature": number,
            "text": labels[number].text if number in labels else sae.rows["tokens"].iat[number],
            "said": f"{value:.2f}",
            "share": round(min(max(value, 0), 1), 3),
            "about": f"Feature {number}: {value:.3f} {about}",
            "href": f"Features?{urlencode(here | {'feature': number})}",
        }
        for number, value in zip(known, shown[measure].tolist(), strict=True)
    ]
    if links:
        read = partial(read_number, choices=known)
        feature_links(key=key, read=read, pick=go_to, label=title, rows=links)
    else:
        st.caption(none)


def take_along(sae: Opened, feature: Feature) -> None:
    """Draw where to go with the feature: other pages, a link, files."""
    number = feature.number
    with st.container(horizontal=True, gap="small"):
        steered = sae.run.config.activations is None
        if steered and st.button(
            "Steer this feature", icon=":material/alt_route:", key="features.to_steer"
        ):
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
        if _unit(feature) == "vector":
            return
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
