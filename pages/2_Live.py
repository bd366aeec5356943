"""Live: one run while it trains -- where it stands, what it measures, and how to stop it."""

import pandas as pd
import streamlit as st

from gsae_core.app import shell
from gsae_core.app.controls import controls
from gsae_core.app.glossary import TERMS, definition
from gsae_core.app.live_view import (
    CANCEL_STAGES,
    draw_numbers,
    draw_progress,
    draw_samples,
    draw_timeline,
    draw_trouble,
    latest_values,
)
from gsae_core.app.parts import (
    correct,
    escalate,
    figure_tools,
    line_legend,
    log,
    notice,
    plain,
    say_worse,
    state_badge,
)
from gsae_core.app.pickers import choice
from gsae_core.config import NO_MODEL, SAESpec, shortfalls
from gsae_core.errors import InputError
from gsae_core.files import left_out
from gsae_core.plots.live import (
    RUN_COLOURS,
    Line,
    LiveChart,
    Track,
    XAxis,
    line_chart,
    lines_of,
    plane,
    tracks,
)
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.metrics_log import MetricsCursor
from gsae_core.runs.outliers import outliers_met
from gsae_core.runs.plan.progress import speed
from gsae_core.runs.run import Run
from gsae_core.text import count, in_units

# Labels first: the address holds what a bound widget shows.
LOSS_PARTS = {
    "total": "loss",
    "squared error": "reconstruction",
    "sparsity": "sparsity_loss",
    "auxiliary": "auxiliary",
}
LOG = ("l0", "fvu", "kl", *LOSS_PARTS.values())
MOVING = ("queued", "starting", "running", "cancelling")
DAMAGE_CAUSE = "A power cut or a full disk can cause this; check the free disk space."
N_HUES = len(RUN_COLOURS["light"])
MAX_OVERLAID = 4  # runs beside the page's own: five hues are told apart, and five are read in time

frame = shell.page(
    "Live",
    icon="📈",
    purpose="Training curves of a run. Training continues when this tab is closed.",
)
run = shell.need_run(frame, "its curves")
X_AXES: dict[str, XAxis] = {f"{run.config.unit}s": "tokens", "steps": "step", "time": "seconds"}
loss_parts = LOSS_PARTS | ({"KL divergence": "kl"} if run.config.loss == "kl" else {})
drawn = frame.statuses.get(run.id)
if drawn is None:
    notice(f"{run.id} was deleted, or its status is damaged.", title="This run cannot be read")
    st.stop()


def read(one: Run) -> tuple[pd.DataFrame, int]:
    """Return every metric line so far, reading only what was added; and how many are damaged."""
    kept = st.session_state.setdefault("live.metrics", {})
    table, cursor, damaged = kept.get(one.id, (pd.DataFrame(), MetricsCursor(), 0))
    added = one.metrics_since(cursor)
    if added.restarted:
        table, damaged = pd.DataFrame(), 0
    names = names_of(one)
    rows = [row for row in added.rows if row["sae"] in names]
    damaged += added.damaged + len(added.rows) - len(rows)
    if rows:
        # A category is read as numbers from then on, and strings are not: a tick's largest part.
        new = pd.DataFrame(rows).astype({"sae": pd.CategoricalDtype(names)})
        parts = [part for part in (table, new) if not part.empty]
        table = pd.concat(parts, ignore_index=True)
    kept[one.id] = table, added.cursor, damaged
    return table, damaged


def names_of(one: Run) -> list[str]:
    return [spec.name for spec in one.config.saes]


def hook_of(one: Run, spec: SAESpec) -> str:
    return one.config.place(spec).hook_name


def place_of(one: Run, spec: SAESpec) -> str:
    """Return the hook point that an SAE reads; nothing where its run has one alone."""
    return hook_of(one, spec) if len(one.config.places) > 1 else ""


def header(status: Status, table: pd.DataFrame) -> None:
    """Draw state, progress and speed."""
    newest = table.tail(10 * len(run.config.saes)).to_dict("records")
    now = speed(status, newest)
    with st.container(border=True):
        draw_timeline(run, status)
        draw_progress(run, status, now)
        tokens = newest[-1]["tokens"] if newest else 0
        moving, unit = status.state in MOVING, run.config.unit
        draw_numbers(status, now, tokens=tokens, moving=moving, unit=unit)
        if status.state == "cancelling":
            st.caption(f"Cancelling: {CANCEL_STAGES.get(escalate(run), 'ended')}.")


