"""Is this machine fit for the work? Every check is a line; a bad one says what to do."""

import platform
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from gsae_core.errors import EXTRAS, InputError, extra_sentence
from gsae_core.files import free_bytes, readable
from gsae_core.machine import installed

# What the quick preset takes, with room to spare: 1.2 GB of memory and 0.3 GB of files.
MEMORY = 2 * 10**9
DISK = 10**9
HUB = "huggingface.co"

# What training takes, with any preset and any data set: the Pile comes as .zst, others as Parquet.
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface-hub"),
    *("pyarrow", "jinja2"),
    *(("backports.zstd",) if sys.version_info < (3, 14) else ()),
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
        if found := installed(package):
            yield Check(package, "ok", found)
        else:
            yield Check(package, "bad", "not installed; install gsae-core again")
    yield from map(extra, EXTRAS)
    yield device()
    yield room("memory", psutil.virtual_memory().available, MEMORY, "close other programs")
    yield room("disk", free_bytes(runs), DISK, "make room")
    yield folder(runs)
    yield bundled_model()
    yield hub()


def extra(name: str) -> Check:
    """Return whether the packages of an extra are installed."""
    versions = {package: installed(package) for package in EXTRAS[name].packages.values()}
    absent = [package for package, version in versions.items() if version is None]
    if absent:
        return Check(f"extra {name}", "note", extra_sentence(name, *absent))
    found = ", ".join(f"{package} {version}" for package, version in versions.items())
    return Check(f"extra {name}", "ok", found)


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


def folder(runs: Path) -> Check:
    """Return whether `runs` can be written; makes nothing there."""
    place = next(each for each in (runs, *runs.absolute().parents) if each.exists())
    try:
        # In earnest, since permission bits do not tell of read-only mounts.
        with tempfile.TemporaryFile(dir=place):
            return Check("runs folder", "ok", f"{runs} can be written")
    except OSError as error:
        why = f"{runs} cannot be written ({error.strerror})"
        return Check("runs folder", "bad", f"{why}; give train another place with --out")


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
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
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
