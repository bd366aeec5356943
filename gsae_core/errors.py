"""The one exception for mistakes of a caller, and the sentences several modules raise it with."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Literal, NamedTuple


class InputError(ValueError):
    """What was expected, what came, and what to do: one sentence, fit to show as it stands."""


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, numpy's among them; True and 1.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@contextmanager
def expecting(what: str, where: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a library raises over a file into an InputError: `what` was expected in it."""
    try:
        yield
    except (InputError, PermissionError):
        raise
    except kinds as error:
        raise InputError(f"expected {what} in {where}, got something else: {error}") from None


class Extra(NamedTuple):
    """An extra of the package: what needs it, and what it installs."""

    purpose: str
    packages: dict[str, str]
    """Package that is imported -> its name for pip; dependencies of these are left out."""


EXTRAS = {
    "app": Extra(
        "the app and figures",
        {
            "streamlit": "streamlit",
            "plotly": "plotly",
            "altair": "altair",
            "vl_convert": "vl-convert-python",
            "PIL": "pillow",
        },
    ),
    "gpu": Extra("the sparse step on a GPU", {"triton": "triton"}),
    "lens": Extra("sites and models of TransformerLens", {"transformer_lens": "transformer-lens"}),
    "track": Extra("--track", {"trackio": "trackio"}),
}


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn the import of a package that is not installed into an InputError that names its extra.

    Around every import of a package of `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = EXTRAS[name].packages.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise InputError(extra_sentence(name, package)) from error


def extra_sentence(name: str, *packages: str) -> str:
    """Return that packages of an extra are not installed, and what installs them."""
    return (
        f"expected {', '.join(packages)} to be installed for {EXTRAS[name].purpose}, found none; "
        f'pip install "gsae-core[{name}]"'
    )


What = Literal["model", "data set", "SAE"]

# `owner/name`, or the `name` alone of some old ones. A path of this machine may look like one too.
# ASCII: a mistyped path such as `été` is said at once, not asked of the Hub.
HUB_NAME = re.compile(r"(?a:\w[\w.-]*(/\w[\w.-]*)?)")

OFFLINE = "No connection to the Hugging Face Hub. Local runs, imports and exports still work."


@contextmanager
def hub_answers(
    repo: str, *, what: What, revision: str | None = None, file: str | None = None
) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into an InputError with `hub_sentence`."""
    import httpx2
    from huggingface_hub import errors

    told = (
        errors.FileMetadataError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        httpx2.HTTPError,  # HfHubHTTPError is one
        UnicodeEncodeError,
        # Of transfers through Xet; the upload of a large file is a RuntimeError too.
        ConnectionError,
        TimeoutError,
        PermissionError,
        RuntimeError,
    )
    try:
        yield
    except told as error:
        if isinstance(error, PermissionError) and error.errno is not None:
            raise  # of a file on this machine
        sentence = hub_sentence(error, repo, what=what, revision=revision, file=file)
        raise InputError(sentence) from error


def hub_sentence(
    error: BaseException,
    repo: str,
    *,
    what: What,
    revision: str | None = None,
    file: str | None = None,
) -> str:
    """Return what went wrong, told by the exceptions that led to `error`.

    A broken connection that names no reason means that the Hub was not reached.
    """
    import httpx2
    from huggingface_hub import errors

    chain = _chain(error)
    page = "repository's" if what == "SAE" else f"{what}'s"
    told: dict[type[BaseException], str] = {
        errors.GatedRepoError: (
            f"expected access to {repo!r}, but its owner asks for an agreement first; accept it on "
            f"the {page} page and run `hf auth login`"
        ),
        errors.DisabledRepoError: (
            f"expected {repo!r} on the Hub, but it was disabled there; look for another copy"
        ),
        errors.RevisionNotFoundError: (
            f"expected a branch, tag or commit of {repo!r}, got {revision!r}; look at the "
            f"{page} page for the revisions there are"
        ),
        errors.RemoteEntryNotFoundError: (
            f"expected {file or 'the file'} in {repo!r}, found none there; list what there is: "
            f"python -m gsae_core pull {repo} --list"
        ),
        errors.RepositoryNotFoundError: (
            f"expected the name of a {'repository' if what == 'SAE' else what} on the Hub, found "
            f"no {repo!r} there; check its spelling, or log in with `hf auth login` if it is "
            "private"
        ),
        errors.HFValidationError: (
            f"expected a Hub repository as OWNER/NAME, got {repo!r}; copy it from its page"
        ),
        UnicodeEncodeError: (
            "expected a Hub token of ASCII characters, got others; correct HF_TOKEN, or run "
            "`hf auth login` again"
        ),
    }
    if _disk_full(chain):
        return (
            f"expected room on the disk for the files of {repo!r}, it is full; make room, or let "
            "HF_HOME name a folder on a larger disk, and start again: whole files stay"
        )
    for kind, sentence in told.items():
        if _met(chain, kind):
            return sentence
    responses = (getattr(one, "response", None) for one in chain)
    for status in (getattr(response, "status_code", None) for response in responses):
        if isinstance(status, int):
            return _refused(repo, status)
    if _met(chain, errors.FileMetadataError):
        return (
            f"expected a Hub to answer for {repo!r}, got something else; correct HF_ENDPOINT, the "
            "proxy or the firewall"
        )
    if what == "model":
        return (
            f"expected to download {repo!r} from the Hub, but we are offline and it is not in the "
            "cache; give a local model folder, or 'bundled' for the model that ships with the "
            "package"
        )
    unreached = (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx2.HTTPError)
    if not _met(chain, *unreached):
        first = str(error).strip().partition("\n")[0]
        return f"expected a transfer of files of {repo!r}, it failed ({first}); start it again"
    if _met(chain, errors.OfflineModeIsEnabled):
        return f"{OFFLINE} (HF_HUB_OFFLINE is set; unset it to reach {repo!r})"
    return f"{OFFLINE} ({repo!r} was not reached; go online and try again)"


def is_hub_trouble(error: BaseException) -> bool:
    """Return whether an error began at the Hub, on the way to it, or on a full disk."""
    import httpx2
    from huggingface_hub import errors

    chain = _chain(error)
    kinds = (
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx2.HTTPError,
        UnicodeEncodeError,  # a token that no header can carry
    )
    return _disk_full(chain) or _met(chain, *kinds)


def data_sentence(error: BaseException, name: str) -> str:
    """Return why a data set, `owner/name` or `owner/name:config`, cannot be streamed.

    `error` is what `datasets` raised.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    repository = name.partition(":")[0]
    chain = _chain(error)
    if _disk_full(chain) or _met(chain, GatedRepoError, RevisionNotFoundError):
        return hub_sentence(error, repository, what="data set")
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, DatasetNotFoundError):
        return (
            f"expected a data set on the Hub, a file or a folder, found none called {repository}: "
            f"check the name, or log in if it is gated ({first})"
        )
    return (
        f"expected to stream {name} from the Hub, got no connection ({first}): "
        "go online, unset HF_HUB_OFFLINE, or use `stdlib` or a local file"
    )


def _disk_full(chain: list[BaseException]) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(one, OSError) and one.errno in full for one in chain)


def _met(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(one, kinds) for one in chain)


def _refused(repo: str, status: int) -> str:
    match status:
        case 401 | 403:
            return (
                f"expected a token that may do this to {repo!r}, the Hub refused ours ({status}); "
                "run `hf auth login` again, or correct HF_TOKEN (to publish, it must allow writing)"
            )
        case 429:
            return f"expected an answer about {repo!r}, but the Hub got too many; wait some minutes"
        case _ if status >= 500:
            return (
                f"expected an answer about {repo!r}, but the Hub itself is in trouble ({status}); "
                "try again later"
            )
    return f"expected the Hub to do this for {repo!r}, it refused ({status}); check name and file"


def _chain(error: BaseException) -> list[BaseException]:
    """Return the exceptions that led to `error`, itself first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain
