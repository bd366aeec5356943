"""The frame that app.py and every page share: title, navigation, run picker and job badge."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import streamlit as st

from gsae_core import launch
from gsae_core.errors import InputError
from gsae_core.pieces import escape_markdown, notice
from gsae_core.plots.palette import Theme
from gsae_core.store.jobs import escalate_cancel
from gsae_core.store.listing import list_runs, unreadable_runs
from gsae_core.store.runs import Run
from gsae_core.store.status import ACTIVE, Status
from gsae_core.wording import percent

NAME = "Gated SAE Studio"

NAVIGATION = (
    (None, (("app.py", "Home", ":material/home:"),)),
    (
        "Build",
        (
            ("pages/1_Train.py", "Train", ":material/tune:"),
            ("pages/2_Live.py", "Live", ":material/monitoring:"),
        ),
    ),
    (
        "Compare",
        (
            ("pages/3_Pareto.py", "Pareto", ":material/balance:"),
            ("pages/4_Shrinkage.py", "Shrinkage", ":material/straighten:"),
        ),
    ),
)


class Frame(NamedTuple):
    """What a page is given."""

    run: Run | None
    """The run chosen in the sidebar; None if there is none, or the one asked for is not here."""
    runs: list[Run]
    """Every run on this machine, newest first."""
    theme: Theme
    statuses: dict[str, Status]
    """Where each run stood when the page was drawn; those that cannot be read are left out."""


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
    deleted = st.session_state.get("deleted")
    if deleted is not None and title != "Home":
        st.switch_page("app.py", query_params={})
    st.set_page_config(page_title=f"{title} · {NAME}", page_icon=icon, layout="wide")
    runs = list_runs(runs_root())
    found = {run.id: status_of(run) for run in runs}
    statuses = {name: status for name, status in found.items() if status is not None}
    with st.sidebar:
        st.html(f'<div style="font-weight:700;font-size:1.15rem">{NAME}</div>')
        run = _pick_run(runs, arrived=st.session_state.get("page") != title)
        _jobs(runs, statuses)
        _navigation(run)
    st.session_state["page"] = title
    st.title(title, anchor=False)
    st.caption(purpose)
    st.session_state.pop("deleted", None)
    if deleted is not None:
        notice(f"{deleted} was deleted.", kind="info")
    if refused := st.session_state.pop("refused", None):
        notice(refused[1], title=refused[0])
    missing = st.session_state.get("missing_run")
    if missing:
        _say_missing(missing, runs)
    theme: Theme = "dark" if st.context.theme.type == "dark" else "light"
    return Frame(run, runs, theme, statuses)


def _say_missing(run_id: str, runs: list[Run]) -> None:
    """Say why the run in the address is not shown: of a newer version, damaged, or not here."""
    reason = dict(unreadable_runs(runs_root())).get(run_id)
    if reason is not None:
        notice(reason, kind="warning", title=f"{run_id} cannot be opened")
        return
    others = "choose another in the sidebar" if runs else "there are no runs here yet"
    notice(f"Run {run_id} is not on this machine; {others}.", kind="warning")


def _pick_run(runs: list[Run], *, arrived: bool) -> Run | None:
    """Draw the run picker; a new run never changes what was chosen."""
    by_id = {run.id: run for run in runs}
    # Read before the widget is drawn: binding drops values that are not among the options.
    # Just arrived on a page, the address counts; later the widget, which the address may lag.
    here = "run" if not arrived else "next_run"
    asked = (
        st.session_state.get(here)
        or st.query_params.get("run")
        or st.session_state.get("chosen_run")
    )
    st.session_state.pop("next_run", None)
    if asked is not None and asked not in by_id:
        st.session_state["missing_run"] = asked
        st.session_state["chosen_run"] = None
        st.session_state["run"] = None
    elif asked is not None:
        st.session_state["run"] = asked
    elif "missing_run" not in st.session_state:
        # Set rather than a default, so that the address always names the run.
        st.session_state["run"] = runs[0].id if runs else None
    chosen = st.selectbox(
        "Run",
        list(by_id),
        index=None,
        key="run",
        bind="query-params",
        placeholder="choose a run" if runs else "no runs yet",
        disabled=not runs,
    )
    st.session_state["chosen_run"] = chosen
    if chosen is None:
        return None
    st.session_state.pop("missing_run", None)
    return by_id[chosen]


def _jobs(runs: list[Run], statuses: dict[str, Status]) -> None:
    """Draw the job badge, which refreshes itself while a job moves, on every page."""
    moving = [run for run in runs if run.id in statuses and statuses[run.id].expects_process]

    def badge() -> None:
        now = {run.id: status for run in moving if (status := status_of(run)) is not None}
        for run in moving:
            if run.id in now and now[run.id].state == "cancelling":
                escalate_cancel(run)  # whichever page is open
        tell_endings(now)
        _badge([status for status in now.values() if status.expects_process])

    st.fragment(badge, run_every=3.0 if moving else None)()
    # What ended between two looks of the badge is told by the page that is drawn next.
    tell_endings(statuses)


def _badge(moving: list[Status]) -> None:
    """Say how many jobs run and wait, and how far the newest is."""
    active = [status for status in moving if status.state in ACTIVE]
    waiting = len(moving) - len(active)
    if not moving:
        st.badge("no job running", icon=None, color="gray")
        return
    words = []
    if active:
        newest = active[0]
        done = percent(newest.step / newest.n_steps if newest.n_steps else 0.0, 0)
        words.append(f"● {len(active)} running · {done}")
    if waiting:
        words.append(f"{waiting} queued")
    st.badge(" · ".join(words), color="blue" if active else "gray")


ENDINGS = {"finished": "✅", "failed": "❌", "lost": "⚠️"}


def tell_endings(statuses: dict[str, Status]) -> None:
    """Say once, on whatever page, that a run seen moving in this session has ended."""
    watched: set[str] = st.session_state.setdefault("watched", set())
    for name, status in statuses.items():
        if status.expects_process:
            watched.add(name)
        elif name in watched:
            watched.discard(name)
            if status.state in ENDINGS:
                said = f"{escape_markdown(name)} {'is ' * (status.state == 'lost')}{status.state}"
                st.toast(said, icon=ENDINGS[status.state], duration="long")


def _navigation(run: Run | None) -> None:
    parameters = {} if run is None else {"run": run.id}
    for group, links in NAVIGATION:
        if group:
            st.html(f'<div style="font-size:.8rem;opacity:.75;margin-top:.5rem">{group}</div>')
        for target, label, icon in links:
            st.page_link(target, label=label, icon=icon, query_params=parameters)


def status_of(run: Run) -> Status | None:
    """Return where a run stands, or None if its folder was deleted or damaged meanwhile."""
    try:
        return run.status
    except InputError:
        return None


def go(target: str, run: Run, **parameters: str) -> NoReturn:
    """Go to another page with a run, and with parameters that no widget here is bound to."""
    # Streamlit refuses a parameter that a widget of this page is bound to, so it travels here;
    # and without an empty query it refuses to leave a page whose address holds such a parameter.
    st.session_state["next_run"] = run.id
    st.switch_page(target, query_params=parameters)


def forget(run: Run) -> None:
    """Leave a run that was deleted: the next page is Home, which says so. For callbacks."""
    for key in ("run", "chosen_run", "next_run"):
        st.session_state.pop(key, None)
    st.session_state["deleted"] = run.id


def need_run(frame: Frame, what: str) -> Run:
    """Return the chosen run, or say that there is nothing to show and end the page.

    Args:
        what: what the page would show, to complete "... appear here".
    """
    if frame.run is not None:
        return frame.run
    if not frame.runs:
        notice(f"No runs yet. Train something, and {what} appear here.", kind="info")
        left, right = st.columns(2)
        left.page_link(
            "app.py", label="Home: train on the bundled model in one press", icon=":material/home:"
        )
        right.page_link(
            "pages/1_Train.py", label="Train with your own choices", icon=":material/tune:"
        )
    else:
        run_links(frame.runs)
    return st.stop()


def run_links(runs: list[Run], limit: int = 10) -> None:
    """List runs by name; each opens its Live page."""
    for run in runs[:limit]:
        if st.button(escape_markdown(run.id), icon=":material/monitoring:", key=f"open_{run.id}"):
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
    if status.state == "finished":
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
    st.page_link(
        "pages/2_Live.py",
        label="Open the run",
        icon=":material/monitoring:",
        query_params={"run": run.id},
    )
    return st.stop()
