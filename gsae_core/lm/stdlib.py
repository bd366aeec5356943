"""The corpus every user already has: the standard library of the running interpreter."""

import os
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


def stdlib_paths(root: Path | None = None) -> dict[str, Path]:
    """Return the standard library's Python files by their path below its root, in name order.

    Third-party code is left out, so that two machines with the same Python read the same text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    outsiders = {"site-packages", "dist-packages", "__pycache__"}
    paths = {}
    for folder, below, names in os.walk(root):
        # Not even entered: site-packages has ten times as many files as the library.
        below[:] = set(below) - outsiders
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                paths[path.relative_to(root).as_posix()] = path
    return dict(sorted(paths.items()))


def read_utf8(path: Path) -> str | None:
    """Return the text of `path`, or None where it is in another encoding.

    A few of the standard library's own tests are in other encodings on purpose.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def stdlib_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield the UTF-8 Python files of the standard library in name order, empty ones left out."""
    for name, path in stdlib_paths(root).items():
        if text := read_utf8(path):
            yield SourceFile(name, text, is_held_out(name))
