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
out, and the log says how many. Where a folder has splits (`files_of_split`), one of them is read.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import reprlib
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from posixpath import normpath
from typing import Any, Literal, NamedTuple

import numpy as np

from gsae_core.config import DataConfig
from gsae_core.errors import HUB_NAME, InputError, data_sentence

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

log: logging.Logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """Part of a document."""

    content: str | np.ndarray
    """Text, or token ids as a 1-D integer array."""
    ends: bool
    """Whether the document ends here."""


# About so many characters (or ids) a part: bounds what is read and tokenised in one go.
PART = 2**20


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


TOKEN_SUFFIXES = {".bin", ".npy"}
TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"}
Kind = Literal["table", "tokens", "text"]

# In the stamp of tables, since a column is chosen by more than one row: tokens that were kept of
# another choice are not these.
READ_ANEW = "2"


def open_source(cfg: DataConfig, vocabulary: int) -> Source:
    """Return the source that `cfg` names; `vocabulary` sets the width of a bare `.bin` file."""
    # Unlike Path, os.path answers for what is too long to be a path, too.
    path = Path(os.path.expanduser(cfg.source))
    if cfg.source == "stdlib" or os.path.isfile(path):
        if cfg.split not in ("train", "all"):
            raise _no_split(cfg.split, cfg.source, ["train"])
        if cfg.source == "stdlib":
            return _stdlib(cfg)
        # One file of an unknown name may be text all the same: opening it tells.
        return _files(cfg, [path], _kind(path) or "text", vocabulary)
    if cfg.source and os.path.isdir(path):  # Path("") is the current folder
        saved = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})
        if any(all((path / name).exists() for name in names) for names in saved):
            return _saved(cfg, path)
        return _files(cfg, *_files_to_read(path, cfg.split), vocabulary)
    # A path that ends like a file is a mistake, not the name of a data set.
    suffixes = TABLE_SUFFIXES | TOKEN_SUFFIXES | {".txt", ".md", ".py", *PACKED}
    is_hub_name = re.fullmatch(rf"{HUB_NAME.pattern}(:[\w.-]+)?", cfg.source)
    if not is_hub_name or path.suffix.lower() in suffixes:
        raise InputError(
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            f"nothing at {cfg.source or 'an empty name'}: check the path"
        )
    read_anew = [READ_ANEW] if cfg.text_column is None else []
    stamp = ("hub", cfg.source, cfg.split, str(cfg.text_column), *read_anew)

    def documents() -> Iterator[Part]:
        return table_parts([(cfg.source, hub_rows(cfg.source, cfg.split))], cfg.text_column)

    return Source(cfg.source, stamp, documents)


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


def _saved(cfg: DataConfig, folder: Path) -> Source:
    def documents() -> Iterator[Part]:
        return table_parts([(str(folder), saved_rows(folder, cfg.split))], cfg.text_column)

    # Of several splits, one: its size is what the preview estimates tokens by.
    inner = folder / cfg.split
    files = tuple(sorted((inner if inner.is_dir() else folder).rglob("*.*")))
    stamp = (*_stamp(files), cfg.split, str(cfg.text_column), READ_ANEW)
    return Source(str(folder), stamp, documents, files=files)


def _files(cfg: DataConfig, paths: list[Path], kind: Kind, vocabulary: int) -> Source:
    def documents() -> Iterator[Part]:
        if kind == "table":
            yield from table_parts(((str(p), _file_rows(p)) for p in paths), cfg.text_column)
            return
        for path in paths:
            if kind == "tokens":
                yield from token_parts(path, vocabulary)
            elif unpacked(path) == path and not looks_like_text(path):
                raise not_text(path)
            else:
                yield from text_parts(path)

    sidecars = [each for path in paths if kind == "tokens" and (each := _sidecar(path)).exists()]
    read_anew = [READ_ANEW] if kind == "table" else []
    stamp = (*_stamp(paths + sidecars), str(cfg.text_column), *read_anew)
    return Source(cfg.source, stamp, documents, files=tuple(paths))


