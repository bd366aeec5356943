"""Documents from anywhere: the standard library, files, folders, tables, token arrays, the Hub.

Everything is read lazily, so that a corpus that needs a thousand documents reads a thousand.

| source | a document | order |
|---|---|---|
| `stdlib` | a file | by the hash of its name |
| a text or code file, a folder of them | a file | by the hash of its name |
| `.jsonl .json .parquet .arrow .csv .tsv`, a folder of them | a row | as stored |
| `.bin .npy .npz`, a folder of them: token ids | all, or a row of a 2-D array | as stored |
| `.zip .tar`, a folder of them: WebDatasets too | a text file or a row | as stored |
| a `datasets` folder (`save_to_disk`) | a row | a fixed permutation |
| a name on the Hub: `name`, `owner/name`, `owner/name:config` | a row | as streamed |

Text and tables may be packed (`.gz .bz2 .xz .zst`), and `.tar` too. A folder is read as what most
of its files are (token ids, tables, text or archives; ties in that order); hidden files and those
of another kind are left out, and the log says how many. Where a folder has splits
(`files_of_split`), one of them is read. Of an archive its `.txt` files are read if tables are not
more, else its tables, else what reads as text.

A line that is `<|endoftext|>`, or the tokenizer's own end of text, ends a document of a `.txt`
file; `DataConfig.separator` names another line, which does so in every kind of text.
"""

import json
import logging
import os
import re
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from posixpath import normpath
from typing import Any, Literal

import numpy as np

