"""Rows that hold a document each: JSON lines, JSON, Parquet, CSV, `datasets` folders, the Hub."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from gsae_core.errors import InputError
from gsae_core.hub_errors import data_sentence
from gsae_core.lm.pieces import NO_ZSTANDARD, Piece, open_text, unpacked

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
                f"expected text or token ids in column {column!r} of {name}, got {_kind([value])}: "
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
        f"{_start(str(column))} ({_kind(values)})" for column, values in list(columns.items())[:12]
    ]
    more = [f"{len(columns) - 12} more"] if len(columns) > 12 else []
    return ", ".join(first + more)


def _kind(values: list[Any]) -> str:
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
