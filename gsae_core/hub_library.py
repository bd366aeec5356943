"""Parts of the Hub page about what is here: the library, exports, and what is sent to the Hub."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import streamlit as st

from gsae_core import shell
from gsae_core.controls import confirm_delete
from gsae_core.errors import InputError
from gsae_core.keys import key_for
from gsae_core.pieces import notice, plain
from gsae_core.store import jobs
from gsae_core.store.files import readable
from gsae_core.store.formats.found import EXPORTS, Export
from gsae_core.store.hub_push import check_repo, check_token
from gsae_core.store.runs import Run
from gsae_core.store.transfers import PushRequest, ask

EXPORT_SECONDS = 600

# The address holds what a bound widget shows, so labels lead to formats.
FORMATS: dict[str, Export] = {label: name for name, label in EXPORTS.items()}


def library(frame: shell.Frame) -> None:
    """Draw the runs of this machine with their origin and size; one can be deleted."""
    if not frame.runs:
        st.caption("Nothing is here yet. What is downloaded or trained appears here.")
        return
    rows = [_row(run, frame) for run in frame.runs]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=min(320, 36 * len(rows) + 38),
        column_config={
            "run": st.column_config.TextColumn(width="large"),
            "SAEs": st.column_config.NumberColumn(width="small"),
        },
        alt="Runs of this machine: name, where from, model, site, SAEs, state, size",
    )
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    chosen = left.selectbox(
        "Delete a run",
        [run.id for run in frame.runs],
        index=None,
        key="hub.doomed",
        placeholder="choose one",
    )
    if (
        right.button(
            "Delete",
            icon=":material/delete:",
            key="hub.delete",
            width="stretch",
            disabled=chosen is None,
        )
        and chosen is not None
    ):
        confirm_delete(next(run for run in frame.runs if run.id == chosen))


def _row(run: Run, frame: shell.Frame) -> dict[str, object]:
    status = frame.statuses.get(run.id)
    config = run.config
    return {
        "run": run.id,
        "from": config.imported or "trained here",
        "model": config.model.name,
        "site": config.model.hook_name,
        "SAEs": len(config.saes),
        "state": "unreadable" if status is None else status.state,
        "size": readable(_size(str(run.folder), _stamp(run))),
    }


def _stamp(run: Run) -> int:
    try:
        return max(path.stat().st_mtime_ns for path in (run.folder, run.folder / "status.json"))
    except OSError:
        return 0


# Walking a run's folder takes milliseconds; two hundred of them at every click do not.
@st.cache_data(max_entries=512, show_spinner=False)
def _size(folder: str, stamp: int) -> int:
    total = 0
    for path in Path(folder).rglob("*"):
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
            "leave this machine. Choose another run in the sidebar.",
            kind="info",
        )
        return
    plain(f"SAEs of {run.id}", size=".9rem")
    left, right = st.columns(2, gap="medium")
    with left.container(border=True):
        _export(run)
    with right.container(border=True):
        _push(run)


def _export(run: Run) -> None:
    st.subheader("Export", anchor=False)
    names = [spec.name for spec in run.config.saes]
    name = st.selectbox("SAE to export", names, key=key_for("hub.export_sae", run.id))
    label = st.selectbox("For", list(FORMATS), key="hub.export_format")
    if name is None or label is None:
        return
    folder = run.folder.parent / "exports" / f"{run.id}-{name}-{FORMATS[label]}"
    plain(f"To {folder}", size=".85rem")
    if st.button("Export and check", icon=":material/output:", key="hub.export", width="stretch"):
        with st.spinner("Writing it, reading it back, comparing", show_time=True):
            done, said = export(run, name, FORMATS[label], folder)
        if done:
            notice(said, kind="info", title="Exported")
        else:
            notice(said, title="Nothing was exported")
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
        done = subprocess.run(
            [sys.executable, "-m", "gsae_core", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=EXPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, (
            f"It took more than {EXPORT_SECONDS} s; export it on the command line: python -m "
            f"gsae_core {' '.join(words)}"
        )
    if done.returncode == 0:
        return True, done.stdout.strip().splitlines()[-1]
    last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return False, last.removeprefix("gsae_core: ")


def zipped(folder: Path) -> bytes:
    """Return a folder's files as a zip archive."""
    held = io.BytesIO()
    # Weights hardly compress.
    with zipfile.ZipFile(held, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                archive.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return held.getvalue()


def _push(run: Run) -> None:
    st.subheader("Send to the Hub", anchor=False)
    names = [spec.name for spec in run.config.saes]
    chosen = st.multiselect(
        "SAEs to send", names, default=names[:1], key=key_for("hub.push_saes", run.id)
    )
    repo = st.text_input(
        "To the repository", key="hub.push_repo", placeholder="OWNER/NAME", max_chars=96
    )
    public = st.toggle(
        "Public",
        key="hub.push_public",
        help="Of a repository that is made for it. One that is there stays as it is.",
    )
    st.caption(
        "With a card: what was measured, the trade-off's figure, and how to load it in three "
        "libraries. Your token is the one of `hf auth login`, or HF_TOKEN of this server."
    )
    ready = bool(chosen and repo.strip())
    label = "Send, for everybody to see" if public else "Send"
    pressed = st.button(
        label, icon=":material/upload:", key="hub.push", width="stretch", disabled=not ready
    )
    if not pressed:
        return
    try:
        check_repo(repo.strip())
        check_token()
        request = PushRequest(run.id, tuple(chosen), repo.strip(), public)
        jobs.start(ask(run.folder.parent, request))
    except InputError as error:
        notice(str(error), title="Nothing was sent")
    else:
        st.rerun()
