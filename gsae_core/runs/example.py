"""The pair of SAEs that ships with the package, as a run that is only read.

`scripts.make_example` made it. What people say of its features is kept beside their own runs.
"""

from pathlib import Path

from gsae_core.files import EXAMPLE
from gsae_core.runs.run import Run

EXAMPLE_ID = EXAMPLE.name

SHOWN_SAE, SHOWN_FEATURE = "gated-0.35", 293
"""What opens first: a feature that fires on `def`, and raises names of functions."""


def example_run() -> Run | None:
    """Return the run; None in a package that was built without it."""
    return Run.open(EXAMPLE) if (EXAMPLE / "config.json").is_file() else None


def is_example(run: Run) -> bool:
    """Return whether a run is the one that ships with the package."""
    return run.folder == EXAMPLE


def labels_folder(root: Path, name: str) -> Path:
    """Return where what is said of one of its SAEs is kept; it need not be there yet.

    Args:
        root: folder of runs; what is in it under a name with a dot is not listed.
    """
    return root / ".example" / name
