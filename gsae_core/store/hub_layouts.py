"""Which SAEs a list of file names holds, before anything is downloaded.

Names alone decide what is offered and which files are fetched; what an SAE really is, its content
tells once it is here. Nothing here imports torch or asks the Hub.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from gsae_core.errors import InputError
from gsae_core.store.formats.found import FORMATS, Format

LARGEST_CONFIG = 2**20
CONFIGS = (".json",)


class HubFile(NamedTuple):
    """A file of a repository, with what proves that a download of it is whole."""

    path: str
    n_bytes: int
    sha256: str | None
    """Of large files; None for those that git holds itself."""

    blob_id: str
    """SHA-1 of git's blob: of the content, or of the pointer to a large file."""


class Layout(NamedTuple):
    """How one library names its files."""

    format: Format
    weights: str
    """Pattern of the file's name."""

    config: str | None
    """Name of the file that must stand beside it."""

    beside: tuple[str, ...] = ()
    """Files that are fetched too where they are, beside every JSON file."""

    config_above: bool = False
    """Whether the config stands a folder higher."""


LAYOUTS = (
    Layout(
        "sae_lens",
        r"sae_weights\.safetensors",
        "cfg.json",
        ("activation_whitening.safetensors", "feature_stats.safetensors"),
    ),
    Layout("sparsify", r"sae\.safetensors", "cfg.json"),
    Layout("dictionary_learning", r"ae\.pt", "config.json"),
    Layout("gemma_scope", r"params\.npz", None),
    Layout("gemma_scope_2", r"params\.safetensors", None),
    Layout("batch_topk", r"sae\.pt", "config.json"),
    Layout("llama_scope", r"final\.safetensors", "hyperparams.json", config_above=True),
)

# A single file of these kinds may hold an SAE under a name that tells nothing.
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


class HubSAE(NamedTuple):
    """An SAE of a repository, as its names tell it."""

    path: str
    """Its folder in the repository, "" for the root; or the file, where that was asked for."""

    format: Format | None
    """None: no layout that is known; its content will tell."""

    files: tuple[HubFile, ...]
    """What has to be fetched, the weights first."""

    @property
    def n_bytes(self) -> int:
        """Size of the download."""
        return sum(file.n_bytes for file in self.files)

    @property
    def library(self) -> str:
        """What a person calls the layout."""
        return "unknown until it is here" if self.format is None else FORMATS[self.format]


def check_path(path: str) -> str:
    """Return a path of a repository if it is safe as one below a folder of this machine.

    Raises:
        InputError: if it could lead elsewhere, or no file system would take it.
    """
    parts = path.split("/")
    bad = any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts)
    if bad or re.search(r'[\\\x00-\x1f:*?"<>|]', path) or len(path) > 1000:
        raise InputError(
            f"expected the path of a file inside the repository, got {path[:200]!r}, which could "
            "lead out of the download's folder; it is left alone"
        )
    return path


def find_on_hub(files: Sequence[HubFile]) -> list[HubSAE]:
    """Return the SAEs whose file names fit a layout, by path."""
    by_folder: dict[str, dict[str, HubFile]] = {}
    for file in files:
        folder, _, name = file.path.rpartition("/")
        by_folder.setdefault(folder, {})[name] = file
    found = []
    for folder, names in sorted(by_folder.items()):
        for layout in LAYOUTS:
            sae = _fits(layout, folder, names, by_folder)
            if sae is not None:
                found.append(sae)
    return found


def _fits(
    layout: Layout, folder: str, names: dict[str, HubFile], all_: dict[str, dict[str, HubFile]]
) -> HubSAE | None:
    weights = next((file for name, file in names.items() if _is(layout, name)), None)
    if weights is None:
        return None
    where = folder
    if layout.config_above:
        where = folder.rpartition("/")[0]
    if layout.config is not None and layout.config not in all_.get(where, {}):
        return None
    beside = [*_configs(all_.get(where, {})), *(names[n] for n in layout.beside if n in names)]
    return HubSAE(where, layout.format, (weights, *beside))


def _is(layout: Layout, name: str) -> bool:
    return re.fullmatch(layout.weights, name) is not None


def _configs(names: dict[str, HubFile]) -> Iterable[HubFile]:
    return (
        file
        for name, file in sorted(names.items())
        if name.endswith(CONFIGS) and file.n_bytes <= LARGEST_CONFIG
    )


def choose(files: Sequence[HubFile], path: str) -> list[HubSAE]:
    """Return the SAEs at or below a path of the repository: a folder, or the weights themselves.

    Args:
        path: "" for the whole repository.
    """
    path = path.strip("/")
    saes = find_on_hub(files)
    if not path:
        return saes
    exact = [sae for sae in saes if sae.path == path or sae.files[0].path == path]
    if exact:
        return exact
    below = [sae for sae in saes if sae.path.startswith(f"{path}/")]
    named = next((file for file in files if file.path == path), None)
    if below or named is None or PurePosixPath(path).suffix not in WEIGHTS:
        return below
    folder = path.rpartition("/")[0]
    names = {f.path.rpartition("/")[2]: f for f in files if f.path.rpartition("/")[0] == folder}
    return [HubSAE(path, None, (named, *_configs(names)))]
