"""Parts of the Hub page: what can be found and fetched, and what is here to share."""

import io
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import streamlit as st

from gsae_core.app import shell
from gsae_core.app.cache import versions
from gsae_core.app.controls import confirm_delete
from gsae_core.app.parts import (
    attempt,
    job_panel,
    job_trouble,
    key_for,
    notice,
    noticed,
    plain,
    since,
    state_badge,
)
from gsae_core.checkpoints.catalog import Release, ranged, releases, search
from gsae_core.checkpoints.formats.libraries import EXPORTS, FORMATS, Export
from gsae_core.checkpoints.hub import Facts, HubSAE, Repository, describe, look, parse_address
from gsae_core.config import SITES
from gsae_core.errors import OFFLINE, InputError
from gsae_core.files import free_bytes, left_out, readable
from gsae_core.machine import run_python
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.run import Run, find_run
from gsae_core.runs.work.publish import check_repo, check_token
from gsae_core.runs.work.transfer import (
    PullRequest,
    PushRequest,
    Transfer,
    ask,
    free_name,
    run_name,
    transfers,
)
from gsae_core.text import facts

EXPORT_SECONDS = 600
MOST_SHOWN = 8  # transfers
WIDTHS = {"release": 150, "model": 170, "widths": 130, "SAEs": 60, "layers": 70}  # in pixels
KEPT_SECONDS = 300  # a listing is of one commit; a new one is seen after so long


