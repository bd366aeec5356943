"""What pages read from run folders, kept until the file behind it changes.

A page runs from its first line at every click; 200 runs must not mean 200 folders read each time.
What cannot be read raises InputError, as where it is read.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pandas as pd
import streamlit as st

from gsae_core.analysis.results import evaluation_frame
from gsae_core.config import Place
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

WEIGHTS = "saes/{sae}/sae_weights.safetensors"
INDEX = "features/{sae}/manifest.json"
MAY_BE_DAMAGED = ("evals.json", "samples.json", "events.jsonl", "saes/{sae}/cfg.json")
PATIENCE = 20.0  # seconds that a visitor waits for a language model that others use
MOST_NUMBERS = 2**24  # of held-out activations that scales are measured on: 64 MB
HEADROOM = 1.3  # of a model's weights: what a pass and the loading itself take besides

OfRun = TypeVar("OfRun", bound=Callable[..., Any])


def _version(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def versions(run: Run, *files: str) -> tuple[Any, ...]:
    """Return a run's folder and the versions of its files; `{sae}` stands for each SAE's name."""
    names = [spec.name for spec in run.config.saes]
    found = [f.format(sae=n) for f in files for n in (names if "{sae}" in f else [""])]
    return str(run.folder), *(_version(run.folder / file) for file in found)


def until_changed(*files: str) -> Any:
    """Return `hash_funcs` that give a cached function of a run a new key when a file changes."""
    return {Run: lambda run: versions(run, *files)}


def kept(*files: str, most: int = 512) -> Callable[[OfRun], OfRun]:
    """Return a decorator that keeps what a function of a run returns until a file changes."""
    keys = until_changed(*files)
    keep: Any = st.cache_data(max_entries=most, show_spinner=False, hash_funcs=keys)
    return keep


Table = Callable[[Run, str], pd.DataFrame]
feature_stats: Table = kept("saes/{sae}/feature_stats.safetensors", most=64)(Run.feature_stats)
deciles: Table = kept("saes/{sae}/norm_deciles.json")(Run.norm_deciles)
damages: Callable[[Run], list[str]] = kept(*MAY_BE_DAMAGED)(Run.damages)


@kept("evals.json")
def evaluations(run: Run) -> pd.DataFrame:
    """Return `evaluation_frame` of a run; empty where it was not evaluated or cannot be read."""
    with suppress(InputError):
        return evaluation_frame(run.evals())
    return pd.DataFrame()


def recent_metrics(run: Run) -> list[dict[str, Any]]:
    """Return `Run.recent_metrics`; nothing where they cannot be read, which Live and Home say."""
    with suppress(InputError):
        return run.recent_metrics()
    return []


class Loaded(NamedTuple):
    """A language model in memory, and its lock."""

    model: "LanguageModel"
    lock: threading.Lock


def _model_key(run: Run) -> tuple[Any, ...]:
    """Return what tells a run's language model from others."""
    of = run.config.model
    folder = model_folder(of.name)
    stamp = None if folder is None else _version(folder / "config.json")
    return of.name, of.revision, of.dtype, stamp


def identity(run: Run) -> tuple[Any, ...]:
    """Return what changes when the config, the model or an SAE does, to keep results by."""
    return (*_model_key(run), *versions(run, "config.json", WEIGHTS))


_loading = threading.Lock()


@st.cache_resource(max_entries=2, show_spinner=False, hash_funcs={Run: _model_key})
def language_model(run: Run) -> Loaded:
    """Return the language model a run's SAEs are for, if memory has room; at most two are kept."""
    if run.config.activations is not None:
        raise InputError(
            f"expected a run with a language model, got {run.id}, which was trained on vectors from"
            " a folder; look at its features on the Features page"
        )
    # Two threads that import packages with cycles, as torch and transformers are, may each find
    # the other's modules half made.
    with _loading:
        from gsae_core.lm.model import load_model
        from gsae_core.runs.plan.cost import free_memory, resolve_device

        of, device = run.config.model, resolve_device("auto")
        folder = model_folder(of.name) or cached_models().get(of.name)
        # Counted as float32; nothing where the number of parameters is not known.
        need = round(HEADROOM * 4 * ((folder and count_parameters(folder)) or 0))
        if need > free_memory(device):
            # The other model makes room before this one is refused.
            language_model.clear()
        if need > free_memory(device):
            raise InputError(
                f"expected about {readable(need)} of memory free for {of.name}, found "
                f"{readable(free_memory(device))}; close what else runs, or look at a run of a "
                "smaller model"
            )
        model = load_model(of.name, revision=of.revision, device=str(device), dtype=of.dtype)
    return Loaded(model, threading.Lock())


@contextmanager
def alone(run: Run) -> "Iterator[LanguageModel]":
    """Have a run's language model for this thread alone; InputError after `PATIENCE` seconds."""
    model, lock = language_model(run)
    if not lock.acquire(timeout=PATIENCE):
        raise InputError(
            f"the language model is busy with others' texts for more than {PATIENCE:g} s; try "
            "again in a moment"
        )
    try:
        yield model
    finally:
        lock.release()


def prompt(run: Run, text: str) -> "Prompt":
    """Return a text as the tokens of a run's model, with BOS where the run had one."""
    model = language_model(run).model
    from gsae_core.analysis.prompt import read_prompt

    return read_prompt(model, text, bos=run.config.data.bos != "never")


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=until_changed(WEIGHTS))
def sae(run: Run, name: str) -> "SAE":
    """Return a finished SAE of a run, on its model's device."""
    model, place = language_model(run).model, run.config.place_of(name)
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.sae.base import check_width

    found = load_sae(run.sae_folder(name))
    model.check(*place)
    check_width(found, model.width(place.site), name=name, hook_name=place.hook_name)
    return found.requires_grad_(False).to(model.device)


@st.cache_resource(max_entries=32, show_spinner=False, hash_funcs=until_changed(WEIGHTS, INDEX))
def scales(run: Run, name: str) -> "Scales":
    """Return the scale of each feature of an SAE: from its index, or from held-out tokens."""
    found = sae(run, name)
    from gsae_core.analysis.steering import scales_of, scales_of_index

    # An index of an older SAE, or cut short: its page says so, and the unit where it is from.
    with suppress(InputError):
        if (run.folder / INDEX.format(sae=name)).exists():
            return scales_of_index(run.features(name), found)
    return scales_of(found, _held_out_vectors(run, run.config.place_of(name)))


# Both SAEs of a page read the same vectors.
@st.cache_resource(max_entries=1, show_spinner=False, hash_funcs={Run: identity})
def _held_out_vectors(run: Run, place: Place) -> "Tensor":
    """Return activations of held-out text at a place: of as little text as has enough of them."""
    from gsae_core.analysis.steering import N_TOKENS, counted_vectors
    from gsae_core.lm.corpus import load_corpus

    model = language_model(run).model
    corpus = load_corpus(
        run.config.data,
        model.tokenizer,
        n_tokens=min(run.config.train.n_tokens, N_TOKENS),
        model_n_ctx=model.n_ctx,
        n_held_out=N_TOKENS,
    )
    n = min(N_TOKENS, MOST_NUMBERS // model.width(place.site))
    with alone(run):
        return counted_vectors(
            model, corpus.held_out, layer=place.layer, site=place.site, n_tokens=n
        )
