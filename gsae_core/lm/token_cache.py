"""Rows of token ids in files that later runs find again and map into memory.

A file is named by everything that decides its rows and by how far it was read; it appears whole
(written beside its place, then renamed), so runs that tokenise the same text at once do no harm.
"""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gsae_core.errors import InputError
from gsae_core.machine import cache_folder

log = logging.getLogger(__name__)

# Fewer tokens than this are tokenised again rather than kept: it takes less than a second.
SMALL_TOKENS = 2**18

# Raise it when the same source and settings come to give other rows.
FORMAT = 1


class Cached(NamedTuple):
    """Rows (n, n_ctx) of a source."""

    rows: np.ndarray
    starts_with_bos: bool
    whole: bool
    """Whether they reach the source's end."""


def cache_key(*parts: Any) -> str:
    """Return a file name's worth of hash of everything that decides what the rows are."""
    return sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """Return what two tokenizers share if they give the same ids."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sha256(f"{text} {special}".encode()).hexdigest()


def find(key: str, n_tokens: int | None, dtype: str) -> list[Cached]:
    """Return the rows kept under `key` that reach `n_tokens` or the source's end, shortest first.

    Args:
        n_tokens: how far the source must have been read; None: to its end.
    """
    found: list[tuple[float, Cached]] = []
    for path in sorted(cache_folder("tokens").glob(f"{key}.*.rows")):
        _, said, n_ctx, bos, _ = path.name.split(".")
        reach = math.inf if said == "all" else float(said)
        if reach >= (math.inf if n_tokens is None else n_tokens):
            rows = _mapped(path, dtype, int(n_ctx))
            found.append((reach, Cached(rows, bos == "bos", said == "all")))
    return [cached for _, cached in sorted(found, key=lambda each: each[0])]


def keep(
    blocks: Iterator[np.ndarray],
    key: str,
    *,
    starts_with_bos: bool,
    reach: Callable[[], int | None],
    always: bool,
) -> np.ndarray:
    """Return the rows of all blocks: from a file under `key` if they are many, else from memory.

    Args:
        blocks: rows (n, n_ctx), at least one block; consumed one by one.
        reach: once they are, returns how many tokens they are enough for; None: the source ended.
        always: keep few rows too, because the source is slow.

    Raises:
        InputError: if the disk fills up.
    """
    head = [next(blocks)]
    while not always and sum(block.size for block in head) < SMALL_TOKENS:
        if (block := next(blocks, None)) is None:
            return np.concatenate(head)
        head.append(block)
    folder = cache_folder("tokens")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{key}.", suffix=".tmp", dir=folder)
    except OSError as error:
        # A home that cannot be written costs the next run its time and this one its memory.
        log.warning("no token cache, so tokens stay in memory: %s", error)
        return np.concatenate([*head, *blocks])
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for block in chain(head, blocks):
                _write(file, block)
        n_tokens, n_ctx = reach(), head[0].shape[1]
        path = folder / ".".join(
            (
                key,
                "all" if n_tokens is None else str(n_tokens),
                str(n_ctx),
                "bos" if starts_with_bos else "plain",
                "rows",
            )
        )
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return _mapped(path, head[0].dtype, n_ctx)


def _write(file: FileIO, block: np.ndarray) -> None:
    # Unbuffered, so that a full disk is noticed here and not once more when the file is closed.
    data = memoryview(block.tobytes())
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise InputError(
            f"expected room for tokens in {cache_folder('tokens')}, got {error.strerror!r}: free "
            "some space, or set XDG_CACHE_HOME to a folder on another disk"
        ) from error


def _mapped(path: Path, dtype: Any, n_ctx: int) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty((0, n_ctx), dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").reshape(-1, n_ctx)
