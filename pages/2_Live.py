"""Live: one run while it trains -- where it stands, what it measures, and how to stop it."""

import streamlit as st

from gsae_core import glossary, shell
from gsae_core.errors import InputError
from gsae_core.failures import explain
from gsae_core.pieces import legend, notice, plain, seconds_since, state_badge
from gsae_core.plots.live import XAxis, line_chart, metrics_frame, plane
from gsae_core.progress import progress
from gsae_core.store.jobs import escalate_cancel, start
from gsae_core.store.metrics_log import MetricsCursor
from gsae_core.store.runs import Run
from gsae_core.store.status import Status
from gsae_core.wording import ago, count, duration

# Labels first: the address holds what a bound widget shows.
LOSS_PARTS = {
    "total": "loss",
    "squared error": "reconstruction",
    "sparsity": "sparsity_loss",
    "auxiliary": "auxiliary",
}
X_AXES: dict[str, XAxis] = {"tokens": "tokens", "steps": "step", "time": "seconds"}
LOG = ("l0", "fvu", *LOSS_PARTS.values())
MOVING = ("queued", "starting", "running", "cancelling")
RESUMABLE = ("cancelled", "failed", "lost")
STAGES = {
    "requested": "asked to finish its step and save",
    "terminating": "did not answer in 10 s; told to end",
    "killing": "did not end in 20 s; being killed",
}

frame = shell.page(
    "Live",
    icon="📈",
    purpose="A run while it trains. It goes on when this tab is closed; this page finds it again.",
)
run = shell.need_run(frame, "its curves")


def read_rows(run: Run) -> list[dict]:
    """Return every metric line so far, reading only what was added since the last look."""
    kept_run, rows, cursor = st.session_state.get("metrics", (None, [], MetricsCursor()))
    if kept_run != run.id:
        rows, cursor = [], MetricsCursor()
    added = run.metrics_since(cursor)
    rows = added.rows if added.restarted else rows + added.rows
    st.session_state["metrics"] = (run.id, rows, added.cursor)
    return rows


def header(status: Status, rows: list[dict]) -> None:
    """Draw state, progress and speed, and what can be done about them."""
    now = progress(status, rows)
    with st.container(border=True):
        state, name, buttons = st.columns([2, 5, 3], vertical_alignment="center")
        with state:
            state_badge(status.state)
        with name:
            config = run.config
            plain(
                f"{config.model.name} · {config.model.hook_name} · {len(config.saes)} SAEs · "
                f"{count(config.train.n_tokens)} tokens of {config.data.source}",
                size=".9rem",
            )
        with buttons:
            controls(status)
        text = f"step {status.step:,} of {status.n_steps:,}"
        if status.state == "running" and status.step == status.n_steps:
            text += f"; now measuring on {run.config.evaluation.n_tokens:,} held-out tokens"
        st.progress(now.share, text=text)
        one, two, three, four = st.columns(4)
        tokens = rows[-1]["tokens"] if rows else 0
        one.metric(
            "Tokens seen", count(tokens), help="Activation vectors trained on, BOS left out."
        )
        two.metric(
            "Speed",
            "–" if now.tokens_per_second is None else f"{count(now.tokens_per_second)}/s",
            help="Activation vectors a second, over the last ten logged steps.",
        )
        left = (
            "–"
            if now.seconds_left is None or status.state not in MOVING
            else duration(now.seconds_left)
        )
        three.metric(
            "Time left", left, help="Training steps left at this speed; evaluation comes after."
        )
        four.metric(
            "Last sign of life",
            ago(seconds_since(status.heartbeat)),
            help="When the training process last wrote its status.",
        )


def controls(status: Status) -> None:
    """Draw Cancel while the run moves, Resume when it stopped early."""
    if status.state in ("queued", "starting", "running"):
        if st.button("Cancel", icon=":material/stop_circle:", key="cancel"):
            run.request_cancel(by="app")
            st.rerun()
    elif status.state == "cancelling":
        stage = escalate_cancel(run)
        st.caption(f"The process was {STAGES.get(stage, 'ended')}.")
    elif status.state in RESUMABLE:
        if st.button("Resume", icon=":material/play_arrow:", type="primary", key="resume"):
            start(run)
            st.rerun()
    else:
        st.page_link(
            "pages/3_Pareto.py",
            label="See the results",
            icon=":material/balance:",
            query_params={"run": run.id},
        )


