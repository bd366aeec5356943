"""The widgets of the Train page: each is a flag of `train`, and its value is in the address."""

import html
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.app.components import ABOUT, block_diagram
from gsae_core.app.parts import SIGNS, notice, plain, segments, swatch
from gsae_core.app.train_form import KNOBS, LABELS, Base, Values, covers, form_fields, log_spaced
from gsae_core.config import ARCHITECTURES, SITES, RunConfig, SAESpec, TrainRecipe
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelFacts, cached_models, choices, model_facts
from gsae_core.plots.palette import LOOKS
from gsae_core.runs.plan.cost import Bar, Expected
from gsae_core.text import count, visible

FIELDS = form_fields()
DRAWN = ("model", "layer", "site", "data", "tokens", "batch_size", "lr", "dtype", "device", "seed")
BIND = "query-params"
WIDTH = "Features per SAE. A ReLU baseline gets 1.5x as many, for equal training compute."
KNOB_HELP = {
    "sparsity": "One Gated and one ReLU SAE per value, separated by spaces. Larger λ, fewer active "
    "features.",
    "jumprelu_sparsity": "One JumpReLU SAE per value: weight of the L0 penalty, not comparable "
    "with the λ of an L1 penalty. From 0.001 to 0.1, L0 on the bundled model falls from about 70 "
    "to about 1.",
    "k": "Active features per token: one TopK SAE per value.",
}
state = st.session_state


@st.cache_data(ttl=30, max_entries=1, show_spinner=False)
def in_cache() -> dict[str, Path]:
    """Return the models in the Hub's cache; asked anew every half minute."""
    return cached_models()


def field(flag: str, given: Values, **options: Any) -> None:
    """Draw the widget of a flag; what the set-up gives is its default, left out of the address."""
    about, value = FIELDS[flag], given[flag]
    options = {"key": flag, "bind": BIND, "help": about.help} | options
    if about.kind == "choice":
        index = about.choices.index(value) if value in about.choices else None
        state[flag] = state.get(flag) or None
        st.selectbox(about.label, about.choices, index=index, **options)
    elif about.kind == "switch":
        st.toggle(about.label, value, **options)
    else:
        st.text_input(about.label, value, **options)


def where(base: Base, given: Values) -> ModelFacts:
    """Draw the model, and the place in it."""
    cached = in_cache()
    names = choices(cached)
    extra = [name for name in (given["model"], state["model"]) if name not in names]
    st.selectbox(
        "Model",
        [*names, *dict.fromkeys(extra)],
        index=[*names, *dict.fromkeys(extra)].index(given["model"]),
        key="model",
        bind=BIND,
        accept_new_options=True,
        help="Type to search. `bundled`, a local Hugging Face folder, or any name on the Hub.",
    )
    about = model_facts(str(state["model"] or "").strip(), cached)
    said = {"bundled": "ships with the package", "folder": "local folder", "cached": "in the cache"}
    size = (
        "size not known until downloaded" if about.parameters is None else count(about.parameters)
    )
    parts = [size if about.parameters is None else f"{size} parameters"]
    if about.shape is not None:
        parts += [f"{about.shape.n_layers} layers", f"d_model {about.shape.d_model:,}"]
    parts.append(said.get(about.where, "from the Hub"))
    if about.gated and about.where == "hub":
        parts.append("🔒 its licence must be accepted on the Hub first")
    plain(" · ".join(parts), size=".875rem")
    with st.expander("Compare models", key="train.compare_models", on_change="rerun") as table:
        if table.open:
            model_table(cached)
    place(base, given, about)
    return about


