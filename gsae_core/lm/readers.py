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

import bz2
import codecs
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
from gsae_core.errors import InputError, data_sentence

# About so many characters (or ids) a piece: bounds what is read and tokenised in one go.
PIECE = 2**20

TOKEN_SUFFIXES = {".bin", ".npy"}

# What to do where `zstandard`, which both our readers and those of `datasets` unpack with, is away.
NO_ZSTANDARD = (
    "expected the package zstandard to unpack {}, found it not installed; pip install -r "
    "requirements.txt"
)

# llm.c writes (magic, version) and 254 more int32 in front of the ids.
LLM_C_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
LLM_C_HEADER_BYTES = 1024


class Piece(NamedTuple):
    """Part of a document: text, or token ids as a 1-D integer array."""

    content: str | np.ndarray
    ends: bool
    """Whether the document ends here."""


class _Unzstd(io.RawIOBase):
    """The bytes of a `.zst` file, its frames one after the other.

    zstandard's own reader ends quietly where a file was cut off; here that is an EOFError, as it is
    for the other kinds.
    """

    def __init__(self, path: Path, unpacker: Any) -> None:
        self._file = path.open("rb")
        self._unpacker = unpacker
        self._frame: Any = None
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
            self._frame = self._frame or self._unpacker.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._unpacked))
        buffer[:n], self._unpacked = self._unpacked[:n], self._unpacked[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path) -> io.BufferedIOBase:
    try:
        import zstandard
    except ImportError:
        raise InputError(NO_ZSTANDARD.format(path)) from None
    # `--long=31` needs the whole window.
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(_Unzstd(path, unpacker), 2**20)


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


def _open_binary(path: Path) -> Any:
    opener = PACKED.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _is_damage(error: Exception) -> bool:
    """Whether an error is of a file's content, however it is packed, and not of the disk."""
    if isinstance(error, OSError):
        return error.errno is None  # gzip's and bz2's own
    kinds = (UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError)
    return isinstance(error, kinds) or type(error).__name__ == "ZstdError"


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a UTF-8 file, unpacked if it is called so, its line ends as they are.

    A byte-order mark at its start is dropped.

    Raises:
        InputError: here or within, when the file turns out to be no UTF-8 text, or damaged.
    """
    binary = _open_binary(path)
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield file
    except Exception as error:
        if not _is_damage(error):
            raise
        raise not_text(path, error) from None


def text_pieces(path: Path, size: int = PIECE) -> Iterator[Piece]:
    """Yield a UTF-8 file in pieces of about `size` characters that end at a line's end.

    Raises:
        InputError: if the file is not UTF-8 text.
    """
    with open_text(path) as file:
        piece = file.read(size) + file.readline()
        while piece:
            following = file.read(size) + file.readline()
            yield Piece(piece, ends=not following)
            piece = following


def not_text(path: Path, error: Exception | str = "not UTF-8, or with a NUL") -> InputError:
    """Return the sentence for a file whose bytes are no UTF-8 text."""
    if isinstance(error, EOFError):
        return InputError(f"expected all of {path}, got its beginning ({error}); download it again")
    if is_utf16(path):
        return InputError(
            f"expected UTF-8 text in {path}, got UTF-16; save it as UTF-8 (Notepad: Save as, "
            "Encoding: UTF-8)"
        )
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return InputError(f"expected UTF-8 text in {path}, got a zip archive; unpack it")
    return InputError(
        f"expected UTF-8 text in {path}, got something else ({error}); convert or remove the file"
    )


def is_utf16(path: Path) -> bool:
    """Whether a file starts with UTF-16's byte-order mark."""
    with path.open("rb") as file:
        return file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def starts_with_bom(path: Path) -> bool:
    """Whether a file, unpacked, starts with UTF-8's byte-order mark."""
    try:
        with _open_binary(path) as file:
            return file.read(3) == codecs.BOM_UTF8
    except Exception as error:
        if not _is_damage(error):
            raise
        return False  # reading it says so


def looks_like_text(path: Path) -> bool:
    """Whether a file starts (64 KiB) with valid UTF-8 without a NUL."""
    with path.open("rb") as file:
        head = file.read(2**16)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the 64 KiB cut in two is no mistake of the file's.
        if error.end < len(head) or len(head) < 2**16:
            return False
    return b"\0" not in head


