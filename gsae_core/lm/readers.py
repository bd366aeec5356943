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
import functools
import gzip
import io
import json
import logging
import lzma
import os
import re
import struct
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

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Part of a document."""

    content: str | np.ndarray
    """Text, or token ids as a 1-D integer array."""
    ends: bool
    """Whether the document ends here."""


# About so many characters (or ids) a part: bounds what is read and tokenised in one go.
PART = 2**20

# --- Sources


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
Kind = Literal["table", "tokens", "text", "other"]

# In the stamp of tables, since a column is chosen by more than one row: tokens that were kept of
# another choice are not these.
READ_ANEW = "2"


def open_source(cfg: DataConfig, vocabulary: int) -> Source:
    """Return the source that `cfg` names; `vocabulary` sets the width of a bare `.bin` file."""
    path = Path(cfg.source).expanduser()
    if cfg.source == "stdlib" or path.is_file():
        if cfg.split not in ("train", "all"):
            raise InputError(_no_split(cfg.split, cfg.source, []))
        if cfg.source == "stdlib":
            return _stdlib(cfg)
        kind = _kind(path)
        # One file of an unknown name may be text all the same: opening it tells.
        return _files(cfg, [path], "text" if kind == "other" else kind, vocabulary)
    if path.is_dir():
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
            f"nothing at {cfg.source}: check the path"
        )
    read_anew = [READ_ANEW] if cfg.text_column is None else []
    stamp = ("hub", cfg.source, cfg.split, str(cfg.text_column), *read_anew)

    def documents() -> Iterator[Part]:
        return table_parts(hub_table(cfg.source, cfg.split), cfg.text_column)

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
            yield from table_parts(map(_table, paths), cfg.text_column)
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
    kinds: dict[str, Kind] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            kinds[name.as_posix()] = _kind(path)
    # What stands beside a data set says nothing of its kind.
    counts = Counter(kinds[n] for n in kinds if Path(n).stem not in ("README", "LICENSE"))
    ranking: tuple[Kind, ...] = ("tokens", "table", "text")
    kind = max(ranking, key=lambda kind: counts[kind]) if counts.total() else "text"
    names = sorted(name for name in kinds if kinds[name] == kind)
    if not names:
        for path in filter(is_utf16, map(folder.joinpath, kinds)):
            raise not_text(path)
        raise InputError(
            f"expected text, tables or token arrays in {folder}, found {len(kinds)} files, none of "
            "them readable"
        )
    read = files_of_split(split, folder, names, is_text=kind == "text")
    if others := len(kinds) - len(names):
        log.info("%s: read as %s, %d other files left out", folder, kind, others)
    if others := len(names) - len(read):
        log.info("%s: split %s, %d files of others left out", folder, split, others)
    # Text by hash, so that the first thousand files are like the rest; shards in their own order.
    return [folder / name for name in sorted(read, key=_hashed if kind == "text" else str)], kind


def _kind(path: Path) -> Kind:
    if path.suffix.lower() in TOKEN_SUFFIXES:
        return "tokens"
    if Path(path.stem).suffix.lower() in TOKEN_SUFFIXES:
        return "other"  # `ids.bin.json` says the width of `ids.bin`; packed, it cannot be mapped
    if unpacked(path).suffix.lower() in TABLE_SUFFIXES:
        return "table"
    return "text" if unpacked(path) != path or looks_like_text(path) else "other"


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

SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def files_of_split(split: str, folder: Path, names: Sequence[str], *, is_text: bool) -> list[str]:
    """Return the files of one split; all of them if `split` is `all`, or `train` and none is told.

    By the rules of the `datasets` library: README.md tells, else names of shards, else words.
    Documents (`is_text`) may be called anything: only names in `.txt` count, and unless most of
    them tell a split, `train` and another, `train` is all of them.
    """
    if split == "all":
        return list(names)
    splits = _told_by_card(folder, names)
    if not splits:
        shards = [(SHARD.fullmatch(name), name) for name in names]
        splits = _grouped((shard and shard[1], name) for shard, name in shards)
    if not splits:
        may_tell = [n for n in names if not is_text or unpacked(Path(n)).suffix.lower() == ".txt"]
        splits = _grouped((_split_of_words(name), name) for name in may_tell)
        is_set = len(splits) > 1 and 2 * sum(map(len, splits.values())) > len(names)
        if split == "train" and (not splits or (is_text and not (is_set and split in splits))):
            return list(names)
    if split not in splits:
        raise InputError(_no_split(split, folder, list(splits)))
    return splits[split]


def _grouped(pairs: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for split, name in pairs:
        if split:
            splits.setdefault(split, []).append(name)
    return splits


def _split_of_words(name: str) -> str | None:
    from datasets import data_files as library

    by_folder = library.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME.items()
    rules = chain(by_folder, library.DEFAULT_PATTERNS_SPLIT_IN_FILENAME.items())
    return next((str(split) for split, patterns in rules if _fits(name, patterns)), None)


def _told_by_card(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    readme = folder / "README.md"
    text = readme.read_text("utf-8-sig", "replace") if readme.is_file() else ""
    head = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    if head is None or not re.search(r"^configs:", head[1], re.MULTILINE):
        return {}
    import yaml
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        card: Any = DatasetCard(text).data
        configs = MetadataConfigs.from_dataset_card_data(card)
        default = configs.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"expected `configs` as the Hub reads them at the head of {readme}, got something "
            f"else: {' '.join(str(error).split())}; mend or remove them"
        ) from None
    if not configs:
        return {}
    if default is None:
        raise InputError(
            f"expected one config in {readme}, found {', '.join(configs)}: mark one of them with "
            "`default: true`"
        )
    splits = sanitize_patterns(configs[default].get("data_files", {})).items()
    return _grouped((split, n) for split, patterns in splits for n in names if _fits(n, patterns))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(_compiled(pattern).match(name) for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(normpath(pattern)))


def _no_split(split: str, where: Path | str, splits: list[str]) -> str:
    there = ", ".join(splits) or "no splits there"
    do = (
        "name one of these with --split, or `all`"
        if splits
        else "leave --split out to read all there is"
    )
    return f"expected a split {split!r} in {where}, found {there}: {do}"


# --- Files of text, packed or not

# What to do where `zstandard`, which both our readers and those of `datasets` unpack with, is away.
NO_ZSTANDARD = (
    "expected the package zstandard to unpack {}, found it not installed; pip install -r "
    "requirements.txt"
)


class _Unzstd(io.RawIOBase):
    """The bytes of a `.zst` file; cut off, an EOFError: zstandard's own reader ends quietly."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(NO_ZSTANDARD.format(path)) from None
        # `--long=31` needs the whole window.
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._file, self._frame = path.open("rb"), None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(2**16)
            if not self._packed and self._frame is None:
                return 0
            if not self._packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            frame: Any = self._frame or self._unpacker.decompressobj()
            self._unpacked = memoryview(frame.decompress(self._packed))
            self._packed, self._frame = frame.unused_data, None if frame.eof else frame
        n = min(len(buffer), len(self._unpacked))
        buffer[:n], self._unpacked = self._unpacked[:n], self._unpacked[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path) -> io.BufferedIOBase:
    return io.BufferedReader(_Unzstd(path), 2**20)


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
    ".zstd": _open_zstandard,
}
"""How a compressed file is opened, by its suffix: those that `datasets` streams, too."""


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
    except Exception as error:
        kinds = (UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError)
        is_damage = isinstance(error, kinds) or type(error).__name__ == "ZstdError"
        # An error of the disk has a number; gzip's and bz2's own, of the content, have none.
        if is_damage or (isinstance(error, OSError) and error.errno is None):
            raise not_text(path, error) from None
        raise


