"""What to change when a run failed, by what its cause says."""

import re
from typing import NamedTuple


class Failure(NamedTuple):
    """Why a run failed and the one thing to change."""

    cause: str
    advice: str


_ADVICE = (
    (
        r"out of memory|cannot allocate|MemoryError|enough memory|expected .* free memory",
        "Train fewer SAEs at once, narrow them, or use a smaller batch.",
    ),
    (r"No space left|make room on the disk", "Free some disk space, then resume: nothing is lost."),
    (r"expected finite activations", ""),  # it says itself what to change
    (r"\bnan\b|\binf\b|not finite", "Lower the learning rate, or lengthen its warm-up."),
    (
        r"gated repo|accept|401|403",
        "Accept the licence on the model's page, sign in with the Hub's command line, then resume.",
    ),
    (
        r"offline|HF_HUB_OFFLINE|network|connection|resolve",
        "Connect to the network, or give a local folder as the model or the data.",
    ),
)


def explain(error: str | None) -> Failure:
    """Return the headline cause and a suggested change, empty where the cause says it itself."""
    if not error:
        return Failure("The process gave no reason.", "The last lines of its log are below.")
    cause = error if error.endswith((".", "!", "?")) else f"{error}."
    for pattern, advice in _ADVICE:
        if re.search(pattern, error, re.IGNORECASE):
            said = advice.lower() in error.lower()
            return Failure(cause, "" if said else advice)
    return Failure(cause, "")