def _files_to_read(folder: Path, split: str) -> tuple[list[Path], Kind]:
    """Return a folder's files of the kind that most of them are, in reading order."""
    kinds: dict[str, Kind | None] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            kinds[name.as_posix()] = _kind(path)
    # What stands beside a data set says nothing of its kind.
    counts = Counter(kinds[n] for n in kinds if Path(n).stem not in ("README", "LICENSE"))
    ranking: tuple[Kind, ...] = ("tokens", "table", "text")
    kind = max(ranking, key=lambda kind: counts[kind]) if counts else "text"
    names = sorted(name for name in kinds if kinds[name] == kind)
    if not names:
        raise InputError(
            f"expected text (UTF-8), tables or token arrays in {folder}, found {len(kinds)} files, "
            "none of them readable"
        )
    read = files_of_split(split, folder, names, is_text=kind == "text")
    n_others = len(kinds) - len(read)
    log.info("%s: %d files read as %s, %d others left out", folder, len(read), kind, n_others)
    # Text by hash, so that the first thousand files are like the rest; shards in their own order.
    return [folder / name for name in sorted(read, key=_hashed if kind == "text" else str)], kind


def _kind(path: Path) -> Kind | None:
    if path.suffix.lower() in TOKEN_SUFFIXES:
        return "tokens"
    if Path(path.stem).suffix.lower() in TOKEN_SUFFIXES:
        return None  # `ids.bin.json` says the width of `ids.bin`; packed, it cannot be mapped
    if unpacked(path).suffix.lower() in TABLE_SUFFIXES:
        return "table"
    return "text" if unpacked(path) != path or looks_like_text(path) else None


def _hashed(name: str) -> str:
    return sha256(name.encode()).hexdigest()


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
        raise _no_split(split, folder, list(splits))
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


def _no_split(split: str, where: Path | str, splits: list[str]) -> InputError:
    return InputError(
        f"expected a split {split!r} in {where}, found {', '.join(splits) or 'none'}: name one "
        "that is there with --split, or `all`"
    )


# --- Files of text, packed or not

# `--long=31` needs the whole window.
_open_zstd = partial(zstd.open, options={zstd.DecompressionParameter.window_log_max: 31})

PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
"""How a compressed file is opened, by its suffix: those that `datasets` streams, too."""

# What a damaged one raises, beside OSError.
UNPACKING = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def unpacked(path: Path) -> Path:
    """Return the path without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a UTF-8 file, unpacked, without its BOM; damaged or other content is an InputError."""
    opened = PACKED.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path)
    try:
        with io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, *UNPACKING, OSError) as error:
        # An error of the disk has a number; gzip's and bz2's own, of the content, have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise not_text(path, error) from None


def text_parts(path: Path, size: int = PART) -> Iterator[Part]:
    """Yield a UTF-8 file in parts of about `size` characters that end at a line's end."""
    with open_text(path) as file:
        part = file.read(size) + file.readline()
        if "\0" in part:  # an archive that was packed, which `looks_like_text` does not unpack
            raise not_text(path, "with a NUL")
        while part:
            following = file.read(size) + file.readline()
            yield Part(part, ends=not following)
            part = following


def not_text(path: Path, error: Exception | str = "not UTF-8, or with a NUL") -> InputError:
    """Return the sentence for a file whose bytes are no UTF-8 text."""
    return InputError(
        f"expected UTF-8 text in {path}, got something else ({error}): save it as UTF-8, unpack it "
        "or download it again"
    )


def looks_like_text(path: Path) -> bool:
    """Whether a file starts (64 KiB) with valid UTF-8 without a NUL."""
    with path.open("rb") as file:
        head = file.read(2**16)
    try:
        # A character that the 64 KiB cut in two is no mistake of the file's.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < 2**16)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


# --- Files of token ids

# llm.c writes (magic, version) and 254 more int32 in front of the ids.
LLM_C_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
LLM_C_HEADER_BYTES = 1024


def token_parts(path: Path, vocabulary: int) -> Iterator[Part]:
    """Yield the ids of a `.npy` (flat, or a row a document) or flat `.bin` file.

    The width of a `.bin` is said by an llm.c header, else by `<file>.json` with a `"dtype"`, else
    it is the narrowest that holds `vocabulary` (as nanoGPT writes).
    """
    ids = _npy(path) if path.suffix.lower() == ".npy" else _bin(path, vocabulary)
    if ids.ndim == 2:
        yield from (Part(np.asarray(row), ends=True) for row in ids)
        return
    for start in range(0, len(ids), PART):
        yield Part(np.asarray(ids[start : start + PART]), ends=False)


