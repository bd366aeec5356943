"""Downloads from the Hub and uploads to it as jobs: started, watched and ended like training.

    runs/.hub/<id>/  request.json  status.json  events.jsonl  log.txt  control.json
                     files/<owner>/<name>/...   what downloads, until it is a run

The id follows from what is asked for, so that asking again goes on with what was begun.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gsae_core.checkpoints.hub import HubFile, fetching
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.files import first_of, read_json, readable
from gsae_core.runs.jobs.job import Job, enqueue
from gsae_core.runs.jobs.worker import perform
from gsae_core.runs.run import find_run, new_run_folder
from gsae_core.runs.work.publish import pack, send
from gsae_core.text import Progress

log: logging.Logger = logging.getLogger(__name__)

FOLDER = ".hub"
_REQUEST = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_REQUEST)
class PullRequest:
    """What to fetch, and the run to make of it."""

    repo: str
    commit: str
    path: str
    library: str
    files: tuple[HubFile, ...]
    to: str  # name of the run
    # Where the SAE belongs, where its files do not say:
    model: str | None = None
    layer: int | None = None
    site: Site | None = None
    fold_decoder_norms: bool = False
    kind: Literal["pull"] = "pull"


@dataclass(frozen=True, config=_REQUEST)
class PushRequest:
    """What to send, and where."""

    run: str
    saes: tuple[str, ...]
    repo: str
    public: bool
    kind: Literal["push"] = "push"


Request = Annotated[PullRequest | PushRequest, Field(discriminator="kind")]


class Transfer(Job):
    """A folder with a request, and where it stands."""

    @property
    def request(self) -> Request:
        """What was asked for."""
        path = self.folder / "request.json"
        try:
            return TypeAdapter(Request).validate_python(read_json(path))
        except ValidationError as error:
            raise InputError(
                f"expected a request of this version in {path}, got another ({first_of(error)}); "
                "delete the folder and ask again"
            ) from None

    @property
    def is_pull(self) -> bool:
        """Whether it fetches and does not send; the id begins with the kind."""
        return self.id.startswith("pull")

    @property
    def arrow(self) -> str:
        """Sign of the way it goes: down from the Hub, or up to it."""
        return "↓" if self.is_pull else "↑"

    @property
    def root(self) -> Path:
        """Folder of the runs it belongs to."""
        return self.folder.parent.parent

    @property
    def result(self) -> str | None:
        """What a finished one led to: the run's name, or the address of the commit."""
        ends = [event.get("result") for event in self.events() if event["event"] == "arrived"]
        return ends[-1] if ends else None


def ask(root: Path, request: Request) -> Transfer:
    """Return the transfer of a request, made if there is none; one that ended begins anew."""
    if isinstance(request, PullRequest):
        new_run_folder(root, request.to)  # a run that is there is refused
    transfer = Transfer(root / FOLDER / _id(request))
    # A new try may go to a run of another name.
    if enqueue(transfer, asdict(request)) is None:
        transfer.add_event("created")
    return transfer


def _id(request: Request) -> str:
    if isinstance(request, PullRequest):
        parts = ("pull", request.repo, request.commit, request.path)
    else:
        parts = ("push", request.repo, request.run, *request.saes, str(request.public))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{parts[0]}-{request.repo}").strip("-.")
    return f"{stem[:48]}-{digest}"


def is_transfer(folder: Path) -> bool:
    """Return whether a folder is a transfer's and not a run's."""
    return folder.absolute().parent.name == FOLDER and (folder / "request.json").is_file()


def transfers(root: Path) -> list[Transfer]:
    """Return the transfers of a folder of runs, newest first; damaged ones are left out."""
    found = []
    # A name with a dot is of one that is deleted, but for the removal of its files.
    for path in (root / FOLDER).glob("[!.]*/request.json"):
        transfer = Transfer(path.parent)
        try:
            _ = transfer.request, transfer.status
            found.append((path.stat().st_mtime, transfer))
        except (InputError, FileNotFoundError):
            continue
    return [transfer for _, transfer in sorted(found, key=lambda pair: pair[0], reverse=True)]


def run_name(repo: str, path: str) -> str:
    """Return a name for the run that an SAE becomes: the repository's and the folder's."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([repo.rpartition("/")[2], path]))
    return stem.strip("-._")[:64].rstrip("-._") or "pulled"


def free_name(root: Path, name: str) -> str:
    """Return `name`, with a number after it if there is a run of that name."""
    names = (name, *(f"{name[:60]}-{n}" for n in range(2, 1000)))
    return next(free for free in names if not (root / free).exists())


def work(transfer: Transfer) -> Iterator[Progress]:
    """Do what was asked for, or go on with it, and yield progress, as `worker.perform` does.

    What came is kept when it is stopped.
    """
    return perform(transfer, _carry_out(transfer))


def _carry_out(transfer: Transfer) -> Iterator[Progress]:
    request = transfer.request
    is_pull = isinstance(request, PullRequest)
    yield from _pull(transfer, request) if is_pull else _push(transfer, request)


def _pull(transfer: Transfer, request: PullRequest) -> Iterator[Progress]:
    total = sum(file.n_bytes for file in request.files)
    where = new_run_folder(transfer.root, request.to)
    log.info("%s of %s at %s", readable(total), request.repo, request.commit)
    yield Progress("downloading", 0, total, "byte")
    downloads = transfer.folder / "files"  # until it is a run
    kept = downloads / request.repo  # runs and SAEs are named by the folder they come from
    with contextlib.closing(fetching(request.repo, request.commit, request.files, kept)) as pieces:
        for done in pieces:
            yield Progress("downloading", done, total, "byte")
    yield Progress("importing", 0, 0)
    # After the wait: what is imported here fills memory.
    from gsae_core.runs.work.imports import import_saes

    place = {"model": request.model, "layer": request.layer, "site": request.site}
    fold = request.fold_decoder_norms
    run, sources = import_saes(kept, where, **place, fold_decoder_norms=fold)
    run.add_event("pulled", repo=request.repo, commit=request.commit, path=request.path)
    for source in sources.values():
        for sentence in source.assumed:
            log.info("%s", sentence)
    transfer.add_event("arrived", result=run.id)
    # It is a run now, and nowhere twice.
    shutil.rmtree(downloads, ignore_errors=True)


def _push(transfer: Transfer, request: PushRequest) -> Iterator[Progress]:
    run = find_run(transfer.root, request.run)
    parcel = pack(run, request.saes, request.repo, public=request.public)
    for note in parcel.notes:
        log.warning("%s", note)
    total = parcel.n_bytes
    yield Progress("uploading", 0, total, "byte")
    # One call: the library tells no one but a terminal how far it is.
    transfer.add_event("arrived", result=send(parcel).commit_url)
    yield Progress("uploading", total, total, "byte")