from gsae_core.config import DataConfig
from gsae_core.errors import HUB_NAME, InputError, expecting
from gsae_core.files import not_permitted
from gsae_core.lm.chat import ChatTemplate
from gsae_core.lm.packed import (
    PACKED,
    PART,
    Part,
    is_archive,
    looks_like_text,
    members,
    not_text,
    text_parts,
    unpacked,
)
from gsae_core.lm.tables import (
    TABLE_SUFFIXES,
    TEXT_COLUMNS,
    TOKEN_COLUMNS,
    Row,
    as_ids,
    file_rows,
    hub_rows,
    no_split,
    saved_rows,
    table_parts,
    unmasked,
)

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from, not yet read."""

    name: str
    stamp: tuple[str, ...]
    """What the token cache knows it by: names, sizes and times of files. A Hub data set's is its
    name, so that a resumed run reads the tokens it began with, online or not."""
    train: Callable[[], Iterator[Part]]
    """Opens the documents: all of them, or those for training where `held_out` is given."""
    held_out: Callable[[], Iterator[Part]] | None = None
    """Opens the held-out documents; None where the split is cut by sequence."""
    files: tuple[Path, ...] = ()
    """What they are read from; none on the Hub."""


TOKEN_SUFFIXES = {".bin", ".npy", ".npz"}
Kind = Literal["table", "tokens", "text", "archive"]

# In the stamp of tables, since a column is chosen by more than one row: tokens that were kept of
# another choice are not these.
READ_ANEW = "2"


# A line of its own that ends a document, whichever tokenizer reads it.
END_OF_TEXT = "<|endoftext|>"

# Files of an archive by which it is told what to read of it.
LOOKED_AT = 1000


def open_source(
    cfg: DataConfig,
    vocabulary: int,
    *,
    end_of_text: str | None = None,
    chats: ChatTemplate | None = None,
) -> Source:
    """Return the source that `cfg` names.

    Args:
        vocabulary: sets the width of a bare `.bin` file.
        end_of_text: how the tokenizer writes the end of a document.
        chats: what writes chats out, where `cfg.chat` asks for them.
    """
    # Unlike Path, os.path answers for what is too long to be a path, too.
    path = Path(os.path.expanduser(cfg.source))
    if cfg.source == "stdlib" or os.path.isfile(path):
        if cfg.split not in ("train", "all"):
            raise no_split(cfg.split, cfg.source, ["train"])
        if cfg.source == "stdlib":
            _check_columns(cfg, "text")
            _check_lines(cfg, "files that are a document each")
            return _stdlib(cfg)
        # One file of an unknown name may be text all the same: opening it tells.
        return _files(cfg, [path], _kind(path) or "text", vocabulary, end_of_text, chats)
    if cfg.source and os.path.isdir(path):  # Path("") is the current folder
        saved = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})
        if any(all((path / name).exists() for name in names) for names in saved):
            _check_lines(cfg, "a table")
            return _saved(cfg, path, chats)
        read, kind = _files_to_read(path, cfg)
        return _files(cfg, read, kind, vocabulary, end_of_text, chats)
    # A path that ends like a file is a mistake, not the name of a data set.
    suffixes = TABLE_SUFFIXES | TOKEN_SUFFIXES | {".txt", ".md", ".py", *PACKED}
    is_hub_name = re.fullmatch(rf"{HUB_NAME.pattern}(:[\w.-]+)?", cfg.source)
    if not is_hub_name or path.suffix.lower() in suffixes or is_archive(path):
        raise InputError(
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            f"nothing at {cfg.source or 'an empty name'}: check the path"
        )
    _check_lines(cfg, "a data set on the Hub")
    read_anew = [READ_ANEW] if cfg.text_column is None else []
    stamp = ("hub", cfg.source, cfg.split, str(cfg.text_column), *_anew(cfg, chats), *read_anew)

    def documents() -> Iterator[Part]:
        rows = hub_rows(cfg.source, cfg.split)
        return table_parts([(cfg.source, rows)], cfg.text_column, chats)

    return Source(cfg.source, stamp, documents)


def _anew(cfg: DataConfig, chats: ChatTemplate | None) -> list[str]:
    """Return what the stamp of a table says of how it is read, where `cfg.reading` decides that."""
    if chats is not None:
        return ["chats", sha256(chats.template.encode()).hexdigest()]
    # Padding is looked for in token ids; a column of this name has none.
    return [] if cfg.reading == 1 or cfg.text_column in TEXT_COLUMNS else [f"reading {cfg.reading}"]


@contextmanager
def permitted(name: str) -> Iterator[None]:
    """Make a sentence of a file or folder that this user may not read."""
    try:
        yield
    except PermissionError as error:
        raise InputError(not_permitted(error.filename or name)) from None


def _check_lines(cfg: DataConfig, kind: str) -> None:
    """Refuse a line that ends documents where documents are told in another way."""
    if cfg.separator not in (None, "none"):
        raise InputError(
            f"expected plain text for --separator, got {kind} in {cfg.source}: leave out "
            "--separator"
        )


def _check_columns(cfg: DataConfig, kind: Kind) -> None:
    """Refuse chats where there are no columns; say that a column is not looked for there."""
    if cfg.chat:
        raise InputError(
            f"expected a table with chats for --chat, got {kind} in {cfg.source}: leave out --chat"
        )
    if cfg.text_column is not None:
        where = f"{cfg.source} is read as {kind}"
        log.warning("%s, so the column %r is not looked for", where, cfg.text_column)


def _stdlib(cfg: DataConfig) -> Source:
    # Whole percents: the bundled model never saw the files below 5, at any share that is asked for.
    percent = max(1, round(100 * cfg.held_out))
    paths = stdlib_paths()

    def documents(held_out: bool) -> Iterator[Part]:
        for name in sorted(paths, key=_hashed):
            if is_held_out(name, percent) == held_out and (text := read_utf8(paths[name])):
                yield Part(text, ends=True)

    files = tuple(paths.values())
    stamp = ("stdlib", str(percent), *_stamp(files))
    return Source("stdlib", stamp, partial(documents, False), partial(documents, True), files)


def _saved(cfg: DataConfig, folder: Path, chats: ChatTemplate | None) -> Source:
    def documents() -> Iterator[Part]:
        rows = saved_rows(folder, cfg.split)
        return table_parts([(str(folder), rows)], cfg.text_column, chats)

    # Of several splits, one: its size is what the preview estimates tokens by.
    inner = folder / cfg.split
    files = tuple(sorted((inner if inner.is_dir() else folder).rglob("*.*")))
    stamp = (*_stamp(files), cfg.split, str(cfg.text_column), *_anew(cfg, chats), READ_ANEW)
    return Source(str(folder), stamp, documents, files=files)


def _files(
    cfg: DataConfig,
    paths: list[Path],
    kind: Kind,
    vocabulary: int,
    end_of_text: str | None,
    chats: ChatTemplate | None,
) -> Source:
    def separators(path: Path) -> tuple[str, ...]:
        is_txt = kind == "archive" or unpacked(path).suffix.lower() == ".txt"
        return _separators(cfg, end_of_text, is_txt=is_txt)

    def documents() -> Iterator[Part]:
        if kind == "table":
            tables = ((str(path), file_rows(path)) for path in paths)
            yield from table_parts(tables, cfg.text_column, chats)
        elif kind == "archive":
            yield from _of_archives(cfg, paths, end_of_text, chats)
        say = _say_once(cfg.source)
        for path in paths if kind in ("tokens", "text") else ():
            if kind == "tokens":
                yield from token_parts(path, vocabulary)
            elif unpacked(path) == path and not looks_like_text(path):
                raise not_text(path)
            else:
                yield from text_parts(path, separators=separators(path), found=say)

    if kind in ("tokens", "text"):
        _check_columns(cfg, kind)
    if kind in ("tokens", "table"):
        _check_lines(cfg, {"tokens": "token ids", "table": "a table"}[kind])
    sidecars = [each for path in paths if kind == "tokens" and (each := _sidecar(path)).exists()]
    how = [] if kind == "text" else _anew(cfg, chats)
    if kind == "table":
        how.append(READ_ANEW)
    elif kind != "tokens":
        # Of an earlier version's reading, what these lines did not part.
        how += sorted({each for path in paths for each in separators(path)})
    stamp = (*_stamp(paths + sidecars), str(cfg.text_column), *how)
    return Source(cfg.source, stamp, documents, files=tuple(paths))


def _separators(cfg: DataConfig, end_of_text: str | None, *, is_txt: bool) -> tuple[str, ...]:
    """Return the lines that end a document of a text."""
    if cfg.separator is not None:
        return () if cfg.separator == "none" else (cfg.separator,)
    if not is_txt or cfg.reading == 1:
        return ()
    return tuple(dict.fromkeys(each for each in (END_OF_TEXT, end_of_text) if each))


def _say_once(name: str) -> Callable[[], object]:
    """Return what says, when it is first called, that lines end documents."""
    return cache(partial(log.info, "%s: lines in it end documents; --separator says which", name))


def _of_archives(
    cfg: DataConfig, paths: list[Path], end_of_text: str | None, chats: ChatTemplate | None
) -> Iterator[Part]:
    """Yield the documents in archives: their `.txt` files, or their tables, or other text."""
    suffixes = Counter(
        unpacked(member).suffix.lower() for member in islice(members(paths[0]), LOOKED_AT)
    )
    n_tables = sum(n for suffix, n in suffixes.items() if suffix in TABLE_SUFFIXES)
    if n_tables > suffixes[".txt"] or (n_tables and (cfg.chat or cfg.text_column)):
        _check_lines(cfg, "a table")
        tables = ((str(path), _rows_in(path)) for path in paths)
        yield from table_parts(tables, cfg.text_column, chats)
        return
    _check_columns(cfg, "text")
    say = _say_once(cfg.source)
    for path in paths:
        for member in members(path):
            is_txt = unpacked(member).suffix.lower() == ".txt"
            if is_txt if suffixes[".txt"] else looks_like_text(member):
                separators = _separators(cfg, end_of_text, is_txt=is_txt)
                yield from text_parts(member, separators=separators, found=say)


def _rows_in(archive: Path) -> Iterator[Row]:
    for member in members(archive):
        if unpacked(member).suffix.lower() in TABLE_SUFFIXES:
            yield from file_rows(member)


def _files_to_read(folder: Path, cfg: DataConfig) -> tuple[list[Path], Kind]:
    """Return a folder's files of the kind that most of them are, in reading order."""
    kinds: dict[str, Kind | None] = {}

    def refuse(error: OSError) -> None:
        raise error

    for root, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.is_file():
                kinds[path.relative_to(folder).as_posix()] = _kind(path, since=cfg.reading)
    # What stands beside a data set says nothing of its kind.
    counts = Counter(kinds[n] for n in kinds if Path(n).stem not in ("README", "LICENSE"))
    ranking: tuple[Kind, ...] = ("tokens", "table", "text", "archive")
    kind = max(ranking, key=lambda kind: counts[kind]) if counts else "text"
    names = sorted(name for name in kinds if kinds[name] == kind)
    if not names:
        raise InputError(
            f"expected text (UTF-8), tables or token arrays in {folder}, found {len(kinds)} files, "
            "none of them readable"
        )
    read = files_of_split(cfg.split, folder, names, is_text=kind == "text")
    n_others = len(kinds) - len(read)
    log.info("%s: %d files read as %s, %d others left out", folder, len(read), kind, n_others)
    # Text by hash, so that the first thousand files are like the rest; shards in their own order.
    return [folder / name for name in sorted(read, key=_hashed if kind == "text" else str)], kind


