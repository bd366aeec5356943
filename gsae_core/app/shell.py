"""The frame that app.py and every page share: title, navigation, run picker and job badge."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import streamlit as st
from streamlit.components.v2 import component

from gsae_core.app.parts import (
    PAGE,
    asset,
    escalate,
    escape_markdown,
    job_share,
    notice,
    noticed,
    plain,
    say_refused,
    write,
)
from gsae_core.errors import InputError
from gsae_core.plots.palette import Theme
from gsae_core.runs import run as launch
from gsae_core.runs.evals import measured_elsewhere
from gsae_core.runs.jobs.job import ACTIVE, Job, Status
from gsae_core.runs.run import EXAMPLE_ID, Run, example_run, survey
from gsae_core.runs.work.transfer import Transfer, transfers
from gsae_core.text import percent


def status_of(job: Job, said: Status | None = None) -> Status | None:
    """Return where a job stands, or None if its folder was deleted or damaged meanwhile.

    `said` is what its status.json holds, where that was just read.
    """
    try:
        return job.status if said is None else job.judged(said)
    except InputError:
        return None


def job_badge(jobs: Sequence[tuple[Job, Status]]) -> None:
    """Draw the job badge, which refreshes itself while a job moves, on every page; newest first."""
    moving = [job for job, status in jobs if status.expects_process]

    def badge() -> None:
        now = [(job, status) for job in moving if (status := status_of(job)) is not None]
        for job, status in now:
            if status.state == "cancelling":
                escalate(job)  # whichever page is open
        tell_endings(now)
        _badge([(job, status) for job, status in now if status.expects_process])

    st.fragment(badge, run_every=3.0 if moving else None)()
    # What ended between two looks of the badge is told by the page that is drawn next.
    tell_endings(jobs)


def _badge(moving: Sequence[tuple[Job, Status]]) -> None:
    """Say how many runs train and wait, how far the newest is, and what goes from or to the Hub."""
    if not moving:
        plain("no job running", size=".875rem")
        return
    sent = [(job, status) for job, status in moving if isinstance(job, Transfer)]
    active = [s for job, s in moving if not isinstance(job, Transfer) and s.state in ACTIVE]
    n_queued = len(moving) - len(sent) - len(active)
    words = []
    if active:
        newest = active[0]
        done = percent(newest.step / newest.n_steps if newest.n_steps else 0.0, 0)
        words.append(f"● {len(active)} running · {done}")
    if n_queued:
        words.append(f"{n_queued} queued")
    for job, status in sent:
        done = percent(job_share(status), 0) if status.total else "starting"
        words.append(f"{job.arrow} {done}")
    st.badge(" · ".join(words), color="blue" if active or sent else "gray")


ENDINGS = {"finished": ("✅", "finished"), "failed": ("❌", "failed"), "lost": ("⚠️", "is lost")}


def tell_endings(jobs: Sequence[tuple[Job, Status]]) -> None:
    """Say once, on the page that is open, that a job seen moving in this session has ended."""
    watched: set[str] = st.session_state.setdefault("shell.watched", set())
    for job, status in jobs:
        if status.expects_process:
            watched.add(job.id)
        elif job.id in watched:
            watched.discard(job.id)
            if status.state in ENDINGS:
                icon, ended = ENDINGS[status.state]
                st.toast(f"{escape_markdown(_title(job))} {ended}", icon=icon, duration="long")


def _title(job: Job) -> str:
    try:
        return f"{job.arrow} {job.request.repo}" if isinstance(job, Transfer) else job.id
    except InputError:
        return job.id  # put away between two looks


def say_connected(title: str, statuses: dict[str, Status]) -> None:
    """Say that runs found at work need neither this tab nor this server.

    It is said on the page a visit begins with, until they end or another page is opened.
    """
    at_work = [name for name, status in statuses.items() if status.state in ACTIVE]
    page, found = st.session_state.setdefault("shell.began_on", (title, at_work))
    still = [name for name in at_work if name in found]
    if title != page or not still:
        st.session_state["shell.began_on"] = None, []
        return
    went_on = f"{', '.join(still)}: training continues whether the app is open or not."
    notice(f"Reconnected to {went_on}", kind="info")


_n_modules = 0


def spare_modules() -> None:
    """Have later collections leave out what lives as long as the process: modules, once imported.

    Streamlit collects after every run of a page and every tick of a fragment, holding the
    interpreter's lock. With pandas and plotly imported that took 0.2 s each time, in which no other
    visitor is served and the last messages of the page wait to be sent.
    """
    global _n_modules
    if len(sys.modules) != _n_modules:
        _n_modules = len(sys.modules)
        # Streamlit has just collected: little is garbage. All that a count frees is freed all the
        # same; only cycles that are alive now and die later are never found.
        gc.freeze()


NAME = "Gated SAE Studio"

# Streamlit shows the focus on links and buttons by a shade that is hard to tell from hovering, and
# keeps 80 px free on either side of figures that need them.
STYLE = (
    "<style>:is(a,button,summary,[role=radio],[tabindex]):focus-visible"
    "{outline:2px solid color-mix(in srgb,#0072B2 60%,currentColor)!important;"
    "outline-offset:2px}"
    "[data-testid=stMainBlockContainer]{padding:3.5rem clamp(1rem,3vw,4rem) 3rem}</style>"
)

PAGES = {
    "app.py": ("", "Home", ":material/home:"),
    "pages/1_Train.py": ("Build", "Train", ":material/tune:"),
    "pages/2_Live.py": ("Build", "Live", ":material/monitoring:"),
    "pages/8_Hub.py": ("Build", "Hub", ":material/cloud_download:"),
    "pages/3_Pareto.py": ("Compare", "Pareto", ":material/balance:"),
    "pages/4_Shrinkage.py": ("Compare", "Shrinkage", ":material/straighten:"),
    "pages/5_Features.py": ("Inspect", "Features", ":material/search:"),
    "pages/6_Prompt.py": ("Inspect", "Prompt", ":material/chat:"),
    "pages/7_Steer.py": ("Inspect", "Steer", ":material/alt_route:"),
    "pages/9_Help.py": ("About", "Help", ":material/help:"),
}
"""Group, title and icon of each page."""

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
    unreadable: dict[str, str]
    """Folders here that look like runs and cannot be opened, and why."""


def runs_root() -> Path:
    """Return the folder runs are kept in, as the command line has it, from the root of the disk."""
    return launch.runs_root().absolute()


def page(title: str, *, icon: str, purpose: str) -> Frame:
    """Draw the frame of a page, and return what it shows.

    Call it first: Streamlit wants the page's settings before anything else is drawn. The browser
    tab's icon is an emoji: any other kind is asked for at a font host.
    """
    spare_modules()
    if "shell.deleted" in st.session_state and title != "Home":
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
        st.session_state["shell.asked"] = st.query_params.to_dict()
    with st.sidebar:
        st.html(f'<div style="font-weight:700;font-size:1.15rem">{NAME}</div>')
        run = _pick_run(runs, arrived=arrived)
        if unreadable:
            n = "1 run" if len(unreadable) == 1 else f"{len(unreadable):,} runs"
            why = [escape_markdown(f"{name}: {reason}") for name, reason in unreadable.items()]
            st.caption(f"{n} here cannot be read.", help="\n\n".join(why))
        job_badge(jobs)
        above = ""
        for target, (group, label, sign) in PAGES.items():
            if group != above:
                st.html(f'<div style="font-size:.8rem;opacity:.75;margin-top:.5rem">{group}</div>')
                above = group
            link(target, run, label=label, icon=sign)
        _history(key="shell.history", data={"pages": [title for _, title, _ in PAGES.values()]})
    st.html(STYLE)
    st.title(title, anchor=False)
    st.caption(purpose)
    if deleted := st.session_state.pop("shell.deleted", None):
        notice(f"{deleted} was deleted.", kind="info")
    say_refused()
    if missing := st.session_state.get("shell.missing_run"):
        others = "choose another in the sidebar" if runs else "there are no runs here yet"
        why = unreadable.get(missing, f"Run {missing} is not on this machine; {others}.")
        notice(why, kind="warning", title=f"{missing} cannot be opened")
    say_connected(title, statuses)
    theme: Theme = "dark" if st.context.theme.type == "dark" else "light"
    return Frame(run, runs, theme, statuses, unreadable)


def _runs() -> tuple[list[tuple[Run, Status | None]], dict[str, str]]:
    """Return every run with what its process said last, newest first, and those unreadable.

    The run that ships with the package is the last of them, once it was asked for.
    """
    listed, unreadable = survey(runs_root())
    runs: list[tuple[Run, Status | None]] = [*listed]
    state = st.session_state
    if EXAMPLE_ID in (st.query_params.get("run"), state.get("run"), state.get("shell.run")):
        state["shell.with_example"] = True
    shipped = example_run() if state.get("shell.with_example") else None
    # A user's own run with that name hides it.
    if shipped is not None and all(run.id != EXAMPLE_ID for run, _ in runs):
        runs.append((shipped, None))
    return runs, unreadable


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
    hint = "choose a run" if runs else "no runs yet"
    chosen = st.selectbox(
        "Run", list(by_id), index=None, key="run", placeholder=hint, disabled=not runs
    )
    if chosen is not None:
        state.pop("shell.missing_run", None)
    shown = chosen or state.get("shell.missing_run")
    state["shell.run"], state["shell.run_said"] = chosen, (said, shown)
    if shown is not None:
        write({"run": shown})
    return None if chosen is None else by_id[chosen]


def _query(target: str, run: Run | None, parameters: dict[str, str]) -> dict[str, str]:
    """Return the parameters of another page's address; `page` is for history.js alone."""
    shown = st.session_state.get("shell.missing_run") if run is None else run.id
    named = {} if shown is None else {"run": shown}
    return {**named, **parameters, PAGE: PAGES[target][1]}


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
    """Return the chosen run; without one, say that `what` will appear here, and end the page."""
    if frame.run is not None:
        return frame.run
    if not frame.runs:
        notice(f"No runs yet. Train something, and {what} appear here.", kind="info")
        link("app.py", None, label="Home: train in one press", icon=":material/home:")
        link("pages/1_Train.py", None, label="Train: your own choices", icon=":material/tune:")
    return st.stop()


@noticed()
def need_evals(run: Run) -> None:
    """Say why a run has no held-out evaluation yet and end the page, if it has none."""
    if evals := run.evals():
        if elsewhere := measured_elsewhere(evals, str(run.folder)):
            notice(f"{run.id}: {elsewhere}", kind="warning")
        return None
    status = run.status
    state = status.state
    if state == "finished" and run.config.imported and not (run.folder / "evals.json").exists():
        text = f"{run.id} was imported and has not been measured here. Measure it: "
        text += f"python -m gsae_core evaluate {run.folder}"
    elif state == "finished":
        text = "The run is finished but none of its SAEs could be evaluated; see its log."
    elif state in (*ACTIVE, "queued"):
        text = f"{run.id} is {state}, step {status.step:,} of {status.n_steps:,}; "
        text += "its SAEs are evaluated when training ends."
    else:
        text = f"{run.id} is {state} and was not evaluated; resume it to get results."
    notice(text, kind="info" if state in (*ACTIVE, "queued") else "warning")
    link("pages/2_Live.py", run, label="Open the run", icon=":material/monitoring:")
    return st.stop()
