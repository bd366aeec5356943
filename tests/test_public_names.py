"""What users import and call has docstrings, and types that resolve.

`pyright --verifytypes`, which `.ci/run` calls, holds every name of the package to its types. Here
are those that users meet, with what it does not look at: docstrings of properties.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from documents import blocks

import gsae_core.config
import gsae_core.training
from gsae_core.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]


def code() -> Iterator[str]:
    """Yield the Python of README.md, of the documentation's pages and of the notebooks."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        yield from blocks(page.read_text(encoding="utf-8"), "python")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                # IPython's own commands, such as %pip.
                yield re.sub(r"(?m)^( *)[%!].*", r"\1pass", "".join(cell["source"]))


def imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def public() -> dict[str, Any]:
    """Return what is offered or shown: packages' lists, configs, commands, imports of the pages."""
    found: dict[str, Any] = {f"gsae {name}": command for name, command in COMMANDS.items()}
    for package in (gsae_core, gsae_core.training):
        found |= {f"{package.__name__}.{name}": getattr(package, name) for name in package.__all__}
    for name, kind in vars(gsae_core.config).items():
        if isinstance(kind, type) and issubclass(kind, gsae_core.config.Config):
            found[f"gsae_core.config.{name}"] = kind
    for node in [node for text in code() for node in imports(ast.parse(text))]:
        if node.module and node.module.partition(".")[0] == "gsae_core":
            home = __import__(node.module, fromlist=["_"])
            found |= {f"{node.module}.{each.name}": getattr(home, each.name) for each in node.names}
    return {name: each for name, each in found.items() if callable(each)}


PUBLIC = public()


def members(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield a class's public methods and properties that the package wrote, and its `__init__`."""
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if name == "__init__" or not name.startswith("_"):
                match member:
                    case property(fget=function):
                        pass
                    case cached_property(func=function) | classmethod(__func__=function):
                        pass
                    case _:
                        function = member
                if inspect.isfunction(function) and function.__module__.startswith("gsae_core."):
                    yield f"{base.__name__}.{name}", inspect.unwrap(function)


def for_checkers(module: str) -> dict[str, Any]:
    """Return the names that a module imports under `if TYPE_CHECKING`."""
    names: dict[str, Any] = {}
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            statements = [
                each for each in node.body if isinstance(each, ast.Import | ast.ImportFrom)
            ]
            exec("\n".join(map(ast.unparse, statements)), names)
    return names


def untyped(function: Callable[..., Any]) -> list[str]:
    """Return the parameters without a type; NameError where an annotation means nothing."""
    hints = get_type_hints(function, localns=for_checkers(function.__module__))
    signature = inspect.signature(function)
    return [
        name for name in [*signature.parameters, "return"] if name not in {"self", "cls", *hints}
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_docstrings_and_types(name: str) -> None:
    named = PUBLIC[name]
    assert inspect.getdoc(named), name
    functions = dict(members(named)) if isinstance(named, type) else {name: inspect.unwrap(named)}
    for each, function in functions.items():
        assert inspect.getdoc(function) or each.endswith(".__init__"), each
        assert untyped(function) == [], each


def test_a_missing_type_and_a_mistaken_one_are_found() -> None:
    def half(x: int, y) -> int:
        return x + y

    def mistaken(x: "Nothing") -> int:  # noqa: F821  # pyright: ignore
        return 1

    assert untyped(half) == ["y"]
    with pytest.raises(NameError):
        untyped(mistaken)