def token_pieces(path: Path, vocabulary: int) -> Iterator[Piece]:
    """Yield the ids of a `.npy` (flat, or a row a document) or flat `.bin` file.

    The width of a `.bin` is said by an llm.c header, else by `<file>.json` with a `"dtype"` of
    uint16 or uint32, else it is the narrowest that holds `vocabulary` (as nanoGPT writes).

    Raises:
        InputError: if the file holds no ids.
    """
    if path.suffix == ".npy":
        ids = _load_npy(path)
    else:
        dtype, start = _bin_layout(path, vocabulary)
        if (path.stat().st_size - start) % np.dtype(dtype).itemsize:
            raise InputError(
                f"expected whole {dtype} token ids in {path}, got {path.stat().st_size} bytes; "
                f'say the width in {path.name}.json, e.g. {{"dtype": "uint32"}}'
            )
        if path.stat().st_size == start:
            return
        ids = np.memmap(path, dtype, mode="r", offset=start)
    if ids.ndim == 2:
        for row in ids:
            yield Piece(np.asarray(row), ends=True)
        return
    for start in range(0, len(ids), PIECE):
        yield Piece(np.asarray(ids[start : start + PIECE]), ends=False)


def _load_npy(path: Path) -> np.ndarray:
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


def _bin_layout(path: Path, vocabulary: int) -> tuple[str, int]:
    """Return the dtype of a flat file's ids, and the byte they start at."""
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
    if len(head) == LLM_C_HEADER_BYTES:
        magic, version = struct.unpack("<ii", head[:8])
        if (magic, version) in LLM_C_HEADERS:
            return LLM_C_HEADERS[magic, version], LLM_C_HEADER_BYTES
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.exists():
        return narrowest(vocabulary), 0
    text = sidecar.read_text(encoding="utf-8-sig")
    try:
        dtype = json.loads(text)["dtype"]
    except (ValueError, KeyError, TypeError):
        dtype = text
    if dtype not in ("uint16", "uint32"):
        raise InputError(f'expected {{"dtype": "uint16"}} or "uint32" in {sidecar}, got {text!r}')
    return dtype, 0


