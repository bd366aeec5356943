"""`pull` and `push` on the command line, and `resume` of what they began."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError
from gsae_core.hub_flags import Pull, Push
from gsae_core.launch import runs_root
from gsae_core.report import aligned
from gsae_core.store.files import readable
from gsae_core.store.hub import Repository, look, one_sae, parse_address
from gsae_core.store.runs import Run
from gsae_core.store.transfers import (
    PushRequest,
    Transfer,
    ask,
    free_name,
    new_run_folder,
    plan_pull,
    run_name,
)

INTERRUPTED = 130

Say = Callable[[str], None]
Follow = Callable[[Iterator[Any]], str]


def pull(command: Pull, *, say: Say, show: Say, follow: Follow) -> int:
    """Fetch an SAE and make a run of it, or list what there is; return the exit code.

    Args:
        say: takes a sentence for the person who watches.
        show: takes a line of the answer.
        follow: draws progress until the work ends, and returns its last stage.

    Raises:
        InputError: for anything that a person can mend.
    """
    repository = look(parse_address(command.address))
    if repository.renamed:
        say(repository.renamed)
    if command.list:
        for line in listing(repository):
            show(line)
        return 0
    sae = one_sae(repository)
    folder = command.to or _default(repository, sae.path)
    new_run_folder(folder.absolute().parent, folder.name)
    place = {"model": command.model, "layer": command.layer, "site": command.site}
    request = plan_pull(repository, sae, to=folder.name, **place)
    count = f"{len(sae.files)} file{'s' * (len(sae.files) > 1)}"
    say(
        f"{sae.path or repository.repo}: {sae.library}, {count}, {readable(sae.n_bytes)}, "
        f"commit {repository.commit[:12]}"
    )
    return go_on(ask(folder.absolute().parent, request), say=say, show=show, follow=follow)


def _default(repository: Repository, path: str) -> Path:
    root = runs_root()
    return root / free_name(root, run_name(repository.repo, path))


def listing(repository: Repository) -> list[str]:
    """Return the SAEs of a repository as lines: path, layout, size."""
    head = f"{repository.asked} at {repository.commit[:12]}"
    if not repository.saes:
        return [f"{head}: no SAE among {len(repository.files)} files"]
    rows = [["SAE", "layout", "size"]]
    rows += [[sae.path or ".", sae.library, readable(sae.n_bytes)] for sae in repository.saes]
    return [f"{head}: {len(repository.saes)} of them", *aligned(rows)]


def push(command: Push, *, say: Say, show: Say, follow: Follow) -> int:
    """Send SAEs of a run to the Hub; return the exit code.

    Raises:
        InputError: for anything that a person can mend.
    """
    from gsae_core.hub_work import parcel_of
    from gsae_core.store.hub_push import check_token

    run = Run.open(command.run)
    request = PushRequest(run.id, command.sae, command.to, command.public)
    parcel = parcel_of(run, request)
    check_token()
    n_files = len(parcel.files) + len(parcel.texts)
    say(f"{n_files} files, {readable(parcel.n_bytes)}, to {parcel.repo}")
    for note in parcel.notes:
        say(note)
    return go_on(ask(run.folder.parent, request), say=say, show=show, follow=follow)


def go_on(transfer: Transfer, *, say: Say, show: Say, follow: Follow) -> int:
    """Do a transfer, or what is left of it; return the exit code.

    Raises:
        InputError: for anything that a person can mend.
    """
    from gsae_core.hub_work import work

    if transfer.status.state == "finished":
        raise InputError(
            f"expected a transfer that is not done, got one that led to {transfer.result}; give "
            "its command again to do it anew"
        )
    if follow(work(transfer)) != "finished":
        say(
            "stopped; what came is kept: give the same command again, or python -m gsae_core "
            f"resume {transfer.folder}"
        )
        return INTERRUPTED
    if transfer.kind == "pull":
        show(f"run {transfer.root / str(transfer.result)}")
    else:
        show(str(transfer.result))
    return 0
