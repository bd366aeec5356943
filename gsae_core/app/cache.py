"""What pages read from run folders, kept until the file behind it changes.

A page runs from its first line at every click; 200 runs must not mean 200 folders read each time.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from gsae_core.analysis.results import evaluation_frame, nearest_pair
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import cached_models, count_parameters, model_folder
from gsae_core.runs.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from gsae_core.analysis.steering import Scales
    from gsae_core.lm.model import LanguageModel
    from gsae_core.sae.base import SAE

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
    """Return `Run.norm_deciles`.

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
    return _run.norm_deciles(name)


logger = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds that a visitor waits for a language model that others use."""

MOST_NUMBERS = 2**24  # of held-out activations that scales are measured on
HEADROOM = 1.3  # of a model's weights: what a pass and the loading itself take besides


class Desk:
    """Who works with a model: one visitor at a time, the others wait a while and are told."""

    def __init__(self) -> None:
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._n_waiting = 0

    @contextmanager
    def turn(self, *, patience: float | None = None) -> Iterator[None]:
        """Within, no other thread has the model.

        Raises:
            InputError: if it does not come free in `patience` seconds; None: `PATIENCE`.
        """
        patience = PATIENCE if patience is None else patience
        with self._counting:
            ahead = self._n_waiting + 1
            self._n_waiting += 1
        try:
            free = self._lock.acquire(timeout=patience)
        finally:
            with self._counting:
                self._n_waiting -= 1
        if not free:
            raise InputError(
                f"the language model is busy: {ahead} ahead of you after {patience:g} s of "
                "waiting; try again in a moment"
            )
        try:
            yield
        finally:
            self._lock.release()


class Loaded(NamedTuple):
    """A language model in memory, and who works with it."""

    model: "LanguageModel"
    desk: Desk


def language_model(run: Run) -> Loaded:
    """Return the language model a run's SAEs are for; at most two are kept.

    Raises:
        InputError: if it is gone, cannot be loaded or does not fit in memory.
    """
    _imported()
    place = run.config.model
    folder = model_folder(place.name)
    stamp = None if folder is None else version(folder / "config.json")
    return _language_model(place.name, place.revision, place.dtype, stamp)


def sae(run: Run, name: str) -> "SAE":
    """Return a finished SAE of a run, on its model's device.

    Raises:
        InputError: if its files are missing or damaged, or it is for another place.
    """
    _imported()
    folder = run.sae_folder(name)
    return _sae(str(folder), version(folder / "sae_weights.safetensors"), _run=run, _name=name)


def scales(run: Run, name: str) -> "Scales":
    """Return the scale of each feature of an SAE: from its index, or from held-out tokens.

    Raises:
        InputError: if the model, the SAE or the text cannot be read.
    """
    _imported()
    folder = str(run.sae_folder(name))
    weights = version(run.sae_folder(name) / "sae_weights.safetensors")
    index = version(run.folder / "features" / name / "manifest.json")
    return _scales(folder, weights, index, _run=run, _name=name)


def identity(run: Run, names: Sequence[str]) -> tuple[Any, ...]:
    """Return what changes when the model or one of the SAEs does, to keep results by."""
    place = run.config.model
    folder = model_folder(place.name)
    stamp = None if folder is None else version(folder / "config.json")
    weights = [run.sae_folder(name) / "sae_weights.safetensors" for name in names]
    return (place.name, place.revision, stamp, *((str(path), version(path)) for path in weights))


def finished_saes(run: Run) -> list[str]:
    """Return the names of the SAEs whose weights are there, in the run's order."""
    names = [spec.name for spec in run.config.saes]
    return [n for n in names if (run.sae_folder(n) / "sae_weights.safetensors").is_file()]


_importing: list[threading.Thread] = []
_starting = threading.Lock()


def import_ahead() -> None:
    """Begin to import what a model takes, once, while the page is still being drawn."""
    with _starting:
        if not _importing:
            _importing.append(threading.Thread(target=_imports, name="imports", daemon=True))
            _importing[0].start()


