"""Rows of tables, in files, `datasets` folders and on the Hub, and the document in each row."""

import csv
import io
import json
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from gsae_core.errors import InputError, data_sentence, expecting
from gsae_core.lm.chat import CHAT_COLUMNS, ChatTemplate, as_chat
from gsae_core.lm.packed import UNPACKING, File, Part, open_text, opened, parts_of, unpacked

log: logging.Logger = logging.getLogger(__name__)

Row = dict[str, Any]

TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv"}


def file_rows(file: File) -> Iterator[Row]:
    """Yield the rows of a file, as its suffix says what it is."""
    # By hand: of JSON and CSV, `datasets` wants one schema for all rows, and names no broken row.
    readers = {".parquet": _columnar, ".arrow": _columnar, ".csv": _csv, ".tsv": _csv}
    return readers.get(unpacked(file).suffix.lower(), _json)(file)


def _json(file: File) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON array; a string is a row of text."""
    number = 0
    try:
        with open_text(file) as text:
            for number, row in enumerate(_values(file, filter(str.strip, text)), start=1):
                if not isinstance(row, str | dict | None):
                    raise InputError(
                        f"expected a JSON object in row {number} of {file}, got "
                        f"{type(row).__name__}"
                    )
                if row is not None:
                    yield {"text": row} if isinstance(row, str) else row
    except InputError:
        raise
    # Numbers of thousands of digits are a bare ValueError.
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"expected JSON in row {number + 1} of {file}, got something else: {error}"
        ) from None


def _values(file: File, lines: Iterator[str]) -> Iterator[Any]:
    """Yield what stands in each line, or in the one array or object that all of them are."""
    first = next(lines, "null")
    if first.lstrip().startswith("["):
        yield from json.loads(first + "".join(lines))
        return
    try:
        value = json.loads(first)
    except ValueError:
        if unpacked(file).suffix.lower() != ".json" or not first.lstrip().startswith("{"):
            raise
        value = json.loads(first + "".join(lines))
    second = next(lines, None)
    if second is not None:
        yield value
        yield from map(json.loads, chain([second], lines))
        return
    yield from _held_rows(value)


def _held_rows(value: Any) -> list[Any]:
    """Return a JSON object as a row, or the rows under its `data` if no document is beside them."""
    held = value.get("data") if isinstance(value, dict) and pick_column([value]) is None else None
    is_table = isinstance(held, list) and all(isinstance(each, str | dict) for each in held)
    return held if isinstance(held, list) and is_table else [value]


def _columnar(file: File) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file, dates and times left out."""
    import pyarrow as pa

    kind = unpacked(file).suffix.lower().removeprefix(".").capitalize()
    with expecting(kind, file, ValueError, OverflowError, OSError, EOFError, *UNPACKING):
        # What is packed, or in an archive, has to be in memory.
        is_plain = isinstance(file, Path) and unpacked(file) == file
        source: Any = file if is_plain else io.BytesIO(opened(file).read())
        for batch in (_parquet if kind == "Parquet" else _arrow)(source):
            # Python has no dates beyond the year 9999.
            kept = [field.name for field in batch.schema if not pa.types.is_temporal(field.type)]
            yield from batch.select(kept).to_pylist()


def _parquet(source: Any) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        yield from file.iter_batches(batch_size=256)


def _arrow(source: Any) -> Iterator[Any]:
    """Yield the batches of Arrow's file format or, as `datasets` writes it, of its streams."""
    import pyarrow as pa

    with pa.memory_map(str(source)) if isinstance(source, Path) else source as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader: Any = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            yield from (batch.slice(i, 256) for i in range(0, batch.num_rows, 256))


