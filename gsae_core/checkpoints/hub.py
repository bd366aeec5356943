"""Look at a repository on the Hub: which SAEs it holds and how large they are; nothing is kept.

    look(parse_address("google/gemma-scope-2b-pt-res:layer_12/width_16k")) -> Repository

Every answer names the commit it is of, and all that is fetched later is fetched from that commit.
Tokens are huggingface_hub's business alone: the environment's or the login's, never seen here.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from gsae_core.checkpoints.formats.found import FORMATS, Format
from gsae_core.errors import InputError, hub_answers

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


MOST_FILES = 50_000

_WEB = re.compile(
    r"https?://[^/]+/(?P<repo>[^/]+/[^/]+)(/(tree|blob)/(?P<rev>[^/]+)(/(?P<path>.+))?)?"
)
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Address(NamedTuple):
    """What a person points at."""

    repo: str
    path: str = ""
    """Folder or file in it; "" for all of it."""

    revision: str | None = None
    """Branch, tag or commit; None for the default branch."""

    def __str__(self) -> str:
        path = f":{self.path}" if self.path else ""
        return f"{self.repo}{path}{f'@{self.revision}' if self.revision else ''}"


class Repository(NamedTuple):
    """A repository at one commit."""

    asked: Address
    repo: str
    """Its name now: another than asked for if it was renamed."""

    commit: str
    files: tuple[HubFile, ...]
    saes: tuple[HubSAE, ...]
    """Those at or below the path asked for."""

    private: bool
    license: str | None
    """As its card names it; None where it does not."""

    @property
    def renamed(self) -> str | None:
        """A sentence, if the repository has another name by now."""
        if self.repo.lower() == self.asked.repo.lower():
            return None
        return f"{self.asked.repo} is called {self.repo} by now; that one is used"


class Facts(NamedTuple):
    """What an SAE's small files and the first bytes of its weights tell; None: they do not."""

    architecture: str | None
    d_in: int | None
    d_sae: int | None
    model: str | None
    hook_name: str | None


def parse_address(text: str) -> Address:
    """Return what `REPO[:PATH][@REV]`, or the address of a page of the Hub, points at.

    Raises:
        InputError: if it is neither.
    """
    text = text.strip()
    if web := _WEB.fullmatch(text):
        return Address(web["repo"], (web["path"] or "").strip("/"), web["rev"])
    rest, _, revision = text.partition("@")
    repo, _, path = rest.partition(":")
    if not _REPO.fullmatch(repo) or (not revision and "@" in text):
        raise InputError(
            "expected a repository on the Hub as OWNER/NAME, OWNER/NAME:FOLDER or "
            f"OWNER/NAME:FOLDER@REVISION, got {text[:200]!r}; copy it from its page"
        )
    path = path.strip("/")
    return Address(repo, check_path(path) if path else "", revision or None)


def look(address: Address) -> Repository:
    """Return a repository's commit, its files with sizes, and the SAEs in it.

    Raises:
        InputError: why the Hub cannot be asked, or what it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="gsae_core")
    with hub_answers(address.repo, what="SAE", revision=address.revision):
        info = api.model_info(address.repo, revision=address.revision)
        entries = api.list_repo_tree(info.id, revision=info.sha, recursive=True)
        files = []
        for entry in entries:
            if isinstance(entry, RepoFile):
                files.append(_file(entry))
            if len(files) > MOST_FILES:
                raise InputError(
                    f"expected at most {MOST_FILES:,} files in {address.repo}, found more; this is "
                    "no repository of SAEs"
                )
    card: Any = info.card_data
    return Repository(
        asked=address,
        repo=info.id,
        commit=str(info.sha),
        files=tuple(files),
        saes=tuple(choose(files, address.path)),
        private=bool(info.private),
        license=None if card is None else _text(card.get("license")),
    )


def _file(entry: Any) -> HubFile:
    if entry.lfs is None:
        return HubFile(entry.path, entry.size, None, entry.blob_id)
    return HubFile(entry.path, entry.lfs.size, entry.lfs.sha256, entry.blob_id)


def _text(value: object) -> str | None:
    return value[:200] if isinstance(value, str) else None


def one_sae(repository: Repository) -> HubSAE:
    """Return the SAE that the address points at.

    Raises:
        InputError: if there is none or there are several; names some.
    """
    saes, asked = repository.saes, repository.asked
    if len(saes) == 1:
        return saes[0]
    if not saes:
        n = len(repository.files)
        raise InputError(
            f"expected an SAE in {asked}, found none among {n} file{'s' * (n != 1)}; list what the "
            f"repository holds: python -m gsae_core pull {repository.repo} --list"
        )
    names = ", ".join(sae.path for sae in saes[:3])
    raise InputError(
        f"expected one SAE, found {len(saes)} in {asked}; name one after a colon ({names}, ...), "
        f"all are listed by: python -m gsae_core pull {asked} --list"
    )


def describe(repository: Repository, sae: HubSAE) -> Facts:
    """Return what an SAE says of itself, from some kilobytes of it.

    Raises:
        InputError: why the Hub cannot be asked.
    """
    config: dict[str, Any] = {}
    for file in sae.files[1:]:
        if file.path.endswith(".json") and file.n_bytes <= LARGEST_CONFIG:
            config |= _flat(_small_json(repository, file))
    d_in, d_sae = _whole(config, "d_in", "activation_dim"), _whole(config, "d_sae", "dict_size")
    if sae.files[0].path.endswith(".safetensors") and (d_in is None or d_sae is None):
        d_in, d_sae = _widths(repository, sae.files[0].path)
    return Facts(
        architecture=_first(config, "architecture", "dict_class", "sae_type"),
        d_in=d_in,
        d_sae=d_sae,
        model=_first(config, "model_name", "lm_name"),
        hook_name=_first(config, "hook_name", "hook_point", "hf_hook_point_in", "submodule_name"),
    )


def _small_json(repository: Repository, file: HubFile) -> dict[str, Any]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    with hub_answers(repository.repo, what="SAE", file=file.path):
        url = hf_hub_url(repository.repo, file.path, revision=repository.commit)
        answer = get_session().get(url, headers=build_hf_headers(library_name="gsae_core"))
        hf_raise_for_status(answer)
    try:
        found = json.loads(answer.content)
    except (ValueError, RecursionError):
        return {}  # Its download says so, and which file it is.
    return found if isinstance(found, dict) else {}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with what `metadata`, `trainer` and `buffer` hold beside its own keys."""
    inner: dict[str, Any] = {}
    for name in ("metadata", "buffer", "trainer"):
        if isinstance(config.get(name), dict):
            inner |= config[name]
    return inner | config


def _widths(repository: Repository, path: str) -> tuple[int | None, int | None]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    with hub_answers(repository.repo, what="SAE", file=path):
        try:
            header = HfApi(library_name="gsae_core").parse_safetensors_file_metadata(
                repository.repo, path, revision=repository.commit
            )
        except SafetensorsParsingError:
            return None, None  # Its download says so.
    for name, tensor in header.tensors.items():
        if name.lower() in ("w_dec", "encoder.weight") and len(tensor.shape) == 2:
            return tensor.shape[1], tensor.shape[0]
    return None, None


def _first(config: dict[str, Any], *keys: str) -> str | None:
    return next((text for key in keys if (text := _text(config.get(key)))), None)


def _whole(config: dict[str, Any], *keys: str) -> int | None:
    values = (config.get(key) for key in keys)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
