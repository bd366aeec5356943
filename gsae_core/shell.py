"""The frame that app.py and every page share: title, navigation, run picker and job badge."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import streamlit as st
from streamlit.components.v2 import component

from gsae_core import address, launch
from gsae_core.collector import spare_modules
from gsae_core.errors import InputError
from gsae_core.example import EXAMPLE_ID, example_run
from gsae_core.job_badge import job_badge, say_connected, status_of
from gsae_core.keys import own
from gsae_core.pieces import asset, escape_markdown, notice
from gsae_core.plots.palette import Theme
from gsae_core.store.listing import UnreadableRun, survey
from gsae_core.store.runs import Run
from gsae_core.store.status import ACTIVE, Status
from gsae_core.store.transfers import transfers

NAME = "Gated SAE Studio"

# Streamlit shows the focus on links and buttons by a shade that is hard to tell from hovering, and
# keeps 80 px free on either side of figures that need them.
STYLE = (
    "<style>:is(a,button,summary,[role=radio],[tabindex]):focus-visible"
    "{outline:2px solid color-mix(in srgb,#0072B2 60%,currentColor)!important;"
    "outline-offset:2px}"
    "[data-testid=stMainBlockContainer]{padding:3.5rem clamp(1rem,3vw,4rem) 3rem}</style>"
)

NAVIGATION = (
    (None, (("app.py", "Home", ":material/home:"),)),
    (
        "Build",
        (
            ("pages/1_Train.py", "Train", ":material/tune:"),
            ("pages/2_Live.py", "Live", ":material/monitoring:"),
            ("pages/8_Hub.py", "Hub", ":material/cloud_download:"),
        ),
    ),
    (
        "Compare",
        (
            ("pages/3_Pareto.py", "Pareto", ":material/balance:"),
            ("pages/4_Shrinkage.py", "Shrinkage", ":material/straighten:"),
        ),
    ),
    (
        "Inspect",
        (
            ("pages/5_Features.py", "Features", ":material/search:"),
            ("pages/6_Prompt.py", "Prompt", ":material/chat:"),
            ("pages/7_Steer.py", "Steer", ":material/alt_route:"),
        ),
    ),
    ("About", (("pages/9_Help.py", "Help", ":material/help:"),)),
)
TITLES = {target: label for _, links in NAVIGATION for target, label, _ in links}

_history = component("gsae_history", js=asset("history.js"))


class Frame(NamedTuple):
    """What a page is given."""

    run: Run | None
    """The run chosen in the sidebar; None if there is none, or the one asked for is not here."""
    runs: list[Run]
    """Every run on this machine, newest first."""
    theme: Theme
    statuses: dict[str, Status]
    """Where each run stood when the page was drawn; those that cannot be read are left out."""
    unreadable: list[UnreadableRun]
    """Folders here that look like runs and cannot be opened."""


def runs_root() -> Path:
    """Return the folder runs are kept in, as the command line has it, from the root of the disk."""
    return launch.runs_root().absolute()


def page(title: str, *, icon: str, purpose: str) -> Frame:
    """Draw the frame of a page, and return what it shows.

    Call it first: Streamlit wants the page's settings before anything else is drawn.

    Args:
        title: page heading and browser tab.
        icon: an emoji, for the browser tab; any other kind is asked for at a font host.
        purpose: one sentence under the heading.
    """
    spare_modules()
    deleted = st.session_state.get("shell.deleted")
    if deleted is not None and title != "Home":
        go("app.py", None)
    st.set_page_config(page_title=f"{title} · {NAME}", page_icon=icon, layout="wide")
    listed, unreadable = _runs()
    runs = [run for run, _ in listed]
    found = [(run, status_of(run, said)) for run, said in listed]
    found += [(transfer, status_of(transfer)) for transfer in transfers(runs_root())]
    jobs = [(job, status) for job, status in found if status is not None]
    statuses = {job.id: status for job, status in jobs if isinstance(job, Run)}
    arrived = st.session_state.get("shell.page") != title
    st.session_state["shell.page"] = title
    if arrived:
        address.arrive()
    with st.sidebar:
        st.html(f'<div style="font-weight:700;font-size:1.15rem">{NAME}</div>')
        run = _pick_run(runs, arrived=arrived)
        _say_unreadable(unreadable)
        job_badge(jobs)
        _navigation(run)
        _history(key="shell.history", data={"pages": list(TITLES.values())})
    st.html(STYLE)
    st.title(title, anchor=False)
    st.caption(purpose)
    st.session_state.pop("shell.deleted", None)
    if deleted is not None:
        notice(f"{deleted} was deleted.", kind="info")
    if refused := st.session_state.pop("shell.refused", None):
        notice(refused[1], title=refused[0])
    missing = st.session_state.get("shell.missing_run")
    if missing:
        _say_missing(missing, runs, unreadable)
    say_connected(title, run, statuses)
    theme: Theme = "dark" if st.context.theme.type == "dark" else "light"
    return Frame(run, runs, theme, statuses, unreadable)


def _runs() -> tuple[list[tuple[Run, Status | None]], list[UnreadableRun]]:
    """Return every run with what its process said last, newest first, and those unreadable.

    The one that ships with the package is among them once it was asked for.
    """
    listed, unreadable = survey(runs_root())
    runs: list[tuple[Run, Status | None]] = [*listed]
    asked = (
        st.query_params.get("run"),
        *(st.session_state.get(key) for key in ("run", "shell.run")),
    )
    if EXAMPLE_ID in asked:
        st.session_state["shell.with_example"] = True
    shipped = example_run() if st.session_state.get("shell.with_example") else None
    # A run of one's own with its name comes first.
    if shipped is None or any(run.id == EXAMPLE_ID for run, _ in runs):
        return runs, unreadable
    return [*runs, (shipped, None)], unreadable


def _say_unreadable(unreadable: list[UnreadableRun]) -> None:
    """Say under the run picker that runs are missing from it, and why each is."""
    if unreadable:
        runs = "1 run" if len(unreadable) == 1 else f"{len(unreadable):,} runs"
        why = "\n\n".join(escape_markdown(f"{run.id}: {run.reason}") for run in unreadable)
        st.caption(f"{runs} here cannot be read.", help=why)


def _say_missing(run_id: str, runs: list[Run], unreadable: list[UnreadableRun]) -> None:
    """Say why the run in the address is not shown: of a newer version, damaged, or not here."""
    reason = dict(unreadable).get(run_id)
    if reason is not None:
        notice(reason, kind="warning", title=f"{run_id} cannot be opened")
        return
    others = "choose another in the sidebar" if runs else "there are no runs here yet"
    notice(f"Run {run_id} is not on this machine; {others}.", kind="warning")


def _pick_run(runs: list[Run], *, arrived: bool) -> Run | None:
    """Draw the run picker, and have the address name the run; a new run changes neither.

    A run that was asked for and cannot be shown stays in the address too, until another is chosen:
    a reload and a copied link then say the same of it.
    """
    by_id, state = {run.id: run for run in runs}, st.session_state
    said = st.query_params.get("run")
    # The address counts on arrival, and where a link or Back changed it; otherwise the widget, for
    # what a page has the address say may come back to it a run later.
    if said is not None and (arrived or said not in state.get("shell.run_said", ())):
        asked = said
    else:
        asked = None if arrived else state.get("run")
    asked = asked or state.get("shell.run") or state.get("shell.missing_run")
    if asked is None and runs:
        asked = runs[0].id
    if asked is not None and asked not in by_id:
        state["shell.missing_run"], asked = asked, None
    state["run"] = asked
    # Not bound to the address: Streamlit takes what a page binds out of it when the page is left.
    chosen = st.selectbox(
        "Run",
        list(by_id),
        index=None,
        key="run",
        placeholder="choose a run" if runs else "no runs yet",
        disabled=not runs,
    )
    if chosen is not None:
        state.pop("shell.missing_run", None)
    shown = chosen or state.get("shell.missing_run")
    state["shell.run"], state["shell.run_said"] = chosen, (said, shown)
    if shown is not None:
        address.write({"run": shown})
    return None if chosen is None else by_id[chosen]


def _navigation(run: Run | None) -> None:
    for group, links in NAVIGATION:
        if group:
            st.html(f'<div style="font-size:.8rem;opacity:.75;margin-top:.5rem">{group}</div>')
        for target, label, icon in links:
            link(target, run, label=label, icon=icon)


def _query(target: str, run: Run | None, parameters: dict[str, str]) -> dict[str, str]:
    """Return the parameters of another page's address; `page` is for history.js alone."""
    shown = st.session_state.get("shell.missing_run") if run is None else run.id
    named = {} if shown is None else {"run": shown}
    return {**named, **parameters, address.PAGE: TITLES[target]}


