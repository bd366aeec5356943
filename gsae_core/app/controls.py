"""What can be done about a run: cancel, resume, change and train again, delete.

Dialogs are opened outside of what refreshes itself: a refresh takes them away.
"""

import secrets
from collections.abc import Callable

import streamlit as st

from gsae_core.app import shell
from gsae_core.app.parts import CANCELLABLE, attempt, cancel, noticed, own, plain
from gsae_core.config import RunConfig
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.run import Run, is_example, launch


def begin(config: RunConfig) -> None:
    """Start a run and show it; two presses at once start one."""
    nonce = st.session_state.setdefault(own("nonce"), secrets.token_hex(3))
    with noticed("Nothing was started"):
        run = launch(shell.runs_root(), config, nonce=nonce)
        del st.session_state[own("nonce")]
        shell.go("pages/2_Live.py", run)


def controls(run: Run, status: Status) -> None:
    """Draw the buttons that a run's state allows."""
    with st.container(horizontal=True, width="content", gap="small"):
        if status.state == "finished" and st.button(
            "See the results", icon=":material/balance:", type="primary", key=own("see_results")
        ):
            shell.go("pages/3_Pareto.py", run)
        idle = status.state == "queued" and status.pid is None
        if idle or status.state in ("cancelled", "failed", "lost"):
            st.button(
                "Start" if idle else "Resume",
                icon=":material/play_arrow:",
                type="primary",
                key=own("resume"),
                on_click=attempt,
                args=(lambda: process.start(run), "Nothing was started"),
            )
        if status.state in CANCELLABLE and not idle:
            if st.button("Cancel", icon=":material/stop_circle:", key=own("cancel")):
                confirm_cancel(run)
        elif (status.state != "cancelling" and not is_example(run)) and st.button(
            "Delete", icon=":material/delete:", key=own("delete")
        ):
            confirm_delete(run)
        icon, about = ":material/content_copy:", "Opens Train with this run's settings filled in."
        if st.button("Duplicate with changes", icon=icon, key=own("duplicate"), help=about):
            shell.go("pages/1_Train.py", run, **{"from": run.id})


# Presses act in callbacks: they count even if the page is drawn anew at the same moment, which
# takes the dialog away.


@st.dialog("Cancel this run?")
def confirm_cancel(run: Run) -> None:
    """Ask whether a run should stop, and have it stop."""
    plain(run.id)
    st.caption("It finishes its step and saves. Resume continues from there.")
    _choice("Cancel the run", "Keep training", name="confirm_cancel", act=cancel, run=run)


@st.dialog("Delete this run?")
def confirm_delete(run: Run) -> None:
    """Ask whether a run should go, and delete it."""
    plain(run.id)
    st.caption("This deletes its SAEs, curves and results, and cannot be undone.")
    _choice("Delete for good", "Keep it", name="confirm_delete", act=_delete, run=run)


def _choice(yes: str, no: str, *, name: str, act: Callable[[Run], None], run: Run) -> None:
    stay, go = st.columns(2)
    pressed = stay.button(no, key=own("keep"), width="stretch")
    pressed |= go.button(
        yes, type="primary", key=own(name), width="stretch", on_click=act, args=(run,)
    )
    if pressed:
        st.rerun()


def _delete(run: Run) -> None:
    def act() -> None:
        process.delete(run)
        shell.forget(run)

    attempt(act, "Nothing was deleted")
