"""Parts of the Hub page about what is here: the library, exports and transfers."""

import io
import zipfile
from pathlib import Path
from subprocess import TimeoutExpired

import pandas as pd
import streamlit as st

from gsae_core.app import shell
from gsae_core.app.cache import kept
from gsae_core.app.controls import confirm_delete
from gsae_core.app.parts import (
    attempt,
    job_panel,
    job_trouble,
    key_for,
    notice,
    plain,
    since,
    state_badge,
)
from gsae_core.checkpoints.formats.libraries import EXPORTS, Export
from gsae_core.errors import InputError
from gsae_core.files import left_out, readable
from gsae_core.machine import python
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.run import Run, find_run
from gsae_core.runs.work.publish import check_repo, check_token
from gsae_core.runs.work.transfer import PullRequest, PushRequest, Transfer, ask, transfers

EXPORT_SECONDS = 600


def library(frame: shell.Frame) -> None:
    """Draw the runs of this machine with their origin and size; one can be deleted."""
    if not frame.runs:
        st.caption("No runs yet. Downloaded and trained runs appear here.")
        return
    rows = [
        {
            "run": run.id,
            "from": run.config.imported or "trained here",
            "model": run.config.model.name,
            "hook point": run.config.model.hook_name,
            "SAEs": len(run.config.saes),
            "state": frame.statuses[run.id].state if run.id in frame.statuses else "unreadable",
            "size": readable(_size(run)),
        }
        for run in frame.runs
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=min(320, 36 * len(rows) + 38),
        column_config={
            "run": st.column_config.TextColumn(width="large"),
            "SAEs": st.column_config.NumberColumn(width="small"),
        },
        alt="Runs of this machine: name, where from, model, hook point, SAEs, state, size",
    )
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    by_id = {run.id: run for run in frame.runs}
    chosen = left.selectbox(
        "Delete a run", list(by_id), index=None, key="hub.doomed", placeholder="choose one"
    )
    pressed = right.button(
        "Delete",
        icon=":material/delete:",
        key="hub.delete",
        width="stretch",
        disabled=chosen is None,
    )
    if pressed and chosen is not None:
        confirm_delete(by_id[chosen])


# Walking a run's folder takes milliseconds; two hundred of them at every click do not.
@kept(".", "status.json")
def _size(run: Run) -> int:
    total = 0
    for path in run.folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue  # Deleted between the listing and the look.
    return total


def share(frame: shell.Frame) -> None:
    """Draw what can be done with an SAE of the run in the sidebar: export it, or send it."""
    run = frame.run
    if run is None:
        st.caption("Choose a run in the sidebar: its SAEs can be exported, or sent to the Hub.")
        return
    status = frame.statuses.get(run.id)
    if status is None or status.state != "finished":
        notice(
            f"{run.id} is {'unreadable' if status is None else status.state}: only finished SAEs "
            "can be exported or sent. Choose another run in the sidebar.",
            kind="info",
        )
        return
    plain(f"SAEs of {run.id}", size=".9rem")
    left, right = st.columns(2, gap="medium")
    names = [spec.name for spec in run.config.saes]
    with left.container(border=True):
        _export(run, names)
    with right.container(border=True):
        _push(run, names)


def _export(run: Run, names: list[str]) -> None:
    st.subheader("Export", anchor=False)
    name = st.selectbox("SAE to export", names, key=key_for("hub.export_sae", run.id))
    format_ = st.selectbox(
        "For", list(EXPORTS), format_func=EXPORTS.__getitem__, key="hub.export_format"
    )
    folder = run.folder.parent / "exports" / f"{run.id}-{name}-{format_}"
    plain(f"To {folder}", size=".85rem")
    if st.button("Export and check", icon=":material/output:", key="hub.export", width="stretch"):
        with st.spinner("Writing, reading back and comparing", show_time=True):
            done, said = export(run, name, format_, folder)
        title = "Exported" if done else "Nothing was exported"
        notice(said, kind="info" if done else "error", title=title)
    if folder.is_dir():
        st.download_button(
            "Download as .zip",
            lambda: zipped(folder),
            file_name=f"{folder.name}.zip",
            mime="application/zip",
            icon=":material/folder_zip:",
            key="hub.export_zip",
            on_click="ignore",
        )


