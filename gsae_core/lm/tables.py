"""Rows that hold a document each: JSON lines, JSON, Parquet, CSV, `datasets` folders, the Hub."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gsae_core.errors import InputError
from gsae_core.hub_errors import data_sentence
from gsae_core.lm.pieces import Piece, not_text, open_text

TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"}

TOKEN_COLUMNS = ("input_ids", "tokens")
TEXT_COLUMNS = ("text", "content")

Row = dict[str, Any]


def row_pieces(rows: Iterable[Row], *, text_column: str | None, name: str) -> Iterator[Piece]:
    """Yield the document in each row; rows whose text is missing or empty have none.

    Args:
        rows: all of one set of columns.
        text_column: the column to read, of text or of token ids; None finds it.
        name: of the source, for sentences.

    Raises:
        InputError: if no column can be chosen, or holds neither text nor ids.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    column = pick_column(first, text_column, name)
    for row in chain([first], rows):
        if column not in row:
            raise InputError(_no_column(column, row, name))
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
        elif value is not None and len(np.atleast_1d(value)):
            raise InputError(
                f"expected text or token ids in column {column!r} of {name}, got "
                f"{type(value).__name__}; name another column as text_column"
            )


def pick_column(row: Row, text_column: str | None, name: str) -> str:
    """Return the column that holds the documents, judged by one row.

    Without `text_column`: token ids under `input_ids` or `tokens`, text under `text` or `content`,
    or the only column of text.

    Raises:
        InputError: if there is no such column, or more than one; the sentence names what there is.
    """
    if text_column is not None:
        if text_column not in row:
            raise InputError(_no_column(text_column, row, name))
        return text_column
    ids = [column for column in TOKEN_COLUMNS if _is_ids(row.get(column))]
    strings = [column for column, value in row.items() if isinstance(value, str)]
    named = [column for column in TEXT_COLUMNS if column in row]
    if found := ids or named or (strings if len(strings) == 1 else []):
        return found[0]
    raise InputError(
        f"expected a column of text in {name}, found {', '.join(row) or 'no columns'}: name one as "
        "text_column"
    )


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _no_column(column: str, row: Row, name: str) -> str:
    return (
        f"expected a column {column!r} in {name}, found {', '.join(row) or 'no columns'}: name one "
        "of these as text_column"
    )


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table file.

    Raises:
        InputError: if the file is not what its name says.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif kind == ".json":
        yield from _json(path)
    elif kind == ".parquet":
        yield from _parquet(path)
    else:
        yield from _csv(path, delimiter="\t" if kind == ".tsv" else ",")


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _as_row(json.loads(line), f"line {number} of {path}")
    except UnicodeDecodeError as error:
        raise not_text(path, error) from None
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
        rows = json.loads(path.read_bytes())
    except ValueError as error:
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


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    import csv

    # The module's own bound of 128 KiB a field is less than a book; a C long may be 32 bits wide.
    csv.field_size_limit(2**31 - 1)
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
    except UnicodeDecodeError as error:
        raise not_text(path, error) from None
    except csv.Error as error:
        raise InputError(f"expected CSV in {path}, got something else: {error}") from None


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a `datasets` folder in a fixed permutation.

    Raises:
        InputError: if the folder has several splits, none of them called `split`.
    """
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(
                f"expected a split {split!r} in {folder}, found {', '.join(map(str, saved))}"
            )
        saved = saved[split]
    order = np.random.default_rng(0).permutation(len(saved))
    for start in range(0, len(order), 256):
        columns = saved[order[start : start + 256].tolist()]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Yield the rows of a data set on the Hub as they arrive; `owner/name:config` picks a config.

    Raises:
        InputError: if the Hub cannot be reached or has no such data set, config or split.
    """
    import datasets
    import httpx2
    from datasets.exceptions import DatasetNotFoundError

    repository, _, config = name.partition(":")
    try:
        yield from datasets.load_dataset(repository, config or None, split=split, streaming=True)
    except (DatasetNotFoundError, OSError, httpx2.HTTPError) as error:
        raise InputError(data_sentence(error, name)) from error
    except (ValueError, RuntimeError) as error:  # no such config or split; a set that needs code
        raise InputError(
            f"expected a data set, config and split that can be streamed, got {name} and "
            f"{split!r}: {' '.join(str(error).split())}"
        ) from error