def narrowest(vocabulary: int) -> str:
    """Return the dtype that token ids are kept in: uint16 where it holds them all."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"}

TOKEN_COLUMNS = ("input_ids", "tokens")
TEXT_COLUMNS = ("text", "content")

# Rows by which a column is chosen, and characters of each value that are looked at.
LOOKED_AT, LOOK = 32, 2000

# Text has so many words a row, on average; identifiers, names, dates and labels have fewer.
WORDS = 5

# A word is up to 40 characters between spaces, a letter in it and no `://`; or one letter of a
# script that is written without spaces: Thai to Burmese, kana, Han.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    r"|(?<!\S)(?!\S*://)(?=\S*[^\W\d_])\S{1,40}(?!\S)"
)

DELIMITERS = (",", ";", "\t", "|")

# Characters of a column's name, and of a value of it, that a sentence shows.
SHOWN = 30

# What the turns of a chat hold, as most data sets have them and as ShareGPT has.
TURNS = ({"role", "content"}, {"from", "value"})

Row = dict[str, Any]


def table_pieces(paths: Iterable[Path], text_column: str | None) -> Iterator[Piece]:
    """Yield the document in each row of some files, a column chosen once holding for all.

    Raises:
        InputError: as `row_pieces` and `table_rows` do.
    """
    chosen = text_column
    for path in paths:
        head, rows = _look(table_rows(path))
        if not head:
            continue
        name = _with_header(path) if _is_csv(path) else str(path)
        if text_column is None and not any(chosen in row for row in head):
            chosen = pick_column(head, None, name)
        yield from row_pieces(rows, text_column=chosen, name=name)


def row_pieces(rows: Iterable[Row], *, text_column: str | None, name: str) -> Iterator[Piece]:
    """Yield the document in each row; rows whose text is missing or empty have none.

    Args:
        rows: all of one set of columns.
        text_column: the column to read, of text or of token ids; None finds it.
        name: of the source, for sentences.

    Raises:
        InputError: if no column can be chosen, or holds neither text nor ids.
    """
    head, rows = _look(rows)
    if not head:
        return
    column = pick_column(head, text_column, name)
    for row in rows:
        if column not in row:
            raise InputError(_no_column(column, [row], name))
        value = row[column]
        if isinstance(value, str):
            # Surrogates that a JSON escape left alone are no text: no tokenizer takes them.
            if text := value.encode("utf-8", "replace").decode("utf-8"):
                yield Piece(text, ends=True)
        elif _is_ids(value):
            ids = np.asarray(value)
            if "attention_mask" in row:
                ids = ids[np.asarray(row["attention_mask"], dtype=bool)]
            yield Piece(ids, ends=True)
        elif _values([row], column):
            raise InputError(
                f"expected text or token ids in column {column!r} of {name}, got "
                f"{_kind_of_values([value])}: "
                "name another column with --text-column, or write the text out as one"
                f"{_template([value])}"
            )


def pick_column(head: list[Row], text_column: str | None, name: str) -> str:
    """Return the column that holds the documents, judged by the first rows.

    Without `text_column`: token ids under `input_ids` or `tokens`; text under `text` or `content`;
    or else the only column of strings, if it reads like text: five words each, on average.

    Args:
        head: the first rows, at least one.

    Raises:
        InputError: if there is no such column, or more than one; the sentence lists what there is.
    """
    columns = {column: _values(head, column) for column in dict.fromkeys(chain(*head))}
    if text_column is not None:
        if text_column not in columns:
            raise InputError(_no_column(text_column, head, name))
        return text_column
    for column in TOKEN_COLUMNS:
        if column in columns and columns[column] and _is_ids(columns[column][0]):
            return column
    named = [column for column in TEXT_COLUMNS if column in columns]
    strings = [
        column
        for column, values in columns.items()
        if values and all(isinstance(value, str) for value in values)
    ]
    if named:
        return next((column for column in named if column in strings), named[0])
    if len(strings) == 1 and reads_like_text(columns[strings[0]]):
        return strings[0]
    raise InputError(
        f"expected a column of text in {name}, found {_described(columns)}: {_advice(columns)}"
    )


def _look(rows: Iterable[Row]) -> tuple[list[Row], Iterator[Row]]:
    """Return the first rows, and all of them."""
    rows = iter(rows)
    head = list(islice(rows, LOOKED_AT))
    return head, chain(head, rows)


def _values(head: list[Row], column: str) -> list[Any]:
    """Return what a column holds in the first rows, but for what is missing or empty."""
    values = [row[column] for row in head if row.get(column) is not None]
    return [value for value in values if not hasattr(value, "__len__") or len(value)]


def reads_like_text(values: list[str]) -> bool:
    """Whether strings are sentences or code rather than identifiers, URLs, dates, labels or JSON.

    That is: at least five words each, on average, by their first 2000 characters. A word is up to
    40 characters between spaces with a letter among them and no `://`, or one letter of a script
    that is written without spaces. Values that are JSON objects or arrays have none.
    """
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


def _no_column(column: str, head: list[Row], name: str) -> str:
    columns = {each: _values(head, each) for each in dict.fromkeys(chain(*head))}
    return (
        f"expected a column {column!r} in {name}, found {_described(columns)}: {_advice(columns)}"
    )


def _advice(columns: dict[str, list[Any]]) -> str:
    """Return what to do about columns none of which can be taken by itself."""
    held = [values for values in columns.values() if values]
    strings = [values for values in held if isinstance(values[0], str)]
    if any(map(reads_like_text, strings)) or any(_is_ids(values[0]) for values in held):
        return "name one of these with --text-column"
    template = next(filter(None, map(_template, held)), "")
    # Short strings, and what is empty so far, may be text; beside chats they are taken for ids.
    if not template and (len(held) < len(columns) or not all(_is_json(v[0]) for v in strings)):
        return "none of these reads like text; if one is, name it with --text-column"
    return f"none of these is a column of text; write the text out as one{template}"


def _template(values: list[Any]) -> str:
    """Return by what chats become strings, after a comma; nothing if these are no chats."""
    turns = values[0] if values else None
    if isinstance(turns, list) and turns:
        turns = turns[0]
    chats = isinstance(turns, dict) and any(keys <= turns.keys() for keys in TURNS)
    return ", each chat by the model's chat template" if chats else ""


def _with_header(name: Path | str) -> str:
    """Return a CSV's name for sentences: a file without a header has odd names of columns."""
    return f"{name} (its first row is read as the header)"


def _described(columns: dict[str, list[Any]]) -> str:
    """Return what each column holds: `id: strings like 'q-1', messages: lists of {role, content}`.

    Of many columns the first twelve.
    """
    if not columns:
        return "no columns"
    first = [
        f"{_start(str(column))} ({_kind_of_values(values)})"
        for column, values in list(columns.items())[:12]
    ]
    more = [f"{len(columns) - 12} more"] if len(columns) > 12 else []
    return ", ".join(first + more)


