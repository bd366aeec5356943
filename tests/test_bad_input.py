"""What goes wrong around a page, each with a sentence and a next step; the page stays there."""

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_pages import HOSTILE, PAGES, opened, text
from synthetic import write_run

from gsae_core.runs.jobs.job import of_process, read_status, write_status
from gsae_core.runs.run import Run, list_runs

LIVE = "pages/2_Live.py"


@pytest.mark.parametrize("page", PAGES)
def test_an_unknown_run_in_the_address_is_named_and_not_replaced(root: Path, page: str) -> None:
    write_run(root, "done")
    at = opened(page, run=HOSTILE)
    assert "is not on this machine; choose another in the sidebar" in text(at)
    assert "<img" not in text(at)
    assert at.selectbox(key="run").value is None


def test_a_damaged_run_stays_in_the_address_until_another_is_chosen(root: Path) -> None:
    write_run(root, "whole")
    (write_run(root, "bad").folder / "config.json").write_bytes(b"{")
    at = opened(LIVE, run="bad")
    for page in ("pages/3_Pareto.py", LIVE, "app.py"):
        del at.query_params["run"]
        at.switch_page(page).run()
        assert at.query_params["run"] == "bad"  # so that a reload does not show another
        assert "bad cannot be opened" in text(at)
        assert f"expected JSON in {root / 'bad' / 'config.json'}, got " in text(at)
        assert not at.metric  # of the other run
    at.selectbox(key="run").set_value("whole").run()
    assert at.query_params["run"] == "whole"
    assert "cannot be opened" not in text(at)
    at.run()
    assert at.selectbox(key="run").value == "whole"


@pytest.mark.parametrize("page", PAGES)
def test_a_run_deleted_while_open_is_named(root: Path, page: str) -> None:
    write_run(root, "older")
    run = write_run(root, "victim")
    at = opened(page, run="victim")
    shutil.rmtree(run.folder)
    at.run()
    assert "Run victim is not on this machine; choose another in the sidebar" in text(at)


def test_where_there_is_no_run_none_is_said_to_be_in_the_sidebar(root: Path) -> None:
    at = opened(LIVE, run="gone")
    assert "Run gone is not on this machine; there are no runs here yet." in text(at)


@pytest.mark.parametrize("page", PAGES)
def test_a_run_of_a_newer_version_says_to_update_and_damaged_ones_are_counted(
    root: Path, page: str
) -> None:
    run = write_run(root, "future")
    (run.folder / "events.jsonl").write_text('{"event": "created", "schema_version": 99}\n')
    for name, file, content in [
        ("torn", "events.jsonl", b'{"time": 5, "event": "crea\0\0\0\0'),
        ("half", "evals.json", b'{"saes": ['),
        ("bad", "status.json", b'{"state": 3}'),
    ]:
        (write_run(root, name).folder / file).write_bytes(content)
    at = opened(page, run="future")
    assert "future cannot be opened" in text(at)
    assert "a newer version of gsae-core made it: update to open it" in text(at)
    assert "2 runs here cannot be read." in [each.value for each in at.caption]
    picker = next(box for box in at.selectbox if box.label == "Run")
    assert sorted(picker.options) == ["half", "torn"]


def test_damaged_runs_are_listed_with_their_reason(root: Path) -> None:
    write_run(root, "done")
    (root / "bad").mkdir()
    (root / "bad" / "config.json").write_text("{", encoding="utf-8")
    assert "bad cannot be read" in text(opened("app.py"))


# metrics.jsonl


