"""The runs in a folder: found by name, listed newest first, the damaged ones with a reason."""

import functools
from pathlib import Path
from typing import NamedTuple

from gsae_core.errors import InputError
from gsae_core.store.runs import Run, check_run_id
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
    return [found.run for found in _survey(Path(root)) if isinstance(found, Listed)]


def list_statuses(root: Path | str) -> list[Listed]:
    """Return what `list_runs` does, each with what its status.json says: read once, not twice."""
    return [found for found in _survey(Path(root)) if isinstance(found, Listed)]


def unreadable_runs(root: Path | str) -> list[UnreadableRun]:
    """Return the folders under `root` that `list_runs` leaves out, each with its reason."""
    return [found for found in _survey(Path(root)) if isinstance(found, UnreadableRun)]


def _survey(root: Path) -> list[Listed | UnreadableRun]:
    found: list[tuple[float, Listed | UnreadableRun]] = []
    for config in root.glob("*/config.json"):
        try:
            if config.parent.name.startswith("."):
                continue  # Deleted, but for the removal of its files.
            stat = config.stat()
            run = _opened(root, config.parent.name, stat.st_mtime_ns, stat.st_size)
            found.append((stat.st_mtime, Listed(run, read_status(run.folder))))
        except InputError as error:
            found.append((0.0, UnreadableRun(config.parent.name, str(error))))
        except FileNotFoundError:
            continue  # Deleted between the listing and the look.
    return [each for _, each in sorted(found, key=lambda pair: pair[0], reverse=True)]


# A config is written once and judged in milliseconds: two hundred of them are a slow page.
@functools.lru_cache(maxsize=2048)
def _opened(root: Path, run_id: str, mtime_ns: int, size: int) -> Run:
    """Return a run; the last two arguments tell a changed config from the one judged before."""
    return find_run(root, run_id)
