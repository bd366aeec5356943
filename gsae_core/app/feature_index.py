"""The index of an SAE on the Features page: opened, or built by a process that is watched."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gsae_core.analysis.features.files import MANIFEST, N_BINS, N_NEIGHBOURS, read_manifest
from gsae_core.analysis.features.filter import listing, weight_listing
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.analysis.labels import Labels
from gsae_core.app import cache
from gsae_core.app.parts import attempt, job_panel, job_trouble, notice
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.runs import run as launch
from gsae_core.runs.jobs.job import Job, Status
from gsae_core.runs.run import Run, is_example, labels_folder
from gsae_core.runs.work.index import N_TOKENS, index_folder, index_job, start_index
from gsae_core.text import count, duration

AMOUNTS = [100_000, 300_000, N_TOKENS, 3_000_000]


@dataclass(frozen=True)
class Opened:
    """An SAE as the page can show it."""

    run: Run
    name: str
    index: FeatureIndex | None
    """None where there is none that can be read."""
    problem: str
    """Why an index that is there cannot be read."""
    rows: pd.DataFrame
    """A row per feature: `filter.listing`, or `filter.weight_listing` without an index."""

    @property
    def unit(self) -> str:
        """What features fire on: a `token`, or a `vector` of a folder."""
        return self.run.config.unit if self.index is None else self.index.manifest.unit


def open_sae(run: Run, name: str) -> Opened:
    """Return one of a run's SAEs with its index, if it has one that can be read."""
    problem, index = "", None
    try:
        index = open_index(run, name)
    except InputError as error:
        problem = str(error)
    if index is not None:
        return Opened(run, name, index, "", _listing(str(index.folder), index.manifest.made, index))
    stats = None  # not evaluated: the weights alone
    with suppress(InputError):
        stats = cache.feature_stats(run, name)
    return Opened(run, name, None, problem, weight_listing(weights_of(run, name), stats))


def open_index(run: Run, name: str) -> FeatureIndex | None:
    """Return the index of one of a run's SAEs; None if there is none.

    InputError if it is of other weights, cut short, or a newer version's, or if its labels cannot
    be read.
    """
    folder = index_folder(run, name)
    if not (folder / MANIFEST).is_file():
        return None
    read_manifest(folder)  # At every look: a mapped file that was cut short would end the server.
    said = labels_folder(launch.runs_root().absolute(), name) if is_example(run) else folder
    index = _index(run, name, str(said))
    index.labels.all()  # A file of them that cannot be read is told now, and once.
    return index


@st.cache_resource(
    max_entries=8,
    show_spinner=False,
    hash_funcs=cache.until_changed(cache.INDEX, "saes/{sae}/cfg.json"),
)
def _index(run: Run, name: str, said: str) -> FeatureIndex:
    index = run.features(name)
    index.labels = Labels(Path(said))
    return index


# Shared by every visitor: read, never changed. What has an underscore is no part of the key.
@st.cache_resource(max_entries=8, show_spinner=False)
def _listing(folder: str, made: float, _index: FeatureIndex) -> pd.DataFrame:
    return listing(_index)


@st.cache_resource(max_entries=8, show_spinner=False, hash_funcs=cache.until_changed(cache.WEIGHTS))
def weights_of(run: Run, name: str) -> pd.DataFrame:
    """Return what the weights of an SAE say of each feature: `table.weight_columns`."""
    from gsae_core.analysis.features.table import weight_columns
    from gsae_core.checkpoints.checkpoint import load_sae

    return pd.DataFrame(weight_columns(load_sae(run.sae_folder(name)))).rename_axis("feature")


def panel(run: Run, names: list[str], *, problem: str) -> None:
    """Offer to build the indices of some SAEs, or show how far that is.

    `problem` says why an index that is there cannot be used; empty: there is none.
    """
    if problem:
        notice(problem, kind="warning", title="The feature index cannot be used")

    def watched() -> None:
        moving = [each for each in _jobs(run, names) if each[2].expects_process]
        if not moving:
            st.rerun()  # the index is there, or its building has ended
        for name, job, status in moving:
            with st.container(border=True):
                key, unit = f"features.cancel_{name}", run.config.unit
                job_panel(job, status, name=f"Index of {name}", key=key, unit=unit)

    jobs = _jobs(run, names)
    if any(status.expects_process for _, _, status in jobs):
        st.fragment(watched, run_every=1.0)()
        return
    again = "Building it again continues from its last shard."
    for name, job, status in jobs:
        job_trouble(job, status, name=f"Building the index of {name}", again=again)
    _offer(run, names)


def _jobs(run: Run, names: list[str]) -> list[tuple[str, Job, Status]]:
    """Return the jobs that build the indices of some SAEs, or built them last."""
    found = []
    for name in names:
        with suppress(InputError):  # its folder went meanwhile
            if (job := index_job(run, name)) is not None:
                found.append((name, job, job.status))
    return found


def _offer(run: Run, names: list[str]) -> None:
    def start() -> None:
        for name in names:
            start_index(run, name, n_tokens=n_tokens, split="mixed")

    with st.container(border=True):
        st.subheader("Index this SAE to see its top examples.", anchor=False)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            n_tokens = st.segmented_control(
                f"{run.config.unit.capitalize()}s to read",
                AMOUNTS,
                format_func=count,
                default=N_TOKENS,
                required=True,
                key="features.amount",
            )
            st.button(
                f"Build the index ({_cost(run, names, n_tokens)})",
                type="primary",
                icon=":material/build:",
                key="features.build",
                on_click=attempt,
                args=(start, "Nothing was started"),
            )
        if len(names) > 1:
            st.caption(f"Of {' and '.join(names)}, over the same {run.config.unit}s.")


def _cost(run: Run, names: list[str], n_tokens: int) -> str:
    """Return about how long it takes, where the run measured its model's speed, and what room.

    Seconds are those of the model's passes in training, and of each SAE's step a third, which is
    about what encoding is of it. Bytes are 10 a firing and 11 a token, and the tables.
    """
    found = {row["name"]: row for row in cache.evaluations(run).to_dict("records")}
    n_bytes = 0.0
    for spec in run.config.saes:
        if spec.name in names:
            row: Any = found.get(spec.name, {"l0": 50.0, "d_in": 512})
            tables = spec.d_sae * (4 * row["d_in"] + 4 * N_BINS + 16 * N_NEIGHBOURS + 400)
            n_bytes += n_tokens * (10 * row["l0"] + 11) + tables
    last = (cache.recent_metrics(run) or [{}])[-1]
    if not last.get("tokens") or "seconds_lm" not in last:
        return f"≈ {readable(round(n_bytes))}"
    step = (last["seconds"] - last["seconds_lm"]) / len(run.config.saes)
    a_token = (last["seconds_lm"] + step / 3) / last["tokens"]
    seconds = len(names) * (5 + n_tokens * a_token)
    return f"≈ {duration(seconds)}, {readable(round(n_bytes))}"
