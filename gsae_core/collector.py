"""Garbage collections that stay short in a server full of modules."""

import gc
import sys
from collections.abc import Mapping

_n_modules = 0


def spare_modules() -> None:
    """Have later collections leave out what lives as long as the process: modules, once imported.

    Streamlit collects after every run of a page and every tick of a fragment, holding the
    interpreter's lock. With pandas and plotly imported that took 0.2 s each time, in which no other
    visitor is served and the last messages of the page wait to be sent.
    """
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)


def _freeze(phase: str, info: Mapping[str, int]) -> None:
    global _n_modules
    # Right after a full collection nothing that is kept is garbage. All that a count frees is
    # freed all the same; only cycles that are alive now and die later are never found.
    if phase == "stop" and info["generation"] == 2 and len(sys.modules) != _n_modules:
        _n_modules = len(sys.modules)
        gc.freeze()
