"""SAEs on the Hub: which ones a repository holds, and their files on this machine.

    look(parse_address("google/gemma-scope-2b-pt-res:layer_12/width_16k")) -> Repository
    fetching(repo, commit, files, folder)       into a folder, in pieces, to be stopped and resumed
    local("OWNER/NAME:PATH@REVISION") -> Path   into the Hugging Face cache, in one call

Every answer names the commit it is of, and all that is fetched later is fetched from that commit.
Tokens are huggingface_hub's business alone: the environment's or the login's, never seen here.
"""

import fnmatch
import json
import logging
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gsae_core.checkpoints.formats.libraries import (
    FORMATS,
    LIBRARIES,
    Format,
    HookPoint,
    first_text,
    hook_point,
    mapping,
    text_of,
    widths,
)
from gsae_core.checkpoints.formats.refused import refusal
from gsae_core.errors import HUB_NAME, InputError, hub_answers
from gsae_core.files import free_bytes, readable, sha256, sync, writing

log: logging.Logger = logging.getLogger(__name__)

LARGEST_CONFIG = 2**20
MOST_FILES = 50_000
# A single file of these kinds may hold an SAE under a name that tells nothing.
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, with what proves that a download of it is whole."""

    path: str
    n_bytes: int
    sha256: str | None  # of large files; None for those that git holds itself
    blob_id: str  # SHA-1 of git's blob: of the content, or of the pointer to a large file


class HubSAE(NamedTuple):
    """An SAE of a repository, as its names tell it."""

    path: str  # its folder, "" for the root; or the file itself, where that was asked for
    format: Format | None  # None: no layout that is known; its content will tell
    files: tuple[HubFile, ...]  # what has to be fetched, the weights first

    @property
    def n_bytes(self) -> int:
        """Size of the download."""
        return sum(file.n_bytes for file in self.files)

    @property
    def library(self) -> str:
        """What a person calls the layout."""
        return "unknown until it is here" if self.format is None else FORMATS[self.format]


def check_path(path: str) -> str:
    """Return a path of a repository if it is safe as one below a folder of this machine."""
    parts = path.split("/")
    bad = re.search(r'[\\\x00-\x1f:*?"<>|\ud800-\udfff]', path) or len(path) > 1000
    if bad or any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts):
        raise InputError(
            f"expected the path of a file inside the repository, got {path[:200]!r}, which could "
            "lead out of the download's folder; it is left alone"
        )
    return path


def find_on_hub(files: Iterable[HubFile]) -> list[HubSAE]:
    """Return the SAEs whose files are named as a library names them, by path."""
    folders = _by_folder(files)
    found: dict[str, HubSAE] = {}
    for folder, names in sorted(folders.items()):
        for format_, library in LIBRARIES.items():
            where = folder.rpartition("/")[0] if library.config_above else folder
            beside = folders.get(where, {})
            alone = "*" in library.weights  # an SAE for each file, beside others and their configs
            for weights in sorted(fnmatch.filter(names, library.weights)):
                config = library.config.replace("*", weights.rpartition(".")[0])
                path = names[weights].path
                if (config and config not in beside) or path in found:
                    continue
                own = {name: beside[name] for name in (config,) if name} if alone else beside
                more = (names[name] for name in library.beside if name in names)
                fetched = (names[weights], *_configs(own), *more)
                found[path] = HubSAE(path if alone else where, format_, fetched)
    return list(found.values())


def _by_folder(files: Iterable[HubFile]) -> dict[str, dict[str, HubFile]]:
    folders: dict[str, dict[str, HubFile]] = {}
    for file in files:
        folder, _, name = file.path.rpartition("/")
        folders.setdefault(folder, {})[name] = file
    return folders


def _configs(folder: dict[str, HubFile]) -> list[HubFile]:
    files = (file for name, file in sorted(folder.items()) if name.endswith(".json"))
    return [file for file in files if file.n_bytes <= LARGEST_CONFIG]


def choose(files: Sequence[HubFile], path: str) -> list[HubSAE]:
    """Return the SAEs at or below a path of the repository: a folder, or the weights themselves."""
    path = path.strip("/")
    saes = find_on_hub(files)
    if not path:
        return saes
    exact = [sae for sae in saes if sae.path == path or sae.files[0].path == path]
    below = exact or [sae for sae in saes if sae.path.startswith(f"{path}/")]
    named = next((file for file in files if file.path == path), None)
    if below or named is None or PurePosixPath(path).suffix not in WEIGHTS:
        return below
    beside = _by_folder(files)[path.rpartition("/")[0]]
    return [HubSAE(path, None, (named, *_configs(beside)))]


_WEB = re.compile(
    r"https?://[^/]+/(?P<repo>[^/]+/[^/]+)(/(tree|blob)/(?P<rev>[^/]+)(/(?P<path>.+))?)?/?"
)


class Address(NamedTuple):
    """What a person points at."""

    repo: str
    path: str = ""  # folder or file in it; "" for all of it
    revision: str | None = None  # branch, tag or commit; None for the default branch

    def __str__(self) -> str:
        path = f":{self.path}" if self.path else ""
        return f"{self.repo}{path}{f'@{self.revision}' if self.revision else ''}"


class Repository(NamedTuple):
    """A repository at one commit."""

    asked: Address
    repo: str  # its name now: another than asked for if it was renamed
    commit: str
    files: tuple[HubFile, ...]
    saes: tuple[HubSAE, ...]  # those at or below the path asked for
    private: bool
    license: str | None  # as its card names it; None where it does not

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
    place: HookPoint


def parse_address(text: str) -> Address:
    """Return what `REPO[:PATH][@REV]`, or the address of a page of the Hub, points at."""
    text = text.strip()
    if web := _WEB.fullmatch(text):
        repo, path, revision = web["repo"], web["path"] or "", web["rev"]
    else:
        rest, at, revision = text.partition("@")
        repo, _, path = rest.partition(":")
        if "://" in text or (at and not revision):
            repo = ""  # the page of something else; half an address
    if not is_repository(repo) or re.search(r"[\ud800-\udfff]", revision or ""):
        raise InputError(
            "expected a repository on the Hub as OWNER/NAME, OWNER/NAME:FOLDER or "
            f"OWNER/NAME:FOLDER@REVISION, got {text[:200]!r}; copy it from its page"
        )
    path = path.strip("/")
    return Address(repo, check_path(path) if path else "", revision or None)


def is_repository(name: str) -> bool:
    """Return whether a repository can have this name, as huggingface_hub has the rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return HUB_NAME.fullmatch(name) is not None


