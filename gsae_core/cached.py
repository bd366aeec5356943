"""What pages read from run folders, kept until the file behind it changes.

A page runs from its first line at every click; 200 runs must not mean 200 folders read each time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from gsae_core.analysis.results import evaluation_frame, nearest_pair
from gsae_core.errors import InputError
from gsae_core.store.evals import norm_deciles
from gsae_core.store.runs import Run

Version = tuple[int, int] | None


def evaluations(run: Run) -> pd.DataFrame:
    """Return `evaluation_frame` of a run; empty where it was not evaluated or cannot be read."""
    try:
        return _evaluations(str(run.folder), version(run.folder / "evals.json"), _run=run)
    except InputError:
        return pd.DataFrame()


def nearest(run: Run, names: Sequence[str]) -> Mapping[str, str]:
    """Return `nearest_pair` of those SAEs of a run; empty where it was not evaluated."""
    key = version(run.folder / "evals.json")
    return _nearest(str(run.folder), key, tuple(names), _run=run)


def feature_stats(run: Run, name: str) -> pd.DataFrame:
    """Return `Run.feature_stats`.

    Raises:
        InputError: as there.
    """
    path = run.sae_folder(name) / "feature_stats.safetensors"
    return _feature_stats(str(run.folder), name, version(path), _run=run)


def deciles(run: Run, name: str) -> pd.DataFrame:
    """Return `store.evals.norm_deciles`.

    Raises:
        InputError: as there.
    """
    path = run.sae_folder(name) / "norm_deciles.json"
    return _deciles(str(run.folder), name, version(path), _run=run)


def damages(run: Run) -> list[str]:
    """Return `Run.damages`."""
    names = ["evals.json", "samples.json", "events.jsonl"]
    names += [f"saes/{spec.name}/cfg.json" for spec in run.config.saes]
    return _damages(str(run.folder), tuple(version(run.folder / name) for name in names), _run=run)


def recent_metrics(run: Run) -> list[dict[str, Any]]:
    """Return `Run.recent_metrics`; nothing where they cannot be read, which Live and Home say."""
    try:
        return run.recent_metrics()
    except InputError:
        return []


def evaluated(runs: list[Run]) -> list[Run]:
    """Return the runs that have an evaluation, by a look at their folders alone."""
    return [run for run in runs if (run.folder / "evals.json").exists()]


def version(path: Path) -> Version:
    """Return what changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


# Arguments with an underscore are no part of the key: the folder and the version stand for the run.
@st.cache_data(max_entries=512, show_spinner=False)
def _evaluations(folder: str, version: Version, _run: Run) -> pd.DataFrame:
    return evaluation_frame(_run.evals())


@st.cache_data(max_entries=512, show_spinner=False)
def _damages(folder: str, versions: tuple[Version, ...], _run: Run) -> list[str]:
    return _run.damages()


@st.cache_data(max_entries=512, show_spinner=False)
def _nearest(folder: str, version: Version, names: tuple[str, ...], _run: Run) -> Mapping[str, str]:
    evals: Any = evaluations(_run)
    return nearest_pair(evals[evals["name"].isin(names)]) if len(evals) else {}


@st.cache_data(max_entries=64, show_spinner=False)
def _feature_stats(folder: str, name: str, version: Version, _run: Run) -> pd.DataFrame:
    return _run.feature_stats(name)


@st.cache_data(max_entries=512, show_spinner=False)
def _deciles(folder: str, name: str, version: Version, _run: Run) -> pd.DataFrame:
    return norm_deciles(_run, name)
