"""The corpus every user already has: the standard library of the running interpreter."""

import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple


class SourceFile(NamedTuple):
    """One Python file, named by its path below the library's root."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str, percent: int = 5) -> bool:
    """Whether file `name` belongs to the held-out split: decided by its name alone."""
    return int.from_bytes(sha256(name.encode()).digest()[:4], "big") % 100 < percent


def stdlib_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield the UTF-8 Python files of the standard library in a fixed order.

    Third-party code is left out, so that two machines with the same Python read the same text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    outsiders = {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if outsiders.isdisjoint(relative.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:  # a few of the library's own tests are in other encodings
                continue
            if text:
                yield SourceFile(relative.as_posix(), text, is_held_out(relative.as_posix()))