def look(address: Address) -> Repository:
    """Return a repository's commit, its files with sizes, and the SAEs in it.

    InputError says why the Hub cannot be asked, or what it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="gsae_core")
    with hub_answers(address.repo, what="SAE", revision=address.revision):
        info = api.model_info(address.repo, revision=address.revision)
        files = []
        for entry in api.list_repo_tree(info.id, revision=info.sha, recursive=True):
            if isinstance(entry, RepoFile):
                large = entry.lfs
                size, digest = (large.size, large.sha256) if large else (entry.size, None)
                files.append(HubFile(entry.path, size, digest, entry.blob_id))
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
        license=None if card is None else text_of(card.get("license")),
    )


def one_sae(repository: Repository) -> HubSAE:
    """Return the SAE that the address points at.

    InputError names some, if there are several, and what is told to be no SAE by its path.
    """
    saes, asked = repository.saes, repository.asked
    if len(saes) == 1:
        if said := refusal(Path("/", repository.repo, saes[0].files[0].path), (), {}):
            raise InputError(said)
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

    InputError names what is no SAE, such as a transcoder.
    """
    config: dict[str, Any] = {}
    for file in sae.files[1:]:
        if file.path.endswith(".json"):  # no larger than LARGEST_CONFIG
            config |= _small_json(repository, file)
    path = sae.files[0].path
    if said := refusal(Path("/", repository.repo, path), (), config):
        raise InputError(said)
    d_in, d_sae = widths({}, config)
    if path.endswith(".safetensors") and (d_in is None or d_sae is None):
        d_in, d_sae = widths(_shapes(repository, path), config)
    fields = config | mapping(config, "trainer")
    architecture = first_text(fields, ("architecture", "dict_class", "sae_type"))
    place = hook_point(sae.format or "sae_lens", config, Path("/", repository.repo, path))
    return Facts(architecture, d_in, d_sae, place)


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


def _shapes(repository: Repository, path: str) -> dict[str, tuple[int, ...]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    with hub_answers(repository.repo, what="SAE", file=path):
        try:
            header = HfApi(library_name="gsae_core").parse_safetensors_file_metadata(
                repository.repo, path, revision=repository.commit
            )
        except SafetensorsParsingError:
            return {}  # Its download says so.
    return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}


