"""The widgets of the Train page: each is a flag of `train`, and its value is in the address."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.state import SessionStateProxy

from gsae_core.app.components import ABOUT, block_diagram, read_choice
from gsae_core.app.parts import PAGE_TEMPLATE, SIGNS, attempt, own, plain
from gsae_core.app.train_form import FIELDS, KNOBS, LABELS, Base, Values, covers, log_spaced
from gsae_core.config import ARCHITECTURES, SITES, Architecture, RunConfig, TrainRecipe
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelFacts, cached_models, choices, model_facts
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.runs.plan.cost import Bar, Expected
from gsae_core.text import count, macros

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
state: SessionStateProxy = st.session_state


in_cache = st.cache_data(ttl=30, max_entries=1, show_spinner=False)(cached_models)
"""The models in the Hub's cache; asked anew every half minute."""


def field(flag: str, given: Values, **options: Any) -> None:
    """Draw the widget of a flag; what the set-up gives is its default, left out of the address."""
    about, label, value = FIELDS[flag], LABELS[flag], given[flag]
    options = {"key": flag, "bind": BIND, "help": about.help} | options
    if about.choices:
        index = about.choices.index(value) if value in about.choices else None
        state[flag] = state.get(flag) or None
        st.selectbox(label, about.choices, index=index, **options)
    elif about.kind is bool:
        st.toggle(label, value, **options)
    else:
        st.text_input(label, value, **options)