def export(run: Run, name: str, format_: Export, folder: Path) -> tuple[bool, str]:
    """Export an SAE as the command line does, in a process of its own; return success and words.

    The SAE, and what compares it, would otherwise stay in this server's memory.
    """
    words = ["export", str(run.folder), "--sae", name, "--format", format_, "--to", str(folder)]
    try:
        done, said = python("gsae_core", *words, seconds=EXPORT_SECONDS)
    except TimeoutExpired:
        return False, (
            f"It took more than {EXPORT_SECONDS} s; export it on the command line: python -m "
            f"gsae_core {' '.join(words)}"
        )
    return done, said.removeprefix("gsae_core: ")


def zipped(folder: Path) -> bytes:
    """Return a folder's files as a zip archive."""
    held = io.BytesIO()
    # Weights hardly compress.
    with zipfile.ZipFile(held, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                archive.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return held.getvalue()


def _push(run: Run, names: list[str]) -> None:
    st.subheader("Send to the Hub", anchor=False)
    chosen = st.multiselect(
        "SAEs to send", names, default=names[:1], key=key_for("hub.push_saes", run.id)
    )
    repo = st.text_input(
        "To the repository", key="hub.push_repo", placeholder="OWNER/NAME", max_chars=96
    )
    public = st.toggle(
        "Public",
        key="hub.push_public",
        help="For a new repository. An existing one keeps its visibility.",
    )
    st.caption(
        "With a card: what was measured, the trade-off's figure, and how to load it in three "
        "libraries. Your token is the one of `hf auth login`, or HF_TOKEN of this server."
    )
    repo = repo.strip()
    if st.button(
        "Send publicly" if public else "Send",
        icon=":material/upload:",
        key="hub.push",
        width="stretch",
        disabled=not (chosen and repo),
    ):
        try:
            check_repo(repo)
            check_token()
            request = PushRequest(run.id, tuple(chosen), repo, public)
            process.start(ask(run.folder.parent, request))
        except InputError as error:
            notice(str(error), title="Nothing was sent")
        else:
            st.rerun()


MOST_SHOWN = 8


def moving(root: Path) -> bool:
    """Return whether a transfer is at work."""
    return any(transfer.status.expects_process for transfer in transfers(root))


def on_the_way(root: Path, drawn: bool) -> None:
    """Draw the transfers that are at work, stopped, or done and not put away.

    `drawn` says whether the page was drawn with one at work.
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
    request, key = transfer.request, transfer.id
    with st.container(border=True):
        if isinstance(request, PullRequest):
            path = f" · {request.path}" if request.path else ""
            plain(f"{transfer.arrow} {request.repo}{path} → {request.to}")
        else:
            plain(f"{transfer.arrow} {request.run}: {', '.join(request.saes)} → {request.repo}")
        if status.expects_process or status.state == "cancelling":
            job_panel(transfer, status, key=f"hub.stop_{key}", amount=readable)
        again = "Resume continues from what was transferred."
        job_trouble(transfer, status, name="The transfer", again=again, n_lines=0)
        if damaged := transfer.event_lines().damaged:
            st.caption(f"{left_out(damaged, 'events.jsonl')}.")
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            state_badge(status.state)
            if not status.expects_process and status.state != "cancelling":
                _buttons(transfer, status)


def _buttons(transfer: Transfer, status: Status) -> None:
    """Draw what can be done with a transfer that has ended."""
    key = transfer.id
    if status.state == "finished" and transfer.is_pull and transfer.result:
        icon = ":material/monitoring:"
        if st.button("Open the run", icon=icon, type="primary", key=f"hub.open_{key}"):
            try:
                run = find_run(transfer.root, transfer.result)
            except InputError as error:
                notice(str(error), title="The run is gone")
            else:
                shell.go("pages/2_Live.py", run)
    elif status.state == "finished":
        plain(f"sent {since(status.heartbeat)}", size=".875rem")
    else:
        st.button(
            "Resume",
            icon=":material/play_arrow:",
            type="primary",
            key=f"hub.on_{key}",
            on_click=attempt,
            args=(lambda: process.start(transfer), "Nothing was started"),
        )
    st.button(
        "Dismiss",
        icon=":material/close:",
        key=f"hub.away_{key}",
        on_click=attempt,
        args=(lambda: process.delete(transfer), "Nothing was dismissed"),
        help="Files that were downloaded but not imported are deleted.",
    )
