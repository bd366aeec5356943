"""Parts of the Hub page that find SAEs: the catalogue, a repository, and one SAE in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gsae_core.app.parts import facts, key_for, notice, plain
from gsae_core.checkpoints.catalog import Release, ranged, releases, search
from gsae_core.checkpoints.formats.libraries import FORMATS
from gsae_core.checkpoints.hub import Facts, HubSAE, Repository, describe, look, parse_address
from gsae_core.config import SITES
from gsae_core.errors import OFFLINE, InputError
from gsae_core.files import free_bytes, readable
from gsae_core.runs.jobs import job as process
from gsae_core.runs.work.transfer import ask, free_name, new_run_folder, plan_pull, run_name

KEPT_SECONDS = 300  # a listing is of one commit; a new one is seen after so long


def offline() -> None:
    """Say that this server was told to stay offline, if it was."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        notice(
            f"{OFFLINE} HF_HUB_OFFLINE is set: nothing is downloaded or uploaded. The catalogue "
            "can be searched.",
            kind="info",
            title="Offline",
        )


@st.cache_data(ttl=KEPT_SECONDS, max_entries=16, show_spinner=False)
def _looked(address: str) -> Repository:
    return look(parse_address(address))


@st.cache_data(ttl=KEPT_SECONDS, max_entries=64, show_spinner=False)
def _described(address: str, _repository: Repository, _sae: HubSAE, path: str) -> Facts:
    return describe(_repository, _sae)


def repository(root: Path) -> None:
    """Draw the field for a repository, and what is in the one it names."""
    left, right = st.columns([4, 1])
    repo = left.text_input(
        "Repository",
        key="repo",
        bind="query-params",
        placeholder="OWNER/NAME, OWNER/NAME:FOLDER, or the address of its page",
        max_chars=300,
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
            found = _looked(address)
    except InputError as error:
        notice(str(error), title="Nothing can be listed")
        if st.button("Try again", icon=":material/refresh:", key="hub.again"):
            st.rerun()
        return
    _show(found, address, root)


def _show(found: Repository, address: str, root: Path) -> None:
    if found.renamed:
        notice(f"{found.renamed}.", kind="info")
    size = sum(file.n_bytes for file in found.files)
    words = [
        f"{len(found.saes):,} SAE{'s' * (len(found.saes) != 1)}",
        f"{len(found.files):,} files, {readable(size)}",
        f"commit {found.commit[:12]}",
        f"licence {found.license or 'not stated'}",
        *(["private"] if found.private else []),
    ]
    plain(f"{found.repo}: {' · '.join(words)}", size=".9rem")
    by_path = {sae.path or ".": sae for sae in found.saes}
    if not by_path:
        notice(
            "None of its files has the layout of a known SAE library. If you know which file is an "
            "SAE, add its path after a colon: OWNER/NAME:PATH.",
            kind="warning",
            title="No SAE found",
        )
    else:
        if st.session_state.get("sae") not in by_path:
            st.session_state["sae"] = next(iter(by_path)) if len(by_path) == 1 else None
        chosen = st.selectbox(
            "SAE",
            list(by_path),
            index=None,
            key="sae",
            bind="query-params",
            placeholder=f"choose one of {len(by_path):,}; type to search",
        )
        if chosen is not None:
            _sae(found, by_path[chosen], address, root)
    with st.expander("Files and sizes", icon=":material/folder_open:"):
        rows = [{"file": file.path, "size": readable(file.n_bytes)} for file in found.files[:2000]]
        st.dataframe(pd.DataFrame(rows), hide_index=True, height=260, alt="Files and their sizes")
        if len(found.files) > len(rows):
            st.caption(f"The first {len(rows):,} of {len(found.files):,}.")


def _sae(found: Repository, sae: HubSAE, address: str, root: Path) -> None:
    """Draw what one SAE is, and the button that fetches it."""
    with st.container(border=True):
        try:
            with st.spinner("Reading its config"):
                told = _described(address, found, sae, sae.path)
        except InputError as error:
            notice(str(error), title="It cannot be read")
            return
        left, right = st.columns([3, 2], gap="large")
        with left:
            facts(compatibility(sae, told))
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
        "model": told.model or "not stated",
        "hook point": told.hook_name or "not stated",
        "download": f"{readable(sae.n_bytes)} in {files}: {names}",
    }


