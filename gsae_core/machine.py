"""What this machine has, asked without torch: the home page opens before torch could load."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from gsae_core.files import free_bytes


class Machine(NamedTuple):
    """Processor cores this process may use, memory, disk and NVIDIA GPUs; sizes in bytes."""

    n_cores: int
    memory_total: int
    memory_free: int
    """What can be had without swapping."""
    disk_free: int
    """Where runs are kept."""
    gpus: tuple[str, ...]
    """As `gpus` returns them."""


def machine(folder: Path) -> Machine:
    """Return what there is now; `folder` is where runs are kept."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(
        n_cores=cores or 1,
        memory_total=memory.total,
        memory_free=memory.available,
        disk_free=free_bytes(folder),
        gpus=gpus(),
    )


@functools.cache
def gpus() -> tuple[str, ...]:
    """Return name and memory of each NVIDIA GPU that the driver lists; none without a driver.

    Raises:
        subprocess.TimeoutExpired: if the driver does not answer in 5 s.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    return tuple(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ()


def run_python(*arguments: str, seconds: float | int, given: str = "") -> tuple[bool, str]:
    """Return whether `python -m ARGUMENTS` succeeded, and its last line (of errors if it did not).

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`, and was ended.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0 and bool(lines), (lines or ["it ended without a message"])[-1]


def slot_of(device: str) -> str:
    """Return the name of the slot a config's device means on this machine, e.g. `cuda-0`.

    Of a device that is not here, `auto`'s takes the place. Asked without torch, which takes seconds
    and hundreds of MB for a process that only waits.
    """
    kind, _, index = device.partition(":")
    visible, number = _visible_gpus(), int(index) if index.isdecimal() else 0
    here = {"cpu": True, "mps": _is_apple(), "cuda": number < len(visible)}
    if not here.get(kind):
        kind, number = "cuda" if visible else "mps" if here["mps"] else "cpu", 0
    # CUDA_VISIBLE_DEVICES renumbers devices: cuda:0 of one shell may be cuda:1 of another.
    return f"cuda-{visible[number]}" if kind == "cuda" else kind


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(len(gpus()))]
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def cache_folder(kind: str) -> Path:
    """Return where a kind of thing is kept between runs; delete it whenever no run is on."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gsae_core" / kind


PACKAGES = (
    "gsae-core streamlit torch transformers transformer-lens huggingface-hub safetensors plotly "
    "numpy pandas"
)


def versions() -> dict[str, str]:
    """Return the version of this package, of Python and of what the results depend on."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    return found | {package: installed(package) or "not installed" for package in PACKAGES.split()}


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