def test_a_damaged_line_is_left_out_with_what_to_do(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "tok\n')
    at = opened(LIVE)
    assert "1 line of metrics.jsonl cannot be read and is left out" in text(at)
    assert "check the free disk space" in text(at)


# A folder of runs that cannot be written


@pytest.fixture
def read_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which the system refuses every write in the folder of runs.

    A superuser may write what is write-protected, so the refusal is put where the system's is.
    """

    def refuse(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def asked(path: Any, *args: Any, **named: Any) -> Any:
            inside = isinstance(path, str | Path) and root in [Path(path), *Path(path).parents]
            if inside and writes(*args, **named):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *args, **named)

        return asked

    def flags(given: int = 0, *_: Any, **__: Any) -> bool:
        return bool(given & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def mode(given: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in given for letter in "wax+")

    def protect() -> None:
        monkeypatch.setattr(os, "open", refuse(os.open, flags))
        monkeypatch.setattr(io, "open", refuse(io.open, mode))
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            always = refuse(getattr(os, name), lambda *_, **__: True)
            monkeypatch.setattr(os, name, always)

    return protect


@pytest.mark.parametrize("page", PAGES)
def test_a_read_only_folder_can_be_looked_at(
    root: Path, read_only: Callable[[], None], page: str
) -> None:
    write_run(root, "done")
    read_only()
    opened(page)


@pytest.mark.parametrize(
    ("page", "key"), [("app.py", "home.start_quick"), ("pages/1_Train.py", "train.start")]
)
def test_nothing_is_started_in_a_read_only_folder(
    root: Path, read_only: Callable[[], None], page: str, key: str
) -> None:
    at = opened(page)
    read_only()
    at.button(key=key).click().run()
    assert "Nothing was started" in text(at)
    assert "choose a folder you own" in text(at)
    assert list_runs(root) == []


@pytest.mark.parametrize(
    ("state", "presses", "said"),
    [
        ("cancelled", ["resume"], "Nothing was started"),
        ("cancelled", ["delete", "confirm_delete"], "Nothing was deleted"),
        ("running", ["cancel", "confirm_cancel"], "Nothing was cancelled"),
    ],
)
def test_what_a_read_only_folder_refuses_is_said(
    root: Path,
    worker: int,
    read_only: Callable[[], None],
    state: Any,
    presses: list[str],
    said: str,
) -> None:
    pid = worker if state == "running" else None
    run = write_run(root, "kept", state, share=0.5, pid=pid)
    at = opened(LIVE)
    for press in presses[:-1]:
        at.button(key=f"live.{press}").click().run()
    read_only()
    at.button(key=f"live.{presses[-1]}").click().run()
    assert said in text(at)
    assert "choose a folder you own" in text(at)
    assert run.status.state == state


def test_a_cancellation_that_a_read_only_folder_holds_up_is_watched(
    root: Path, worker: int, read_only: Callable[[], None]
) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    run.request_cancel()
    read_only()
    assert "asked to finish its step and save" in text(opened(LIVE))


# A disk that is full


@pytest.mark.slow
def test_a_disk_that_fills_during_training_says_how_much_it_takes_and_resume_goes_on(
    root: Path, small: list[str]
) -> None:
    def full() -> None:
        # The system refuses what makes a file larger than this, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "gsae_core"]
    # Its tokens are in the cache by then: without them no run would begin.
    elsewhere = [*small, "--out", str(root.parent / "elsewhere")]
    subprocess.run([*command, *elsewhere], capture_output=True, check=True)
    done = subprocess.run([*command, *small], preexec_fn=full, capture_output=True, check=False)
    assert done.returncode != 0
    at = opened(LIVE)
    assert "The run failed" in text(at)
    assert "make room on the disk and resume the run" in text(at)
    assert at.button(key="live.resume").label == "Resume"
    (run,) = list_runs(root)
    subprocess.run([*command, "resume", str(run.folder)], capture_output=True, check=True)
    assert run.status.state == "finished"


def test_a_status_that_is_no_status_is_named(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened(LIVE)
    (run.folder / "status.json").write_text("{")
    at.run()
    assert "moving cannot be opened" in text(at)


def test_a_run_that_began_meanwhile_is_not_deleted(root: Path, worker: int) -> None:
    run = write_run(root, "old", "cancelled", share=0.5)
    at = opened(LIVE)
    at.button(key="live.delete").click().run()
    write_status(run.folder, of_process(read_status(run.folder), "running", worker))
    at.button(key="live.confirm_delete").click().run()
    assert isinstance(Run.open(run.folder), Run)
    assert "which one does; cancel it first" in text(at)