def _csv(file: File) -> Iterator[Row]:
    """Yield the rows of a CSV file; what its header has most of, unquoted, delimits its fields."""
    # The module's own bound of 128 KiB a field is less than a book; a C long may be 32 bits wide.
    csv.field_size_limit(2**31 - 1)
    delimiters = "\t,;|" if unpacked(file).suffix.lower() == ".tsv" else ",;\t|"
    with expecting("CSV", file, csv.Error), open_text(file) as text:
        blank = 0
        while (header := text.readline()) and not header.strip():
            blank += 1
        delimiter = max(delimiters, key=re.sub('"[^"]*"', "", header).count)
        reader = csv.DictReader(chain([header], text), delimiter=delimiter, strict=True)
        # Without a name: the index that pandas writes, and columns that are empty.
        twice = [n for n, times in Counter(reader.fieldnames or ()).items() if n and times > 1]
        if twice:
            raise InputError(
                f"expected a name for each column of {file}, got {twice[0]!r} twice: rename one"
            )
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"expected {len(reader.fieldnames or ())} fields in the row that ends at "
                    f"line {blank + reader.line_num} of {file}, got another number"
                )
            yield row


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder of `datasets.save_to_disk` in a fixed permutation."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split != "all" and split not in saved:
            raise no_split(split, folder, list(map(str, saved)))
        every = list(saved.values())
        saved = datasets.concatenate_datasets(every) if split == "all" else saved[split]
    elif split not in ("all", "train", str(saved.split)):
        raise no_split(split, folder, [str(saved.split or "train")])
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
            if kind == "webdataset":  # beside a sample, where it stands; its JSON is a column
                told = row.get("json")
                row = {key: row[key] for key in row if not key.startswith("__")}
                row |= told if isinstance(told, dict) else {}
            # Files of one object each come as rows, and so do chats in a column `data`.
            if kind == "json" and as_chat(row.get("data")) is None:
                yield from ({"text": r} if isinstance(r, str) else r for r in _held_rows(row))
                continue
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


def no_split(split: str, where: Path | str, splits: list[str]) -> InputError:
    """Return the sentence for a split that is not among those there."""
    return InputError(
        f"expected a split {split!r} in {where}, found {', '.join(splits) or 'none'}: name one "
        "that is there with --split, or `all`"
    )


# --- The document in a row

TOKEN_COLUMNS = ("input_ids", "tokens")
TEXT_COLUMNS = ("text", "content")

# Rows by which a column is chosen; if none has one, so many more; and characters of each value that
# are looked at.
LOOKED_AT, LOOKED_AT_MORE, LOOK = 32, 1000, 2000

# Text has so many words a row, on average, by its first characters (LOOK).
WORDS = 5

# A word is up to 40 characters between spaces, a letter in it and no `://`; or one letter of a
# script that is written without spaces: Thai to Burmese, kana, Han.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    r"|(?<!\S)(?!\S*://)(?=\S*[^\W\d_])\S{1,40}(?!\S)"
)


def table_parts(
    tables: Iterable[tuple[str, Iterator[Row]]],
    text_column: str | None,
    chats: ChatTemplate | None = None,
) -> Iterator[Part]:
    """Yield the document in each row of some tables; rows without text or ids have none.

    Without `text_column`, `pick_column` chooses one (`pick_chats` with a template), kept for the
    tables after that have it too; a row that lacks it may have its document under another name that
    `pick_column` knows. Each table comes with its name, for sentences.
    """
    column = text_column
    pick = pick_column if chats is None else pick_chats
    for name, rows in tables:
        head = list(islice(rows, LOOKED_AT))
        if not head:
            continue
        # A column may be called "": the index that pandas writes in front of a CSV's others.
        if column is None or not any(column in row for row in head):
            picked = None if text_column else pick(head)
            if picked is None and text_column is None:
                head += islice(rows, LOOKED_AT_MORE)
                picked = pick(head)
            if picked is None:
                raise _none_to_read(text_column, name, head, chats)
            column = picked
            _say_chats_beside(column, name, head, chats)
        n_without = 0
        for row in chain(head, rows):
            at = column
            if column not in row and text_column is None:
                at = next((each for each in TOKEN_COLUMNS + TEXT_COLUMNS if each in row), column)
            n_without += row.get(at) is None
            for content in _documents(row, at, name, chats):
                yield from parts_of(content) if isinstance(content, str) else [Part(content, True)]
        if n_without:
            log.warning("%s: left out %d rows without anything in %r", name, n_without, column)


def _documents(
    row: Row, column: str, name: str, chats: ChatTemplate | None
) -> Iterator[str | np.ndarray]:
    """Yield the text or the ids in a column of a row, if it holds any."""
    value = row.get(column)
    if not _is_held(value):
        return
    chat = None if isinstance(value, str) else as_chat(value)
    if chats is not None:
        if chat is None:
            raise _no_column(
                f"chats (role and content, or from and value) in column {column!r}", name, row
            )
        value = chats.text(chat, name)
    elif chat is not None:
        raise InputError(
            f"expected text or token ids in column {column!r} in {name}, got a chat: {READ_CHATS}"
        )
    if isinstance(value, str):
        # Surrogates that a JSON escape left alone are no text: no tokenizer takes them.
        if text := value.encode("utf-8", "replace").decode("utf-8"):
            yield text
        return
    ids = as_ids(value)
    if ids is None:
        raise _no_column(f"text or token ids{_wrong_id(value)} in column {column!r}", name, row)
    yield unmasked(ids, row.get("attention_mask"), name)