def _npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"expected a NumPy array in {path}, got something else: {error}") from None
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(
            f"expected token ids in one or two dimensions in {path}, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    return ids


def _bin(path: Path, vocabulary: int) -> np.ndarray:
    by_header = LLM_C_HEADERS.get(tuple(np.fromfile(path, "<i4", count=2).tolist()))
    start = LLM_C_HEADER_BYTES if by_header else 0
    dtype = by_header or _told_dtype(_sidecar(path)) or narrowest(vocabulary)
    size = path.stat().st_size - start
    if size % np.dtype(dtype).itemsize:
        raise InputError(
            f"expected whole {dtype} token ids in {path}, got {size} bytes; "
            f'say the width in {path.name}.json, e.g. {{"dtype": "uint32"}}'
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", offset=start) if size > 0 else np.empty(0, dtype)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _told_dtype(sidecar: Path) -> str | None:
    if not sidecar.exists():
        return None
    text = sidecar.read_text(encoding="utf-8-sig")
    try:
        dtype = json.loads(text)["dtype"]
    except (ValueError, KeyError, TypeError):
        dtype = text
    if dtype not in ("uint16", "uint32"):
        raise InputError(f'expected {{"dtype": "uint16"}} or "uint32" in {sidecar}, got {text!r}')
    return dtype


def narrowest(vocabulary: int) -> str:
    """Return the dtype that token ids are kept in: uint16 where it holds them all."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


# --- Rows of tables: in files, in `datasets` folders, on the Hub

Row = dict[str, Any]


def _file_rows(path: Path) -> Iterator[Row]:
    # By hand: of JSON and CSV, `datasets` wants one schema for all rows, and names no broken row.
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    return readers.get(unpacked(path).suffix.lower(), _json)(path)


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON array; a string is a row of text."""
    number = 0
    try:
        with open_text(path) as file:
            is_array = file.read(2**12).lstrip().startswith("[")
            file.seek(0)
            rows = json.load(file) if is_array else map(json.loads, filter(str.strip, file))
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, str | dict):
                    raise InputError(
                        f"expected a JSON object in row {number} of {path}, got "
                        f"{type(row).__name__}"
                    )
                yield {"text": row} if isinstance(row, str) else row
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"expected JSON in row {number + 1} of {path}, got something else: {error}"
        ) from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"expected Parquet in {path}, got something else: {error}") from None


def _csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file; what its header has most of, unquoted, delimits its fields."""
    # The module's own bound of 128 KiB a field is less than a book; a C long may be 32 bits wide.
    csv.field_size_limit(2**31 - 1)
    delimiters = "\t,;|" if unpacked(path).suffix.lower() == ".tsv" else ",;\t|"
    try:
        with open_text(path) as file:
            header = file.readline()
            delimiter = max(delimiters, key=re.sub('"[^"]*"', "", header).count)
            reader = csv.DictReader(chain([header], file), delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"expected {len(reader.fieldnames or ())} fields in the row that ends at "
                        f"line {reader.line_num} of {path}, got another number"
                    )
                yield row
    except csv.Error as error:
        raise InputError(f"expected CSV in {path}, got something else: {error}") from None


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder of `datasets.save_to_disk` in a fixed permutation."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split != "all" and split not in saved:
            raise _no_split(split, folder, list(map(str, saved)))
        every = list(saved.values())
        saved = datasets.concatenate_datasets(every) if split == "all" else saved[split]
    elif split not in ("all", "train", str(saved.split)):
        raise _no_split(split, folder, [str(saved.split or "train")])
    # As Python's own objects, whichever library's the folder remembers (torch, pandas, arrow).
    saved = saved.with_format(None, columns=saved.format["columns"])
    order = np.random.default_rng(0).permutation(len(saved))
    for start in range(0, len(order), 256):
        columns: Any = saved[order[start : start + 256].tolist()]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Yield the rows of a data set on the Hub as they arrive."""
    import datasets
    import httpx2

    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        # The library takes a mark off other kinds of files, but leaves it in text.
        kind = rows.info.builder_name
        for row in rows:
            if kind == "csv":
                _check_header(row, name)
            yield {"text": row["text"].removeprefix("\ufeff")} if kind == "text" else row
    except InputError:
        raise
    except (OSError, httpx2.HTTPError) as error:
        raise InputError(data_sentence(error, name)) from error
    # No such config or split; a set that needs code; a damaged file, or one that is not UTF-8.
    except (ValueError, RuntimeError, *UNPACKING) as error:
        raise InputError(
            f"expected a data set, config and split that can be streamed, got {name} and "
            f"{split!r}: {' '.join(str(error).split())}; name others, or mend the files in a folder"
        ) from error


