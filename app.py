"""Home: start something, see what runs, open what is done."""

import secrets

import streamlit as st

from gsae_core import shell
from gsae_core.controls import confirm_cancel
from gsae_core.errors import InputError
from gsae_core.launch import launch
from gsae_core.live_view import draw_progress
from gsae_core.machine import machine
from gsae_core.pieces import facts, notice, plain, seconds_since, state_badge
from gsae_core.presets import preset
from gsae_core.progress import progress
from gsae_core.store.files import readable
from gsae_core.store.listing import unreadable_runs
from gsae_core.store.runs import Run
from gsae_core.wording import ago, count

frame = shell.page(
    "Home",
    icon="🏠",
    purpose="Train Gated Sparse Autoencoders beside a ReLU baseline; see what the gate changes.",
)


def actions() -> None:
    """Draw the three ways to begin."""
    quick = preset("quick")
    finished = [r for r in frame.runs if r.id in frame.statuses]
    finished = [r for r in finished if frame.statuses[r.id].state == "finished"]
    first, second, third = st.columns(3, border=True)
    with first:
        st.subheader("Train the bundled model", anchor=False)
        st.caption(f"{quick.description}.")
        if st.button(
            "Start training",
            type="primary",
            icon=":material/play_arrow:",
            key="start_quick",
            width="stretch",
        ):
            nonce = st.session_state.setdefault("nonce", secrets.token_hex(3))
            try:
                run = launch(shell.runs_root(), quick.config(), nonce=nonce)
            except InputError as error:
                notice(str(error), title="Nothing was started")
            else:
                del st.session_state["nonce"]
                shell.go("pages/2_Live.py", run)
    with second:
        st.subheader("Train with choices", anchor=False)
        st.caption(
            "Your model, layer, widths and λ; the memory and time it takes, before it starts."
        )
        icon = ":material/tune:"
        if st.button("Choose settings", icon=icon, key="choose", width="stretch"):
            st.switch_page("pages/1_Train.py", query_params={})
    with third:
        st.subheader("Open the latest results", anchor=False)
        if finished:
            latest = finished[0]
            plain(f"{latest.id}: {len(latest.config.saes)} SAEs", size=".875rem")
            label = "Sparsity against fidelity"
            if st.button(label, icon=":material/balance:", key="results", width="stretch"):
                shell.go("pages/3_Pareto.py", latest)
        else:
            st.caption("Nothing is finished yet; the first results take minutes.")


def jobs() -> None:
    """Draw the jobs that run or wait, refreshed while there are any."""
    st.subheader("Running now", anchor=False)
    looked = [(run, status) for run in frame.runs if (status := shell.status_of(run)) is not None]
    moving = [(run, status) for run, status in looked if status.expects_process]
    drawn = {name for name, status in frame.statuses.items() if status.expects_process}
    if {run.id for run, _ in moving} != drawn:
        st.rerun()  # one ended or began: the table below says so too
    if not moving:
        st.caption("No job is running.")
    for run, status in moving:
        with st.container(border=True):
            plain(run.id)
            with st.container(horizontal=True, vertical_alignment="center"):
                state_badge(status.state)
                if st.button("Watch", icon=":material/monitoring:", key=f"watch_{run.id}"):
                    shell.go("pages/2_Live.py", run)
                if status.state != "cancelling" and st.button(
                    "Cancel", icon=":material/stop_circle:", key=f"cancel_{run.id}"
                ):
                    # Asked by the whole page: a dialog of this part would go with its refresh.
                    st.session_state["to_cancel"] = run.id
                    st.rerun()
            draw_progress(run, status, progress(status, run.recent_metrics()), eta=True)


def recent() -> None:
    """Draw the newest runs; choosing a row opens it."""
    st.subheader("Recent runs", anchor=False)
    if not frame.runs:
        st.caption("No runs yet. They are kept in the runs folder, one folder each.")
        return
    rows = [describe(run) for run in frame.runs[:20]]
    picked = st.dataframe(
        rows,
        hide_index=True,
        key="recent",
        on_select="rerun",
        selection_mode="single-row",
        column_config={
            "done": st.column_config.ProgressColumn(
                "done", format="%.0f %%", min_value=0, max_value=100, width="small"
            ),
            "SAEs": st.column_config.NumberColumn(width="small"),
            "layer": st.column_config.NumberColumn(width="small"),
        },
        alt="The newest runs: name, state, share done, model, site, SAEs, tokens, last change",
    )
    st.caption("Tick a row to open the run.")
    chosen = picked["selection"]["rows"]
    if chosen:
        run = frame.runs[chosen[0]]
        finished = rows[chosen[0]]["state"] == "finished"
        target = "pages/3_Pareto.py" if finished else "pages/2_Live.py"
        shell.go(target, run)


def describe(run: Run) -> dict[str, object]:
    """Return a run's row of the table."""
    status = frame.statuses.get(run.id)
    config = run.config
    return {
        "run": run.id,
        "state": "unreadable" if status is None else status.state,
        "done": None
        if status is None or not status.n_steps
        else 100 * status.step / status.n_steps,
        "model": config.model.name,
        "layer": config.model.layer,
        "site": config.model.site,
        "SAEs": len(config.saes),
        "tokens": count(config.train.n_tokens),
        "last change": "–" if status is None else ago(seconds_since(status.heartbeat)),
    }


def this_machine() -> None:
    """Draw what there is to train on."""
    here = machine(shell.runs_root())
    st.subheader("This machine", anchor=False)
    device = here.gpus[0] if here.gpus else "none found: training runs on the processor"
    facts(
        {
            "GPU": device if len(here.gpus) < 2 else f"{device} and {len(here.gpus) - 1} more",
            "Processor": f"{here.n_cores} cores",
            "Memory": f"{readable(here.memory_free)} free of {readable(here.memory_total)}",
            "Disk": f"{readable(here.disk_free)} free for runs",
        }
    )


actions()
busy = any(status.expects_process for status in frame.statuses.values())
left, right = st.columns([2, 1], gap="large")
with left:
    st.fragment(jobs, run_every=2 if busy else None)()
with right:
    this_machine()
recent()
for broken in unreadable_runs(shell.runs_root()):
    notice(broken.reason, kind="warning", title=f"{broken.id} cannot be read")
to_cancel = st.session_state.pop("to_cancel", None)
for run in frame.runs:
    if run.id == to_cancel:
        confirm_cancel(run)
