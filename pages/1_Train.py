"""Train: choose a model, a hook point and a sweep; see what it takes; start it.

Each widget of the form is a flag of `train`, and its value is in the address.
"""

import secrets
from collections.abc import Container, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.state import SessionStateProxy

from gsae_core.app import cache, shell
from gsae_core.app.components import ABOUT, block_diagram, read_choice
from gsae_core.app.controls import begin
from gsae_core.app.parts import (
    PAGE_TEMPLATE,
    SIGNS,
    attempt,
    copy_link,
    notice,
    noticed,
    own,
    plain,
)
from gsae_core.app.pickers import stacking
from gsae_core.app.train_form import (
    FIELDS,
    KNOBS,
    LABELS,
    OF_A_MODEL,
    Base,
    Values,
    at_place,
    corrected,
    covers,
    in_labels,
    log_spaced,
    notebook_cell,
    shown,
    to_flags,
)
from gsae_core.cli.arguments import Train, command_line, run_config
from gsae_core.config import (
    ARCHITECTURES,
    NO_MODEL,
    SITES,
    Architecture,
    DataConfig,
    RunConfig,
    SAESpec,
    TrainRecipe,
    shortfalls,
)
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import (
    ModelFacts,
    ModelShape,
    cached_models,
    choices,
    is_certain,
    model_facts,
)
from gsae_core.lm.preview import Preview, preview_within
from gsae_core.lm.stored import described, open_vectors
from gsae_core.machine import machine
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.presets import presets
from gsae_core.runs.plan.cost import (
    Bar,
    Expected,
    Finished,
    Fix,
    Pace,
    Refusal,
    alike,
    expected_l0,
    gpu_memory,
    guessed_pace,
    operations,
    preflight,
)
from gsae_core.runs.run import Run, run_id
from gsae_core.text import count, duration, facts, in_units, macros

PREVIEW_SECONDS = 20
A_FEW_SECONDS = 5
MOST_LAYERS = 128  # offered where the model's are not known
MAX_EARLIER = 20  # finished runs at a place that say which L0 to expect, the newest first
DRAWN = (
    "activations",
    "model",
    "layer",
    "site",
    "data",
    "tokens",
    "batch_size",
    "lr",
    "dtype",
    "device",
    "seed",
)
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
# Shares of a bar, told apart by lightness as well as hue; Okabe-Ito.
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
# The models in the Hub's cache; asked anew every half minute.
in_cache = st.cache_data(ttl=30, max_entries=1, show_spinner=False)(cached_models)
state: SessionStateProxy = st.session_state

arrived = state.get("shell.page") != "Train"
# Read before the widgets are drawn: they drop from the address what they cannot take.
asked = {name: st.query_params.get_all(name) for name in st.query_params} if arrived else {}
frame = shell.page(
    "Train",
    icon="🏋️",
    purpose="Train a sweep of SAEs on the activations of a hook point, or of several.",
)


def choose_base() -> Base:
    """Draw what the form starts from, and fill it in when that changes."""
    one, two = st.columns(2)
    runs = {run.id: run for run in frame.runs}
    with two:
        chosen = st.selectbox(
            "Or settings of a run",
            list(runs),
            index=None,
            key="from",
            bind="query-params",
            placeholder="none" if runs else "no runs yet",
            disabled=not runs,
            help="Fills in the settings of that run.",
        )
    with one:
        name = st.selectbox(
            "Preset",
            list(presets()),
            key="preset",
            bind="query-params",
            disabled=chosen is not None,
        )
    if chosen is None:
        base = Base(presets()[name].config(), Train(preset=name))
        about = f"{presets()[name].description}."
        if unit() == "vector":
            about = f"Widths, λ and recipe of {name}, for the vectors below."
        plain(about, size=".875rem")
    else:
        base = Base(runs[chosen].config, Train(config=runs[chosen].folder / "config.json"))
        plain(f"The settings of {chosen}. Unchanged settings reproduce the same results.")
    if unknown := [run for run in asked.get("from", []) if run not in runs]:
        notice(f"Run {unknown[0][:80]} is not on this machine; showing {name}.", kind="warning")
    if state.get("train.filled") != base.flags or "from" in asked:
        state.update(shown(base.config))
        state["train.filled"] = base.flags
    return base