def _check_header(row: Row, name: str) -> None:
    """Refuse a CSV whose header was taken for one name: its delimiter is not the comma."""
    # Fields of later rows that hold a comma come as an index of pandas'.
    header, *more = (each for each in row if not each.startswith("__index_level_"))
    if not more and any(delimiter in header for delimiter in ";\t|"):
        raise InputError(
            f"expected fields between commas in the CSV files of {name}, got the header {header!r}:"
            " download them and name the folder, or a data set whose card has their `sep`"
        )


# --- The document in a row

TOKEN_COLUMNS = ("input_ids", "tokens")
TEXT_COLUMNS = ("text", "content")

# Rows by which a column is chosen, and characters of each value that are looked at.
LOOKED_AT, LOOK = 32, 2000

# Text has so many words a row, on average, by its first characters (LOOK).
WORDS = 5

# A word is up to 40 characters between spaces, a letter in it and no `://`; or one letter of a
# script that is written without spaces: Thai to Burmese, kana, Han.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    r"|(?<!\S)(?!\S*://)(?=\S*[^\W\d_])\S{1,40}(?!\S)"
)


def table_parts(
    tables: Iterable[tuple[str, Iterator[Row]]], text_column: str | None
) -> Iterator[Part]:
    """Yield the document in each row of some tables; rows without text or ids have none.

    Without `text_column`, `pick_column` chooses one, kept for the tables after that have it too.
    Each table comes with its name, for sentences.
    """
    column = text_column
    for name, rows in tables:
        head = list(islice(rows, LOOKED_AT))
        if not head:
            continue
        # A column may be called "": the index that pandas writes in front of a CSV's others.
        if column is None or not any(column in row for row in head):
            picked = None if text_column else pick_column(head)
            if picked is None:
                wanted = f"column {text_column!r}" if text_column else "column of text"
                raise _no_column(f"a {wanted}", name, head[0])
            column = picked
        for row in chain(head, rows):
            value = row.get(column)
            if isinstance(value, str):
                # Surrogates that a JSON escape left alone are no text: no tokenizer takes them.
                if text := value.encode("utf-8", "replace").decode("utf-8"):
                    yield Part(text, ends=True)
            elif _is_ids(value):
                ids = np.asarray(value)
                if "attention_mask" in row:
                    ids = ids[np.asarray(row["attention_mask"], dtype=bool)]
                yield Part(ids, ends=True)
            elif _is_held(value):
                raise _no_column(f"text or token ids in column {column!r}", name, row)


def pick_column(head: list[Row]) -> str | None:
    """Return the column that holds the documents, judged by the first rows; None if none does.

    Token ids under `input_ids` or `tokens`; text under `text` or `content`; or else the only column
    of strings, if it reads like text.
    """
    held = {name: [row[name] for row in head if _is_held(row.get(name))] for name in chain(*head)}
    ids = [name for name in TOKEN_COLUMNS if held.get(name) and _is_ids(held[name][0])]
    strings = [name for name in held if held[name] and all(isinstance(v, str) for v in held[name])]
    named = [name for name in TEXT_COLUMNS if name in held]
    named.sort(key=lambda name: name not in strings)
    only = strings if len(strings) == 1 and reads_like_text(held[strings[0]]) else []
    return next(iter(ids + named + only), None)


def _is_held(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def reads_like_text(values: list[str]) -> bool:
    """Whether strings are sentences or code, not identifiers, URLs, dates, labels or JSON."""
    n_words = sum(0 if _is_json(value) else len(WORD.findall(value[:LOOK])) for value in values)
    return n_words >= WORDS * len(values)


def _is_json(value: str) -> bool:
    if not value.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(value), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _no_column(wanted: str, name: str, row: Row) -> InputError:
    shown = reprlib.Repr()
    shown.maxdict = 12
    return InputError(
        f"expected {wanted} in {name}, got rows such as {shown.repr(row)}: name a column of text "
        "with --text-column, or write the text out as one, a chat by the model's chat template"
    )
