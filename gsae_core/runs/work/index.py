"""A run's SAE -> its feature index: what an index process runs, and its files tell."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from gsae_core.analysis.features.files import weights_sha256
from gsae_core.config import Config, given, validated
from gsae_core.errors import InputError
from gsae_core.files import read_checked
from gsae_core.machine import slot_of
from gsae_core.runs.jobs.job import Job, enqueue, start
from gsae_core.runs.jobs.worker import perform
from gsae_core.runs.run import Run, trained_folder
from gsae_core.text import Progress

if TYPE_CHECKING:  # the app and the command line read this module without torch
    from gsae_core.analysis.features.build import Part
    from gsae_core.lm.corpus import Corpus

IndexSplit = Literal["mixed", "train", "held_out"]
N_TOKENS = 1_000_000


class Request(Config):
    """What an index is to be made of."""

    n_tokens: PositiveInt = N_TOKENS
    """Counted tokens to read; fewer where the text has fewer."""
    split: IndexSplit = "mixed"
    """`mixed`: half of them held out, as far as they reach, the rest from the training split."""

    @property
    def n_held_out(self) -> int:
        """How many of them are wanted from the held-out split."""
        return {"held_out": self.n_tokens, "mixed": -(-self.n_tokens // 2), "train": 0}[self.split]


def index_folder(run: Run, name: str) -> Path:
    """Return where the index of one of a run's SAEs is or will be."""
    run.sae_folder(name)  # refuses other names
    return run.folder / "features" / name


def index_job(run: Run, name: str) -> Job | None:
    """Return the job that builds an SAE's index, or built it last; None if there was none."""
    folder = index_folder(run, name)
    return Job(folder) if (folder / "status.json").is_file() else None


def start_index(
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> int:
    """Build an index, or go on with it, in a process that outlives this one; return its id.

    Pressing twice starts one process. Without numbers it goes on with what was asked for last.
    """
    job, _ = _asked(run, name, n_tokens, split)
    return start(job, ("index", str(run.folder), "--sae", name))


def _asked(
    run: Run, name: str, n_tokens: int | None, split: IndexSplit | None
) -> tuple[Job, int | None]:
    """Return the job of an index, what is asked of it written down, or the process it has."""
    changed = given(n_tokens=n_tokens, split=split)
    validated(Request, changed, {"n_tokens": "--tokens", "split": "--split"})
    job = Job(index_folder(run, name))
    return job, enqueue(job, request(job).model_dump() | changed)


def request(job: Job) -> Request:
    """Return what was asked for last, or the defaults."""
    path = job.folder / "request.json"
    if not os.path.lexists(path):
        return Request()
    try:
        return Request(**read_checked(path, Request, what="n_tokens and split"))
    except InputError as error:
        raise InputError(f"{error}; delete the file to ask for the defaults") from None


def index_run(
    run: Run,
    name: str,
    *,
    n_tokens: int | None = None,
    split: IndexSplit | None = None,
) -> Iterator[Progress]:
    """Build the feature index of one SAE of a run, from where it stands, and yield progress.

    A request to stop (`worker.perform`) ends it after the shard; started again it goes on with
    what was asked for last, where nothing else is.
    """
    job, worker = _asked(run, name, n_tokens, split)
    if worker not in (None, os.getpid()):  # this one, if it was started for it
        raise InputError(
            f"expected no process to be building the index of {name!r}, got process {worker}, "
            "which is; wait for it, or cancel it first"
        )
    return perform(job, _build(run, name, job), slot=slot_of(run.config.device), of=run.folder)


def _build(run: Run, name: str, job: Job) -> Iterator[Progress]:
    from gsae_core.analysis.features.build import build_index
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.runs.work.setup import (
        check_held_out,
        load_source,
        load_text,
        max_norm,
        on_device_here,
    )

    yield Progress("loading", 0, 0, run.config.unit)
    run = on_device_here(run)
    cfg, sae_folder, asked = run.config, trained_folder(run, name), request(job)
    place = cfg.place_of(name)
    sae = load_sae(sae_folder)
    model = load_source(cfg)
    corpus = load_text(cfg, model, n_tokens=asked.n_tokens, n_held_out=asked.n_held_out)
    check_held_out(run, corpus, part=True)
    whose = "text" if cfg.activations is None else "folder"
    if asked.split == "held_out":
        whose = f"held-out {whose}" if whose == "text" else "held-out share of the folder"
    yield from build_index(
        model,
        sae.to(model.device),
        choose_parts(corpus, asked),
        run.folder / "features" / name,
        layer=place.layer,
        site=place.site,
        name=name,
        text=corpus.name,
        weights_sha256=weights_sha256(sae_folder),
        revision=cfg.model.revision,
        n_tokens_asked=asked.n_tokens,
        shortage=f"the {whose} has no more",
        max_norm=max_norm(run, name),
    )


def choose_parts(corpus: "Corpus", asked: Request) -> "Sequence[Part]":
    """Return the sequences to read: whole ones, from the start of each split."""
    from gsae_core.analysis.features.build import Part
    from gsae_core.analysis.fidelity import n_sequences

    parts, left = [], asked.n_tokens
    if asked.split != "train":
        n = n_sequences(corpus.held_out, asked.n_held_out)
        parts.append(Part("held_out", corpus.held_out, n))
        left -= parts[0].n_tokens
    if asked.split != "held_out" and left > 0:
        parts.append(Part("train", corpus.train, n_sequences(corpus.train, left)))
    return parts