def unit() -> str:
    """Return what the form's run counts: the page speaks of vectors once a folder is given."""
    # What the address asks for is in the state only once the field is drawn.
    given = [state.get("activations"), *asked.get("activations", [])]
    return "vector" if any(given) else "token"


def field(flag: str, given: Values, **options: Any) -> None:
    """Draw the widget of a flag; what the set-up gives is its default, left out of the address."""
    about, value = FIELDS[flag], given[flag]
    label, help = (in_units(each, unit()) for each in (LABELS[flag], about.help))
    options = {"key": flag, "bind": BIND, "help": help} | options
    if about.choices:
        index = about.choices.index(value) if value in about.choices else None
        state[flag] = state.get(flag) or None
        st.selectbox(label, about.choices, index=index, **options)
    elif about.kind is bool:
        st.toggle(label, value, **options)
    else:
        st.text_input(label, value, **options)


def where(base: Base, given: Values) -> ModelFacts:
    """Draw the model, and the place in it; in their stead, a folder of vectors."""
    hint = "optional: a folder of vectors, in place of a model"
    field("activations", given, placeholder=hint)
    if state["activations"]:
        return vectors(state["activations"], given)
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


@st.cache_data(ttl=30, max_entries=8, show_spinner="Reading the folder")
def stored(folder: str) -> tuple[int, ModelFacts, str]:
    """Return how many vectors a folder has, their width as a model's, and what they are of."""
    found, (of, _) = open_vectors(folder), described(folder)
    shape = ModelShape(found.d_in, found.d_in, found.d_in, of.layer + 1)
    whose = "of no known model" if of.name == NO_MODEL else f"of {of.name}, {of.hook_name}"
    return len(found), ModelFacts(of.name, "folder", None, 0, shape), whose


def vectors(folder: str, given: Values) -> ModelFacts:
    """Say what is in a folder of vectors; no field of a model or of a text is drawn."""
    for flag in ("model", "layer", "site", "more_layers", "more_sites", "data"):
        state.setdefault(flag, given[flag])
    try:
        n, about, whose = stored(folder.strip())
    except InputError as error:
        notice(str(error), title="This folder cannot be read")
        return ModelFacts(NO_MODEL, "folder")
    width = 0 if about.shape is None else about.shape.d_model
    plain(f"{n:,} vectors, {width:,} wide, {whose}", size=".875rem")
    st.caption("No language model runs: FVU, γ and L0 are measured, loss recovered is not.")
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
    further_places(given, last)
    layers = {state["layer"], *state["more_layers"]}
    sites = {state["site"], *state["more_sites"]}
    if not all(covers(base, layer, site) for layer in layers for site in sites):
        kept = "its settings are kept as your own"
        st.caption(f"{base.flags.preset} has no runs at this hook point; {kept}.")
    if not all(is_certain(about.family, site) for site in sites):
        plain(
            f"Of this {about.family} model only resid_pre and resid_post are certain before it is "
            "loaded; if it lacks another site, the run ends at once and says which it has.",
            size=".875rem",
        )
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


def further_places(given: Values, last: int | None) -> None:
    """Draw the choice of more layers and sites, read in the same pass of the model."""
    layers = list(range(MOST_LAYERS if last is None else last + 1))
    for name, known in (("more_layers", layers), ("more_sites", list(SITES))):
        state[name] = [each for each in state.get(name, given[name]) if each in known]
    # What the address asks for is known only once the widgets are drawn.
    named = {"more_layers", "more_sites"} & asked.keys()
    chosen = bool(named or state["more_layers"] or state["more_sites"])
    with st.expander("More layers and sites", expanded=chosen):
        one, two = st.columns([2, 3])
        label, default = LABELS["more_layers"], [n for n in given["more_layers"] if n in layers]
        one.multiselect(label, layers, default, key="more_layers", bind=BIND, placeholder="none")
        label, default = LABELS["more_sites"], given["more_sites"]
        two.multiselect(label, SITES, default, key="more_sites", bind=BIND, placeholder="none")
        st.caption("One pass of the model reads all; each layer and site gets the whole sweep.")


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
        said = in_units(KNOB_HELP[flag], unit())
        one.text_input(LABELS[flag], given[flag], key=flag, bind=BIND, help=said)
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
    if state["activations"]:
        state.setdefault("dtype", given["dtype"])
        row(("device", "seed"), given, n_columns=2)
    else:
        row(("dtype", "device", "seed"), given)
    hint = "optional: price of this machine per hour"
    st.number_input("Price per hour", 0.0, None, None, key="price", bind=BIND, placeholder=hint)