def _kind_of_values(values: list[Any]) -> str:
    if not values:
        return "empty in the first rows"
    value = values[0]
    if isinstance(value, str):
        kind = "JSON" if _is_json(value) else "text" if reads_like_text(values) else "strings"
        return f"{kind} such as {_start(value)!r}"
    if _is_ids(value):
        return "lists of whole numbers"
    if isinstance(value, list | np.ndarray):
        lists = f"lists of {_plural(value[0])}"
        return f"chats: {lists}" if _template(values) else lists
    return _plural(value)


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


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table file.

    Raises:
        InputError: if the file is not what its name says.
    """
    kind = unpacked(path).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif kind == ".json":
        yield from _json(path)
    elif kind == ".parquet":
        yield from _parquet(path)
    else:
        yield from _csv(path, usual="\t" if kind == ".tsv" else ",")


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
        first = file.read(2**12).lstrip()[:1]
    if first != "[":
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


def _is_csv(path: Path) -> bool:
    return unpacked(path).suffix.lower() in (".csv", ".tsv")


def _csv(path: Path, usual: str) -> Iterator[Row]:
    import csv

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
    """Return the first delimiter that cuts the header and every row after it into as many fields.

    More than one field, by the file's first 64 Ki characters; the `usual` one is tried first, and
    taken where none does.
    """
    with open_text(path) as file:
        head = file.read(2**16)
    return next((each for each in (usual, *DELIMITERS) if _cuts_evenly(head, each)), usual)


def _cuts_evenly(head: str, delimiter: str) -> bool:
    import csv

    widths = []
    try:
        lines = io.StringIO(head, newline="")
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            if row:
                widths.append(len(row))
    except csv.Error:
        pass  # inside the quotes of a row that goes on beyond the head
    else:
        if len(head) == 2**16:
            del widths[-1:]  # cut short
    return len(widths) > 0 and widths[0] > 1 and set(widths) == {widths[0]}


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a `datasets` folder in a fixed permutation.

    Args:
        folder: written by `save_to_disk`.
        split: one of the folder's; `all` for every row.

    Raises:
        InputError: if the folder has no such split.
    """
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split != "all" and split not in saved:
            raise InputError(no_split(split, folder, list(map(str, saved))))
        saved = (
            datasets.concatenate_datasets(list(saved.values())) if split == "all" else saved[split]
        )
    elif split not in ("all", "train", str(saved.split)):
        raise InputError(no_split(split, folder, []))
    # As Python's own objects, whichever library's the folder remembers (torch, pandas, arrow).
    saved = saved.with_format(None, columns=saved.format["columns"])
    order = np.random.default_rng(0).permutation(len(saved))
    for start in range(0, len(order), 256):
        columns: Any = saved[order[start : start + 256].tolist()]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def no_split(split: str, where: Path | str, splits: list[str]) -> str:
    """Return the sentence for a split that is not there; it names those that are."""
    if splits:
        return (
            f"expected a split {split!r} in {where}, found {', '.join(splits)}: name one of these "
            "with --split, or `all`"
        )
    return (
        f"expected a split {split!r} in {where}, found no splits there: leave --split out to read "
        "all there is"
    )


def hub_pieces(name: str, *, split: str, text_column: str | None) -> Iterator[Piece]:
    """Yield the document in each row of a data set on the Hub as it arrives.

    Args:
        name: `owner/name`, or `owner/name:config` to pick a config.

    Raises:
        InputError: if the Hub cannot be reached or has no such data set, config or split; and as
            `row_pieces` does.
    """
    with _hub_sentences(name, split):
        rows, kind = _streamed(name, split)
    yield from row_pieces(
        _arriving(rows, kind, name=name, split=split),
        text_column=text_column,
        name=_with_header(name) if kind == "csv" else name,
    )


def _streamed(name: str, split: str) -> tuple[Iterator[Row], str | None]:
    """Return the rows of a data set on the Hub, and the kind of file they are read from."""
    import datasets

    repository, _, config = name.partition(":")

    def stream(**options: Any) -> tuple[Iterator[Row], str | None]:
        opened = datasets.load_dataset(
            repository, config or None, split=split, streaming=True, **options
        )
        return iter(opened), getattr(getattr(opened, "info", None), "builder_name", None)

    rows, kind = stream()
    first = next(rows, {})
    if kind == "csv" and (delimiter := _other_delimiter(first)) is not None:
        rows, _ = stream(sep=delimiter)
        first = next(rows, {})
    return chain([first] if first else [], rows), kind