READ_CHATS = (
    "read chats by the model's chat template with --chat, or name a column of text with "
    "--text-column"
)


def _none_to_read(
    text_column: str | None, name: str, head: list[Row], chats: ChatTemplate | None
) -> InputError:
    row = next((row for row in head if any(map(_is_held, row.values()))), head[0])
    if text_column is not None:
        return _no_column(f"a column {text_column!r}", name, row)
    if chats is not None:
        return _no_column("a column of chats", name, row)
    if (column := pick_chats(head)) is not None:
        found = f"got chats in column {column!r}"
        return InputError(f"expected a column of text in {name}, {found}: {READ_CHATS}")
    return _no_column("a column of text", name, row)


def _say_chats_beside(column: str, name: str, head: list[Row], chats: ChatTemplate | None) -> None:
    beside = None if chats is not None or column in TOKEN_COLUMNS else pick_chats(head)
    if beside is not None:
        log.warning("%s: column %r is read; --chat reads the chats in %r", name, column, beside)


def pick_column(head: list[Row]) -> str | None:
    """Return the column that holds the documents, judged by the first rows; None if none does.

    Token ids under `input_ids` or `tokens`; text under `text` or `content`; or else the only column
    of strings, if it reads like text.
    """
    held = _held(head)
    ids = [name for name in TOKEN_COLUMNS if name in held and as_ids(held[name][0]) is not None]
    strings = [name for name in held if all(isinstance(v, str) for v in held[name])]
    named = [name for name in TEXT_COLUMNS if any(name in row for row in head)]
    named.sort(key=lambda name: name not in strings)
    only = strings if len(strings) == 1 and reads_like_text(held[strings[0]]) else []
    return next(iter(ids + named + only), None)


def pick_chats(head: list[Row]) -> str | None:
    """Return the column that holds chats: `messages` or `conversations`, or the only one."""
    held = _held(head)
    found = [name for name in held if all(as_chat(value) is not None for value in held[name])]
    named = [name for name in CHAT_COLUMNS if name in found]
    return next(iter(named + (found if len(found) == 1 else [])), None)


def _held(head: list[Row]) -> dict[str, list[Any]]:
    """Return the values of each column that has any."""
    held = {name: [row[name] for row in head if _is_held(row.get(name))] for name in chain(*head)}
    return {name: values for name, values in held.items() if values}


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


def as_ids(value: Any) -> np.ndarray | None:
    """Return whole numbers as an array of integers, floats among them too; None of anything else.

    A list of numbers, not of truth values; an array of one dimension.
    """
    if isinstance(value, list):
        if not value or not {*map(type, value)} <= {int, float}:
            return None
        value = np.asarray(value)
    # Objects are numbers beyond 64 bits, which are beyond every vocabulary too.
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iufO":
        return None
    if value.dtype.kind != "f":
        return value
    is_whole = (np.abs(value) < 2**53) & (value == np.trunc(value))
    return value.astype(np.int64) if is_whole.all() else None


def _wrong_id(value: Any) -> str:
    """Return what of some numbers is no id, for a sentence; empty if they are no numbers."""
    of = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(of, list) or not {*map(type, of)} <= {int, float, bool}:
        return ""
    wrong = next((each for each in of if as_ids([each]) is None), None)
    return f" (whole numbers, {wrong} is none)"


def unmasked(ids: np.ndarray, mask: Any, name: str) -> np.ndarray:
    """Return the ids that an attention mask, if there is one, does not hide."""
    if mask is None:
        return ids
    said = mask.tolist() if isinstance(mask, np.ndarray) else mask
    if isinstance(said, list):
        said = [int(each) if type(each) is bool else each for each in said]
    told = as_ids(said)
    if told is None or told.shape != ids.shape or told.min() < 0:
        raise InputError(
            f"expected an attention_mask of {len(ids)} numbers, as many as token ids, 0 where one "
            f"is left out, in {name}, got {reprlib.repr(said)}: mend it, or leave the column out"
        )
    return ids[told > 0]


def _no_column(wanted: str, name: str, row: Row) -> InputError:
    shown = reprlib.Repr()
    shown.maxdict = 12
    return InputError(
        f"expected {wanted} in {name}, got rows such as {shown.repr(row)}: name a column of text "
        "with --text-column, or write the text out as one"
    )
