"""Standard streams whose reader has left, a terminal that closed, streams that were never open."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gsae_core.files import EXAMPLE
from gsae_core.runs.run import Run

COMMAND = (sys.executable, "-m", "gsae_core")
SIGPIPE = 141
"""What a shell says of a program that wrote to a pipe which nobody reads: 128 + 13."""


@contextmanager
def unread() -> Iterator[int]:
    """The end of a pipe whose reader is gone, which `| head -1` is after a line."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (("train", "--help"), ""),
        (("bench", "step", "--help"), ""),
        (("list", str(EXAMPLE)), ""),
        (("doctor",), ""),
        (("--help",), "1"),
        (("list", str(EXAMPLE)), "1"),
    ],
)
def test_an_answer_ends_quietly_with_its_reader(words: tuple[str, ...], unbuffered: str) -> None:
    with unread() as pipe:
        done = subprocess.run(
            [*COMMAND, *words],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (SIGPIPE, "")


def test_a_sentence_that_nobody_reads_leaves_the_exit_code(tmp_path: Path) -> None:
    with unread() as pipe:
        done = subprocess.run(
            [*COMMAND, "resume", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=pipe,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_run_goes_on_without_its_readers(small: list[str], tmp_path: Path) -> None:
    # `train | head -1` in a terminal that is closed: the bars meet EIO there.
    master, terminal = pty.openpty()
    with unread() as pipe:
        process = subprocess.Popen([*COMMAND, *small], stdout=pipe, stderr=terminal)
        os.close(terminal)
        said = os.read(master, 1000)
        os.close(master)
        assert process.wait(timeout=120) == 0
    assert said.startswith(b"loading the model and the text")
    run = Run.open(tmp_path / "run")
    assert (run.status.state, run.status.step) == ("finished", 20)
    assert len(run.evals()) == 4
    assert "Traceback" not in (run.folder / "log.txt").read_text()


def test_what_is_meant_for_a_stream_that_was_closed_goes_nowhere(tmp_path: Path) -> None:
    words = " ".join(f"'{word}'" for word in [*COMMAND, "resume", str(tmp_path)])
    done = subprocess.run(
        f"{words} 2>&-", shell=True, stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