def text_parts(path: Path, size: int = PART) -> Iterator[Part]:
    """Yield a UTF-8 file in parts of about `size` characters that end at a line's end."""
    with open_text(path) as file:
        part = file.read(size) + file.readline()
        while part:
            following = file.read(size) + file.readline()
            yield Part(part, ends=not following)
            part = following


def not_text(path: Path, error: Exception | str = "not UTF-8, or with a NUL") -> InputError:
    """Return the sentence for a file whose bytes are no UTF-8 text."""
    if isinstance(error, EOFError):
        return InputError(f"expected all of {path}, got its beginning ({error}); download it again")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_utf16(path):
        got = "UTF-16; save it as UTF-8 (Notepad: Save as, Encoding: UTF-8)"
    elif is_zip:
        got = "a zip archive; unpack it"
    else:
        got = f"something else ({error}); convert or remove the file"
    return InputError(f"expected UTF-8 text in {path}, got {got}")


def is_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
    ids = _npy(path) if path.suffix == ".npy" else _bin(path, vocabulary)
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
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
    whole = len(head) == LLM_C_HEADER_BYTES
    by_header = LLM_C_HEADERS.get(struct.unpack("<ii", head[:8])) if whole else None
    start = LLM_C_HEADER_BYTES if by_header else 0
    dtype = by_header or _told_dtype(_sidecar(path)) or narrowest(vocabulary)
    size = path.stat().st_size
    if (size - start) % np.dtype(dtype).itemsize:
        raise InputError(
            f"expected whole {dtype} token ids in {path}, got {size} bytes; "
            f'say the width in {path.name}.json, e.g. {{"dtype": "uint32"}}'
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", offset=start) if size > start else np.empty(0, dtype)


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
Table = tuple[str, Iterator[Row]]
"""A table's name, for sentences, and its rows."""

DELIMITERS = (",", ";", "\t", "|")

# Behind a CSV's name in sentences: a file without a header has odd names of columns.
WITH_HEADER = " (its first row is read as the header)"


def _table(path: Path) -> Table:
    # By hand: JSON and CSV by `datasets` have one schema for all rows of a file, and no line number
    # in what is said of a broken one.
    kind = unpacked(path).suffix.lower()
    if kind in (".csv", ".tsv"):
        return f"{path}{WITH_HEADER}", _csv(path, usual="\t" if kind == ".tsv" else ",")
    readers = {".json": _json, ".parquet": _parquet}
    return str(path), readers.get(kind, _json_lines)(path)


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _as_row(json.loads(line), f"line {number} of {path}")
    except json.JSONDecodeError as error:
        raise InputError(
            f"expected a JSON object in line {number} of {path}, got something else: {error}"
        ) from None


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array, or of JSON lines under the name `.json`."""
    with open_text(path) as file:
        is_array = file.read(2**12).lstrip().startswith("[")
    if not is_array:
        yield from _json_lines(path)
        return
    try:
        with open_text(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"expected JSON in {path}, got something else: {error}") from None
    for number, row in enumerate(rows):
        yield _as_row(row, f"item {number} of {path}")


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {where}, got {type(value).__name__}")
    return value


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"expected Parquet in {path}, got something else: {error}") from None
    with file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _csv(path: Path, usual: str) -> Iterator[Row]:
    # The module's own bound of 128 KiB a field is less than a book; a C long may be 32 bits wide.
    csv.field_size_limit(2**31 - 1)
    delimiter = csv_delimiter(path, usual)
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"expected {len(reader.fieldnames or ())} fields in the row that ends at "
                        f"line {reader.line_num} of {path}, got another number"
                    )
                yield row
    except csv.Error as error:
        raise InputError(f"expected CSV in {path}, got something else: {error}") from None


def csv_delimiter(path: Path, usual: str) -> str:
    """Return the first delimiter that cuts all rows into as many fields, two at least, or `usual`.

    Judged by the first 64 Ki characters.
    """
    with open_text(path) as file:
        head = file.read(2**16)
    for delimiter in (usual, *DELIMITERS):
        widths = []
        try:
            for row in csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True):
                widths += [len(row)] if row else []
            if len(head) == 2**16:
                del widths[-1:]  # cut short
        except csv.Error:
            pass  # inside the quotes of a row that goes on beyond the head
        if widths and widths[0] > 1 and set(widths) == {widths[0]}:
            return delimiter
    return usual


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder of `datasets.save_to_disk` in a fixed permutation."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split != "all" and split not in saved:
            raise InputError(_no_split(split, folder, list(map(str, saved))))
        every = list(saved.values())
        saved = datasets.concatenate_datasets(every) if split == "all" else saved[split]
    elif split not in ("all", "train", str(saved.split)):
        raise InputError(_no_split(split, folder, []))
    # As Python's own objects, whichever library's the folder remembers (torch, pandas, arrow).
    saved = saved.with_format(None, columns=saved.format["columns"])
    order = np.random.default_rng(0).permutation(len(saved))
    for start in range(0, len(order), 256):
        columns: Any = saved[order[start : start + 256].tolist()]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def hub_table(name: str, split: str) -> Iterator[Table]:
    """Yield the table of a data set on the Hub, its rows as they arrive."""
    import datasets

    repository, _, config = name.partition(":")
    options: dict[str, Any] = {"split": split, "streaming": True}
    with _hub_sentences(name, split):
        opened = datasets.load_dataset(repository, config or None, **options)
        kind = getattr(getattr(opened, "info", None), "builder_name", None)
        rows = iter(opened)
        first = next(rows, {})
        if kind == "csv" and (delimiter := _other_delimiter(first)) is not None:
            rows = iter(datasets.load_dataset(repository, config or None, sep=delimiter, **options))
            first = next(rows, {})

    def arriving() -> Iterator[Row]:
        with _hub_sentences(name, split):
            for row in chain([first] if first else [], rows):
                # The library takes a mark off other kinds of files, but leaves it in text.
                yield {"text": row["text"].removeprefix("\ufeff")} if kind == "text" else row

    yield f"{name}{WITH_HEADER}" if kind == "csv" else name, arriving()


@contextmanager
def _hub_sentences(name: str, split: str) -> Iterator[None]:
    import httpx2
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (DatasetNotFoundError, OSError, httpx2.HTTPError) as error:
        raise InputError(data_sentence(error, name)) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"expected UTF-8 text in the files of {name}, got something else ({error}); download "
            "and convert them, or choose another data set"
        ) from error
    except (ValueError, RuntimeError) as error:  # no such config or split; a set that needs code
        if "zstd not supported" in str(error):
            raise InputError(NO_ZSTANDARD.format(f"the files of {name}")) from error
        raise InputError(
            f"expected a data set, config and split that can be streamed, got {name} and "
            f"{split!r}: {' '.join(str(error).split())}"
        ) from error


def _other_delimiter(row: Row) -> str | None:
    """Return what a CSV's fields are separated by where the library took its header for one name.

    Fields of later rows that hold a comma come as an index of pandas'.
    """
    names = [name for name in row if not name.startswith("__index_level_")]
    return next((each for each in DELIMITERS if len(names) == 1 and each in names[0]), None)


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

# Characters of a column's name, and of a value of it, that a sentence shows.
SHOWN = 30

# What the turns of a chat hold, as most data sets have them and as ShareGPT has.
TURNS = ({"role", "content"}, {"from", "value"})
BY_TEMPLATE = ", each chat by the model's chat template"

STRINGS = ("text", "JSON", "strings")


def table_parts(tables: Iterable[Table], text_column: str | None) -> Iterator[Part]:
    """Yield the document in each row of some tables; rows without text or ids have none.

    Without `text_column`, `pick_column` chooses one, kept for the tables after that have it too.
    """
    column = text_column
    for name, rows in tables:
        head = list(islice(rows, LOOKED_AT))
        if head and (text_column is not None or not any(column in row for row in head)):
            column = pick_column(head, text_column, name)
        for row in chain(head, rows):
            assert column is not None
            if column not in row:
                raise _no_column(f"a column {column!r}", name, _by_column([row]))
            value = row[column]
            if isinstance(value, str):
                # Surrogates that a JSON escape left alone are no text: no tokenizer takes them.
                if text := value.encode("utf-8", "replace").decode("utf-8"):
                    yield Part(text, ends=True)
            elif _is_ids(value):
                ids = np.asarray(value)
                if "attention_mask" in row:
                    ids = ids[np.asarray(row["attention_mask"], dtype=bool)]
                yield Part(ids, ends=True)
            elif _held(value):
                kind, words = _kind_of([value])
                raise InputError(
                    f"expected text or token ids in column {column!r} of {name}, got {words}: name "
                    "another column with --text-column, or write the text out as one"
                    f"{BY_TEMPLATE if kind == 'chats' else ''}"
                )


def pick_column(head: list[Row], text_column: str | None, name: str) -> str:
    """Return the column that holds the documents, judged by the first rows.

    Without `text_column`: token ids under `input_ids` or `tokens`; text under `text` or `content`;
    or else the only column of strings, if it reads like text.
    """
    columns = _by_column(head)
    if text_column is not None:
        if text_column not in columns:
            raise _no_column(f"a column {text_column!r}", name, columns)
        return text_column
    kinds = {column: _kind_of(values)[0] for column, values in columns.items()}
    for column in TOKEN_COLUMNS:
        if kinds.get(column) == "ids":
            return column
    strings = [column for column, kind in kinds.items() if kind in STRINGS]
    named = [column for column in TEXT_COLUMNS if column in columns]
    if named:
        return next((column for column in named if column in strings), named[0])
    if len(strings) == 1 and kinds[strings[0]] == "text":
        return strings[0]
    raise _no_column("a column of text", name, columns)


def _held(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _by_column(head: list[Row]) -> dict[str, list[Any]]:
    """Return what each column holds in the first rows, but for what is missing or empty."""
    names = dict.fromkeys(chain(*head))
    return {name: [row[name] for row in head if _held(row.get(name))] for name in names}


def _kind_of(values: list[Any]) -> tuple[str, str]:
    """Return `empty`, one of STRINGS, `ids`, `chats` or `other`, and the same in words."""
    if not values:
        return "empty", "empty in the first rows"
    first = values[0]
    if all(isinstance(value, str) for value in values):
        text = reads_like_text(values)
        kind = "text" if text else "JSON" if _is_json(first) else "strings"
        return kind, f"{kind} such as {_start(first)!r}"
    if _is_ids(first):
        return "ids", "lists of whole numbers"
    is_list = isinstance(first, list | np.ndarray)
    turn = first[0] if is_list else first
    words = f"lists of {_plural(turn)}" if is_list else _plural(first)
    if isinstance(turn, dict) and any(keys <= turn.keys() for keys in TURNS):
        return "chats", f"chats: {words}" if is_list else words
    return "other", words


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


def _no_column(wanted: str, name: str, columns: dict[str, list[Any]]) -> InputError:
    """Return the sentence for a table without the wanted column; of those it has the first 12."""
    judged = {column: _kind_of(values) for column, values in columns.items()}
    found = [f"{_start(str(column))} ({words})" for column, (_, words) in judged.items()]
    more = [f"{len(found) - 12} more"] if len(found) > 12 else []
    told = ", ".join(found[:12] + more) or "no columns"
    kinds = {kind for kind, _ in judged.values()}
    advice = "none of these is a column of text; write the text out as one"
    if kinds & {"text", "ids"}:
        advice = "name one of these with --text-column"
    elif "chats" in kinds:
        advice += BY_TEMPLATE
    elif kinds & {"empty", "strings"}:
        advice = "none of these reads like text; if one is, name it with --text-column"
    return InputError(f"expected {wanted} in {name}, found {told}: {advice}")


def _start(text: str) -> str:
    start = " ".join(text[:100].split())
    return start if len(start) <= SHOWN else start[: SHOWN - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _plural(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, bool | np.bool_):
        return "true or false"
    if isinstance(value, int | float | np.number):
        return "numbers"
    return {"str": "strings", "list": "lists"}.get(type(value).__name__, type(value).__name__)
