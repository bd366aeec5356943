"""How far a run is and how long it still takes, from what it wrote so far."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gsae_core.store.status import Status

RECENT = 10  # logged steps that the speed is taken from: old ones say little about now


class Progress(NamedTuple):
    """Where a run stands."""

    share: float
    """Steps done over steps planned."""

    tokens_per_second: float | None
    """Activation vectors a second lately; None until two steps were logged."""

    seconds_left: float | None
    """Training time left at that speed."""


def progress(status: Status, rows: Sequence[Mapping[str, Any]]) -> Progress:
    """Return where a run stands.

    Args:
        rows: what `Run.metrics` returns, oldest first.
    """
    share = min(status.step / status.n_steps, 1.0) if status.n_steps else 0.0
    steps = {row["step"]: row for row in rows}
    recent = list(steps.values())[-RECENT:]
    if len(recent) < 2 or recent[-1]["seconds"] <= recent[0]["seconds"]:
        return Progress(share, None, None)
    first, last = recent[0], recent[-1]
    seconds = last["seconds"] - first["seconds"]
    step_seconds = seconds / (last["step"] - first["step"])
    left = max(status.n_steps - status.step, 0) * step_seconds
    return Progress(share, (last["tokens"] - first["tokens"]) / seconds, left)