def advanced(given: Values, asked: Container[str]) -> None:
    """Draw every other flag of `train`, once one of them is looked for or is not as given.

    Drawn closed, they were half of the page's elements and of the time until it could be used.
    `asked` holds the flags that the address sets.
    """
    rest = [flag for flag in FIELDS if flag not in DRAWN]
    if state["activations"]:  # a switch that is on stays, to be switched off
        unread = [flag for flag in rest if flag in OF_A_MODEL and state.get(flag) is not True]
        for flag in unread:
            state.setdefault(flag, given[flag])
        rest = [flag for flag in rest if flag not in unread]
    # An empty choice is "" as given and None once its widget was drawn.
    now = {flag: state.get(flag, given[flag]) or "" for flag in rest}
    changed = any(flag in asked or now[flag] != (given[flag] or "") for flag in rest)
    title = f"Advanced: recipe,{' corpus,' * (unit() == 'token')} evaluation"
    with st.expander(title, key="train.advanced", on_change="rerun") as shown:
        if not (shown.open or changed):
            for flag in rest:
                state.setdefault(flag, given[flag])
            return
        switches = [flag for flag in rest if FIELDS[flag].kind is bool]
        fields = [flag for flag in rest if flag not in switches]
        for start in range(0, len(fields), 3):
            row(fields[start : start + 3], given)
        for start in range(0, len(switches), 2):  # their names are long
            row(switches[start : start + 2], given, n_columns=2)


@st.cache_data(max_entries=32, show_spinner="Reading the first lines")
def preview_of(data: str, model: str, revision: str | None) -> Preview:
    """Return the first lines of a corpus; `data` is its config as JSON."""
    config = DataConfig.model_validate_json(data)
    return preview_within(PREVIEW_SECONDS, config, model, revision)


@noticed("No preview")
def preview(config: RunConfig) -> None:
    """Draw ten lines of the corpus as tokens, and how much of it there is."""
    if not st.toggle("Show ten lines as tokens", key="peek", bind="query-params"):
        return
    found = preview_of(config.data.model_dump_json(), config.model.name, config.model.revision)
    token_lines(found.lines)
    said = [f"{found.sampled_tokens:,} tokens read"]
    if found.sampled_bytes:
        said.append(f"{found.sampled_bytes / found.sampled_tokens:.1f} bytes a token")
    if found.n_tokens is not None:
        passes = config.train.n_tokens / max(found.n_tokens * (1 - config.data.held_out), 1)
        said.append(f"about {count(found.n_tokens)} in all, so {passes:.2g} passes over the text")
    else:
        said.append("total not known until all of it is read")
    st.caption(" · ".join(said))


@cache.kept("evals.json", most=256)
def results(run: Run) -> Finished:
    """Return a run with its evaluation, if that is of its own text."""
    return Finished(run.id, run.config, [row for row in run.evals() if row["text"] is None])


def expected(config: RunConfig) -> dict[str, Expected]:
    """Return the L0 to expect of each SAE, from finished runs at the same place."""
    found = []
    for run in frame.runs:
        evaluated = (run.folder / "evals.json").exists()
        if len(found) < MAX_EARLIER and alike(config, run.config) and evaluated:
            try:
                found.append(results(run))
            except (InputError, KeyError):
                continue  # damaged: Home says so
    ranges = {spec.name: expected_l0(spec, config.place(spec), found) for spec in config.saes}
    return {name: l0 for name, l0 in ranges.items() if l0 is not None}


@cache.kept("metrics.jsonl", most=64)
def last_seconds(run: Run) -> tuple[int, float] | None:
    """Return the last logged step of a run and its seconds of training."""
    rows = cache.recent_metrics(run)
    return (rows[-1]["step"], rows[-1]["seconds"]) if rows else None


def shape_of(run: Run) -> ModelShape | None:
    """Return the widths of a run's model, or of its folder; None where they are not known."""
    with suppress(InputError):
        if run.config.activations is not None:
            return stored(run.config.activations)[1].shape
        return model_facts(run.config.model.name, in_cache()).shape
    return None


