"""A run's SAE -> its feature index: what an index process runs, and its files tell."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import BaseModel, PositiveInt

from gsae_core.analysis.features.files import weights_sha256
from gsae_core.errors import InputError
from gsae_core.files import lock, read_checked, write_json, writing
from gsae_core.machine import slot_of
from gsae_core.runs.jobs.job import (
    FOLDER_BYTES,
    Job,
    new_status,
    read_status,
    start,
    write_status,
)
from gsae_core.runs.jobs.worker import Worker, perform
from gsae_core.runs.run import Run
from gsae_core.text import Progress

if TYPE_CHECKING:  # the app and the command line read this module without torch
    from gsae_core.analysis.features.build import Part
    from gsae_core.lm.corpus import Corpus, SequenceSet

IndexSplit = Literal["mixed", "train", "held_out"]
N_TOKENS = 1_000_000


class Request(BaseModel, frozen=True, extra="forbid"):
    """What an index is to be made of."""

    n_tokens: PositiveInt = N_TOKENS
    """Counted tokens to read; fewer where the text has fewer."""
    split: IndexSplit = "mixed"
    """`mixed`: half of them held out, as far as they reach, the rest from the training split."""

    @property
    def n_held_out(self) -> int:
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
    if not (run.sae_folder(name) / "cfg.json").is_file():
        raise InputError(
            f"expected saved weights of {name!r} in {run.sae_folder(name)}, found none yet; they "
            "are there once the run has saved them"
        )
    job = index_job(run, name)
    if job is None or not job.is_alive():
        job = prepare(run, name, n_tokens=n_tokens, split=split)
    asked = request(job)
    flags = ("--sae", name, "--tokens", str(asked.n_tokens), "--split", asked.split)
    return start(job, ("index", str(run.folder), *flags))


def prepare(
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> Job:
    """Return the job of an index, ready for a worker: queued, its request written down."""
    if n_tokens is not None and n_tokens < 1:
        raise InputError(f"--tokens: expected a number of at least 1, got {n_tokens}")
    if split not in (None, *get_args(IndexSplit)):
        names = ", ".join(get_args(IndexSplit))
        raise InputError(f"--split: expected one of {names}, got {split!r}")
    folder = index_folder(run, name)
    with writing(folder, FOLDER_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        # The starting process holds this lock; a worker that is starting has its status already.
        with lock(folder, "start"):
            job = index_job(run, name)
            builder = read_status(folder).pid if job is not None and job.is_alive() else None
            if builder not in (None, os.getpid()):
                raise InputError(
                    f"expected no process to be building the index of {name!r}, got process "
                    f"{builder}, which is; wait for it, or cancel it first"
                )
            job = Job(folder)
            given = {"n_tokens": n_tokens, "split": split}
            changed = {key: value for key, value in given.items() if value is not None}
            write_json(folder / "request.json", request(job).model_dump() | changed)
            # A process that was started for it is in the status already.
            if builder is None:
                write_status(folder, new_status())
    return job


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
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> Iterator[Progress]:
    """Build the feature index of one SAE of a run, from where it stands, and yield progress.

    Waits for the device like a run. A request to stop ends it after the shard, in state
    `cancelled`; started again it goes on with what was asked for last, where nothing else is. An
    `InputError` while iterating is said in status.json too.
    """
    job = prepare(run, name, n_tokens=n_tokens, split=split)
    work = functools.partial(_build, run, name, job)
    return perform(job, work, slot=slot_of(run.config.device), of=run.folder)


def _build(run: Run, name: str, job: Job, worker: Worker) -> Iterator[Progress]:
    from gsae_core.analysis.features.build import build_index
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.lm.corpus import load_corpus
    from gsae_core.runs.work.setup import check_held_out, load_lm

    yield Progress("loading", 0, 0)
    cfg, sae_folder, asked = run.config, run.sae_folder(name), request(job)
    sae = load_sae(sae_folder)
    model = load_lm(cfg)
    corpus = load_corpus(
        cfg.data,
        model.tokenizer,
        n_tokens=asked.n_tokens,
        model_n_ctx=model.n_ctx,
        n_held_out=asked.n_held_out,
    )
    check_held_out(run, corpus, part=True)
    yield from build_index(
        model,
        sae.to(model.device),
        choose_parts(corpus, asked),
        run.folder / "features" / name,
        layer=cfg.model.layer,
        site=cfg.model.site,
        name=name,
        text=corpus.name,
        weights_sha256=weights_sha256(sae_folder),
        revision=cfg.model.revision,
        n_tokens_asked=asked.n_tokens,
        shortage=corpus.shortage if asked.split == "held_out" else "the text has no more",
    )


def choose_parts(corpus: "Corpus", asked: Request) -> "Sequence[Part]":
    """Return the sequences to read: whole ones, from the start of each split."""
    parts = []
    left = asked.n_tokens
    if asked.split != "train":
        parts.append(_first(corpus.held_out, "held_out", asked.n_held_out))
        left -= int(corpus.held_out.counts[: parts[0].n].sum())
    if asked.split != "held_out" and left > 0:
        parts.append(_first(corpus.train, "train", left))
    return parts


def _first(sequences: "SequenceSet", split: str, n_tokens: int) -> "Part":
    """Return the sequences up to and including the one in which token `n_tokens` is counted."""
    import numpy as np

    from gsae_core.analysis.features.build import Part

    ends = np.cumsum(sequences.counts)
    return Part(split, sequences, min(int(np.searchsorted(ends, n_tokens)) + 1, len(sequences)))
