"""What the README prints, works."""

from pathlib import Path

import pytest
from documents import blocks, check_command, commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_two_blocks_are_the_two_lines() -> None:
    app, tests = blocks(README, "bash")[:2]
    assert app.count("\n") == tests.count("\n") == 1
    assert app.strip().endswith("streamlit run app.py")
    assert tests.strip().endswith("pytest")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(README, "python")
    exec(compile(example, "README.md", "exec"), {})
    steps = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [50, 100]


@pytest.mark.parametrize("command", commands(README))
def test_every_command_is_one_the_program_takes(command: str) -> None:
    check_command(command)
