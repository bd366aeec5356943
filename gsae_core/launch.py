"""Start a run from a page: one press, one run, and the command line that would do the same."""

import dataclasses
import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsae_core.config import RunConfig
from gsae_core.errors import InputError
from gsae_core.store.files import writing
from gsae_core.store.jobs import start
from gsae_core.store.listing import list_runs
from gsae_core.store.runs import Run
from gsae_core.store.status import ACTIVE, lock

if TYPE_CHECKING:
    from gsae_core.flags import Train


def runs_root() -> Path:
    """Return the folder runs are kept in: `runs`, unless GSAE_RUNS names another."""
    return Path(os.environ.get("GSAE_RUNS", "runs"))


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


def command_line(flags: "Train") -> str:
    """Return the command that trains exactly what `flags` describes, quoted for a shell."""
    words = ["python", "-m", "gsae_core", "train"]
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if value is not None and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *_words(value)]
    return shlex.join(words)


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    return [_exact(v) if isinstance(v, float) else str(v) for v in _listed(value)]


def _exact(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def numbers(text: str, field: str) -> tuple[float, ...]:
    """Return the numbers in a text field, separated by spaces, commas or semicolons.

    Raises:
        InputError: if a word is no number, or there is none.
    """
    words = re.split(r"[\s,;]+", text.strip())
    try:
        found = tuple(float(word) for word in words)
    except ValueError:
        wanted = "numbers separated by spaces, like 0.1 0.2"
        raise InputError(f"{field}: expected {wanted}, got {text!r}") from None
    return found


def whole(text: str, field: str) -> int:
    """Return the whole number in a text field; 2e6, 2 M, 2_000_000 and 2,000,000 are all read.

    Raises:
        InputError: if it is no whole number.
    """
    try:
        digits = re.sub(r"[\s,_]", "", text)
        unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(digits[-1:].lower())
        number = float(digits) if unit is None else round(float(digits[:-1]) * unit, 3)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise InputError(
            f"{field}: expected a whole number, like 2_000_000, got {text!r}"
        ) from None
    return int(number)


def in_labels(sentence: str, labels: Mapping[str, str]) -> str:
    """Return an error of the command line in a form's words: flags become the fields' labels."""
    return re.sub(r"--[a-z-]+", lambda flag: labels.get(flag[0], flag[0]), sentence)
