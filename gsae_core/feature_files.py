"""What the Features page reads: an SAE's index, or its weights, kept until the files change."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import streamlit as st

from gsae_core import cached, launch
from gsae_core.analysis.feature_filter import listing, weight_listing
from gsae_core.analysis.features import FeatureIndex
from gsae_core.analysis.index_files import MANIFEST, N_BINS, N_NEIGHBOURS, read_manifest
from gsae_core.analysis.weight_table import WEIGHTS, weight_table
from gsae_core.cached import Version, version
from gsae_core.errors import InputError
from gsae_core.example import is_example, labels_folder
from gsae_core.store.index_jobs import index_folder
from gsae_core.store.labels import Labels
from gsae_core.store.runs import Run


@dataclass(frozen=True)
class Opened:
    """An SAE as the page can show it."""

    run: Run
    name: str
    index: FeatureIndex | None
    """None where there is none, or none that can be read."""
    problem: str
    """Why an index that is there cannot be read."""
    rows: pd.DataFrame
    """A row per feature: `feature_filter.listing`, or `weight_listing` without an index."""

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return len(self.rows)


def open_sae(run: Run, name: str) -> Opened:
    """Return one of a run's SAEs with its index, if it has one that can be read.

    Raises:
        InputError: if not even its weights can be read.
    """
    try:
        index = open_index(run, name)
    except InputError as error:
        return Opened(run, name, None, str(error), _weights(run, name))
    if index is None:
        return Opened(run, name, None, "", _weights(run, name))
    return Opened(run, name, index, "", _listing(str(index.folder), index.manifest.made, index))


def open_index(run: Run, name: str) -> FeatureIndex | None:
    """Return the index of one of a run's SAEs; None if there is none.

    Raises:
        InputError: if it is of other weights, cut short, or a newer version's, or if its labels
            cannot be read.
    """
    folder = index_folder(run, name)
    if not (folder / MANIFEST).is_file():
        return None
    # At every look: a mapped file that was cut short since would end the server.
    manifest = read_manifest(folder)
    weights = version(run.sae_folder(name) / "cfg.json")
    said = labels_folder(launch.runs_root().absolute(), name) if is_example(run) else folder
    index = _index(str(folder), manifest.made, weights, str(said), _run=run, _name=name)
    index.labels.all()  # A file of them that cannot be read is told now, and once.
    return index


def weights_of(run: Run, name: str) -> pd.DataFrame:
    """Return `weight_table` of an SAE.

    Raises:
        InputError: as there.
    """
    folder = run.sae_folder(name)
    return _weight_table(str(folder), version(folder / WEIGHTS))


class Cost(NamedTuple):
    """What building an index takes, about."""

    seconds: float | None
    """None where the run did not measure how fast its model is."""
    n_bytes: int


def cost(run: Run, name: str, n_tokens: int) -> Cost:
    """Return what an index over so many tokens takes, from what the run measured.

    Time is that of the language model's passes in training, and of each SAE's step a third, which
    is about what encoding is of it. Room is 10 bytes a firing and 11 a token, and the tables.
    """
    spec = next(spec for spec in run.config.saes if spec.name == name)
    evals = cached.evaluations(run)
    found = next((row for row in evals.to_dict("records") if row["name"] == name), {})
    l0, d_in = float(found.get("l0", 50.0)), int(found.get("d_in", 512))
    tables = spec.d_sae * (4 * d_in + 4 * N_BINS + 16 * N_NEIGHBOURS + 400)
    n_bytes = round(n_tokens * (10 * l0 + 11) + tables)
    rows = cached.recent_metrics(run)
    if not rows or not rows[-1].get("tokens") or "seconds_lm" not in rows[-1]:
        return Cost(None, n_bytes)
    last = rows[-1]
    model = last["seconds_lm"] / last["tokens"]
    step = (last["seconds"] - last["seconds_lm"]) / last["tokens"] / len(run.config.saes)
    return Cost(5 + n_tokens * (model + step / 3), n_bytes)


# Arguments with an underscore are no part of the key: what stands before them tells them apart.
@st.cache_resource(max_entries=8, show_spinner=False)
def _index(
    folder: str, made: float, weights: Version, said: str, _run: Run, _name: str
) -> FeatureIndex:
    index = _run.features(_name)
    index.labels = Labels(Path(said))
    return index


@st.cache_resource(max_entries=8, show_spinner=False)
def _listing(folder: str, made: float, _index: FeatureIndex) -> pd.DataFrame:
    # Shared by every visitor: read, never changed.
    return listing(_index)


@st.cache_resource(max_entries=8, show_spinner=False)
def _weight_table(folder: str, stamp: Version) -> pd.DataFrame:
    return weight_table(Path(folder))


def _weights(run: Run, name: str) -> pd.DataFrame:
    try:
        stats = cached.feature_stats(run, name)
    except InputError:
        stats = None  # not evaluated: the weights alone
    return weight_listing(weights_of(run, name), stats)