def where(base: Base, given: Values) -> ModelFacts:
    """Draw the model, and the place in it."""
    cached = in_cache()
    names = list(dict.fromkeys([*choices(cached), given["model"], state["model"]]))
    st.selectbox(
        "Model",
        names,
        index=names.index(given["model"]),
        key="model",
        bind=BIND,
        accept_new_options=True,
        help="Type to search. `bundled`, a local Hugging Face folder, or any name on the Hub.",
    )
    about = model_facts(str(state["model"] or "").strip(), cached)
    said = {"bundled": "ships with the package", "folder": "local folder", "cached": "in the cache"}
    parts = ["size not known until downloaded"]
    if about.parameters is not None:
        parts = [f"{count(about.parameters)} parameters"]
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
    one.number_input("Layer", 0, last, default, key="layer", bind=BIND, help=FIELDS["layer"].help)
    site = SITES.index(given["site"])
    two.selectbox("Site", SITES, site, key="site", bind=BIND, help=FIELDS["site"].help)
    width = "" if about.shape is None else f", {about.shape.width(state['site']):,} wide"
    st.caption(f"{ABOUT[state['site']].capitalize()}{width}.")
    if not covers(base, state["layer"], state["site"]):
        kept = "its settings are kept as your own"
        st.caption(f"{base.flags.preset} has no runs at this hook point; {kept}.")
    with picture:
        n_layers = 0 if last is None else last + 1
        block_diagram(
            key=own("block"),
            read=lambda sent: read_choice(sent, n_layers),
            pick=lambda choice: state.update([choice]),
            site=state["site"],
            layer=state["layer"],
            n_layers=n_layers,
            parallel=about.family == "gpt_neox",
            about=ABOUT,
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
    one.multiselect("Architectures", ARCHITECTURES, given["arch"], key="arch", bind=BIND, wrap=True)
    with two:
        st.number_input("Width", 1, None, given["width"], 256, key="width", bind=BIND, help=WIDTH)
        if about.shape is not None and state["width"]:
            d_in = about.shape.width(state["site"])
            factor = state["width"] / d_in
            times = f"{factor:,.0f}" if factor >= 1000 else f"{factor:.3g}"
            st.caption(f"{times} × the {d_in:,} activations")
    st.toggle(
        "Equal width for ReLU baselines",
        given["equal_width"],
        key="equal_width",
        bind=BIND,
        disabled=not {"relu"} < set(state["arch"]),
        help="Off: ReLU SAEs get 1.5x the width, for equal compute (paper, section 4.1).",
    )
    turned = [flag for flag, archs in KNOBS.items() if set(archs) & set(state["arch"])]
    for flag in turned:
        one, two = st.columns([5, 2], vertical_alignment="bottom")
        one.text_input(LABELS[flag], given[flag], key=flag, bind=BIND, help=KNOB_HELP[flag])
        if flag == turned[0] and flag != "k":
            with two:
                spacing(flag)


def spacing(knob: str) -> None:
    """Draw the helper that spaces lambdas evenly on a log scale."""

    def fill_in() -> None:
        values = log_spaced(*(state[f"train.log_{end}"] for end in ("low", "high", "n")))
        state[knob] = " ".join(f"{value:g}" for value in values)

    with st.popover("Log-spaced", width="stretch"):
        st.number_input("From", 0.0, None, 0.1, format="%g", key="train.log_low")
        st.number_input("To", 0.0, None, 1.0, format="%g", key="train.log_high")
        st.number_input("Values", 2, 32, 4, key="train.log_n")
        act = fill_in, "Nothing was filled in"
        st.button("Fill in", on_click=attempt, args=act, key="train.log_fill", width="stretch")


def row(flags: Sequence[str], given: Values, *, n_columns: int = 3) -> None:
    """Draw fields beside each other."""
    for column, flag in zip(st.columns(n_columns), flags, strict=False):
        with column:
            field(flag, given)


def computing(given: Values) -> None:
    """Draw what it is computed with, and what an hour of that costs."""
    row(("dtype", "device", "seed"), given)
    hint = "optional: price of this machine per hour"
    st.number_input("Price per hour", 0.0, None, None, key="price", bind=BIND, placeholder=hint)


def advanced(given: Values, asked: Container[str]) -> None:
    """Draw every other flag of `train`, once one of them is looked for or is not as given.

    Drawn closed, they were half of the page's elements and of the time until it could be used.
    `asked` holds the flags that the address sets.
    """
    rest = [flag for flag in FIELDS if flag not in DRAWN]
    # An empty choice is "" as given and None once its widget was drawn.
    now = {flag: state.get(flag, given[flag]) or "" for flag in rest}
    changed = any(flag in asked or now[flag] != (given[flag] or "") for flag in rest)
    title = "Advanced: recipe, corpus, evaluation"
    with st.expander(title, key="train.advanced", on_change="rerun") as shown:
        if not (shown.open or changed):
            for flag in rest:
                state.setdefault(flag, given[flag])
            return
        switches = [flag for flag in rest if FIELDS[flag].kind is bool]
        fields = [flag for flag in rest if flag not in switches]
        for start in range(0, len(fields), 3):
            row(fields[start : start + 3], given)
        row(switches, given, n_columns=2)  # their names are long


# Shares of a bar, told apart by lightness as well as hue; Okabe-Ito.
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def bar(shown: Bar) -> None:
    """Draw how much is needed of how much there is; a part's name is under it."""
    said = f"about {readable(shown.needed)} of {readable(shown.available)} free"
    parts = [
        (shade, size, f"{label} {readable(size)}")
        for (label, size), shade in zip(shown.parts.items(), SHADES, strict=False)
        if size
    ]
    st.html(macros(PAGE_TEMPLATE).bar(shown, said, parts))


def token_lines(lines: Sequence[Sequence[str]]) -> None:
    """Show tokens side by side, each in its own frame, with white space made visible."""
    st.html(macros(PAGE_TEMPLATE).token_lines([[token[:200] for token in line] for line in lines]))


def schedule_rows(recipe: TrainRecipe) -> dict[str, str]:
    """Return the rows about the steps over which rates change and features are resampled."""
    steps = recipe.schedule
    rate = [_rise(steps.lr_warmup_steps, whole="at its peak")]
    if recipe.lr_decay_fraction:
        rate.append(f"falls over the last {recipe.lr_decay_fraction * recipe.n_steps:,.0f}")
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
    groups: dict[tuple[Architecture, int], list[tuple[str, str]]] = {}
    for spec in config.saes:
        found, l0 = expected.get(spec.name), ""
        if found is not None and spec.architecture != "topk":
            ends = [f"{float(f'{end:.2g}'):,g}" for end in (found.low, found.high)]
            l0 = f"→ L0 {'–'.join(dict.fromkeys(ends))}"
        cell = knob(spec.architecture, spec.sparsity), l0
        groups.setdefault((spec.architecture, spec.d_sae), []).append(cell)
    rows = [(LOOKS[kind], SIGNS[kind], width, cells) for (kind, width), cells in groups.items()]
    st.html(macros(PAGE_TEMPLATE).plan(rows))
