"""Train: choose a model, a hook point and a sweep; see what it takes; start it."""

import secrets

import streamlit as st

from gsae_core.app import cache, shell
from gsae_core.app.controls import begin
from gsae_core.app.parts import copy_link, notice, noticed, plain
from gsae_core.app.pickers import stacking
from gsae_core.app.train_form import (
    LABELS,
    Base,
    at_place,
    corrected,
    in_labels,
    notebook_cell,
    shown,
    to_flags,
)
from gsae_core.app.train_view import (
    advanced,
    bar,
    computing,
    field,
    in_cache,
    plan,
    row,
    schedule_rows,
    token_lines,
    what,
    where,
)
from gsae_core.cli.arguments import Train, command_line, run_config
from gsae_core.config import DataConfig, RunConfig, shortfalls
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelFacts, model_facts
from gsae_core.lm.preview import Preview, preview_within
from gsae_core.machine import machine
from gsae_core.presets import presets
from gsae_core.runs.plan.cost import (
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
from gsae_core.text import count, duration, facts

PREVIEW_SECONDS = 20
MAX_EARLIER = 20  # finished runs at a place that say which L0 to expect, the newest first
state = st.session_state

arrived = state.get("shell.page") != "Train"
# Read before the widgets are drawn: they drop from the address what they cannot take.
asked = {name: st.query_params.get_all(name) for name in st.query_params} if arrived else {}
frame = shell.page(
    "Train",
    icon="🏋️",
    purpose="Train a sweep of SAEs on the activations of one hook point.",
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
        plain(f"{presets()[name].description}.", size=".875rem")
    else:
        base = Base(runs[chosen].config, Train(config=runs[chosen].folder / "config.json"))
        plain(f"The settings of {chosen}. Unchanged settings reproduce the same results.")
    if unknown := [run for run in asked.get("from", []) if run not in runs]:
        notice(f"Run {unknown[0][:80]} is not on this machine; showing {name}.", kind="warning")
    if state.get("train.filled") != base.flags or "from" in asked:
        state.update(shown(base.config))
        state["train.filled"] = base.flags
    return base


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
    """Return a run with its evaluation."""
    return Finished(run.id, run.config, run.evals())


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
    ranges = {spec.name: expected_l0(spec, found) for spec in config.saes}
    return {name: l0 for name, l0 in ranges.items() if l0 is not None}


@cache.kept("metrics.jsonl", most=64)
def last_seconds(run: Run) -> tuple[int, float] | None:
    """Return the last logged step of a run and its seconds of training."""
    rows = cache.recent_metrics(run)
    return (rows[-1]["step"], rows[-1]["seconds"]) if rows else None


def speed(here_has_gpu: bool, n_cores: int) -> Pace:
    """Return how fast this machine trains, by its newest runs."""
    for run in frame.runs[:5]:
        status, last = frame.statuses.get(run.id), last_seconds(run)
        shape = model_facts(run.config.model.name, in_cache()).shape
        if status is not None and status.n_steps and last is not None and shape is not None:
            steps, seconds = last
            if steps > 0 and seconds > 0:
                done = operations(run.config, shape) * (steps / status.n_steps)
                return Pace(done / seconds, run.id)
    return guessed_pace(n_cores=n_cores, has_gpu=here_has_gpu)


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
        plain(f"L0 as in {which} at this hook point, interpolated over λ.", size=".875rem")
    for one in flight.bars:
        bar(one)
    n_steps, batch = config.train.n_steps, config.train.batch_size
    rows = {"Steps": f"{n_steps:,} of {batch:,} activations, {len(config.saes)} SAEs at once"}
    rows |= schedule_rows(config.train)
    if flight.seconds is None:
        rows["Memory and time"] = "known once the model is downloaded; checked before training"
    else:
        source = (
            "a rough estimate: no run was trained here yet"
            if now.source is None
            else f"at the speed of {now.source}"
        )
        rows["Time"] = f"about {duration(flight.seconds)}, {source}"
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
        notice(in_labels(refusal.sentence), title="This cannot start yet")
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
    kinds = {"layer": int, "width": int, "cache_activations": lambda value: value == "on"}
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
        st.markdown("**1 · Model and hook point**")
        about = where(base, given)
    given = shown(at_place(base, state["layer"], state["site"]).config)
    with st.container(border=True):
        st.markdown("**2 · SAEs**")
        what(given, about)
    with st.container(border=True):
        st.markdown("**3 · Data and budget**")
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
        notice(in_labels(str(error)), title="This cannot start yet")
        st.button("Start", type="primary", disabled=True, width="stretch", key="train.start")
        st.stop()
    refusals = before(config, about)
    for sentence in shortfalls(config.train):
        notice(f"{sentence[0].upper()}{sentence[1:]}.", kind="warning")
    refuse(refusals)
    if st.button(
        f"Start {count(config.train.n_tokens)} tokens",
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
    preview(config)