# Downloads. The library's own begins a file anew in every process and checks its size alone. This
# one keeps what came (`.NAME.part`), asks for the rest by range, and believes no file before its
# hash.

TRIES = 5  # of a connection that brings nothing new, with a pause before each
PAUSE_SECONDS = 1.0


def fetching(repo: str, commit: str, files: Sequence[HubFile], folder: Path) -> Generator[int]:
    """Fetch what is missing; yield how many bytes are here after each piece that came.

    Each ends at its own path below `folder`. Closed early, or after an InputError, it leaves what
    came, and the next call goes on from there.
    """
    targets = [(folder / check_path(file.path), file) for file in files]
    needed = sum(max(f.n_bytes - _size(_part(t)), 0) for t, f in targets if not _is_whole(t, f))
    if needed > (free := free_bytes(folder)):
        raise InputError(
            f"expected {readable(needed)} free for the download in {folder}, found "
            f"{readable(free)}; make room on the disk and start it again"
        )
    before = 0
    for target, file in targets:
        if not _is_whole(target, file):
            with writing(target, file.n_bytes):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = _part(target)
                for size in _filling(repo, commit, file, part):
                    yield before + size
                _check(part, file, repo)
                sync(part)
                os.replace(part, target)
        before += file.n_bytes
        yield before


def _filling(repo: str, commit: str, file: HubFile, part: Path) -> Iterator[int]:
    """Append to a partial file until it has its size; yield the size so far."""
    import httpx2

    part.touch()
    tries = TRIES
    with hub_answers(repo, what="SAE", revision=commit, file=file.path):
        while (have := part.stat().st_size) < file.n_bytes:
            broken: Exception | None = None
            try:
                yield from _pieces(repo, commit, file, part)
            except httpx2.TransportError as error:
                broken = error
            now = part.stat().st_size
            tries = TRIES if now > have else tries - 1
            if tries == 0:
                if now == 0 and broken is not None:
                    raise broken
                raise InputError(
                    f"expected {readable(file.n_bytes)} of {file.path} in {repo!r}, the connection "
                    f"broke after {readable(now)}; start it again to go on from there"
                ) from broken
            if now < file.n_bytes:
                time.sleep(PAUSE_SECONDS)