def _kind(path: Path, *, since: int = 2) -> Kind | None:
    """Return what a file is read as; `since`: what was read then (`DataConfig.reading`)."""
    suffix, inner = path.suffix.lower(), unpacked(path).suffix.lower()
    if suffix in TOKEN_SUFFIXES and (since > 1 or suffix != ".npz"):
        return "tokens"
    if Path(path.stem).suffix.lower() in TOKEN_SUFFIXES:
        return None  # `ids.bin.json` says the width of `ids.bin`; packed, it cannot be mapped
    if since > 1 and is_archive(path):
        return "archive"
    if inner in TABLE_SUFFIXES and (since > 1 or inner != ".arrow"):
        return "table"
    return "text" if unpacked(path) != path or looks_like_text(path, marked=since > 1) else None


def _hashed(name: str) -> str:
    # A name in another encoding than this system's has its bytes as lone surrogates.
    return sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return what changes when one of the files does, or their order."""
    facts = [(os.path.abspath(path), path.stat()) for path in paths]
    return tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)


# --- The standard library


def is_held_out(name: str, percent: int = 5) -> bool:
    """Whether file `name` belongs to the held-out split: decided by its name alone."""
    return int(_hashed(name)[:8], 16) % 100 < percent


def stdlib_paths(root: Path | None = None) -> dict[str, Path]:
    """Return the standard library's Python files, without third parties', by path below its root.

    In name order: two machines with the same Python read the same text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = {}
    for folder, below, names in os.walk(root):
        # Not even entered: site-packages has ten times as many files as the library.
        below[:] = set(below) - {"site-packages", "dist-packages", "__pycache__"}
        found = [Path(folder, name) for name in names if name.endswith(".py")]
        paths |= {path.relative_to(root).as_posix(): path for path in found}
    return dict(sorted(paths.items()))