def place(base: Base, given: Values, about: ModelFacts) -> None:
    """Draw the layer and the site, as fields and as a picture to click in."""
    picture = st.container()
    one, two = st.columns([2, 3])
    last = None if about.shape is None else about.shape.n_layers - 1
    if last is not None and state["layer"] > last:
        st.caption(f"Layer {state['layer']} was set to {last}: the model has {last + 1} blocks.")
        state["layer"] = last
    default = given["layer"] if last is None else min(given["layer"], last)
    layer_help = "Block number, from 0."
    one.number_input("Layer", 0, last, default, 1, key="layer", bind=BIND, help=layer_help)
    site = SITES.index(given["site"])
    two.selectbox("Site", SITES, site, key="site", bind=BIND, help=FIELDS["site"].help)
    width = "" if about.shape is None else f", {about.shape.width(state['site']):,} wide"
    st.caption(f"{ABOUT[state['site']].capitalize()}{width}.")
    if not covers(base, state["layer"], state["site"]):
        st.caption(
            f"{base.preset} has no runs at this hook point; its settings are kept as your own."
        )
    with picture:
        block_diagram(
            site=state["site"],
            layer=state["layer"],
            n_layers=None if last is None else last + 1,
            parallel=about.family == "gpt_neox",
            pick=lambda flag, value: state.update({flag: value}),
        )


def model_table(cached: dict[str, Path]) -> None:
    """Draw the models side by side; a ticked row is chosen."""
    about = [model_facts(name, cached) for name in choices(cached)]

    def chosen() -> None:
        if rows := state["train.models"]["selection"]["rows"]:
            state["model"] = about[rows[0]].name

    licence = {True: "to accept", False: "open", None: "–"}
    st.dataframe(
        [
            {
                "model": model.name,
                "parameters": model.parameters,
                "layers": model.shape and model.shape.n_layers,
                "d_model": model.shape and model.shape.d_model,
                "licence": "open" if model.where == "bundled" else licence[model.gated],
                "here": model.where in ("bundled", "cached"),
            }
            for model in about
        ],
        key="train.models",
        hide_index=True,
        on_select=chosen,
        selection_mode="single-row",
        height=260,
        column_config={"parameters": st.column_config.NumberColumn(format="compact")},
        alt="Models: name, parameters, layers, width, licence, whether on this machine",
    )


def what(given: Values, about: ModelFacts) -> None:
    """Draw the SAEs of the sweep."""
    one, two = st.columns(2)
    one.multiselect(
        "Architectures",
        ARCHITECTURES,
        default=given["arch"],
        key="arch",
        bind=BIND,
        wrap=True,
    )
    with two:
        st.number_input("Width", 1, None, given["width"], 256, key="width", bind=BIND, help=WIDTH)
        if about.shape is not None and state["width"]:
            d_in = about.shape.width(state["site"])
            st.caption(f"{expansion(state['width'] / d_in)} × the {d_in:,} activations")
    many = {"relu"} < set(state["arch"])
    st.toggle(
        "Equal width for ReLU baselines",
        given["equal_width"],
        key="equal_width",
        bind=BIND,
        disabled=not many,
        help="Off: ReLU SAEs get 1.5x the width, for equal compute (paper, section 4.1).",
    )
    turned = [knob for knob, archs in KNOBS.items() if set(archs) & set(state["arch"])]
    for knob in turned:
        one, two = st.columns([5, 2], vertical_alignment="bottom")
        one.text_input(LABELS[knob], given[knob], key=knob, bind=BIND, help=KNOB_HELP[knob])
        if knob == turned[0] and knob != "k":
            with two:
                spacing(knob)


def expansion(factor: float) -> str:
    """Return how many times as wide, in figures that people read."""
    return f"{factor:,.0f}" if factor >= 1000 else f"{factor:.3g}"


def spacing(knob: str) -> None:
    """Draw the helper that spaces lambdas evenly on a log scale."""

    def fill_in() -> None:
        try:
            values = log_spaced(
                state["train.log_low"], state["train.log_high"], state["train.log_n"]
            )
        except InputError as error:
            state["train.log_error"] = str(error)
        else:
            state[knob] = " ".join(f"{value:g}" for value in values)

    with st.popover("Log-spaced", width="stretch"):
        st.number_input("From", 0.0, None, 0.1, format="%g", key="train.log_low")
        st.number_input("To", 0.0, None, 1.0, format="%g", key="train.log_high")
        st.number_input("Values", 2, 32, 4, key="train.log_n")
        st.button("Fill in", on_click=fill_in, key="train.log_fill", width="stretch")
        if error := state.pop("train.log_error", ""):
            notice(error)


