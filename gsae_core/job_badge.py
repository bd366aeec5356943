"""What moves on every page: the job badge, the news that a run ended, and what is found at work."""

import psutil
import streamlit as st

from gsae_core.errors import InputError
from gsae_core.pieces import escape_markdown, notice, plain
from gsae_core.store.jobs import CancelStage, escalate_cancel
from gsae_core.store.runs import Run
from gsae_core.store.status import ACTIVE, Status
from gsae_core.wording import percent


def status_of(run: Run, said: Status | None = None) -> Status | None:
    """Return where a run stands, or None if its folder was deleted or damaged meanwhile.

    Args:
        said: what its status.json holds, where that was just read.
    """
    try:
        return run.status if said is None else run.judged(said)
    except InputError:
        return None


def job_badge(runs: list[Run], statuses: dict[str, Status]) -> None:
    """Draw the job badge, which refreshes itself while a job moves, on every page."""
    moving = [run for run in runs if run.id in statuses and statuses[run.id].expects_process]

    def badge() -> None:
        now = {run.id: status for run in moving if (status := status_of(run)) is not None}
        for run in moving:
            if run.id in now and now[run.id].state == "cancelling":
                escalate(run)  # whichever page is open
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
        plain("no job running", size=".875rem")
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


def escalate(run: Run) -> CancelStage:
    """Take a cancellation as far as it needs to go by now, if the folder lets us."""
    try:
        return escalate_cancel(run)
    except InputError:
        return "requested"  # read-only, or gone: what the process itself does is seen all the same


def _at_work(statuses: dict[str, Status]) -> list[str]:
    return [name for name, status in statuses.items() if status.state in ACTIVE]


def server_started() -> float:
    """Return when this server's process began, in seconds since 1970."""
    return psutil.Process().create_time()


def say_connected(title: str, run: Run | None, statuses: dict[str, Status]) -> None:
    """Say that a run found at work needed neither this tab nor this server.

    It is said on the page a visit begins with, until that run ends or another page is opened.
    """
    begun = (title, set(_at_work(statuses)))
    page, found = st.session_state.setdefault("began_on", begun)
    still = [name for name in _at_work(statuses) if name in found]
    if title != page or not still:
        st.session_state["began_on"] = None, set()
        return
    server = server_started()
    older = [name for name in still if (statuses[name].process_started or server) < server]
    if older:
        went_on = f"{', '.join(older)}: training went on while the app was started again."
        notice(f"Reconnected to {went_on}", kind="info")
    elif title == "Live" and run is not None and run.id in still:
        text = f"Reconnected to {run.id}: training goes on whether this page is open or not."
        notice(text, kind="info")
