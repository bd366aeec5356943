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

    from gsae_core.analysis.prompt import Prompt
    from gsae_core.analysis.steering import Scales
    from gsae_core.lm.model import LanguageModel
    from gsae_core.sae.base import SAE

Version = tuple[int, int] | None


def version(path: Path) -> Version:
    """Return what changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def until_changed(*files: str) -> Any:
    """Return `hash_funcs` that give a cached function of a run a new key when a file changes.

    Args:
        files: in the run's folder; `{sae}` stands for the name of each SAE.
    """

    def key(run: Run) -> tuple[Any, ...]:
        names = [spec.name for spec in run.config.saes]
        found = [f.format(sae=n) for f in files for n in (names if "{sae}" in f else [""])]
        return str(run.folder), *(version(run.folder / file) for file in found)

    return {Run: key}


def evaluations(run: Run) -> pd.DataFrame:
    """Return `evaluation_frame` of a run; empty where it was not evaluated or cannot be read."""
    try:
        return _evaluations(run)
    except InputError:
        return pd.DataFrame()


@st.cache_data(max_entries=512, show_spinner=False, hash_funcs=until_changed("evals.json"))
def _evaluations(run: Run) -> pd.DataFrame:
    return evaluation_frame(run.evals())


@st.cache_data(max_entries=512, show_spinner=False, hash_funcs=until_changed("evals.json"))
def nearest(run: Run, names: Sequence[str]) -> Mapping[str, str]:
    """Return `nearest_pair` of those SAEs of a run; empty where it was not evaluated."""
    evals: Any = evaluations(run)
    return nearest_pair(evals[evals["name"].isin(names)]) if len(evals) else {}


FEATURE_STATS = "saes/{sae}/feature_stats.safetensors"


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=until_changed(FEATURE_STATS))
def feature_stats(run: Run, name: str) -> pd.DataFrame:
    """Return `Run.feature_stats`.

    Raises:
        InputError: as there.
    """
    return run.feature_stats(name)


DECILES = "saes/{sae}/norm_deciles.json"


@st.cache_data(max_entries=512, show_spinner=False, hash_funcs=until_changed(DECILES))
def deciles(run: Run, name: str) -> pd.DataFrame:
    """Return `Run.norm_deciles`.

    Raises:
        InputError: as there.
    """
    return run.norm_deciles(name)


CHECKED = ("evals.json", "samples.json", "events.jsonl", "saes/{sae}/cfg.json")


@st.cache_data(max_entries=512, show_spinner=False, hash_funcs=until_changed(*CHECKED))
def damages(run: Run) -> list[str]:
    """Return `Run.damages`."""
    return run.damages()


def recent_metrics(run: Run) -> list[dict[str, Any]]:
    """Return `Run.recent_metrics`; nothing where they cannot be read, which Live and Home say."""
    try:
        return run.recent_metrics()
    except InputError:
        return []


def evaluated(runs: list[Run]) -> list[Run]:
    """Return the runs that have an evaluation, by a look at their folders alone."""
    return [run for run in runs if (run.folder / "evals.json").exists()]


logger = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds that a visitor waits for a language model that others use."""

MOST_NUMBERS = 2**24  # of held-out activations that scales are measured on
HEADROOM = 1.3  # of a model's weights: what a pass and the loading itself take besides


class ModelLock:
    """Lets one thread at a time work with a model; the others wait a while and are told."""

    def __init__(self) -> None:
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._n_waiting = 0

    @contextmanager
    def held(self, *, patience: float | None = None) -> Iterator[None]:
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
    """A language model in memory, and its lock."""

    model: "LanguageModel"
    lock: ModelLock


def _model_key(run: Run) -> tuple[Any, ...]:
    """Return what tells a run's language model from others."""
    of = run.config.model
    folder = model_folder(of.name)
    stamp = None if folder is None else version(folder / "config.json")
    return of.name, of.revision, of.dtype, stamp


def identity(run: Run, names: Sequence[str]) -> tuple[Any, ...]:
    """Return what changes when the model or one of the SAEs does, to keep results by."""
    weights = [run.sae_folder(name) / "sae_weights.safetensors" for name in names]
    return (*_model_key(run), *((str(path), version(path)) for path in weights))


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