def read_utf8(path: Path) -> str | None:
    """Return a text; None in another encoding, as some of the library's own tests are."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


# --- Splits of a folder


def files_of_split(split: str, folder: Path, names: Sequence[str], *, is_text: bool) -> list[str]:
    """Return the files of one split; all of them if `split` is `all`, or `train` and none is told.

    By the rules of the `datasets` library: README.md tells, else names of shards, else words.
    Documents (`is_text`) may be called anything: unless most are `.txt` whose names tell a split,
    `train` and another, `train` is all of them.
    """
    if split == "all":
        return list(names)
    import yaml

    try:
        told = by_card = _told_by_card(folder)
        # Source code called `test` may be no split.
        tell = [n for n in names if by_card or not is_text or ".txt" in Path(n).suffixes]
        if tell and not by_card:
            from datasets import data_files

            # By names as they are here: its own walk goes through the folder for each pattern.
            told = data_files._get_data_files_patterns(partial(_fitting, tell))
    # An assertion: a name of a shard without a split in it.
    except (ValueError, TypeError, KeyError, AssertionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split()) or "a name without its split"
        raise InputError(
            f"expected splits as the Hub reads them in {folder}, by names or by `configs` in "
            f"README.md, one of them the default, got something else ({why}): mend them, or read "
            "all there is with --split all"
        ) from None
    found = {each: {n for p in told[each] for n in _fitting(tell, p)} for each in told}
    splits = {str(each): sorted(found[each]) for each in told if found[each]}
    if split == "train" and is_text and not by_card:
        n_told = sum(map(len, splits.values()))
        if split not in splits or len(splits) == 1 or 2 * n_told <= len(names):
            return list(names)
    if split not in splits:
        raise no_split(split, folder, list(splits))
    return splits[split]


def _fitting(names: Sequence[str], pattern: str) -> list[str]:
    from fsspec.utils import glob_translate

    fits = re.compile(glob_translate(normpath(pattern))).match
    return [name for name in names if fits(name)]


def _told_by_card(folder: Path) -> dict[str, Any]:
    """Return the patterns of each split that README.md names; none if it names no files."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8-sig", "replace") if readme.is_file() else ""
    if "\nconfigs:" not in text:
        return {}
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card: Any = DatasetCard(text).data
    configs = MetadataConfigs.from_dataset_card_data(card)
    default: Any = configs.get_default_config_name()
    if configs and default is None:
        raise ValueError(f"none of {', '.join(configs)} is the default")
    return sanitize_patterns(configs[default].get("data_files", {})) if configs else {}