def speed(here_has_gpu: bool, n_cores: int) -> Pace:
    """Return how fast this machine trains: the longest of its newest runs that read the like.

    Of a run of seconds most is the start: compiling, the first batches, files not yet in memory.
    """
    like = [run for run in frame.runs if run.config.unit == unit()]
    found: list[tuple[float, Pace]] = []
    for run in like[:5]:
        status, last, shape = frame.statuses.get(run.id), last_seconds(run), shape_of(run)
        if status is not None and status.n_steps and last is not None and shape is not None:
            steps, seconds = last
            if steps > 0 and seconds > 0:
                done = operations(run.config, shape) * (steps / status.n_steps)
                found.append((seconds, Pace(done / seconds, run.id)))
    if found:
        return max(found, key=itemgetter(0))[1]
    return guessed_pace(n_cores=n_cores, has_gpu=here_has_gpu)


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
    rate = [rise(steps.lr_warmup_steps, whole="at its peak")]
    if recipe.lr_decay_fraction:
        rate.append(f"falls over the last {recipe.lr_decay_fraction * recipe.n_steps:,.0f}")
    revived = f"resampled every {in_steps(steps.revive_every)}, if dead for {steps.revive_window:,}"
    return {
        "Learning rate": ", ".join(rate),
        "λ": rise(steps.sparsity_warmup_steps, whole="full"),
        "Dead features": revived if steps.revive_every else "not resampled",
    }


def rise(n: int, *, whole: str) -> str:
    return f"rises over {in_steps(n)}" if n else f"{whole} from the first step on"


def in_steps(n: int) -> str:
    return f"{n:,} step{'s' * (n != 1)}"


def plan(config: RunConfig, expected: dict[str, Expected]) -> None:
    """Show every SAE of the sweep: width, lambda and the L0 that earlier runs let one expect."""
    for place in config.places:
        if len(config.places) > 1:
            plain(place.hook_name, size=".875rem")
        saes = [spec for spec in config.saes if config.place(spec) == place]
        plan_of_place(saes, expected)


def plan_of_place(saes: Sequence[SAESpec], expected: dict[str, Expected]) -> None:
    """Show the SAEs of one place."""
    groups: dict[tuple[Architecture, int], list[tuple[str, str]]] = {}
    for spec in saes:
        found, l0 = expected.get(spec.name), ""
        if found is not None and spec.architecture != "topk":
            ends = [f"{float(f'{end:.2g}'):,g}" for end in (found.low, found.high)]
            l0 = f"→ L0 {'–'.join(dict.fromkeys(ends))}"
        cell = knob(spec.architecture, spec.sparsity), l0
        groups.setdefault((spec.architecture, spec.d_sae), []).append(cell)
    rows = [(LOOKS[kind], SIGNS[kind], width, cells) for (kind, width), cells in groups.items()]
    st.html(macros(PAGE_TEMPLATE).plan(rows))


def before(config: RunConfig, about: ModelFacts) -> tuple[Refusal, ...]:
    """Draw what the run takes and what there is; return why it cannot start."""
    here = machine(shell.runs_root())
    on_gpu = gpu_memory(here, config.device) is not None
    now = speed(on_gpu, here.n_cores)
    flight = preflight(config, about, here, now)
    ranges = expected(config)
    plan(config, ranges)
    runs = list(dict.fromkeys(run for l0 in ranges.values() for run in l0.runs))
    if runs:
        others = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        which = f"{'run' if len(runs) == 1 else 'runs'} {', '.join(runs[:3])}{others}"
        where = "at these hook points" if len(config.places) > 1 else "at this hook point"
        where = where if unit() == "token" else "on these vectors"
        plain(f"L0 as in {which} {where}, interpolated over λ.", size=".875rem")
    for one in flight.bars:
        bar(one)
    n_steps, batch = config.train.n_steps, config.train.batch_size
    at_once = f"{len(config.saes)} SAEs at once"
    if (n_places := len(config.places)) > 1:
        at_once += f", at {n_places} hook points in one pass of the model"
    rows = {"Steps": f"{n_steps:,} of {batch:,} activations, {at_once}"}
    rows |= schedule_rows(config.train)
    if flight.seconds is None:
        known = {"token": "the model is downloaded", "vector": "the folder can be read"}[unit()]
        rows["Memory and time"] = f"known once {known}; checked before training"
    else:
        kind = "" if unit() == "token" else " on vectors"
        source = (
            f"a rough estimate: no run{kind} was trained here yet"
            if now.source is None
            else f"at the speed of {now.source}"
        )
        few = flight.seconds < A_FEW_SECONDS  # loading and logging then take longer
        rows["Time"] = (
            f"{'a few seconds' if few else f'about {duration(flight.seconds)}'}, {source}"
        )
        rows |= cost(flight.seconds, on_gpu=on_gpu)
    if flight.download or about.where == "hub":
        size = f"about {readable(flight.download)}" if flight.download else "size not known"
        rows["Download"] = f"{size}, from the Hub"
    st.html(facts(rows))
    return flight.refusals


