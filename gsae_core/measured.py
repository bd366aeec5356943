"""What was measured on this machine once, kept in the user's cache folder for the next run."""

import json
import logging
import os
import platform
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path:
    """Return where a kind of thing is kept between runs; delete it whenever no run is on."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gsae_core" / kind


def known(kind: str, key: object) -> float | None:
    """Return the number remembered under `key`, or None."""
    try:
        number = json.loads(_path(kind, key).read_text(encoding="utf-8"))["number"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not measured yet, or a process died while writing
    return number if isinstance(number, float) else None


def remembered(kind: str, key: object, measure: Callable[[], float]) -> float:
    """Return the number remembered under `key`, measured and remembered if there is none.

    Args:
        kind: what is measured; a folder of its own.
        key: everything the number depends on, in its `repr`.
        measure: called by one process at a time.
    """
    path = _path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("measured again in every run, for it cannot be kept: %s", error)
        return measure()
    # Two runs that start together measure one after the other, or they would measure each other.
    with FileLock(path.parent / ".lock"):
        number = known(kind, key)
        if number is None:
            number = measure()
            path.write_text(json.dumps({"number": number, "key": repr(key)}), encoding="utf-8")
            log.info("measured %s: %g; kept in %s", kind, number, path)
    return number


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _path(kind: str, key: object) -> Path:
    return cache_folder(kind) / f"{sha256(repr(key).encode()).hexdigest()[:32]}.json"
