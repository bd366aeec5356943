"""Documents from anywhere: the standard library, files, folders, tables, token arrays, the Hub.

Everything is read lazily, so that a corpus that needs a thousand documents reads a thousand.

| source | a document | order |
|---|---|---|
| `stdlib` | a file | by the hash of its name |
| a text or code file, a folder of them | a file | by the hash of its name |
| `.jsonl .json .parquet .csv .tsv`, a folder of them | a row | as stored |
| `.bin .npy`, a folder of them: token ids | all, or a row of a 2-D array | as stored |
| a `datasets` folder (`save_to_disk`) | a row | a fixed permutation |
| a name on the Hub: `name`, `owner/name`, `owner/name:config` | a row | as streamed |

Text and tables may be packed (`.gz .bz2 .xz .zst`). A folder is read as what most of its files are
(token ids, tables or text; ties in that order); hidden files and those of another kind are left
out, and the log says how many. Where a folder has splits (`splits`), one of them is read.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.pieces import (
    PACKED,
    TOKEN_SUFFIXES,
    Piece,
    is_utf16,
    looks_like_text,
    not_text,
    starts_with_bom,
    text_pieces,
    token_pieces,
    unpacked,
)
from gsae_core.lm.splits import files_of_split
from gsae_core.lm.stdlib import is_held_out, read_utf8, stdlib_paths
from gsae_core.lm.tables import (
    TABLE_SUFFIXES,
    hub_pieces,
    no_split,
    row_pieces,
    saved_rows,
    table_pieces,
)

log = logging.getLogger(__name__)

Kind = Literal["table", "tokens", "text", "other"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")

# A path that ends so and is not there is a typing mistake, not the name of a data set.
FILE_SUFFIXES = TABLE_SUFFIXES | TOKEN_SUFFIXES | {".txt", ".md", ".py", *PACKED}

# In the stamp of what earlier versions read in another way (a column guessed by one row, a CSV of
# semicolons, a byte-order mark): the tokens that they kept are not these.
READ_ANEW = "2"


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from, not yet read."""

    name: str
    """For people."""

    stamp: tuple[str, ...]
    """What the token cache knows it by: names, sizes and times of files. A Hub data set's is its
    name, so that a resumed run reads the tokens it began with, online or not."""

    train: Callable[[], Iterator[Piece]]
    """Opens the documents: all of them, or those for training where `held_out` is given."""

    held_out: Callable[[], Iterator[Piece]] | None = None
    """Opens the held-out documents; None where the split is cut by sequence."""

    remote: bool = False


def open_source(cfg: DataConfig, vocabulary: int) -> Source:
    """Return the source that `cfg` names.

    Args:
        cfg: `source`, `text_column`, `split` and, for `stdlib`, `held_out` are read.
        vocabulary: number of the tokenizer's ids; sets the width of a bare `.bin` file.

    Raises:
        InputError: if there is nothing to read under that name.
    """
    if cfg.source == "stdlib":
        _refuse_split(cfg)
        return _stdlib(cfg)
    path = Path(cfg.source).expanduser()
    if path.is_dir():
        one = ("dataset_info.json", "state.json")
        if (path / "dataset_dict.json").exists() or all((path / f).exists() for f in one):
            return _saved(cfg, path)
        return _files(cfg, *_chosen(path, cfg.split), vocabulary)
    if path.is_file():
        _refuse_split(cfg)
        kind = _kind(path)
        # One file of an unknown name may be text all the same: opening it tells.
        return _files(cfg, [path], "text" if kind == "other" else kind, vocabulary)
    if not HUB_NAME.fullmatch(cfg.source) or path.suffix.lower() in FILE_SUFFIXES:
        raise InputError(
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            f"nothing at {cfg.source}: check the path"
        )
    stamp = ("hub", cfg.source, cfg.split, str(cfg.text_column))
    if cfg.text_column is None:
        stamp = (*stamp, READ_ANEW)
    documents = partial(hub_pieces, cfg.source, split=cfg.split, text_column=cfg.text_column)
    return Source(cfg.source, stamp, documents, remote=True)


def _refuse_split(cfg: DataConfig) -> None:
    if cfg.split not in ("train", "all"):
        raise InputError(no_split(cfg.split, cfg.source, []))