def _download(found: Repository, sae: HubSAE, told: Facts, root: Path) -> None:
    # Keyed by the SAE: another one has a name and a place of its own.
    about = (found.repo, found.commit, sae.path)
    default = free_name(root, run_name(found.repo, sae.path))
    name = st.text_input("Name of the run", default, key=key_for("hub.name", *about), max_chars=64)
    with st.expander("Model and hook point", expanded=False):
        st.caption("Fill in only what its files do not state, or state wrongly.")
        model = st.text_input(
            "Language model",
            key=key_for("hub.place_model", *about),
            placeholder=told.model or "as stated",
        )
        stated: Any = {"placeholder": "as stated"}
        layer = st.number_input(
            "Layer", 0, 200, None, key=key_for("hub.place_layer", *about), **stated
        )
        site = st.selectbox(
            "Site", SITES, index=None, key=key_for("hub.place_site", *about), **stated
        )
    free, need = free_bytes(root), 2 * sae.n_bytes  # what comes, and the run that is made of it
    if need >= free:
        text = f"Opening it takes about {readable(need)} of disk; {readable(free)} are free."
        notice(text, kind="warning")
    pressed = st.button(
        f"Download {readable(sae.n_bytes)}",
        type="primary",
        icon=":material/download:",
        key="hub.download",
        width="stretch",
        disabled=need >= free,
    )
    if pressed:
        place = {"model": model.strip() or None, "layer": layer, "site": site}
        try:
            new_run_folder(root, name)
            process.start(ask(root, plan_pull(found, sae, to=name, **place)))
        except InputError as error:
            notice(str(error), title="Nothing was started")
        else:
            st.rerun()


def catalogue() -> None:
    """Draw the search over public releases; a chosen row fills the repository's field."""
    words, layer, kind, width, l0 = st.columns([4, 1.5, 2.5, 2, 1.5])
    kinds = sorted({each.architecture for each in releases() if each.architecture is not None})
    widths = sorted({n for each in releases() for n in each.widths})
    found = search(
        words.text_input("Model or words", key="hub.find", placeholder="gemma-2-2b resid_post"),
        layer=layer.number_input("Layer", 0, 200, None, key="hub.find_layer", placeholder="any"),
        architecture=kind.selectbox(
            "Architecture", kinds, index=None, key="hub.find_arch", placeholder="any"
        ),
        width=width.selectbox(
            "Width",
            widths,
            index=None,
            key="hub.find_width",
            placeholder="any",
            format_func=lambda n: f"{n:,}",
        ),
        l0=l0.number_input("L0 near", 1.0, 5000.0, None, 1.0, key="hub.find_l0", placeholder="any"),
    )
    if not found:
        notice(
            "No release matches all fields. Leave a field empty: a release is not found by what it "
            "does not state.",
            kind="info",
        )
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
        column_config={
            "release": st.column_config.TextColumn(width=150),
            "model": st.column_config.TextColumn(width=170),
            "widths": st.column_config.TextColumn(width=130),
            "SAEs": st.column_config.NumberColumn(width=60),
            "layers": st.column_config.TextColumn(width=70),
        },
        alt="Public releases: title, model, site, layers, architecture, widths, L0, SAEs, where",
    )


def catalogue_table(found: Sequence[Release]) -> pd.DataFrame:
    """Return releases as a table's rows; a dash where nothing is known."""
    rows = [
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
    return pd.DataFrame(rows)


def short(width: int) -> str:
    """Return a number of features as releases write it: `16k` for 16,384, `1M`."""
    if width % 2**20 == 0:
        return f"{width // 2**20}M"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def choose_release(release: Release) -> None:
    """Put a release into the repository's field, or say why it cannot be. For callbacks."""
    st.session_state["hub.note"] = release.note
    st.session_state["sae"] = None
    if release.repo is None:
        st.session_state["repo"] = ""
        return
    path = f":{release.prefix}" if release.prefix else ""
    st.session_state["repo"] = f"{release.repo}{path}"
    st.session_state["rev"] = ""
