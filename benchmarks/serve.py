"""The far end of a benchmark: a process that prepares one piece of work and does it when told.

Ours and the peers' alike, the latter in their own environments: this module needs torch and nothing
else that the peers might lack. One JSON object a line:

    <- {"ready": true, "torch": "2.13.0"}    when the work is prepared
    -> go                                    <- {"ms": 12.3, ...what the work returns}
    -> weigh                                 <- {"temporary": bytes or null}
    -> look                                  <- {"resident": bytes or null, ...facts on the work}

and the process ends when its input does.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Job = dict[str, Any]
STATUS = Path("/proc/self/status")


class Work(NamedTuple):
    """One piece of work, ready to be done again and again."""

    run: Callable[[], dict[str, Any] | None]
    """Does it once, timed; may return facts about it."""

    tidy: Callable[[], None] = lambda: None
    """Drops what a step leaves behind and the next one makes anew (gradients); not timed."""

    look: Callable[[], dict[str, Any]] = dict
    """Returns what is to be known of the work after the last round: versions, the L0 it held."""


def serve(prepare: Callable[[Job], Work]) -> None:
    """Prepare the job that the command line holds as JSON, then answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Libraries print as they please; the answers' channel is not theirs.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    job: Job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    work = prepare(job)
    say({"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        match line.strip():
            case "go":
                say(_timed(work, device))
            case "weigh":
                say(_weighed(work, device))
            case "look":
                say({"resident": _resident(device), **work.look()})


def _timed(work: Work, device: torch.device) -> dict[str, Any]:
    _synchronise(device)
    began = time.perf_counter()
    found = work.run()
    _synchronise(device)
    return {"ms": 1e3 * (time.perf_counter() - began), **(found or {})}


def _weighed(work: Work, device: torch.device) -> dict[str, Any]:
    """Return the most memory the work held at once beyond what lies there between two steps.

    On a GPU by torch's own account. On Linux by the kernel's: its high-water mark of the resident
    set, reset just before, so nothing can slip between two samples. Elsewhere nothing.
    """
    work.tidy()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif _reset_high_water():
        before = _status("VmRSS")
    else:
        return {"temporary": None}
    work.run()
    _synchronise(device)
    peak = _resident(device)
    assert peak is not None  # there is a high-water mark, or it could not have been reset
    return {"temporary": peak - before}


def _resident(device: torch.device) -> int | None:
    """Return the most memory held at once: since the last `weigh`, or else since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.is_file() else None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_high_water() -> bool:
    """Give unused memory back and set the high-water mark to what is left; False if not Linux."""
    try:
        # Freed blocks that the allocator keeps would be used again without being seen to grow.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(field: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
