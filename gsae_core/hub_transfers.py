"""Part of the Hub page about what is on its way from the Hub or to it."""

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from gsae_core import shell
from gsae_core.errors import InputError
from gsae_core.pieces import notice, plain, seconds_since, state_badge
from gsae_core.store import jobs
from gsae_core.store.files import readable
from gsae_core.store.json_lines import left_out
from gsae_core.store.listing import find_run
from gsae_core.store.status import Status
from gsae_core.store.transfers import PullRequest, Transfer, transfers
from gsae_core.wording import ago

STAGES = {"downloading": "downloading", "importing": "making a run of it", "uploading": "sending"}
MOST_SHOWN = 8


def moving(root: Path) -> bool:
    """Return whether a transfer is at work."""
    return any(transfer.status.expects_process for transfer in transfers(root))


def on_the_way(root: Path, drawn: bool) -> None:
    """Draw the transfers that are at work, stopped, or done and not put away.

    Args:
        drawn: whether the page was drawn with one at work.
    """
    found = transfers(root)
    if not found:
        return
    if drawn != any(transfer.status.expects_process for transfer in found):
        # The whole page: its timer is of another state, and the library may have a run more. A
        # press in here draws this part alone.
        st.rerun()
    st.subheader("Transfers", anchor=False)
    for transfer in found[:MOST_SHOWN]:
        try:
            _card(transfer, transfer.status)
        except InputError as error:
            notice(str(error), title=f"{transfer.id} can no longer be read")


def _card(transfer: Transfer, status: Status) -> None:
    request = transfer.request
    if status.state == "cancelling":
        jobs.escalate_cancel(transfer)
    with st.container(border=True):
        if isinstance(request, PullRequest):
            path = f" · {request.path}" if request.path else ""
            plain(f"{transfer.arrow} {request.repo}{path} → {request.to}")
        else:
            plain(f"{transfer.arrow} {request.run}: {', '.join(request.saes)} → {request.repo}")
        if status.state in ("starting", "running", "cancelling") and status.total:
            done = f"{readable(status.done)} of {readable(status.total)}"
            text = f"{STAGES.get(status.stage or '', 'starting')}: {done}"
            st.progress(min(1.0, status.done / status.total), text=text)
        elif status.expects_process:
            st.progress(0.0, text=STAGES.get(status.stage or "", "starting"))
        if status.state == "failed":
            notice(status.error or "It gave no reason.", title="It failed")
        elif status.state == "lost":
            notice(
                "Its process is gone without a word: the machine restarted, or it was killed. Go "
                "on takes up what came.",
                kind="warning",
            )
        if damaged := transfer.event_lines().damaged:
            st.caption(f"{left_out(damaged, 'events.jsonl')}.")
        _buttons(transfer, status)


def _buttons(transfer: Transfer, status: Status) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        state_badge(status.state)
        key = transfer.id
        if status.state in ("queued", "starting", "running"):
            st.button(
                "Cancel",
                icon=":material/stop_circle:",
                key=f"hub.stop_{key}",
                on_click=_cancel,
                args=(transfer,),
            )
        elif status.state in ("cancelled", "failed", "lost"):
            st.button(
                "Go on",
                icon=":material/play_arrow:",
                type="primary",
                key=f"hub.on_{key}",
                on_click=_go_on,
                args=(transfer,),
            )
        elif status.state == "finished" and transfer.kind == "pull" and transfer.result:
            if st.button(
                "Open the run", icon=":material/monitoring:", type="primary", key=f"hub.open_{key}"
            ):
                _open(transfer)
        elif status.state == "finished":
            plain(f"sent {ago(seconds_since(status.heartbeat))}", size=".875rem")
        if not status.expects_process and status.state != "cancelling":
            st.button(
                "Put away",
                icon=":material/close:",
                key=f"hub.away_{key}",
                on_click=_put_away,
                args=(transfer,),
                help="What came and is no run yet goes with it.",
            )


def _open(transfer: Transfer) -> None:
    try:
        run = find_run(transfer.root, str(transfer.result))
    except InputError as error:
        notice(str(error), title="The run is gone")
    else:
        shell.go("pages/2_Live.py", run)


def _cancel(transfer: Transfer) -> None:
    _attempt(lambda: transfer.request_cancel(by="app"), "Nothing was cancelled")


def _go_on(transfer: Transfer) -> None:
    _attempt(lambda: jobs.start(transfer), "Nothing was started")


def _put_away(transfer: Transfer) -> None:
    _attempt(lambda: jobs.delete(transfer), "Nothing was put away")


def _attempt(act: Callable[[], object], refused: str) -> None:
    try:
        act()
    except InputError as error:
        # Someone else may have pressed first, or the disk refuses.
        st.session_state["shell.refused"] = (refused, str(error))