@st.cache_resource(max_entries=2, show_spinner=False, hash_funcs={Run: _model_key})
def language_model(run: Run) -> Loaded:
    """Return the language model a run's SAEs are for; at most two are kept.

    Raises:
        InputError: if it is gone, cannot be loaded or does not fit in memory.
    """
    _imported()
    from gsae_core.lm.model import load_model
    from gsae_core.runs.plan.cost import resolve_device

    of = run.config.model
    device, need = resolve_device("auto"), _needs(of.name)
    if need > _free(device):
        # The other model makes room before this one is refused.
        language_model.clear()
    if need > _free(device):
        raise InputError(
            f"expected about {readable(need)} of memory free for {of.name}, found "
            f"{readable(_free(device))}; close what else runs, or look at a run of a smaller model"
        )
    model = load_model(of.name, revision=of.revision, device=str(device), dtype=of.dtype)
    return Loaded(model, ModelLock())


def _needs(name: str) -> int:
    """Return the bytes a model takes, counted as float32; 0 where that is not known."""
    folder = model_folder(name) or cached_models().get(name)
    return round(HEADROOM * 4 * ((folder and count_parameters(folder)) or 0))


def _free(device: Any) -> int:
    from gsae_core.runs.plan.cost import free_memory

    return free_memory(device)


def prompt(run: Run, text: str) -> "Prompt":
    """Return a text as the tokens of a run's model, with BOS where the run had one.

    Raises:
        InputError: if there is no text, or too much of it, or the model cannot be loaded.
    """
    model = language_model(run).model
    from gsae_core.analysis.prompt import read_prompt

    return read_prompt(model, text, bos=run.config.data.bos != "never")


WEIGHTS = "saes/{sae}/sae_weights.safetensors"


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=until_changed(WEIGHTS))
def sae(run: Run, name: str) -> "SAE":
    """Return a finished SAE of a run, on its model's device.

    Raises:
        InputError: if its files are missing or damaged, or it is for another hook point.
    """
    model, hook = language_model(run).model, run.config.model
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.sae.base import check_width

    found = load_sae(run.sae_folder(name))
    model.check(hook.layer, hook.site)
    check_width(found, model.width(hook.site), name=name, hook_name=hook.hook_name)
    return found.requires_grad_(False).to(model.device)


INDEX = "features/{sae}/manifest.json"


@st.cache_resource(max_entries=32, show_spinner=False, hash_funcs=until_changed(WEIGHTS, INDEX))
def scales(run: Run, name: str) -> "Scales":
    """Return the scale of each feature of an SAE: from its index, or from held-out tokens.

    Raises:
        InputError: if the model, the SAE or the text cannot be read.
    """
    found = sae(run, name)
    from gsae_core.analysis.steering import scales_of, scales_of_index

    if (run.folder / INDEX.format(sae=name)).exists():
        try:
            return scales_of_index(run.features(name), found)
        except InputError as error:
            # Of an older SAE, or cut short: its page says so, and the unit says where it is from.
            logger.info("no scales from the index of %s: %s", name, error)
    return scales_of(found, _held_out_vectors(run), source="held-out tokens")


def _text_key(run: Run) -> tuple[Any, ...]:
    hook = run.config.model
    return (*_model_key(run), hook.layer, hook.site, run.config.data.model_dump_json())


# Both SAEs of a page read the same vectors; 64 MB of them at most.
@st.cache_resource(max_entries=1, show_spinner=False, hash_funcs={Run: _text_key})
def _held_out_vectors(run: Run) -> "Tensor":
    """Return activations of held-out text: of as little text as has enough of them."""
    from gsae_core.analysis.steering import N_TOKENS, counted_vectors
    from gsae_core.lm.corpus import load_corpus

    (model, lock), hook = language_model(run), run.config.model
    corpus = load_corpus(
        run.config.data,
        model.tokenizer,
        n_tokens=min(run.config.train.n_tokens, N_TOKENS),
        model_n_ctx=model.n_ctx,
        n_held_out=N_TOKENS,
    )
    n = min(N_TOKENS, MOST_NUMBERS // model.width(hook.site))
    with lock.held():
        return counted_vectors(model, corpus.held_out, layer=hook.layer, site=hook.site, n_tokens=n)