def offline() -> None:
    """Say that this server was told to stay offline, if it was."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        said = f"{OFFLINE} HF_HUB_OFFLINE is set: nothing is downloaded or uploaded."
        notice(f"{said} The catalogue can be searched.", kind="info", title="Offline")


_looked = st.cache_data(ttl=KEPT_SECONDS, max_entries=16, show_spinner=False)(look)
_described = st.cache_data(
    ttl=KEPT_SECONDS,
    max_entries=64,
    show_spinner=False,
    hash_funcs={Repository: lambda found: (found.repo, found.commit), HubSAE: lambda sae: sae.path},
)(describe)


def repository(root: Path) -> None:
    """Draw the field for a repository, and what is in the one it names."""
    left, right = st.columns([4, 1])
    hint = "OWNER/NAME, OWNER/NAME:FOLDER, or the address of its page"
    repo = left.text_input(
        "Repository", key="repo", bind="query-params", placeholder=hint, max_chars=300
    )
    revision = right.text_input(
        "Revision", key="rev", bind="query-params", placeholder="main", max_chars=100
    )
    if note := st.session_state.get("hub.note"):
        notice(note, kind="info")
    if not repo.strip():
        st.caption("Choose a release above, or paste the name of any repository with SAEs.")
        return
    address = "@".join(filter(None, (repo.strip(), revision.strip())))
    try:
        with st.spinner("Asking the Hub", show_time=True):
            found = _looked(parse_address(address))
    except InputError as error:
        notice(str(error), title="Nothing can be listed")
        st.button("Try again", icon=":material/refresh:", key="hub.again")
        return
    _show(found, root)


def _show(found: Repository, root: Path) -> None:
    if found.renamed:
        notice(f"{found.renamed}.", kind="info")
    words = [
        f"{len(found.saes):,} SAE{'s' * (len(found.saes) != 1)}",
        f"{len(found.files):,} files, {readable(sum(file.n_bytes for file in found.files))}",
        f"commit {found.commit[:12]}",
        f"licence {found.license or 'not stated'}",
        *(["private"] if found.private else []),
    ]
    plain(f"{found.repo}: {' · '.join(words)}", size=".9rem")
    by_path = {sae.path or ".": sae for sae in found.saes}
    if not by_path:
        text = "None of its files has the layout of a known SAE library. If you know which file is "
        text += "an SAE, add its path after a colon: OWNER/NAME:PATH."
        notice(text, kind="warning", title="No SAE found")
    else:
        if st.session_state.get("sae") not in by_path:
            st.session_state["sae"] = next(iter(by_path)) if len(by_path) == 1 else None
        hint = f"choose one of {len(by_path):,}; type to search"
        chosen = st.selectbox(
            "SAE", list(by_path), index=None, key="sae", bind="query-params", placeholder=hint
        )
        if chosen is not None:
            _sae(found, by_path[chosen], root)
    with st.expander("Files and sizes", icon=":material/folder_open:"):
        rows = [{"file": file.path, "size": readable(file.n_bytes)} for file in found.files[:2000]]
        st.dataframe(rows, hide_index=True, height=260, alt="Files and their sizes")
        if len(found.files) > len(rows):
            st.caption(f"The first {len(rows):,} of {len(found.files):,}.")


def _sae(found: Repository, sae: HubSAE, root: Path) -> None:
    with st.container(border=True), noticed("It cannot be read"):
        with st.spinner("Reading its config"):
            told = _described(found, sae)
        left, right = st.columns([3, 2], gap="large")
        with left:
            st.html(facts(compatibility(sae, told)))
        with right:
            _download(found, sae, told, root)


def compatibility(sae: HubSAE, told: Facts) -> dict[str, str]:
    """Return what is known of an SAE before it is here, and whether it can be opened."""
    later = "not known until downloaded"
    d_in, d_sae = (f"{n:,}" if n is not None else "?" for n in (told.d_in, told.d_sae))
    widths = f"{d_in} wide activations, {d_sae} features"
    names = ", ".join(file.path.rpartition("/")[2] for file in sae.files)
    files = f"{len(sae.files)} file{'s' * (len(sae.files) > 1)}"
    return {
        "opens here": f"yes, {FORMATS[sae.format]} files can be read" if sae.format else later,
        "architecture": told.architecture or later,
        "width": later if told.d_in is None and told.d_sae is None else widths,
        "model": told.place.model or "not stated",
        "hook point": told.place.hook_name or "not stated",
        "download": f"{readable(sae.n_bytes)} in {files}: {names}",
    }


def _download(found: Repository, sae: HubSAE, told: Facts, root: Path) -> None:
    # Keyed by the SAE: another one has a name and a place of its own.
    about, hint = (found.repo, found.commit, sae.path), "as stated"
    key = key_for("hub.pull", *about)
    default = free_name(root, run_name(found.repo, sae.path))
    name = st.text_input("Name of the run", default, key=f"{key}.name", max_chars=64)
    with st.expander("Model and hook point"):
        st.caption("Fill in only what its files do not state, or state wrongly.")
        model = st.text_input(
            "Language model", key=f"{key}.model", placeholder=told.place.model or hint
        )
        layer = st.number_input("Layer", 0, 200, None, key=f"{key}.layer", placeholder=hint)
        site = st.selectbox("Site", SITES, index=None, key=f"{key}.site", placeholder=hint)
    said = "Features times the norms of their directions, as SAELens' fold_W_dec_norm and "
    said += "Neuronpedia show them; reconstructions are the same."
    fold = st.checkbox("Fold decoder norms", key=f"{key}.fold", help=said)
    free, need = free_bytes(root), 2 * sae.n_bytes  # what comes, and the run that is made of it
    full = need >= free
    if full:
        text = f"Opening it takes about {readable(need)} of disk; {readable(free)} are free."
        notice(text, kind="warning")
    label, icon = f"Download {readable(sae.n_bytes)}", ":material/download:"
    if st.button(
        label, type="primary", icon=icon, key="hub.download", width="stretch", disabled=full
    ):
        place = {"model": model.strip() or None, "layer": layer, "site": site}
        how = {**place, "fold_decoder_norms": fold}
        with noticed("Nothing was started"):
            process.start(ask(root, PullRequest(*about, sae.library, sae.files, name, **how)))
            st.rerun()


def catalogue() -> None:
    """Draw the search over public releases; a chosen row fills the repository's field."""
    words, layer, kind, width, l0 = st.columns([4, 1.5, 2.5, 2, 1.5])
    kinds = sorted({each.architecture for each in releases() if each.architecture is not None})
    widths = sorted({n for each in releases() for n in each.widths})
    pick: Any = {"index": None, "placeholder": "any"}
    found = search(
        words.text_input("Model or words", key="hub.find", placeholder="gemma-2-2b resid_post"),
        layer=layer.number_input("Layer", 0, 200, None, key="hub.find_layer", placeholder="any"),
        architecture=kind.selectbox("Architecture", kinds, key="hub.find_arch", **pick),
        width=width.selectbox(
            "Width", widths, key="hub.find_width", format_func="{:,}".format, **pick
        ),
        l0=l0.number_input("L0 near", 1.0, 5000.0, None, 1.0, key="hub.find_l0", placeholder="any"),
    )
    if not found:
        way = "Leave a field empty: a release is not found by what it does not state."
        notice(f"No release matches all fields. {way}", kind="info")
        return
    shown = f"{len(found)} of {len(releases())} releases"
    st.caption(f"{shown}. Tick a row to see what is in its repository.")

    def ticked() -> None:
        for row in st.session_state["hub.catalogue"]["selection"]["rows"]:
            choose_release(found[row])

    st.dataframe(
        catalogue_table(found),
        hide_index=True,
        height=min(320, 36 * len(found) + 38),
        key="hub.catalogue",
        on_select=ticked,
        selection_mode="single-row",
        column_config={name: st.column_config.Column(width=n) for name, n in WIDTHS.items()},
        alt="Public releases: title, model, site, layers, architecture, widths, L0, SAEs, where",
    )


