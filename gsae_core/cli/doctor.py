"""Is this machine fit for the work? Every check is a line; a bad one says what to do."""

import importlib.metadata
import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from gsae_core.errors import InputError
from gsae_core.files import readable

# What the quick preset takes, with room to spare: 1.2 GB of memory and 0.3 GB of files.
MEMORY = 2 * 10**9
DISK = 10**9
HUB = "huggingface.co"

# What training takes, with any preset and any data set: the Pile comes as .zst, others as Parquet.
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "transformer-lens"),
    *("datasets", "huggingface-hub", "pyarrow", "zstandard"),
    *("streamlit", "plotly", "altair", "vl-convert-python", "jinja2"),
)


class Check(NamedTuple):
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "bad"]
    """`note` is no obstacle: something works only in part. `bad` is."""

    found: str
    """What there is, and for a `note` or a `bad` what to do."""


def examine(runs: Path) -> Iterator[Check]:
    """Yield one check after the other; `runs` is the folder that runs are kept in."""
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check("python", "ok", system)
    for package in PACKAGES:
        try:
            yield Check(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "bad", "not installed; pip install -r requirements.txt")
    yield device()
    yield room("memory", psutil.virtual_memory().available, MEMORY, "close other programs")
    yield from folder(runs)
    yield bundled_model()
    yield hub()


def device() -> Check:
    """Return what the work runs on."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("device", "ok", f"CUDA: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Check("device", "ok", "Apple GPU (mps)")
    return Check(
        "device",
        "note",
        f"CPU, {torch.get_num_threads()} threads; enough for the quick preset, not for a model of "
        "billions of parameters",
    )


def room(name: str, free: int, needed: int, advice: str) -> Check:
    """Return whether there is as much free as the quick preset takes."""
    if free >= needed:
        return Check(name, "ok", f"{readable(free)} free")
    wants = f"the quick preset wants {readable(needed)}"
    return Check(name, "bad", f"{readable(free)} free; {advice}: {wants}")


def folder(runs: Path) -> Iterator[Check]:
    """Yield whether the disk has room and `runs` can be written; makes nothing there."""
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    yield room("disk", psutil.disk_usage(str(place)).free, DISK, "make room")
    try:
        # In earnest, since permission bits do not tell of read-only mounts.
        with tempfile.TemporaryFile(dir=place):
            yield Check("runs folder", "ok", f"{runs} can be written")
    except OSError as error:
        yield Check(
            "runs folder",
            "bad",
            f"{runs} cannot be written ({error.strerror}); give train another place with --out",
        )


def bundled_model() -> Check:
    """Return whether the model that ships with the package predicts a token."""
    import torch

    from gsae_core.lm.model import load_model

    try:
        model = load_model("bundled")
        logits = model.logits(torch.tensor([[0, 1, 2]]))
    except (InputError, OSError, RuntimeError) as error:
        return Check("bundled model", "bad", f"{error}; install the package again")
    shape = f"{model.n_layers} layers of width {model.d_model}, {logits.shape[-1]} tokens"
    return Check("bundled model", "ok", f"loads and runs: {shape}")


def hub() -> Check:
    """Return whether the Hub answers within 3 s."""
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "yes", "on"):
        return Check("Hub", "note", "offline by HF_HUB_OFFLINE; local folders and files work")
    try:
        socket.create_connection((HUB, 443), timeout=3).close()
    except OSError as error:
        return Check(
            "Hub",
            "note",
            f"{HUB} does not answer ({error}); local folders and files work, names on the Hub "
            "need the network",
        )
    return Check("Hub", "ok", f"{HUB} answers")
