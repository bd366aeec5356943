"""Start a run from a page: one press, one run, and the command line that would do the same."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gsae_core.config import RunConfig
from gsae_core.files import lock, writing
from gsae_core.runs.jobs.job import ACTIVE
from gsae_core.runs.jobs.process import start
from gsae_core.runs.run import Run, list_runs

if TYPE_CHECKING:
    pass


def launch(root: Path, config: RunConfig, *, nonce: str) -> Run:
    """Make a run under `root` and start it; return the one there is if it was made before.

    A run with the same config that waits or trains now is that one too, started from here or not:
    its seed is the same, so a second one would find the same numbers.

    Args:
        nonce: one for each intention to start: a double press has the same and starts one run.

    Raises:
        InputError: if the folder cannot be made or written.
    """
    with writing(root, 0):
        root.mkdir(parents=True, exist_ok=True)
        # Two visitors who press at once are served one after the other.
        with lock(root, "launch"):
            made = sorted(root.glob(f"*-{nonce}/config.json"))
            run = Run.open(made[0].parent) if made else _same_job(root, config)
            run = run or Run.create(root / run_id(config, nonce), config)
            if run.status.state == "queued":
                start(run)
    return run


def _same_job(root: Path, config: RunConfig) -> Run | None:
    alike = (run for run in list_runs(root) if run.config == config)
    return next((run for run in alike if run.status.state in ("queued", *ACTIVE)), None)


def run_id(config: RunConfig, nonce: str) -> str:
    """Return a name for a new run: what it is, when it began, and the nonce."""
    place = f"{Path(config.model.name).name}-L{config.model.layer}-{config.model.site}"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", config.preset or place).strip("-._") or "run"
    return f"{stem[:32]}-{time.strftime('%m%d-%H%M')}-{nonce}"
