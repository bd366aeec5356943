"""The runs in a folder: found by name, listed newest first, the damaged ones with a reason."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

from gsae_core.errors import InputError
from gsae_core.store.files import unreadable
from gsae_core.store.runs import Run, check_layout, check_run_id
from gsae_core.store.status import Status, read_status


class UnreadableRun(NamedTuple):
    """A folder that looks like a run and cannot be opened."""

    id: str
    reason: str


class Listed(NamedTuple):
    """A run, and what its process said last."""

    run: Run
    said: Status


def find_run(root: Path | str, run_id: str) -> Run:
    """Return a run by its name; the name cannot lead out of `root`.

    Raises:
        InputError: if the name is no run id or there is no such run under `root`.
    """
    folder = Path(root).absolute() / check_run_id(run_id)
    if not folder.resolve().is_relative_to(Path(root).resolve()):
        raise InputError(f"expected a run inside {root}, got {run_id!r}, which leads out of it")
    return Run.open(folder)


def list_runs(root: Path | str) -> list[Run]:
    """Return the runs under `root`, newest first; those that cannot be read are left out."""
    return [found.run for found in survey(root)[0]]


def unreadable_runs(root: Path | str) -> list[UnreadableRun]:
    """Return the folders under `root` that `list_runs` leaves out, each with its reason."""
    return survey(root)[1]


def survey(root: Path | str) -> tuple[list[Listed], list[UnreadableRun]]:
    """Return the runs under `root`, newest first, and the folders of runs that cannot be read."""
    listed: list[tuple[float, Listed]] = []
    unreadable: list[UnreadableRun] = []
    for folder in sorted(Path(root).glob("*")):
        if folder.name.startswith("."):
            continue  # The queue, transfers, or deleted but for the removal of its files.
        try:
            if (looked := _look(Path(root), folder)) is not None:
                listed.append(looked)
        except InputError as error:
            if folder.is_dir():  # not deleted between the listing and the look
                unreadable.append(UnreadableRun(folder.name, str(error)))
    newest_first = sorted(listed, key=lambda pair: pair[0], reverse=True)
    return [each for _, each in newest_first], unreadable


# What a run has once it began; with one of these and a status, but no config, it has lost that.
BEGUN = ("metrics.jsonl", "log.txt", "saes", "resume", "evals.json")


def _look(root: Path, folder: Path) -> tuple[float, Listed] | None:
    """Return a run and when it was made; None for a folder that is no run.

    Raises:
        InputError: if a file that says what the run is, or where it stands, cannot be read.
    """
    config, events = folder / "config.json", folder / "events.jsonl"
    if not (os.path.lexists(config) or _has_lost_its_config(folder)):
        return None
    made = _stat(config)
    run = _opened(root, folder.name, made.st_mtime_ns, made.st_size)
    if os.path.lexists(events):
        seen = _stat(events)
        _checked(folder, seen.st_ino, seen.st_mtime_ns, seen.st_size)
    return made.st_mtime, Listed(run, read_status(run.folder))


def _has_lost_its_config(folder: Path) -> bool:
    names = ("status.json", *BEGUN)
    has_status, *begun = (os.path.lexists(folder / name) for name in names)
    return has_status and any(begun)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(unreadable(path, error)) from None


# A config is written once and judged in milliseconds: two hundred of them are a slow page.
@functools.lru_cache(maxsize=2048)
def _opened(root: Path, run_id: str, mtime_ns: int, size: int) -> Run:
    """Return a run; the last two arguments tell a changed config from the one judged before."""
    return find_run(root, run_id)


@functools.lru_cache(maxsize=4096)
def _checked(folder: Path, inode: int, mtime_ns: int, size: int) -> None:
    check_layout(folder)