def trouble(status: Status) -> None:
    """Say what went wrong and what to change."""
    if status.state == "failed":
        cause, advice = explain(status.error)
        notice(f"{cause} {advice}", title="Training failed")
        st.code("\n".join(run.log_tail(30)) or "the log is empty", language=None, height=240)
    elif status.state == "lost":
        notice(
            "The process is gone without a word: the machine restarted, or it was killed, "
            "often for want of memory. Resume goes on from the last saved state.",
            kind="warning",
            title="The run was lost",
        )


def charts(rows: list[dict], status: Status) -> None:
    """Draw the curves and the plane."""
    chosen = st.session_state.get("saes") or [spec.name for spec in run.config.saes]
    saes = [spec for spec in run.config.saes if spec.name in chosen]
    table = metrics_frame(rows, saes)
    if table.empty:
        with st.container(border=True):
            st.caption(
                "The first numbers appear after the model is loaded and the first steps are done."
            )
        return
    legend(saes, frame.theme)
    x = X_AXES[st.session_state["x"]]
    part = LOSS_PARTS[st.session_state["part"]]
    smoothing = st.session_state["smooth"]
    plots = (part, "l0", "fvu", "gamma", "gamma_gate", None, "dead_gate", "dead_magnitude", "lr")
    cells = [cell for _ in range(3) for cell in st.columns(3, gap="medium")]
    for cell, column in zip(cells, plots, strict=True):
        with cell:
            if column is None:
                chart = plane(table, saes, theme=frame.theme, finished=status.state == "finished")
                alt = "L0 against FVU of each SAE now, with the path it came by"
            else:
                chart = line_chart(
                    table,
                    column,
                    saes,
                    x=x,
                    theme=frame.theme,
                    smoothing=0.0 if column == "lr" else smoothing,
                    log=column in LOG,
                    rule=1.0 if column in ("gamma", "gamma_gate") else None,
                )
                alt = f"{column} of each SAE against {x}"
            st.altair_chart(chart, key=f"chart_{column or 'plane'}", alt=alt)


def view() -> None:
    """Draw everything that moves."""
    try:
        status = run.status
        rows = read_rows(run)
    except InputError as error:
        notice(str(error), title="This run can no longer be read")
        return
    header(status, rows)
    trouble(status)
    if not st.session_state.get("pause") and moving and status.state not in MOVING:
        st.rerun()  # once: the whole page is drawn again without a timer
    charts(rows, status)
    with st.expander("Log", expanded=status.state == "starting"):
        st.code("\n".join(run.log_tail(30)) or "nothing yet", language=None, height=240)


with st.expander("View", icon=":material/settings:"):
    one, two, three, four = st.columns([2, 2, 2, 1], vertical_alignment="bottom")
    one.segmented_control(
        "Horizontal axis",
        list(X_AXES),
        default="tokens",
        required=True,
        key="x",
        bind="query-params",
    )
    two.segmented_control(
        "Loss",
        list(LOSS_PARTS),
        default="total",
        required=True,
        key="part",
        bind="query-params",
    )
    three.slider(
        "Smoothing",
        0.0,
        0.95,
        0.0,
        0.05,
        key="smooth",
        bind="query-params",
        help="Exponential moving average; the raw line stays visible.",
    )
    four.toggle("Pause", key="pause", help="Stop refreshing; training goes on.")
    st.multiselect(
        "SAEs",
        [spec.name for spec in run.config.saes],
        key="saes",
        placeholder="all",
        bind="query-params",
    )
state = shell.status_of(run)
moving = state is not None and state.state in MOVING and not st.session_state.get("pause")
st.fragment(view, run_every=1.0 if moving else None)()
with st.expander("What the numbers mean", icon=":material/menu_book:"):
    for term in ("l0", "fvu", "gamma", "gamma_gate", "sparsity"):
        plain(f"{term}: {glossary.definition(term)}")
