"""Files of one commit -> a folder: on from the last byte, checked, whole or not there.

The library's own download begins a file anew in every process and checks its size alone. This one
keeps what came (`.NAME.part`), asks for the rest by range, and believes no file before its hash.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gsae_core.checkpoints.hub import HubFile, check_path
from gsae_core.errors import InputError, hub_answers
from gsae_core.files import free_bytes, readable, sync, writing

# How often a connection that brings nothing new is taken up again, and after which pause.
TRIES = 5
PAUSE_SECONDS = 1.0


def fetching(repo: str, commit: str, files: Sequence[HubFile], folder: Path) -> Iterator[int]:
    """Fetch what is missing; yield how many bytes are here after each piece that came.

    Closed early, it leaves what came, and the next call goes on from there.

    Args:
        repo: on the Hub.
        commit: all files are of it.
        files: each ends at its own path below `folder`.

    Raises:
        InputError: one sentence; what came stays.
    """
    for file in files:
        check_path(file.path)
    needed = sum(file.n_bytes - _here(folder / file.path, file) for file in files)
    if needed > (free := free_bytes(folder)):
        raise InputError(
            f"expected {readable(needed)} free for the download in {folder}, found "
            f"{readable(free)}; make room on the disk and start it again"
        )
    before = 0
    for file in files:
        target = folder / file.path
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
    if not _same_host(url, location) and urlsplit(location).hostname not in constants.HF_URL_HOSTS:
        headers.pop("authorization", None)  # A token is the Hub's alone.
    have = part.stat().st_size
    if have:
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


def _same_host(url: str, other: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(other)[:2]


def _check(part: Path, file: HubFile, repo: str) -> None:
    """Compare a file's hash with the Hub's; throw a damaged one away."""
    if file.sha256 is not None:
        kind, wanted, found = "SHA-256", file.sha256, _hash(part, hashlib.sha256())
    else:
        # Git names a file by the SHA-1 of its size and content.
        start = hashlib.sha1(f"blob {file.n_bytes}\0".encode(), usedforsecurity=False)
        kind, wanted, found = "git's SHA-1", file.blob_id, _hash(part, start)
    if found == wanted:
        return
    part.unlink()
    raise InputError(
        f"expected {file.path} of {repo!r} with {kind} {wanted[:12]}..., got {found[:12]}...; it "
        "was damaged on its way and is thrown away: pull it again"
    )


def _hash(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _here(target: Path, file: HubFile) -> int:
    """Return how much of a file is here, whole or in part."""
    part = _part(target)
    if _is_whole(target, file) or not part.exists():
        return file.n_bytes if _is_whole(target, file) else 0
    return min(part.stat().st_size, file.n_bytes)


def _is_whole(target: Path, file: HubFile) -> bool:
    # Put in place only once its hash was right; an empty one never has to come.
    return target.is_file() and target.stat().st_size == file.n_bytes


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")