def budget(given: Values) -> None:
    """Draw the text, how much of it, and how fast to learn from it."""
    field("data", given, placeholder="stdlib, a path, or a data set on the Hub")
    one, two, three = st.columns(3)
    with one:
        field("tokens", given)
    with two:
        field("batch_size", given)
    with three:
        field("lr", given)


def computing(given: Values) -> None:
    """Draw what it is computed with, and what an hour of that costs."""
    for column, flag in zip(st.columns(3), ("dtype", "device", "seed"), strict=True):
        with column:
            field(flag, given)
    st.number_input(
        "Price per hour",
        0.0,
        None,
        None,
        key="price",
        bind=BIND,
        placeholder="optional: price of this machine per hour",
    )


def advanced(given: Values, asked: Container[str]) -> None:
    """Draw every other flag of `train`, once one of them is looked for or is not as given.

    Drawn closed, they were half of the page's elements and of the time until it could be used.

    Args:
        asked: the flags that the address sets.
    """
    rest = [flag for flag in FIELDS if flag not in DRAWN]
    # An empty choice is "" as given and None once its widget was drawn.
    now = {flag: state.get(flag, given[flag]) or "" for flag in rest}
    changed = any(flag in asked or now[flag] != (given[flag] or "") for flag in rest)
    with st.expander(
        "Advanced: recipe, corpus, evaluation", key="train.advanced", on_change="rerun"
    ) as e:
        if not (e.open or changed):
            for flag in rest:
                state.setdefault(flag, given[flag])
            return
        switches = [flag for flag in rest if FIELDS[flag].kind == "switch"]
        fields = [flag for flag in rest if flag not in switches]
        rows = [fields[start : start + 3] for start in range(0, len(fields), 3)]
        for row, n_columns in [*((row, 3) for row in rows), (switches, 2)]:  # their names are long
            for column, flag in zip(st.columns(n_columns), row, strict=False):
                with column:
                    field(flag, given)


# Shares of a bar, told apart by lightness as well as hue; Okabe-Ito.
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
OVER = "#D55E00"


def side_by_side() -> DeltaGenerator:
    """Return a container whose columns stack on a narrow page; on a wide one the second stays.

    Streamlit's own columns stack below 640 px, where two forms beside each other are long cut off.
    """
    columns = ".st-key-train-form>[data-testid=stLayoutWrapper]>[data-testid=stHorizontalBlock]"
    column = f"{columns}>[data-testid=stColumn]"
    st.html(
        f"<style>@media(max-width:1000px){{{columns}{{flex-wrap:wrap}}"
        f"{column}{{min-width:100%}}}}"
        f"@media(min-width:1001px){{{column}:last-child"
        "{position:sticky;top:4rem;align-self:flex-start}}</style>"
    )
    return st.container(key="train.form")


def bar(shown: Bar) -> None:
    """Draw how much is needed of how much there is; a part's name is under it."""
    whole = max(shown.needed, shown.available, 1)
    said = f"{readable(shown.needed)} of {readable(shown.available)} free"
    shares = segments([part.size for part in shown.parts], SHADES, whole=whole)
    names = "".join(
        swatch(shade, f"{part.label} {readable(part.size)}")
        for part, shade in zip(shown.parts, SHADES, strict=False)
        if part.size
    )
    edge = "transparent" if shown.fits else OVER
    limit = f"{100 * shown.available / whole:.2f}%"
    st.html(
        f'<div style="display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap">'
        f"<span>{html.escape(shown.label)}</span>"
        f'<span style="font-variant-numeric:tabular-nums">about {said}'
        f"{'' if shown.fits else ' ✕'}</span></div>"
        f'<div role="meter" aria-label="{html.escape(shown.label)}" aria-valuemin="0" '
        f'aria-valuemax="{shown.available}" aria-valuenow="{shown.needed}" '
        f'aria-valuetext="about {said}" style="position:relative;height:.75rem;'
        f"border-radius:.4rem;overflow:hidden;display:flex;outline:2px solid {edge};"
        f'background:color-mix(in srgb,currentColor 12%,transparent)">{shares}'
        + (
            ""
            if shown.fits
            else f'<div style="position:absolute;left:{limit};top:0;bottom:0;width:3px;'
            'background:currentColor"></div>'
        )
        + '</div><div style="display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.875rem;'
        f'opacity:.85;margin-top:.2rem">{names}</div>'
    )