def _pieces(repo: str, commit: str, file: HubFile, part: Path) -> Iterator[int]:
    """Append what one connection brings."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo, file.path, revision=commit)
    # Asked anew each time: the storage's addresses are signed and expire.
    location = get_hf_file_metadata(url, library_name="gsae_core").location
    headers = build_hf_headers(library_name="gsae_core") | {"Accept-Encoding": "identity"}
    same_host = urlsplit(url)[:2] == urlsplit(location)[:2]
    if not same_host and urlsplit(location).hostname not in constants.HF_URL_HOSTS:
        headers.pop("authorization", None)  # A token is the Hub's alone.
    if have := part.stat().st_size:
        headers["Range"] = f"bytes={have}-"
    with http_stream_backoff(
        "GET",
        location,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
    ) as answer:
        hf_raise_for_status(answer)
        # A server may take no notice of the range and send everything again.
        with part.open("ab" if answer.status_code == 206 else "wb") as out:
            for piece in answer.iter_bytes():
                if out.tell() + len(piece) > file.n_bytes:
                    part.unlink()
                    raise InputError(
                        f"expected {file.n_bytes} bytes of {file.path} in {repo!r}, as its listing "
                        "says, got more; pull it again, and if that fails tell its owner"
                    )
                out.write(piece)
                yield out.tell()


def _check(part: Path, file: HubFile, repo: str) -> None:
    """Compare a file's hash with the Hub's; throw a damaged one away."""
    from huggingface_hub.utils.sha import git_hash

    if file.sha256 is None:  # small, for git holds it itself
        kind, wanted, found = "git's SHA-1", file.blob_id, git_hash(part.read_bytes())
    else:
        kind, wanted, found = "SHA-256", file.sha256, sha256(part)
    if found != wanted:
        part.unlink()
        raise InputError(
            f"expected {file.path} of {repo!r} with {kind} {wanted[:12]}..., got {found[:12]}...; "
            "it was damaged on its way and is thrown away: fetch it again"
        )


def _is_whole(target: Path, file: HubFile) -> bool:
    # Put in place only once its hash was right; an empty one never has to come.
    return target.is_file() and target.stat().st_size == file.n_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


# The cache that Hugging Face's libraries share: HF_HOME and HF_HUB_CACHE say where.


def local(where: Path | str) -> Path:
    """Return where an SAE lies on this machine; one on the Hub is fetched into the cache first.

    A `Path`, or text at which something lies, is a folder or file; other text an address on the Hub
    (`parse_address`), of which the weights' path is returned. InputError if it is neither, if the
    Hub refuses, or if the address holds no SAE or several.
    """
    if not isinstance(where, Path | str):
        raise InputError(
            f"expected a Path, or text that is one or an address on the Hub, got {where!r}"
        )
    if isinstance(where, Path) or os.path.exists(where):
        return Path(where)
    from huggingface_hub.errors import RepositoryNotFoundError

    nowhere = f"expected a folder or file with an SAE, found nothing at {where[:200]!r}"
    try:
        address = parse_address(where)
    except InputError as error:
        raise InputError(f"{nowhere}; as an address on the Hub: {error}") from None
    try:
        return fetched(address)
    except InputError as error:
        if _unreached(error):
            raise InputError(f"{nowhere}, nor in the cache of the Hub: {error}") from error
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise InputError(f"{nowhere}; as an address on the Hub: {error}") from error
        raise


def fetched(address: Address) -> Path:
    """Return the weights of the one SAE at an address, in the cache, with its configs beside them.

    A commit that is in the cache is opened without asking. A branch is asked for; where the Hub is
    not reached, what the cache has of it counts.
    """
    kept = _kept(address)
    if kept is not None and kept.commit == address.revision:
        exact = [sae for sae in kept.saes if address.path in (sae.path, sae.files[0].path)]
        if len(exact) == 1:
            return _snapshot(kept) / exact[0].files[0].path
    try:
        repository = look(address)
    except InputError as error:
        if kept is None or not _unreached(error):
            raise
        log.warning("%s is read from the cache, for the Hub was not reached", address)
        return _snapshot(kept) / one_sae(kept).files[0].path
    if repository.renamed:
        log.warning("%s", repository.renamed)
    files = one_sae(repository).files
    # The weights, which come first, last: where they are in the cache, all that belongs to them is.
    for file in reversed(files):
        path = _into_cache(repository, file, repository.commit).resolve()
        with writing(path, file.n_bytes):
            _check(path, file, repository.repo)
    if address.revision != repository.commit:
        # No download: this notes in the cache which commit the branch is at.
        _into_cache(repository, files[0], address.revision)
    return _snapshot(repository) / files[0].path


def _into_cache(repository: Repository, file: HubFile, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    repo = repository.asked.repo  # the name that is looked for without a Hub
    try:
        with (
            writing(Path(constants.HF_HUB_CACHE), file.n_bytes),
            hub_answers(repo, what="SAE", revision=revision, file=file.path),
        ):
            path = hf_hub_download(
                repo, check_path(file.path), revision=revision, library_name="gsae_core"
            )
    except OSError as error:
        if error.errno is not None:
            raise
        # The library's word on a file that is not as long as it should be.
        raise InputError(
            f"expected {readable(file.n_bytes)} of {file.path} in {repo!r}, as its listing says, "
            "got another length; fetch it again, and if that fails tell its owner"
        ) from error
    return Path(path)


def _unreached(error: InputError) -> bool:
    """Return whether the Hub gave no answer, or one of trouble of its own."""
    import httpx2

    cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    # OfflineModeIsEnabled is a ConnectionError.
    return isinstance(cause, httpx2.TransportError | ConnectionError) or status >= 500


def _kept(address: Address) -> Repository | None:
    """Return what the cache has of an address; None where that is no SAE."""
    from huggingface_hub import constants

    asked = address.revision or constants.DEFAULT_REVISION
    if not re.fullmatch(r"\w[\w./-]*", asked) or ".." in asked:
        return None
    ref = _cache_of(address.repo) / "refs" / asked
    commit = ref.read_text("utf-8").strip() if ref.is_file() else asked
    kept = Repository(address, address.repo, commit, (), (), private=False, license=None)
    folder = _snapshot(kept)
    files = tuple(
        HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, None, "")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    saes = tuple(choose(files, address.path))
    return kept._replace(files=files, saes=saes) if saes else None


def _snapshot(repository: Repository) -> Path:
    return _cache_of(repository.asked.repo) / "snapshots" / repository.commit


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