def about(name: str) -> str:
    terms = ("l0", "fvu") if name == "plane" else (name,)
    return in_units("\n\n".join(map(definition, terms)), run.config.unit)


def figures(
    lines: tuple[Line, ...], logged: list[Track], finished: list[str]
) -> list[tuple[LiveChart, str, str]]:
    """Return each chart with its name and what it says to those who cannot see it."""
    x = X_AXES[st.session_state["x"]]
    loss = loss_parts[st.session_state["part"]]
    columns = (loss, "l0", "fvu", "gamma", "gamma_gate", "dead_gate", "dead_magnitude", "lr")
    charts = [
        (
            line_chart(
                lines,
                logged,
                column,
                x=x,
                smoothing=0.0 if column == "lr" else st.session_state["smooth"],
                log=column in LOG and st.session_state["log"],
            ),
            column,
            f"{column} of each SAE against {x}",
        )
        for column in columns
    ]
    alt = "L0 against FVU of each SAE now, and its path during training"
    charts.insert(5, (plane(lines, logged, finished=finished, unit=run.config.unit), "plane", alt))
    return charts


def draw_newest(lines: tuple[Line, ...], logged: list[Track]) -> None:
    """Draw the last number of each kind, as a table."""
    icon = ":material/table_rows:"
    table = st.expander("Latest values", icon=icon, key="live.newest", on_change="rerun")
    if not table.open:
        return  # a tenth of a tick
    newest = {
        line.sae: {name: float(values[-1]) for name, values in part.items()}
        for line, part in zip(lines, logged, strict=True)
        if part
    }
    numbers = latest_values(newest)
    table.dataframe(numbers, hide_index=True, alt="Latest values of each SAE")


def view(was: Status) -> None:
    """Draw everything that moves.

    Args:
        was: where the run stood when the page around this was drawn.
    """
    try:
        status = run.status
        tables = {one.id: read(one) for one in shown}
        states = {one.id: one.status.state for one in shown[1:]} | {run.id: status.state}
        if status.state != was.state:
            st.rerun()  # the whole page: its buttons and its timer are of another state
        header(status, tables[run.id][0])
        imported = run.config.imported is not None  # its recipe says nothing
        for sentence in () if imported else shortfalls(run.config.train):
            notice(f"{sentence[0].upper()}{sentence[1:]}.", kind="warning")
        begun = [event for event in run.events() if event["event"] == "set up"]
        for sentence in outliers_met(begun[-1], run.config.unit) if begun else ():
            notice(f"{sentence}.", kind="warning")
        draw_trouble(run, status)
        lost = run.n_lost_events(status)
    except InputError as error:
        notice(str(error), title="This run can no longer be read")
        return
    damaged = {"metrics.jsonl": sum(n for _, n in tables.values()), "events.jsonl": lost}
    said = [left_out(n, name) for name, n in damaged.items() if n]
    if said:
        left = "; ".join(said)
        notice(f"{left}. {DAMAGE_CAUSE}", kind="warning")
    finished = [name for name, state in states.items() if state == "finished"]
    chosen, at = st.session_state.get("saes"), st.session_state.get("places")
    by_id = {one.id: one for one in shown}
    runs = {
        one.id: [
            spec
            for spec in one.config.saes
            if (not chosen or spec.name in chosen)
            and (not at or len(one.config.places) == 1 or hook_of(one, spec) in at)
        ]
        for one in shown
    }
    lines = lines_of(runs, frame.theme, lambda name, spec: place_of(by_id[name], spec))
    logged = tracks({name: table for name, (table, _) in tables.items()}, lines)
    charts = figures(lines, logged, finished) if any(logged) else []
    place = st.container()
    if charts and len(runs) == 1:
        draw_newest(lines, logged)
    with st.expander("Sample of features", icon=":material/visibility:", expanded=True):
        draw_samples(run, names)
    if status.state not in ("failed", "lost", "cancelled"):
        with st.expander("Log", expanded=status.state == "starting"):
            log(run.log_tail(30))
    with place:
        if not charts:
            with st.container(border=True):
                st.caption("Values appear once the first steps are done.")
            return
        line_legend(lines)
        if len({line.group for line in lines}) > N_HUES:
            st.caption(f"Colours repeat after {N_HUES}: choose hook points or runs under View.")
        say_worse(
            {
                (line.sae if len(runs) == 1 else f"{line.run}/{line.sae}"): float(part["fvu"][-1])
                for line, part in zip(lines, logged, strict=True)
                if "fvu" in part
            }
        )
        cells = [cell for _ in range(3) for cell in st.columns(3, gap="medium")]
        slots = []
        for cell, (chart, name, _) in zip(cells, charts, strict=True):
            with cell:
                slots.append(st.container())
                figure_tools(lambda c=chart: c.data, name=name, about=about(name))
    # Last, and with nothing between: a browser that has the charts but not yet the end of the page
    # draws them first, for 0.3 s in which the page cannot be used.
    data = [chart.arrow() for chart, _, _ in charts]
    for slot, table, (chart, name, alt) in zip(slots, data, charts, strict=True):
        # A zoom that Streamlit does not hear of is thrown away with the next data: it empties the
        # store of every selection bound to scales unless the selection is one of its own.
        slot.vega_lite_chart(
            table,
            chart.spec,
            key=f"live.chart_{name}",
            alt=alt,
            on_select="rerun",
            selection_mode="zoom",
        )