def catalogue_table(found: Sequence[Release]) -> list[dict[str, Any]]:
    """Return releases as a table's rows; a dash where nothing is known."""
    return [
        {
            "release": release.title,
            "model": release.model,
            "site": release.site or "–",
            "layers": ranged(release.layers),
            "architecture": release.architecture or "–",
            "widths": ", ".join(short(width) for width in release.widths) or "–",
            "L0": "–".join(f"{n:g}" for n in dict.fromkeys(release.l0 or ())) or "–",
            "SAEs": release.count,
            "where": release.repo or release.where or "–",
        }
        for release in found
    ]


def short(width: int) -> str:
    """Return a number of features as releases write it: `16k` for 16,384, `1M`."""
    if width % 2**20 == 0:
        return f"{width // 2**20}M"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def choose_release(release: Release) -> None:
    """Put a release into the repository's field, or say why it cannot be. For callbacks."""
    path = f":{release.prefix}" if release.prefix else ""
    repo = "" if release.repo is None else f"{release.repo}{path}"
    st.session_state.update({"hub.note": release.note, "sae": None, "repo": repo})
    if repo:
        st.session_state["rev"] = ""


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
            "hook point": run.config.hook_names,
            "SAEs": len(run.config.saes),
            "state": frame.statuses[run.id].state if run.id in frame.statuses else "unreadable",
            "size": readable(_size(*versions(run, ".", "status.json"))),
        }
        for run in frame.runs
    ]
    column = st.column_config.Column
    st.dataframe(
        rows,
        hide_index=True,
        height=min(320, 36 * len(rows) + 38),
        column_config={"run": column(width="large"), "SAEs": column(width="small")},
        alt="Runs of this machine: name, where from, model, hook point, SAEs, state, size",
    )
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    by_id = {run.id: run for run in frame.runs}
    chosen = left.selectbox(
        "Delete a run", list(by_id), index=None, key="hub.doomed", placeholder="choose one"
    )
    icon, none = ":material/delete:", chosen is None
    pressed = right.button("Delete", icon=icon, key="hub.delete", width="stretch", disabled=none)
    if pressed and chosen is not None:
        confirm_delete(by_id[chosen])


# Walking a run's folder takes milliseconds, and a call of st.cache_data half of one: two hundred
# of either at every click do not.
@lru_cache(maxsize=512)
def _size(folder: str, *_: object) -> int:
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # deleted between the listing and the look
            total += path.lstat().st_size if path.is_file() else 0
    return total


def share(frame: shell.Frame) -> None:
    """Draw what can be done with an SAE of the run in the sidebar: export it, or send it."""
    run = frame.run
    if run is None:
        st.caption("Choose a run in the sidebar: its SAEs can be exported, or sent to the Hub.")
        return
    state = frame.statuses[run.id].state if run.id in frame.statuses else "unreadable"
    if state != "finished":
        only = "only finished SAEs can be exported or sent. Choose another run in the sidebar."
        notice(f"{run.id} is {state}: {only}", kind="info")
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
        done, said = run_python("gsae_core", *words, seconds=EXPORT_SECONDS)
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
    about = "For a new repository. An existing one keeps its visibility."
    public = st.toggle("Public", key="hub.push_public", help=about)
    st.caption(
        "With a card: what was measured, the trade-off's figure, and how to load it in three "
        "libraries. Your token is the one of `hf auth login`, or HF_TOKEN of this server."
    )
    repo = repo.strip()
    label, icon = "Send publicly" if public else "Send", ":material/upload:"
    missing = not (chosen and repo)
    if st.button(label, icon=icon, key="hub.push", width="stretch", disabled=missing):
        with noticed("Nothing was sent"):
            check_repo(repo)
            check_token()
            process.start(ask(run.folder.parent, PushRequest(run.id, tuple(chosen), repo, public)))
            st.rerun()


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
        with noticed(f"{transfer.id} can no longer be read"):
            _card(transfer, transfer.status)


def _card(transfer: Transfer, status: Status) -> None:
    request = transfer.request
    with st.container(border=True):
        if isinstance(request, PullRequest):
            path = f" · {request.path}" if request.path else ""
            plain(f"{transfer.arrow} {request.repo}{path} → {request.to}")
        else:
            plain(f"{transfer.arrow} {request.run}: {', '.join(request.saes)} → {request.repo}")
        if status.expects_process:
            job_panel(transfer, status, key=f"hub.stop_{transfer.id}", amount=readable)
        again = "Resume continues from what was transferred."
        job_trouble(transfer, status, name="The transfer", again=again, n_lines=0)
        if damaged := transfer.event_lines().damaged:
            st.caption(f"{left_out(damaged, 'events.jsonl')}.")
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            state_badge(status.state)
            if not status.expects_process:
                _buttons(transfer, status)


def _buttons(transfer: Transfer, status: Status) -> None:
    key = transfer.id
    if status.state == "finished" and transfer.is_pull and transfer.result:
        icon = ":material/monitoring:"
        if st.button("Open the run", icon=icon, type="primary", key=f"hub.open_{key}"):
            with noticed("The run is gone"):
                shell.go("pages/2_Live.py", find_run(transfer.root, transfer.result))
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