def link(target: str, run: Run | None, *, label: str, icon: str) -> None:
    """Draw a link to another page with a run."""
    st.page_link(target, label=label, icon=icon, query_params=_query(target, run, {}))


def go(target: str, run: Run | None, **parameters: str) -> NoReturn:
    """Go to another page with a run, and with parameters that no widget here is bound to."""
    # Without a query Streamlit refuses to leave a page whose address holds what a widget is bound
    # to, and with one it refuses those names.
    st.switch_page(target, query_params=_query(target, run, parameters))


def forget(run: Run) -> None:
    """Leave a run that was deleted: the next page is Home, which says so. For callbacks."""
    for key in ("run", "shell.run"):
        st.session_state.pop(key, None)
    st.session_state["shell.deleted"] = run.id


def need_run(frame: Frame, what: str) -> Run:
    """Return the chosen run, or say that there is nothing to show and end the page.

    Args:
        what: what the page would show, to complete "... appear here".
    """
    if frame.run is not None:
        return frame.run
    if not frame.runs:
        notice(f"No runs yet. Train something, and {what} appear here.", kind="info")
        home = "Home: train on the bundled model in one press"
        link("app.py", None, label=home, icon=":material/home:")
        own_choices = "Train with your own choices"
        link("pages/1_Train.py", None, label=own_choices, icon=":material/tune:")
    else:
        run_links(frame.runs)
    return st.stop()


