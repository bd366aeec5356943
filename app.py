"""Home: start something, see what runs, open what is done."""

import streamlit as st

from gsae_core.app import cache, shell
from gsae_core.app.controls import begin, confirm_cancel
from gsae_core.app.live_view import draw_progress
from gsae_core.app.parts import PAGE_TEMPLATE, notice, plain, since, state_badge
from gsae_core.files import readable
from gsae_core.machine import machine
from gsae_core.presets import preset
from gsae_core.runs.plan.progress import speed
from gsae_core.runs.run import SHOWN_FEATURE, SHOWN_SAE, Run, example_run, is_example
from gsae_core.text import WORSE, count, is_worse_than_mean, macros

MOST_SHOWN = 20  # of the runs, the newest

frame = shell.page(
    "Home",
    icon="🏠",
    purpose="Train Gated sparse autoencoders and ReLU baselines, and compare them.",
)


def actions() -> None:
    """Draw the three ways to begin: train, fetch, look."""
    quick = preset("quick")
    states = {name: status.state for name, status in frame.statuses.items()}
    finished = [run for run in frame.runs if states.get(run.id) == "finished"]
    cells = [
        # As high as the highest, with the buttons on one line.
        cell.container(border=True, height="stretch", vertical_alignment="distribute")
        for cell in st.columns(3)
    ]
    with cells[0]:
        heading("Train", f"{quick.description}. Or choose model, layer, widths and λ yourself.")
        with st.container(gap="small"):
            if st.button(
                "Start training",
                type="primary",
                icon=":material/play_arrow:",
                key="home.start_quick",
                width="stretch",
            ):
                begin(quick.config())
            icon = ":material/tune:"
            if st.button("Choose settings", icon=icon, key="home.choose", width="stretch"):
                shell.go("pages/1_Train.py", frame.run)
    with cells[1]:
        heading("Open from the Hub", "Published SAEs, to download and explore.")
        icon = ":material/cloud_download:"
        if st.button("Find SAEs", icon=icon, key="home.hub", width="stretch"):
            shell.go("pages/8_Hub.py", frame.run)
    with cells[2]:
        results(finished)


def results(finished: list[Run]) -> None:
    """Draw the ways to results: the newest, and those that ship with the package."""
    own = [run for run in finished if not is_example(run)]
    if own:
        many = len(own[0].config.saes)
        newest = f"{own[0].id} is the newest result: {many} SAE{'s' * (many != 1)}"
        heading("Explore", f"{newest}{'; ' * bool(worse(own[0]))}{worse(own[0])}.")
    else:
        heading("Explore", "A finished Gated SAE and its baseline, and what the terms mean.")
    with st.container(gap="small"):
        icon = ":material/balance:"
        if own and st.button("Latest results", icon=icon, key="home.results", width="stretch"):
            shell.go("pages/3_Pareto.py", own[0])
        shipped = example_run()
        if shipped is not None and st.button(
            "Explore the bundled example",
            icon=":material/search:",
            key="home.example",
            width="stretch",
            help="Its features on text of the bundled model; opens at once, read-only.",
        ):
            chosen = {"sae": SHOWN_SAE, "feature": str(SHOWN_FEATURE)}
            shell.go("pages/5_Features.py", shipped, **chosen)
        icon = ":material/help:"
        if not own and st.button("Start here", icon=icon, key="home.help", width="stretch"):
            shell.go("pages/9_Help.py", frame.run)


def heading(title: str, text: str) -> None:
    """Draw what an action is."""
    with st.container(gap="small"):
        st.subheader(title, anchor=False)
        plain(text, size=".875rem")


def jobs() -> None:
    """Draw the jobs that run or wait, refreshed while there are any."""
    looked = [(run, status) for run in frame.runs if (status := shell.status_of(run)) is not None]
    moving = [(run, status) for run, status in looked if status.expects_process]
    drawn = {name for name, status in frame.statuses.items() if status.expects_process}
    if {run.id for run, _ in moving} != drawn:
        st.rerun()  # one ended or began: the table below says so too
    if moving:
        st.subheader("Running now", anchor=False)
    for run, status in moving:
        with st.container(border=True):
            plain(run.id)
            with st.container(horizontal=True, vertical_alignment="center"):
                state_badge(status.state)
                if st.button("Watch", icon=":material/monitoring:", key=f"home.watch_{run.id}"):
                    shell.go("pages/2_Live.py", run)
                if status.state != "cancelling" and st.button(
                    "Cancel", icon=":material/stop_circle:", key=f"home.cancel_{run.id}"
                ):
                    # Asked by the whole page: a dialog of this part would go with its refresh.
                    st.session_state["home.to_cancel"] = run.id
                    st.rerun()
            draw_progress(run, status, speed(status, cache.recent_metrics(run)), eta=True)


def recent() -> None:
    """Draw the newest runs; choosing a row opens it."""
    st.subheader("Recent runs", anchor=False)
    if not frame.runs:
        st.caption("No runs yet. They are kept in the runs folder, one folder each.")
        return
    rows = [describe(run) for run in frame.runs[:MOST_SHOWN]]
    if not any(row["note"] for row in rows):
        rows = [{name: cell for name, cell in row.items() if name != "note"} for row in rows]
    picked = st.dataframe(
        rows,
        hide_index=True,
        key="home.recent",
        on_select="rerun",
        selection_mode="single-row",
        column_config={
            "done": st.column_config.ProgressColumn(
                "done", format="%.0f %%", min_value=0, max_value=100, width="small"
            ),
            "SAEs": st.column_config.NumberColumn(width="small"),
            "where": st.column_config.TextColumn(help="Site and layer; or the folder of vectors"),
        },
        alt="The newest runs: name, state, share done, model, where, SAEs, trained on, last change",
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
        "where": config.where,
        "SAEs": len(config.saes),
        "note": worse(run),
        "trained on": f"{count(config.train.n_tokens)} {config.unit}s"
        if config.imported is None
        else "imported",
        "last change": "–" if status is None else since(status.heartbeat),
    }


def worse(run: Run) -> str:
    """Return how many of a run's SAEs have an FVU above 1; nothing where none has."""
    evals = cache.evaluations(run)
    n = sum(is_worse_than_mean(fvu) for fvu in evals["fvu"]) if len(evals) else 0
    return f"{WORSE} {n} worse than the mean activation" if n else ""


def this_machine() -> None:
    """Draw what there is to train on."""
    here = machine(shell.runs_root())
    st.subheader("This machine", anchor=False)
    device = here.gpus[0] if here.gpus else "none found: training runs on the CPU"
    rows = {
        "GPU": device if len(here.gpus) < 2 else f"{device} and {len(here.gpus) - 1} more",
        "Processor": f"{here.n_cores} cores",
        "Memory": f"{readable(here.memory_free)} free of {readable(here.memory_total)}",
        "Disk": f"{readable(here.disk_free)} free for runs",
    }
    st.html(macros(PAGE_TEMPLATE).facts_in_line(rows))


actions()
busy = any(status.expects_process for status in frame.statuses.values())
st.fragment(jobs, run_every=2 if busy else None)()
recent()
this_machine()
for broken, reason in frame.unreadable.items():
    notice(reason, kind="warning", title=f"{broken} cannot be read")
for run in frame.runs[:MOST_SHOWN]:
    for damage in cache.damages(run):
        notice(damage, kind="warning", title=f"Not all of {run.id} can be read")
to_cancel = st.session_state.pop("home.to_cancel", None)
for run in frame.runs:
    if run.id == to_cancel:
        confirm_cancel(run)