def _arriving(rows: Iterator[Row], kind: str | None, *, name: str, split: str) -> Iterator[Row]:
    with _hub_sentences(name, split):
        for row in rows:
            # The library takes a mark off other kinds of files, but leaves it in text.
            if kind == "text" and row["text"].startswith("\ufeff"):
                yield {"text": row["text"][1:]}
            else:
                yield row


@contextmanager
def _hub_sentences(name: str, split: str) -> Iterator[None]:
    """Turn what goes wrong between here and a data set on the Hub into a sentence."""
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
    found = [each for each in DELIMITERS if len(names) == 1 and each in names[0]]
    return found[0] if found else None


class SourceFile(NamedTuple):
    """One Python file, named by its path below the library's root."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str, percent: int = 5) -> bool:
    """Whether file `name` belongs to the held-out split: decided by its name alone."""
    return int.from_bytes(sha256(name.encode()).digest()[:4], "big") % 100 < percent


def stdlib_paths(root: Path | None = None) -> dict[str, Path]:
    """Return the standard library's Python files by their path below its root, in name order.

    Third-party code is left out, so that two machines with the same Python read the same text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    outsiders = {"site-packages", "dist-packages", "__pycache__"}
    paths = {}
    for folder, below, names in os.walk(root):
        # Not even entered: site-packages has ten times as many files as the library.
        below[:] = set(below) - outsiders
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                paths[path.relative_to(root).as_posix()] = path
    return dict(sorted(paths.items()))


def read_utf8(path: Path) -> str | None:
    """Return the text of `path`, or None where it is in another encoding.

    A few of the standard library's own tests are in other encodings on purpose.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def stdlib_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield the UTF-8 Python files of the standard library in name order, empty ones left out."""
    for name, path in stdlib_paths(root).items():
        if text := read_utf8(path):
            yield SourceFile(name, text, is_held_out(name))


SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def files_of_split(split: str, folder: Path, names: Sequence[str], *, is_text: bool) -> list[str]:
    """Return the files of one split; all of them if `split` is `all`, or `train` and none is told.

    Args:
        names: of the folder's files, below it.
        is_text: the files are documents, which may be called anything. Only names in `.txt` count;
            and unless most of them tell a split, `train` and another, `train` is all of them.

    Raises:
        InputError: if there is no such split; the sentence names those there are.
    """
    if split == "all":
        return list(names)
    splits = _by_card(folder, names) or _by_shards(names)
    if not splits:
        splits = _by_words(names, is_text=is_text)
        is_set = len(splits) > 1 and 2 * sum(map(len, splits.values())) > len(names)
        if split == "train" and (not splits or (is_text and not (is_set and split in splits))):
            return list(names)
    if split not in splits:
        raise InputError(no_split(split, folder, list(splits)))
    return splits[split]


def _by_card(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    head = re.match(r"---\r?\n(.*?)\n---", readme.read_text("utf-8-sig", "replace"), re.DOTALL)
    if head is None or not re.search(r"^configs:", head[1], re.MULTILINE):
        return {}
    import yaml
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**yaml.safe_load(head[1])))
        default = configs.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"expected `configs` as the Hub reads them at the head of {readme}, got something "
            f"else: {' '.join(str(error).split())}; mend or remove them"
        ) from None
    if default is None:
        raise InputError(
            f"expected one config in {readme}, found {', '.join(configs)}: mark one of them with "
            "`default: true`"
        )
    if "data_files" not in configs[default]:
        return {}
    found = {
        split: [name for name in names if any(_fits(pattern, name) for pattern in patterns)]
        for split, patterns in sanitize_patterns(configs[default]["data_files"]).items()
    }
    return {split: files for split, files in found.items() if files}


def _fits(pattern: str, name: str) -> bool:
    from fsspec.utils import glob_translate

    return re.match(glob_translate(normpath(pattern)), name) is not None


def _by_shards(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            splits.setdefault(shard[1], []).append(name)
    return splits


def _by_words(names: Sequence[str], *, is_text: bool) -> dict[str, list[str]]:
    parts = [name for name in names if not is_text or unpacked(Path(name)).suffix.lower() == ".txt"]
    if not parts:
        return {}
    from datasets.data_files import (
        DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    )
    from fsspec.utils import glob_translate

    rules = [
        (str(split), re.compile("|".join(map(glob_translate, patterns))))
        for by in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME)
        for split, patterns in by.items()
    ]
    splits: dict[str, list[str]] = {}
    for name in parts:
        for split, pattern in rules:
            if pattern.match(name):
                splits.setdefault(split, []).append(name)
                break
    return splits


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