def run_links(runs: list[Run], limit: int = 10) -> None:
    """List runs by name; each opens its Live page."""
    for run in runs[:limit]:
        if st.button(
            escape_markdown(run.id), icon=":material/monitoring:", key=own(f"open_{run.id}")
        ):
            go("pages/2_Live.py", run)


def need_evals(run: Run) -> list[dict[str, Any]]:
    """Return a run's held-out evaluation, or say why there is none yet and end the page."""
    try:
        evals, status = run.evals(), run.status
    except InputError as error:
        notice(str(error), title="This run cannot be read")
        return st.stop()
    if evals:
        return evals
    if (
        status.state == "finished"
        and run.config.imported
        and not (run.folder / "evals.json").exists()
    ):
        notice(
            f"{run.id} was imported and has not been measured here. Measure it: "
            f"python -m gsae_core evaluate {run.folder}",
            kind="info",
        )
    elif status.state == "finished":
        notice(
            "The run is finished but none of its SAEs could be evaluated; its log says why.",
            kind="warning",
        )
    elif status.state in (*ACTIVE, "queued"):
        notice(
            f"{run.id} is {status.state}, step {status.step:,} of {status.n_steps:,}; "
            "its SAEs are evaluated when training ends.",
            kind="info",
        )
    else:
        notice(
            f"{run.id} is {status.state} and was not evaluated; resume it to get results.",
            kind="warning",
        )
    link("pages/2_Live.py", run, label="Open the run", icon=":material/monitoring:")
    return st.stop()
