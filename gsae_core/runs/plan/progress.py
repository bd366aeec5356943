"""How far a run is and how long it still takes, from what it wrote so far."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gsae_core.runs.jobs.job import Status

RECENT = 10  # logged steps that the speed is taken from: old ones say little about now


class Speed(NamedTuple):
    """How far a run is, and how fast."""

    share: float
    """Steps done over steps planned."""
    tokens_per_second: float | None
    """Activation vectors a second lately; None until two steps were logged."""
    seconds_left: float | None
    """Training time left at that speed."""
    lm_share: float | None = None
    """Share of all training seconds spent in the language model; None for older runs."""
    sae_share: float | None = None
    """Share of all training seconds spent in the SAEs' steps."""


def speed(status: Status, rows: Sequence[Mapping[str, Any]]) -> Speed:
    """Return how far a run is, and how fast, from what `Run.metrics` returns."""
    share = min(status.step / status.n_steps, 1.0) if status.n_steps else 0.0
    steps: dict[int, Mapping[str, Any]] = {}
    for row in rows:  # those of SAEs added to a finished run begin again at step 1
        steps.pop(row["step"], None)
        steps[row["step"]] = row
    recent = list(steps.values())[-RECENT:]
    if not recent:
        return Speed(share, None, None)
    first, last = recent[0], recent[-1]
    shares = (None, None)
    if "seconds_lm" in last and last["seconds"]:
        # Of all seconds and not of the last steps: activations are harvested in bursts.
        shares = (last[part] / last["seconds"] for part in ("seconds_lm", "seconds_sae"))
    seconds = last["seconds"] - first["seconds"]
    if seconds <= 0:
        return Speed(share, None, None, *shares)
    step_seconds = seconds / (last["step"] - first["step"])
    left = max(status.n_steps - status.step, 0) * step_seconds
    return Speed(share, (last["tokens"] - first["tokens"]) / seconds, left, *shares)


Mark = Literal["done", "now", "ahead", "stopped"]


class Phase(NamedTuple):
    """A stretch of a run's life."""

    name: str
    seconds: float | None
    """Its length so far, over all resumes; None if it has not begun."""
    mark: Mark


PHASES = ("queued", "starting", "training", "evaluating")
_ENDS = ("finished", "cancelled", "failed")
# What an event of events.jsonl begins, if anything; events that are not here change nothing.
_BEGINS = {
    "created": "queued",
    "waiting": "queued",
    "started": "starting",
    "loading": "starting",
    "training": "training",
    "evaluating": "evaluating",
    **dict.fromkeys(_ENDS),
}


def timeline(
    events: Sequence[Mapping[str, Any]], status: Status, *, now: float
) -> tuple[Phase, ...]:
    """Return the stretches of a run's life in order, the last one named by how it ended."""
    trained = any(event["event"] == "training" for event in events)
    if status.state == "finished" and status.step and not trained:
        # Of the bundled example the first and the last event are shipped: what lay between took
        # time that is not known, and was not spent in the line.
        return tuple(Phase(name, None, "done") for name in (*PHASES, "finished"))
    spent: dict[str, float] = {}
    current, since = None, 0.0
    for event in events:
        if event["event"] not in _BEGINS:
            continue
        # When a process died that could not say so is not known: that stretch is left out.
        if current is not None and not (event["event"] == "started" and current != "queued"):
            spent[current] += event["time"] - since
        current, since = _BEGINS[event["event"]], event["time"]
        if current is not None:
            spent.setdefault(current, 0.0)
    over = status.state in (*_ENDS, "lost")
    if current is not None:
        spent[current] += max((status.heartbeat if over else now) - since, 0.0)
    end = status.state if over else "finished"
    latest: Mark = "now" if not over else "done" if end == "finished" else "stopped"
    begun = [name for name in PHASES if name in spent]
    phases = []
    for name in PHASES:
        mark = "ahead" if name not in begun else latest if name == begun[-1] else "done"
        phases.append(Phase(name, spent.get(name), mark))
    return (*phases, Phase(end, None, latest if over else "ahead"))
