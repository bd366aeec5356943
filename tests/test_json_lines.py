"""Files that grow by a line: what is appended is whole or not there, what is damaged is counted."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusals import refusal

from gsae_core import files
from gsae_core.analysis.labels import Labels
from gsae_core.errors import InputError
from gsae_core.files import Lines, append, parse_json, read
from gsae_core.runs.jobs.job import Job
from gsae_core.runs.metrics_log import MetricsCursor, MetricsLog, read_since

ROW = {"step": 1, "tokens": 16, "seconds": 0.5, "sae": "gated", "note": None}


@contextmanager
def disk_that_holds(n_bytes: int) -> Iterator[None]:
    """Within, the system writes a file's first bytes and refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def add_event(folder: Path) -> None:
    Job(folder).add_event("started", pid=7)


def add_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    log = MetricsLog(path, n_bytes=path.stat().st_size if path.exists() else 0)
    try:
        log.add([ROW, ROW])
    finally:
        log.close()


def add_label(folder: Path) -> None:
    Labels(folder).add(3, "label", "words", author="ada")


FILES: list[tuple[str, Callable[[Path], None]]] = [
    ("events.jsonl", add_event),
    ("metrics.jsonl", add_metrics),
    ("labels.jsonl", add_label),
]


@pytest.mark.parametrize(("name", "add"), FILES)
def test_a_disk_that_fills_up_leaves_no_half_line(
    tmp_path: Path, name: str, add: Callable[[Path], None]
) -> None:
    add(tmp_path)
    whole = (tmp_path / name).read_bytes()
    with disk_that_holds(len(whole) + 20), pytest.raises(InputError) as caught:
        add(tmp_path)
    assert f"free for {tmp_path / name}, found " in str(caught.value)
    assert (tmp_path / name).read_bytes() == whole


@pytest.mark.parametrize(("name", "add"), [FILES[0], FILES[2]])
def test_a_line_begins_on_its_own_after_half_a_line_and_is_on_the_disk(
    tmp_path: Path, name: str, add: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"event": "sta')
    seen: list[bytes] = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: seen.append(path.read_bytes()))
    add(tmp_path)
    written = path.read_bytes()
    assert written.startswith(b'{"event": "sta\n{')
    assert written.count(b"\n") == 2
    assert written.endswith(b"}\n")
    assert seen == [written]
    lines = read(path)
    assert (len(lines.rows), lines.damaged, lines.torn) == (1, 1, False)


def test_metrics_wait_for_the_disk_with_each_state_and_not_with_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", n_bytes=0)
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    log.add([ROW])
    log.add([ROW])
    assert waits == []
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert (log.sync(), len(waits)) == (size, 1)
    log.close()


@pytest.mark.parametrize(
    ("data", "rows", "damaged", "torn"),
    [
        (b"", 0, 0, False),
        (b'{"a": 1}\n{"b": 2}\n', 2, 0, False),
        (b'{"a": 1}\n{"b": 2}', 2, 0, False),  # written by hand: the last line is whole
        (b'{"a": 1}\n{"b": ', 1, 0, True),
        (b'{"a": 1}\n\0\0\0\0', 1, 0, True),  # a power cut, before the run goes on
        (b'{"a": 1}\n\0\0\0\0\n{"b": 2}\n', 2, 1, False),  # and after
        (b'{"a": 1}\n\n{"b": 2}\n', 2, 1, False),
        (b'{"a": "\xc3\n{"b": 2}\n', 1, 1, False),
        (b'[]\nnull\n3\n"x"\n{"b": 2}\n', 1, 4, False),
        (b'{"a": 1e999}\n{"a": 9223372036854775808}\n{"a": -9223372036854775807}\n', 1, 2, False),
        (b'{"a": "\\ud800"}\n', 0, 1, False),
        (b'\xff\xfe{"a": 1}\n', 0, 1, False),
        (b'{"a": ' + b"[" * 100_000 + b"\n", 0, 1, False),
        (b'{"a": ' + b"9" * 5000 + b"}\r\n" + b'{"b": 2}\r\n', 1, 1, False),
    ],
)
def test_what_is_no_object_is_left_out_and_counted(
    tmp_path: Path, data: bytes, rows: int, damaged: int, torn: bool
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(data)
    found = read(path)
    assert (len(found.rows), found.damaged, found.torn) == (rows, damaged, torn)


def test_no_file_has_no_lines_and_a_folder_is_told(tmp_path: Path) -> None:
    assert read(tmp_path / "events.jsonl") == Lines([], 0, False)
    folder = tmp_path / "labels.jsonl"
    folder.mkdir()
    assert refusal(read, folder) == f"expected a file to read at {folder}, got: Is a directory"
    said = refusal(append, folder, {"a": 1})
    assert said == f"expected a file at {folder}, got: Is a directory; move it away"


def test_what_an_event_lacks_makes_it_a_damaged_line(tmp_path: Path) -> None:
    lines = [{"event": "created", "time": 5}, {"event": 3, "time": 5}, {"event": "x", "time": "y"}]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Job(tmp_path).event_lines() == Lines(lines[:1], 2, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sae", 3), ("sae", None), ("step", "1"), ("tokens", None), ("seconds", []), ("note", "x")],
)
def test_a_line_of_metrics_of_wrong_types_is_damaged(
    tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {name: value}) + "\n")
    found = read_since(path, MetricsCursor())
    assert (found.rows, found.damaged) == ([ROW], 1)


def test_numbers_up_to_2_to_the_63_are_read() -> None:
    assert parse_json("[9223372036854775807, -9223372036854775807, 1e308]") == [
        2**63 - 1,
        1 - 2**63,
        1e308,
    ]
    with pytest.raises(ValueError, match="a number of 19 digits"):
        parse_json("9223372036854775808")
    with pytest.raises(ValueError, match="the number 1e999, which is too large"):
        parse_json("1e999")
