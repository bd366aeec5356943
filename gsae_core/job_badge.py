"""What moves on every page: the job badge, the news that a job ended, and what is found at work."""

from collections.abc import Sequence

import psutil
import streamlit as st

from gsae_core.errors import InputError
from gsae_core.pieces import escape_markdown, notice, plain
from gsae_core.store.job_folder import Job
from gsae_core.store.jobs import CancelStage, escalate_cancel
from gsae_core.store.runs import Run
from gsae_core.store.status import ACTIVE, Status
from gsae_core.store.transfers import Transfer
from gsae_core.wording import percent

Standings = Sequence[tuple[Job, Status]]
"""Jobs, runs and transfers alike, and where each stands."""


def status_of(job: Job, said: Status | None = None) -> Status | None:
    """Return where a job stands, or None if its folder was deleted or damaged meanwhile.

    Args:
        said: what its status.json holds, where that was just read.
    """
    try:
        return job.status if said is None else job.judged(said)
    except InputError:
        return None


def job_badge(jobs: Standings) -> None:
    """Draw the job badge, which refreshes itself while a job moves, on every page.

    Args:
        jobs: newest first.
    """
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


def _badge(moving: Standings) -> None:
    """Say how many runs train and wait, how far the newest is, and what goes from or to the Hub."""
    if not moving:
        plain("no job running", size=".875rem")
        return
    sent = [(job, status) for job, status in moving if isinstance(job, Transfer)]
    runs = [status for job, status in moving if not isinstance(job, Transfer)]
    active = [status for status in runs if status.state in ACTIVE]
    words = []
    if active:
        newest = active[0]
        done = percent(newest.step / newest.n_steps if newest.n_steps else 0.0, 0)
        words.append(f"● {len(active)} running · {done}")
    if len(active) < len(runs):
        words.append(f"{len(runs) - len(active)} queued")
    for job, status in sent:
        share = min(1.0, status.done / status.total) if status.total else None
        words.append(f"{job.arrow} {'starting' if share is None else percent(share, 0)}")
    st.badge(" · ".join(words), color="blue" if active or sent else "gray")


ENDINGS = {"finished": "✅", "failed": "❌", "lost": "⚠️"}


def tell_endings(jobs: Standings) -> None:
    """Say once, on the page that is open, that a job seen moving in this session has ended."""
    watched: set[str] = st.session_state.setdefault("shell.watched", set())
    for job, status in jobs:
        if status.expects_process:
            watched.add(job.id)
        elif job.id in watched:
            watched.discard(job.id)
            if status.state in ENDINGS:
                end = "is lost" if status.state == "lost" else status.state
                said = f"{escape_markdown(_title(job))} {end}"
                st.toast(said, icon=ENDINGS[status.state], duration="long")


def _title(job: Job) -> str:
    try:
        return f"{job.arrow} {job.request.repo}" if isinstance(job, Transfer) else job.id
    except InputError:
        return job.id  # put away between two looks


def escalate(job: Job) -> CancelStage:
    """Take a cancellation as far as it needs to go by now, if the folder lets us."""
    try:
        return escalate_cancel(job)
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
    page, found = st.session_state.setdefault("shell.began_on", begun)
    still = [name for name in _at_work(statuses) if name in found]
    if title != page or not still:
        st.session_state["shell.began_on"] = None, set()
        return
    server = server_started()
    older = [name for name in still if (statuses[name].process_started or server) < server]
    if older:
        went_on = f"{', '.join(older)}: training went on while the app was started again."
        notice(f"Reconnected to {went_on}", kind="info")
    elif title == "Live" and run is not None and run.id in still:
        text = f"Reconnected to {run.id}: training goes on whether this page is open or not."
        notice(text, kind="info")