others = [other.id for other in frame.runs if other.id != run.id]
names = names_of(run)
correct("overlay", others, what="other run here", shown="the rest")
correct("saes", names, what="SAE of this run", shown="the rest")
hooks = [place.hook_name for place in run.config.places]
correct("places", hooks, what="hook point of this run", shown="the rest")
# Here, not in the closed popover that holds both choices.
correct("x", list(X_AXES), what="axis", shown=next(iter(X_AXES)))
correct("part", list(loss_parts), what="part of the loss", shown=next(iter(loss_parts)))
config = run.config
plain(
    ("" if config.model.name == NO_MODEL else f"{config.model.name} · {config.hook_names} · ")
    + f"{len(config.saes)} SAE{'s' * (len(config.saes) != 1)} · "
    + (
        f"{count(config.train.n_tokens)} {config.unit}s of {config.data.source}"
        if config.imported is None
        else f"imported from {config.imported}"
    )
    + ("" if config.finetuned is None else f" · fine-tuned from {config.finetuned}"),
    size=".9rem",
)
with st.container(horizontal=True, vertical_alignment="center", gap="small"):
    state_badge(drawn.state)
    controls(run, drawn)
    options = st.popover("View", icon=":material/settings:")
with options:
    choice("Horizontal axis", X_AXES, key="x", what="axis")
    choice("Loss", loss_parts, key="part", what="part of the loss")
    st.slider(
        "Smoothing",
        0.0,
        0.95,
        0.0,
        0.05,
        key="smooth",
        bind="query-params",
        help="Exponential moving average; the raw line stays visible.",
    )
    st.toggle(
        "Logarithmic",
        value=True,
        key="log",
        bind="query-params",
        help="The axes of losses, L0 and FVU.",
    )
    st.multiselect("SAEs", names, key="saes", placeholder="all", bind="query-params")
    if len(hooks) > 1:
        about_hues = "Colour shows the hook point; dash and marker show the architecture."
        st.multiselect(
            "Hook points",
            hooks,
            key="places",
            placeholder="all",
            bind="query-params",
            help=about_hues,
        )
    st.multiselect(
        "Overlay runs",
        others,
        key="overlay",
        placeholder="none",
        bind="query-params",
        max_selections=MAX_OVERLAID,
        help="Colour then shows the run; dash and marker still show the architecture.",
    )
    st.toggle("Pause", key="live.pause", help="Stop refreshing; training goes on.")
shown = [run, *(other for other in frame.runs if other.id in st.session_state["overlay"])]
moving = any(frame.statuses[one.id].state in MOVING for one in shown if one.id in frame.statuses)
paused = st.session_state.get("live.pause")
curves = st.container()
with st.expander("What the numbers mean", icon=":material/menu_book:"):
    for term in ("l0", "fvu", "gamma", "gamma_gate", "sparsity"):
        plain(in_units(": ".join(TERMS[term]), run.config.unit))
with curves:
    st.fragment(view, run_every=1.0 if moving and not paused else None)(drawn)
