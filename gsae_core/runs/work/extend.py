"""More of a finished run: SAEs added to its sweep, or training that goes on.

    extend/request.json  SAEs that were added; they learn alone, from the first batch on
    extend/state-*.pt    their resumable state, which joins that of the run in the end

SAEs of a sweep know nothing of each other, so an added one has the bits of one that was there from
the start. Until all is done nothing of what was finished is touched; `resume` goes on with either.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gsae_core.config import RunConfig, SAESpec, TrainRecipe, validated
from gsae_core.errors import InputError
from gsae_core.files import lock, write_json, writing
from gsae_core.runs.jobs.job import holding, read_status, write_status
from gsae_core.runs.run import Added, Run, is_example


def add_saes(run: Run, saes: Sequence[SAESpec]) -> Run:
    """Add SAEs to a finished run and make it ready to train them; return it with its new config.

    InputError if the run cannot be extended, or has an SAE of one of the names.
    """
    config = validated(RunConfig, dict(run.config) | {"saes": (*run.config.saes, *saes)})
    with _finished(run):
        path = run.folder / "metrics.jsonl"
        n_bytes = path.stat().st_size if path.exists() else 0
        added = Added(saes=[spec.name for spec in saes], metrics_bytes=n_bytes)
        folder = run.folder / "extend"
        # What a withdrawn one left is not theirs to go on from.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(folder / "request.json", added.model_dump())
        return _ready(run, config, step=0, details={"saes": added.saes})


def lengthen(run: Run, n_tokens: int) -> Run:
    """Make a finished run ready to train all its SAEs on so many more activations; return it.

    They go on with their optimizer's moments, on text behind what was read, or on the same again in
    another order where there is no more. Learning rate, decay and revivals begin anew.
    """
    config = lengthened(run.config, n_tokens)
    with _finished(run):
        step = run.config.train.n_steps
        return _ready(run, config, step=step, details={"n_tokens": n_tokens})


def lengthened(config: RunConfig, n_tokens: int) -> RunConfig:
    """Return the config of a run that trains on so many more activations, a batch at least."""
    train = config.train
    if n_tokens < train.batch_size:
        raise InputError(
            f"expected at least one batch ({train.batch_size}) of further {config.unit}s, got "
            f"{n_tokens}"
        )
    total = train.n_steps * train.batch_size + n_tokens
    fields = train.model_dump() | {"n_tokens": total, "extended": (*train.extended, train.n_tokens)}
    return validated(RunConfig, dict(config) | {"train": validated(TrainRecipe, fields)})


def withdraw(run: Run, config: RunConfig) -> None:
    """Make a run that was extended, and has learnt nothing since, what it was with `config`."""
    n_steps = config.train.n_steps
    with lock(run.folder, "start"):
        write_json(run.folder / "config.json", config.model_dump(mode="json"))
        shutil.rmtree(run.folder / "extend", ignore_errors=True)
        status = read_status(run.folder)._replace(state="finished", error=None, stage=None)
        write_status(run.folder, status._replace(step=n_steps, n_steps=n_steps, done=0, total=0))
        run.add_event("extension withdrawn")


@contextmanager
def _finished(run: Run) -> Iterator[None]:
    """Hold a run that can be extended; InputError says why another cannot."""
    if run.config.imported is not None or is_example(run):
        what = "SAEs of another library" if run.config.imported else "what ships with the package"
        raise InputError(
            f"expected a run that was trained here to extend, got {run.id}, which holds {what}; "
            "finetune makes a new run of them"
        )
    busy = f"expected a run that no process works on, got {run.id}; wait until it has finished"
    with writing(run.folder, 0), lock(run.folder, "start"), holding(run.folder, busy):
        if (state := run.status.state) != "finished":
            raise InputError(
                f"expected a finished run to extend, got {run.id}, which is {state}; "
                f"python -m gsae_core resume {run.folder}"
            )
        if not (run.folder / "resume" / "state.json").exists():
            raise InputError(
                f"expected the resumable state of {run.id} to go on from, found none in "
                f"{run.folder / 'resume'}; finetune goes on from the weights alone, in a new run"
            )
        yield


def _ready(run: Run, config: RunConfig, *, step: int, details: dict[str, object]) -> Run:
    """Write what makes `resume` go on with a run: its status, and last its config."""
    run.add_event("extended", **details)
    status = read_status(run.folder)._replace(state="queued", pid=None, process_started=None)
    status = status._replace(step=step, n_steps=config.train.n_steps, stage=None, done=0, total=0)
    write_status(run.folder, status)
    write_json(run.folder / "config.json", config.model_dump(mode="json"))
    return Run(run.folder, config)