def token_lines(lines: Sequence[Sequence[str]]) -> None:
    """Show tokens side by side, each in its own frame, with white space made visible."""
    rows = "".join(
        f'<div style="white-space:nowrap;overflow-x:auto" tabindex="0" role="listitem">'
        f"{''.join(_token(token) for token in line)}</div>"
        for line in lines
    )
    st.html(
        "<style>.gs-t{display:inline-block;border:1px solid color-mix(in srgb,currentColor 25%,"
        "transparent);border-radius:3px;padding:0 .2em;margin:1px;max-width:16em;overflow:hidden;"
        "text-overflow:ellipsis;vertical-align:bottom;unicode-bidi:isolate}"
        ".gs-t:nth-child(even){background:color-mix(in srgb,currentColor 8%,transparent)}</style>"
        '<div role="list" aria-label="First lines as tokens" style="font-family:monospace;'
        f'font-size:.875rem;line-height:1.7">{rows}</div>'
    )


def _token(text: str) -> str:
    return f'<span class="gs-t">{html.escape(visible(text[:200]))}</span>'


def schedule_rows(recipe: TrainRecipe) -> dict[str, str]:
    """Return the rows about the steps over which rates change and features are resampled."""
    steps, n = recipe.schedule, recipe.n_steps
    rate = [_rise(steps.lr_warmup_steps, whole="at its peak")]
    if recipe.lr_decay_fraction:
        rate.append(f"falls over the last {recipe.lr_decay_fraction * n:,.0f}")
    revived = f"resampled every {_steps(steps.revive_every)}, if dead for {steps.revive_window:,}"
    return {
        "Learning rate": ", ".join(rate),
        "λ": _rise(steps.sparsity_warmup_steps, whole="full"),
        "Dead features": revived if steps.revive_every else "not resampled",
    }


def _rise(n: int, *, whole: str) -> str:
    return f"rises over {_steps(n)}" if n else f"{whole} from the first step on"


def _steps(n: int) -> str:
    return f"{n:,} step{'s' * (n != 1)}"


def plan(config: RunConfig, expected: dict[str, Expected]) -> None:
    """Show every SAE of the sweep: width, lambda and the L0 that earlier runs let one expect."""
    groups: dict[str, list[SAESpec]] = {}
    for spec in config.saes:
        groups.setdefault(f"{spec.architecture} {spec.d_sae}", []).append(spec)
    body = "".join(_group(saes, expected) for saes in groups.values())
    st.html(
        f'<div style="display:flex;flex-direction:column;gap:.6rem;font-size:.9375rem">{body}</div>'
    )


def _group(saes: list[SAESpec], expected: dict[str, Expected]) -> str:
    look, sign = LOOKS[saes[0].architecture], SIGNS[saes[0].architecture]
    letter = "k" if saes[0].architecture == "topk" else "λ"
    head = (
        f'<div><span style="color:{look.colour}">{sign}</span> <strong>{html.escape(look.label)}'
        f"</strong>, {saes[0].d_sae:,} features</div>"
    )
    cells = "".join(
        '<span style="white-space:nowrap;border:1px solid color-mix(in srgb,currentColor 20%,'
        'transparent);border-radius:.4rem;padding:.05rem .5rem;font-variant-numeric:tabular-nums">'
        f"{letter} {spec.sparsity:g}{_l0(spec, expected)}</span>"
        for spec in saes
    )
    return f'<div>{head}<div style="display:flex;flex-wrap:wrap;gap:.3rem">{cells}</div></div>'


def _l0(spec: SAESpec, expected: dict[str, Expected]) -> str:
    if spec.architecture == "topk":
        return ""
    found = expected.get(spec.name)
    if found is None:
        return ""
    low, high = f"{found.low:.2g}", f"{found.high:.2g}"
    low, high = (_plainly(text) for text in (low, high))
    return f' <span style="opacity:.8">→ L0 {low if low == high else f"{low}–{high}"}</span>'


def _plainly(number: str) -> str:
    return re.sub(r"\.0$", "", f"{float(number):,}")