def cost(seconds: float, *, on_gpu: bool) -> dict[str, str]:
    """Return the rows about hours and their price."""
    hours = seconds / 3600
    rows = {"GPU hours": f"about {hours:,.2g}"} if on_gpu else {}
    if state.get("price"):
        rows["Cost"] = f"about {hours * state['price']:,.2f}, at {state['price']:,.2f} an hour"
    return rows


def refuse(refusals: tuple[Refusal, ...]) -> None:
    """Draw why the run cannot start, with a button for each change that would let it."""
    for number, refusal in enumerate(refusals):
        notice(in_labels(refusal.sentence, unit()), title="This cannot start yet")
        for fix in refusal.fixes:
            st.button(
                f"Set {LABELS[fix.flag]} to {grouped(fix.value)}",
                key=f"train.fix_{number}_{fix.flag}",
                on_click=apply,
                args=(fix,),
                icon=":material/build:",
            )


def grouped(value: str) -> str:
    """Return a field's value as people read it: thousands set apart."""
    return f"{int(value):,}" if value.isdecimal() else value


def apply(fix: Fix) -> None:
    """Change a field."""
    if fix.flag == "layer":
        state["layer"], *state["more_layers"] = map(int, fix.value.split())
        return
    kinds = {"width": int, "cache_activations": lambda value: value == "on"}
    state[fix.flag] = kinds.get(fix.flag, str)(fix.value)


def copies(flags: Train, config: RunConfig) -> None:
    """Offer the same run for a terminal and for a notebook."""
    with st.popover("Copy as command line", icon=":material/terminal:", width="stretch"):
        st.code(command_line(flags), language="bash", wrap_lines=True)
    with st.popover("Copy as notebook cell", icon=":material/code:", width="stretch"):
        name = run_id(config, secrets.token_hex(2))
        st.code(notebook_cell(config, name=name), language="python", wrap_lines=True)
    with st.popover("Copy link", icon=":material/link:", width="stretch"):
        copy_link()


with stacking("train.form", least=16, last_stays=True):
    left, right = st.columns([3, 2], gap="large")
with left:
    base = choose_base()
    given = shown(base.config)
    with st.container(border=True):
        of = "Model and hook point" if unit() == "token" else "Vectors"
        st.markdown(f"**1 · {of}**")
        about = where(base, given)
    given = shown(at_place(base, state["layer"], state["site"]).config)
    with st.container(border=True):
        st.markdown("**2 · SAEs**")
        what(given, about)
    with st.container(border=True):
        st.markdown("**3 · Data and budget**")
        if not state["activations"]:
            field("data", given, placeholder="stdlib, a path, or a data set on the Hub")
        row(("tokens", "batch_size", "lr"), given)
        lines = st.container()
    with st.container(border=True):
        st.markdown("**4 · Machine**")
        computing(given)
    advanced(given, asked)
values = {flag: state[flag] for flag in given}
with left:
    for sentence in corrected(asked, values):
        plain(sentence, size=".875rem")
with right, st.container(border=True):
    st.subheader("Check before training", anchor=False)
    try:
        flags = to_flags(values, base)
        config = run_config(flags)
    except InputError as error:
        notice(in_labels(str(error), unit()), title="This cannot start yet")
        st.button("Start", type="primary", disabled=True, width="stretch", key="train.start")
        st.stop()
    refusals = before(config, about)
    for sentence in shortfalls(config.train):
        notice(f"{sentence[0].upper()}{sentence[1:]}.", kind="warning")
    refuse(refusals)
    if st.button(
        f"Start {count(config.train.n_tokens)} {config.unit}s",
        type="primary",
        icon=":material/play_arrow:",
        width="stretch",
        key="train.start",
        disabled=bool(refusals),
    ):
        begin(config)
    copies(flags, config)
# Last, because it may wait for the network; the rest of the page is there already.
with lines:
    if config.activations is None:
        preview(config)