def _imports() -> None:
    # The Auto classes alone leave half of the imports for when a model is loaded.
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_layers  # noqa: F401

    from gsae_core.analysis import (
        generation,  # noqa: F401
    )


def _imported() -> None:
    """Wait until what is imported ahead is there.

    Two threads that import packages with cycles, as torch and transformers are, may each find the
    other's modules half made.
    """
    import_ahead()
    _importing[0].join()


# Arguments with an underscore are no part of the key.
@st.cache_resource(max_entries=2, show_spinner=False)
def _language_model(name: str, revision: str | None, dtype: Any, stamp: Version) -> Loaded:
    from gsae_core.lm.model import load_model
    from gsae_core.runs.plan.cost import resolve_device

    device, need = resolve_device("auto"), _needs(name)
    if need > _free(device):
        # The other model makes room before this one is refused.
        _language_model.clear()
    if need > _free(device):
        raise InputError(
            f"expected about {readable(need)} of memory free for {name}, found "
            f"{readable(_free(device))}; close what else runs, or look at a run of a smaller model"
        )
    return Loaded(load_model(name, revision=revision, device=str(device), dtype=dtype), Desk())


def _needs(name: str) -> int:
    """Return the bytes a model takes, counted as float32; 0 where that is not known."""
    folder = model_folder(name) or cached_models().get(name)
    return round(HEADROOM * 4 * ((folder and count_parameters(folder)) or 0))


def _free(device: Any) -> int:
    from gsae_core.runs.plan.cost import free_memory

    return free_memory(device)


@st.cache_resource(max_entries=4, show_spinner=False)
def _sae(folder: str, weights: Version, _run: Run, _name: str) -> "SAE":
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.sae.base import check_width

    model, place = language_model(_run).model, _run.config.model
    found = load_sae(folder)
    model.check(place.layer, place.site)
    check_width(found, model.width(place.site), name=_name, hook_name=place.hook_name)
    return found.requires_grad_(False).to(model.device)


@st.cache_resource(max_entries=32, show_spinner=False)
def _scales(folder: str, weights: Version, index: Version, _run: Run, _name: str) -> "Scales":
    from gsae_core.analysis.steering import scales_of, scales_of_index

    found = sae(_run, _name)
    if index is not None:
        try:
            return scales_of_index(_run.features(_name), found)
        except InputError as error:
            # Of an older SAE, or cut short: its page says so, and the unit says where it is from.
            logger.info("no scales from the index of %s: %s", _name, error)
    place, data = _run.config.model, _run.config.data.model_dump_json()
    x = _held_out_vectors(data, identity(_run, []), place.layer, place.site, _run=_run)
    return scales_of(found, x, source="held-out tokens")


# Both SAEs of a page read the same vectors; 64 MB of them at most.
@st.cache_resource(max_entries=1, show_spinner=False)
def _held_out_vectors(
    data: str, model: tuple[Any, ...], layer: int, site: Any, _run: Run
) -> "Tensor":
    from gsae_core.analysis.steering import N_TOKENS, counted_vectors

    lm, desk = language_model(_run)
    n_tokens = min(N_TOKENS, MOST_NUMBERS // lm.width(site))
    with desk.turn():
        return counted_vectors(lm, _held_out(_run, lm), layer=layer, site=site, n_tokens=n_tokens)


def _held_out(run: Run, model: "LanguageModel") -> Any:
    """Return held-out sequences of a run: of as little text as has enough of them."""
    from gsae_core.analysis.steering import N_TOKENS
    from gsae_core.lm.corpus import load_corpus

    data = run.config.data
    corpus = load_corpus(
        data,
        model.tokenizer,
        n_tokens=min(run.config.train.n_tokens, N_TOKENS),
        model_n_ctx=model.n_ctx,
        n_held_out=N_TOKENS,
    )
    return corpus.held_out
