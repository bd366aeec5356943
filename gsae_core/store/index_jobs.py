"""Building a feature index as a process: start it, see where it stands, cancel it.

    runs/<id>/features/<name>/  status.json  events.jsonl  log.txt  control.json  request.json

The folder is a job like any other: `index_job(run, name).status` says its state, its stage
(indexing, sorting, describing), how much of it is done and why it failed; `request_cancel()` and
`jobs.escalate_cancel` end it. Nothing here imports torch.
"""

import os
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from gsae_core.errors import InputError
from gsae_core.store.files import write_json, writing
from gsae_core.store.job_folder import FOLDER_BYTES, Job
from gsae_core.store.jobs import start
from gsae_core.store.runs import Run
from gsae_core.store.status import Status, lock, read_json, read_status, write_status

IndexSplit = Literal["mixed", "train", "held_out"]
N_TOKENS = 1_000_000


class Request(NamedTuple):
    """What an index is to be made of."""

    n_tokens: int = N_TOKENS
    """Counted tokens to read; fewer where the text has fewer."""
    split: IndexSplit = "mixed"
    """`mixed`: half of them held out, as far as they reach, the rest from the training split."""


def index_folder(run: Run, name: str) -> Path:
    """Return where the index of one of a run's SAEs is or will be.

    Raises:
        InputError: if the run has no SAE of this name.
    """
    run.sae_folder(name)
    return run.folder / "features" / name


def index_job(run: Run, name: str) -> Job | None:
    """Return the job that builds an SAE's index, or built it last; None if there was none.

    Raises:
        InputError: if the run has no SAE of this name.
    """
    folder = index_folder(run, name)
    return Job(folder) if (folder / "status.json").is_file() else None


def start_index(
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> int:
    """Build an index, or go on with it, in a process that outlives this one; return its id.

    Pressing twice starts one process. Without numbers it goes on with what was asked for last.

    Raises:
        InputError: if the SAE is unknown or has no weights yet, or the folder cannot be written.
    """
    if not (run.sae_folder(name) / "cfg.json").is_file():
        raise InputError(
            f"expected saved weights of {name!r} in {run.sae_folder(name)}, found none yet; they "
            "are there once the run has saved them"
        )
    job = index_job(run, name)
    if job is None or not is_building(job):
        job = prepare(run, name, n_tokens=n_tokens, split=split)
    asked = request(job)
    flags = ("--sae", name, "--tokens", str(asked.n_tokens), "--split", asked.split)
    return start(job, ("index", str(run.folder), *flags))


def prepare(
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> Job:
    """Return the job of an index, ready for a worker: queued, with what is asked for written down.

    Raises:
        InputError: if the request cannot be, the folder cannot be written, or a process builds it.
    """
    folder = index_folder(run, name)
    with writing(folder, FOLDER_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(folder)
        # The starting process holds this lock; a worker that is starting has its status already.
        with lock(folder, "start"):
            builder = read_status(folder).pid if is_building(job) else None
            if builder not in (None, os.getpid()):
                raise InputError(
                    f"expected no process to be building the index of {name!r}, got process "
                    f"{builder}, which is; wait for it, or cancel it first"
                )
            before = request(job)
            asked = Request(
                before.n_tokens if n_tokens is None else n_tokens, split or before.split
            )
            _check(asked)
            write_json(folder / "request.json", asked._asdict())
            # A process that was started for it is in the status already.
            if builder is None:
                write_status(folder, Status("queued", 0, 0, None, None, time.time(), None))
    return job


def is_building(job: Job) -> bool:
    """Return whether a process builds the index now."""
    return (job.folder / "status.json").is_file() and job.is_alive()


def request(job: Job) -> Request:
    """Return what was asked for last, or the defaults.

    Raises:
        InputError: if request.json is damaged.
    """
    path = job.folder / "request.json"
    if not os.path.lexists(path):
        return Request()
    fields = Request()._asdict() | read_json(path)
    n_tokens, split = fields["n_tokens"], fields["split"]
    if fields.keys() != set(Request._fields) or not isinstance(n_tokens, int):
        raise InputError(
            f"expected n_tokens and split in {path}, got {', '.join(fields)}; delete the file to "
            "ask for the defaults"
        )
    _check(Request(n_tokens, split))
    return Request(n_tokens, split)


def _check(asked: Request) -> None:
    if asked.n_tokens < 1:
        raise InputError(f"--tokens: expected a number of at least 1, got {asked.n_tokens}")
    if asked.split not in get_args(IndexSplit):
        raise InputError(
            f"--split: expected one of {', '.join(get_args(IndexSplit))}, got {asked.split!r}"
        )
