"""A transfer from or to the Hub, done: what its process does, and what it says meanwhile."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple, cast

from gsae_core.model_card import make_card
from gsae_core.store.files import readable
from gsae_core.store.hub_download import fetching
from gsae_core.store.hub_push import Parcel, check_repo, check_token, pack, send
from gsae_core.store.listing import find_run
from gsae_core.store.runs import Run
from gsae_core.store.transfers import (
    PullRequest,
    PushRequest,
    Transfer,
    clear_files,
    new_run_folder,
)
from gsae_core.store.worker import Worker

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a transfer is: bytes that came."""

    stage: Literal["downloading", "importing", "uploading", "finished", "cancelled"]
    done: int
    total: int


def work(transfer: Transfer, *, worker: Worker | None = None) -> Iterator[Progress]:
    """Do what was asked for, or go on with it, and yield progress; files tell the rest.

    A request to stop (control.json, SIGTERM, Ctrl-C, or closing this iterator) ends it in state
    `cancelled`; what came is kept.

    Raises:
        InputError: while iterating, for what a person can mend; status.json then says it too.
    """
    with contextlib.nullcontext(worker) if worker else Worker(transfer) as held:
        assert held is not None
        request = transfer.request
        if isinstance(request, PullRequest):
            yield from _pull(transfer, request, held)
        else:
            yield from _push(transfer, request, held)


def _pull(transfer: Transfer, request: PullRequest, worker: Worker) -> Iterator[Progress]:
    total = sum(file.n_bytes for file in request.files)
    where = new_run_folder(transfer.root, request.to)
    log.info("%s of %s at %s", readable(total), request.repo, request.commit)
    worker.enter("downloading", total=total)
    pieces = fetching(request.repo, request.commit, request.files, transfer.files)
    with contextlib.closing(cast("Generator[int]", pieces)):
        for done in pieces:
            worker.done = done
            if worker.stop_requested:
                worker.outcome = "cancelled"
                yield Progress("cancelled", done, total)
                return
            yield Progress("downloading", done, total)
    worker.enter("importing", total=0)
    yield Progress("importing", 0, 0)
    # After the wait: what is imported here fills memory.
    from gsae_core.store.imports import import_saes

    place = {"model": request.model, "layer": request.layer, "site": request.site}
    run, sources = import_saes(transfer.files, where, **place)
    run.add_event("pulled", repo=request.repo, commit=request.commit, path=request.path)
    for source in sources.values():
        for sentence in source.assumed:
            log.info("%s", sentence)
    transfer.add_event("arrived", result=run.id)
    clear_files(transfer)
    yield Progress("finished", total, total)


def _push(transfer: Transfer, request: PushRequest, worker: Worker) -> Iterator[Progress]:
    check_token()
    parcel = parcel_of(find_run(transfer.root, request.run), request)
    for note in parcel.notes:
        log.warning("%s", note)
    total = parcel.n_bytes
    worker.enter("uploading", total=total)
    yield Progress("uploading", 0, total)
    if worker.stop_requested:
        worker.outcome = "cancelled"
        yield Progress("cancelled", 0, total)
        return
    # One call: the library tells no one but a terminal how far it is.
    pushed = send(parcel)
    worker.done = total
    transfer.add_event("arrived", result=pushed.url)
    yield Progress("finished", total, total)


def parcel_of(run: Run, request: PushRequest) -> Parcel:
    """Return what a push would send, its card included.

    Raises:
        InputError: if it may not be sent.
    """
    for name in request.saes:
        run.sae_folder(name)
    check_repo(request.repo)
    texts = make_card(run, request.saes, request.repo) if request.saes else {}
    return pack(run, request.saes, request.repo, texts=texts, public=request.public)