def _stdlib(cfg: DataConfig) -> Source:
    # Whole percents: the bundled model never saw the files below 5, at any share that is asked for.
    percent = max(1, round(100 * cfg.held_out))
    paths = stdlib_paths()
    names = sorted(paths, key=_hashed)

    def documents(held_out: bool) -> Iterator[Piece]:
        for name in names:
            if is_held_out(name, percent) == held_out and (text := read_utf8(paths[name])):
                yield Piece(text, ends=True)

    stamp = ("stdlib", str(percent), *_stamp(list(paths.values())))
    return Source("stdlib", stamp, partial(documents, False), partial(documents, True))


def _saved(cfg: DataConfig, folder: Path) -> Source:
    rows = partial(saved_rows, folder, cfg.split)
    # Of several splits, one: its size is what the preview estimates tokens by.
    inner = folder / cfg.split
    files = sorted((inner if inner.is_dir() else folder).rglob("*.*"))
    stamp = (*_stamp(files), cfg.split, str(cfg.text_column), READ_ANEW)
    return Source(str(folder), stamp, partial(_rows, rows, cfg, str(folder)))


def _files(cfg: DataConfig, paths: list[Path], kind: Kind, vocabulary: int) -> Source:
    def documents() -> Iterator[Piece]:
        if kind == "table":
            yield from table_pieces(paths, cfg.text_column)
            return
        for path in paths:
            if kind == "tokens":
                yield from token_pieces(path, vocabulary)
            elif unpacked(path) == path and not looks_like_text(path):
                raise not_text(path)
            else:
                yield from text_pieces(path)

    sidecars = [path.with_name(path.name + ".json") for path in paths if kind == "tokens"]
    stamp = (
        *_stamp(paths + [path for path in sidecars if path.exists()]),
        str(cfg.text_column),
    )
    if kind == "table" or (kind == "text" and any(map(starts_with_bom, paths))):
        stamp = (*stamp, READ_ANEW)
    return Source(cfg.source, stamp, documents)


def _rows(rows: Callable[[], Iterator[dict]], cfg: DataConfig, name: str) -> Iterator[Piece]:
    return row_pieces(rows(), text_column=cfg.text_column, name=name)


def _chosen(folder: Path, split: str) -> tuple[list[Path], Kind]:
    """Return a folder's files of the kind that most of them are, in reading order."""
    kinds: dict[Path, Kind] = {}
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            kinds[path] = _kind(path)
    # What stands beside a data set says nothing of its kind.
    counts = Counter(kinds[path] for path in kinds if path.stem not in ("README", "LICENSE"))
    ranking: tuple[Kind, ...] = ("tokens", "table", "text")
    kind = max(ranking, key=lambda kind: counts[kind])
    if not counts[kind]:
        kind = "text"  # nothing but these
    paths = [path for path in kinds if kinds[path] == kind]
    if not paths:
        for path in filter(is_utf16, kinds):
            raise not_text(path)
        raise InputError(
            f"expected text, tables or token arrays in {folder}, found {len(kinds)} files, none of "
            "them readable"
        )
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    read = files_of_split(split, folder, sorted(names), is_text=kind == "text")
    if others := len(kinds) - len(paths):
        log.info("%s: read as %s, %d other files left out", folder, kind, others)
    if others := len(names) - len(read):
        log.info("%s: split %s, %d files of others left out", folder, split, others)
    # Text by hash, so that the first thousand files are like the rest; shards in their own order.
    return [names[name] for name in sorted(read, key=_hashed if kind == "text" else str)], kind


def _kind(path: Path) -> Kind:
    suffix = unpacked(path).suffix.lower()
    if path.suffix.lower() in TOKEN_SUFFIXES:
        return "tokens"
    if Path(path.stem).suffix.lower() in TOKEN_SUFFIXES:
        return "other"  # `ids.bin.json` says the width of `ids.bin`; packed, it cannot be mapped
    if suffix in TABLE_SUFFIXES:
        return "table"
    return "text" if unpacked(path) != path or looks_like_text(path) else "other"


def _hashed(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _stamp(paths: list[Path]) -> tuple[str, ...]:
    """Return what changes when one of the files does, or their order."""
    facts = [(os.path.abspath(path), path.stat()) for path in paths]
    return tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)
