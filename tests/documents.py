"""Fenced blocks of README.md and of docs/: found, run, and held to the command line."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.flags import BENCHES
from gsae_core.cli.arguments import Train, parse, run_config
from gsae_core.cli.main import COMMANDS


class Example(NamedTuple):
    """A block of Python, and what the page says that it prints; None where it does not say."""

    code: str
    printed: str | None


def blocks(text: str, language: str) -> list[str]:
    """Return the content of every fenced block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def examples(text: str) -> Iterator[Example]:
    """Yield the blocks of Python; a block of `text` that follows one is its output."""
    block = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```)?", re.M | re.S)
    for found in block.finditer(text):
        yield Example(found[1], found[2])


def commands(text: str) -> list[str]:
    """Return the command of every line of the console blocks, without comment and prompt."""
    joined = "".join(blocks(text, "console")).replace("\\\n", " ")
    return [line[2:].partition("#")[0].strip() for line in joined.splitlines()]


def check_command(command: str) -> None:
    """Raise InputError unless the program takes a command; nothing of it is carried out."""
    words = shlex.split(command)
    program = ["gsae"] if words[0] == "gsae" else ["python", "-m", "gsae_core"]
    assert words[: len(program)] == program, command
    words = words[len(program) :]
    if words[0] == "bench":
        parse(words[1:], BENCHES).check()
        return
    parsed = parse(words, COMMANDS)
    if isinstance(parsed, Train):
        assert run_config(parsed).saes