# --- Files of token ids

# llm.c writes (magic, version) and 254 more int32 in front of the ids.
LLM_C_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
LLM_C_HEADER_BYTES = 1024


# Ids of a `.bin` of unsaid width that are looked at, and how few tell nothing.
IDS_LOOKED_AT, TOO_FEW_IDS = 2**16, 8


def token_parts(path: Path, vocabulary: int) -> Iterator[Part]:
    """Yield the ids of a `.npy` or `.npz` (flat, or a row a document) or flat `.bin` file.

    The width of a `.bin` is said by an llm.c header, else by `<file>.json` with a `"dtype"`, else
    it is the narrowest that holds `vocabulary` (as nanoGPT writes).
    """
    is_bin = path.suffix.lower() == ".bin"
    ids, mask = (_bin(path, vocabulary), None) if is_bin else _numpy(path)
    size = 1 if ids.ndim == 2 else PART
    for start in range(0, len(ids), size):
        which = start if ids.ndim == 2 else slice(start, start + size)
        part = as_ids(np.asarray(ids[which]))
        if part is None:
            raise InputError(f"expected token ids in {path}, got numbers that are not whole")
        hidden = None if mask is None else mask[which]
        yield Part(unmasked(part, hidden, str(path)), ends=ids.ndim == 2)


def _numpy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the one array of token ids in a file of NumPy's, and their attention mask if any."""
    mask = None
    damaged = (ValueError, EOFError, zipfile.BadZipFile)
    with expecting("a NumPy array", path, *damaged), path.open("rb") as file:
        if file.peek(2)[:2] != b"PK":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            found: Any = np.load(file, allow_pickle=False)
            names = [name for name in TOKEN_COLUMNS if name in found.files] or found.files
            if len(names) != 1:
                raise InputError(
                    f"expected one array of token ids in {path}, or one called input_ids or "
                    f"tokens, got {', '.join(names) or 'none'}"
                )
            ids, mask = found[names[0]], found.get("attention_mask")
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iuf":
        raise InputError(
            f"expected token ids in one or two dimensions in {path}, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    if mask is not None and mask.shape != ids.shape:
        raise InputError(
            f"expected an attention_mask of shape {ids.shape}, as input_ids, in {path}, got "
            f"{mask.shape}"
        )
    return ids, mask


def _bin(path: Path, vocabulary: int) -> np.ndarray:
    by_header = LLM_C_HEADERS.get(tuple(np.fromfile(path, "<i4", count=2).tolist()))
    start = LLM_C_HEADER_BYTES if by_header else 0
    told = by_header or _told_dtype(_sidecar(path))
    dtype = told or narrowest(vocabulary)
    size = path.stat().st_size - start
    if size % np.dtype(dtype).itemsize:
        raise InputError(
            f"expected whole {dtype} token ids in {path}, got {size} bytes; "
            f'say the width in {path.name}.json, e.g. {{"dtype": "uint32"}}'
        )
    # An empty file cannot be mapped.
    ids = np.memmap(path, dtype, mode="r", offset=start) if size > 0 else np.empty(0, dtype)
    head = ids[:IDS_LOOKED_AT]
    if not told and dtype == "uint16" and len(head) >= TOO_FEW_IDS and not head[1::2].any():
        raise InputError(
            f"expected uint16 token ids in {path}, got every other one 0, as uint32 would be; say "
            f'the width in {path.name}.json: {{"dtype": "uint32"}}, or "uint16" if they are so'
        )
    return ids


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _told_dtype(sidecar: Path) -> str | None:
    if not sidecar.exists():
        return None
    text = "a folder" if sidecar.is_dir() else sidecar.read_text("utf-8-sig", "replace")
    try:
        dtype = json.loads(text)["dtype"]
    except (ValueError, KeyError, TypeError, RecursionError):
        dtype = text
    if dtype not in ("uint16", "uint32"):
        raise InputError(
            f'expected {{"dtype": "uint16"}} or "uint32" in {sidecar}, got {text[:80]!r}'
        )
    return dtype


def narrowest(vocabulary: int) -> str:
    """Return the dtype that token ids are kept in: uint16 where it holds them all."""
    return "uint16" if vocabulary <= 2**16 else "uint32"
