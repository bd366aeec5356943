"""What the README prints, works."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.flags import BENCHES
from gsae_core.cli.arguments import Train, parse, run_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    (console,) = blocks("console")
    joined = console.replace("\\\n", " ")
    return [line[2:].partition("#")[0].strip() for line in joined.splitlines()]


def test_the_first_two_blocks_are_the_two_lines() -> None:
    app, tests = blocks("bash")[:2]
    assert app.count("\n") == tests.count("\n") == 1
    assert app.strip().endswith("streamlit run app.py")
    assert tests.strip().endswith("pytest")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    steps = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [50, 100]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_the_program_takes(command: str) -> None:
    python, minus_m, package, *words = shlex.split(command)
    assert (python, minus_m, package) == ("python", "-m", "gsae_core")
    if words[0] == "bench":
        parse(words[1:], BENCHES).check()
        return
    parsed = parse(words)
    if isinstance(parsed, Train):
        assert run_config(parsed).saes


def test_every_linked_file_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
