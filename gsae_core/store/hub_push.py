"""Chosen SAEs of a finished run -> one commit on the Hub, with their card; all of it or nothing."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gsae_core.errors import InputError
from gsae_core.hub_errors import hub_answers
from gsae_core.store.files import sha256
from gsae_core.store.runs import Run

# Of an SAE's folder; what else is in it was made here and is made anew elsewhere.
WEIGHTS = "sae_weights.safetensors"
SENT = ("cfg.json", WEIGHTS, "feature_stats.safetensors", "norm_deciles.json")
OF_RUN = ("config.json", "evals.json")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Parcel(NamedTuple):
    """What is sent, decided before anything is."""

    repo: str
    public: bool
    files: Mapping[str, Path]
    """By path in the repository."""
    texts: Mapping[str, str]
    """Files that are made for the purpose: the card, its figure."""
    notes: tuple[str, ...]
    """What somebody may want to know before it is sent."""

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        texts = sum(len(text.encode()) for text in self.texts.values())
        return texts + sum(path.stat().st_size for path in self.files.values())


class Pushed(NamedTuple):
    """Where it went."""

    repo: str
    commit: str
    url: str
    created: bool
    """Whether the repository was made for it."""


def pack(
    run: Run, names: Sequence[str], repo: str, *, texts: Mapping[str, str], public: bool = False
) -> Parcel:
    """Return what a push would send.

    Args:
        names: of the SAEs.
        repo: OWNER/NAME.
        texts: the card and its figure, from `model_card.make_card`.

    Raises:
        InputError: if the run or an SAE is not finished, its files are not whole, or `repo` is no
            repository.
    """
    check_repo(repo)
    state = run.status.state
    if state != "finished":
        raise InputError(
            f"expected a finished run, got {run.id}, which is {state}; let it train to its end: "
            f"python -m gsae_core resume {run.folder}"
        )
    if not names:
        raise InputError("expected the name of an SAE to push, got none; name one with --sae")
    files = {name: run.folder / name for name in OF_RUN if (run.folder / name).is_file()}
    for name in names:
        folder = run.sae_folder(name)
        _check_whole(folder, name)
        files |= {f"{name}/{file}": folder / file for file in SENT if (folder / file).is_file()}
    return Parcel(repo, public, files, dict(texts), _notes(run))


def check_repo(repo: str) -> str:
    """Return a repository's name if one can be made under it.

    Raises:
        InputError: if not.
    """
    if not _REPO.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo:
        raise InputError(
            f"expected a repository to push to as OWNER/NAME, got {repo[:200]!r}; the owner is "
            "your name on the Hub or an organisation of yours"
        )
    return repo


def _check_whole(folder: Path, name: str) -> None:
    # Imported here: it brings torch, and a page asks this module for less.
    from gsae_core.store.checkpoint import read_cfg

    cfg = read_cfg(folder)
    metadata = cfg.get("metadata") or {}
    if metadata.get("stopped"):
        raise InputError(
            f"expected an SAE that learned to the end, got {name}, which stopped at "
            f"{metadata['stopped']}; push another"
        )
    expected = metadata.get("weights_sha256")
    if not (folder / WEIGHTS).is_file() or (expected and sha256(folder / WEIGHTS) != expected):
        raise InputError(
            f"expected the whole weights of {name} in {folder / WEIGHTS}, found others or none; "
            "train or import it again"
        )


def _notes(run: Run) -> tuple[str, ...]:
    """Return a sentence for each folder of this machine that the files name."""
    named = {"model": run.config.model.name, "text": run.config.data.source}
    return tuple(
        f"config.json and cfg.json name the {what}'s folder on this machine: {name}"
        for what, name in named.items()
        if os.path.isabs(name)
    )


def check_token() -> None:
    """Check that there is a token to push with; whether the Hub takes it, the Hub says.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            "expected a Hub token that may write, found none; run `hf auth login`, or set HF_TOKEN "
            "in the environment the app was started from"
        )


def send(parcel: Parcel) -> Pushed:
    """Send a parcel as one commit; a repository that is not there is made, private unless told.

    An interruption leaves the repository as it was: large files wait unseen in the storage until a
    commit names them.

    Raises:
        InputError: why the Hub refused, or cannot be reached.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    api = HfApi(library_name="gsae_core")
    contents: dict[str, Path | bytes] = dict(parcel.files)
    contents |= {path: text.encode() for path, text in parcel.texts.items()}
    additions = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
    names = sorted({path.partition("/")[0] for path in parcel.files if "/" in path})
    with hub_answers(parcel.repo, what="SAE"):
        created = not api.repo_exists(parcel.repo)
        if created:
            api.create_repo(parcel.repo, private=not parcel.public, exist_ok=True)
        try:
            commit = api.create_commit(
                parcel.repo,
                additions,
                commit_message=f"Add {', '.join(names)}",
            )
        except (RuntimeError, httpx2.TransportError) as error:
            # The library wraps what goes wrong with a large file.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, httpx2.TransportError):
                raise cause or error from None
            raise InputError(
                f"expected to send {len(additions)} files to {parcel.repo!r}, the connection "
                "broke; nothing was changed there: push again"
            ) from error
    return Pushed(parcel.repo, commit.oid, commit.commit_url, created)
