"""The package as it is installed: what it declares, its command, and what an extra would bring."""

import ast
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gsae_core.cli.main import app_command, main
from gsae_core.errors import EXTRAS, InputError, extra, extra_sentence
from gsae_core.runs.track import INSTALL

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
OPTIONAL = {module for each in EXTRAS.values() for module in each.packages}
FILES = sorted((ROOT / "gsae_core").rglob("*.py"))


def ranges(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line.partition("#")[0].strip()) for line in lines]
    return {canonicalize_name(each.name): each for each in found}


def imported(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the top-level package and the line of every import below a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").partition(".")[0], child.lineno


def test_every_package_that_is_imported_is_declared() -> None:
    own = {"gsae_core", "benchmarks", *sys.stdlib_module_names}
    known = packages_distributions()
    declared = ranges(PROJECT["dependencies"]).keys()
    used = {name for path in FILES for name, _ in imported(ast.parse(path.read_text("utf-8")))}
    needed = {
        canonicalize_name(distribution)
        for name in used - own - OPTIONAL - INSTALL.keys()
        # `compression` is the standard library's from Python 3.14 on.
        if name != "compression"
        for distribution in known[name]
    }
    assert needed <= declared
    assert declared - needed == set()


def test_packages_of_extras_are_imported_where_their_absence_becomes_a_sentence() -> None:
    bare = []
    for path in FILES:
        if "app" in path.relative_to(ROOT / "gsae_core").parts[:-1]:
            continue  # the room's own __init__ asks for streamlit before any module of it loads
        tree = ast.parse(path.read_text("utf-8"))
        within = {
            line
            for node in ast.walk(tree)
            if (isinstance(node, ast.With) and ast.unparse(node.items[0]).startswith("extra("))
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            for _, line in imported(node)
        }
        bare += [
            f"{path.relative_to(ROOT)}:{line}"
            for name, line in imported(tree)
            # The GPU's kernels are asked for by `_device_refusal`, which says what is missing.
            if name in OPTIONAL - {"triton"} and line not in within
        ]
    assert bare == []


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_installs_what_its_sentence_says(name: str) -> None:
    assert (
        set(EXTRAS[name].packages.values()) <= ranges(PROJECT["optional-dependencies"][name]).keys()
    )


def test_pins_are_within_the_ranges() -> None:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = ranges([line for line in lines if line and line[0] not in "#-"])
    optional = PROJECT["optional-dependencies"]
    for name, allowed in ranges(
        PROJECT["dependencies"] + optional["app"] + optional["lens"]
    ).items():
        (pin,) = [each.version for each in pins.pop(name).specifier if each.operator != "<"]
        assert allowed.specifier.contains(pin), name
    assert pins == {}


def test_development_tools_are_the_ones_that_are_pinned() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines()
    pins = ranges([line for line in lines if line and line[0] not in "#-"])
    groups = {name: ranges(each).keys() for name, each in PROJECT["optional-dependencies"].items()}
    assert groups["dev"] | groups["docs"] <= pins.keys()
    assert pins.keys() - groups["gpu"] - groups["track"] <= groups["dev"] | groups["docs"]


def test_the_wheel_takes_the_app_from_where_it_is() -> None:
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    studio = "gsae_core/assets/_studio"
    assert included == {
        path: f"{studio}/{path}" for path in ("app.py", "pages", ".streamlit/config.toml")
    }
    assert all((ROOT / path).exists() for path in included)


def test_the_command_gsae_is_the_module() -> None:
    module, _, function = PROJECT["scripts"]["gsae"].partition(":")
    # What an installer writes.
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    ways = [["-c", script], ["-m", "gsae_core"]]
    answers = [
        subprocess.run(
            [sys.executable, *way, "resume", "nowhere"],
            capture_output=True,
            text=True,
            check=False,
        )
        for way in ways
    ]
    assert {done.returncode for done in answers} == {2}
    assert {done.stdout for done in answers} == {""}
    (sentence,) = {done.stderr for done in answers}
    assert sentence.startswith("gsae_core: expected")


def without(
    *packages: str, code: str, words: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter in which packages cannot be imported, as if not installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


WITHOUT_EXTRAS = """
import torch

from gsae_core import GatedSAE, open_run
from gsae_core.cli.main import main
from gsae_core.files import EXAMPLE
from gsae_core.training import TrainConfig, train

batches = (torch.randn(32, 6).relu() for _ in range(4))
recipe = TrainConfig(n_tokens=128, batch_size=32, lr=1e-3, sparsity=[0.1])
steps = sum(1 for _ in train([GatedSAE(6, 12)], batches, recipe))
assert main(sys.argv[1:]) == 0
run = open_run(EXAMPLE)
index = run.features(run.config.saes[0].name)
assert main(["list", str(EXAMPLE)]) == 0
print(steps, len(run.evals()), index.feature(0).number)
"""


def test_nothing_but_figures_and_the_app_needs_an_extra(small: list[str]) -> None:
    # Nor a tracker that no run asks for.
    done = without(*OPTIONAL, "wandb", "tensorboard", code=WITHOUT_EXTRAS, words=small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 2 0"


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("plotly", "gsae_core.plots.pareto"),
        ("plotly", "gsae_core.plots.shrinkage"),
        ("altair", "gsae_core.plots.live"),
        ("altair", "gsae_core.plots.features"),
        ("streamlit", "gsae_core.app.glossary"),
    ],
)
def test_a_figure_without_its_package_names_the_extra(package: str, module: str) -> None:
    done = without(package, code=f"import {module}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"gsae_core.errors.InputError: expected {package} to be installed for the app and figures, "
        'found none; pip install "gsae-core[app]"'
    )


@pytest.mark.parametrize("module", ["altair", "vl_convert"])
def test_a_model_card_is_not_sent_without_its_figure(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core import open_run
    from gsae_core.files import EXAMPLE
    from gsae_core.runs.work.publish import make_card

    run = open_run(EXAMPLE)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"to be installed for the app and figures"):
        make_card(run, [run.config.saes[0].name], "someone/something")


def test_another_missing_package_is_not_taken_for_an_extras() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), extra("app"):
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


def test_the_app_without_its_packages_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("streamlit", "vl_convert"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == (
        "gsae_core: expected streamlit, vl-convert-python to be installed for the app and figures, "
        'found none; pip install "gsae-core[app]"\n'
    )
    assert extra_sentence("lens", "transformer-lens").endswith('pip install "gsae-core[lens]"')


def test_the_app_takes_the_place_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    def execv(path: str, command: list[str]) -> None:
        raise Replaced(path, command)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Replaced) as replaced:
        main(["app", "--port", "8600"])
    assert replaced.value.args == (
        sys.executable,
        [
            *(sys.executable, "-P", "-m", "streamlit", "run", str(ROOT / "app.py")),
            "--server.port=8600",
        ],
    )


def test_the_port_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert app_command()[-1] == str(ROOT / "app.py")
    assert main(["app", "--port", "65536"]) == 2
    assert capsys.readouterr().err == (
        "gsae_core: --port: expected a number from 1 to 65535, got 65536\n"
    )


def test_a_port_that_is_taken_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"gsae_core: --port: expected one to listen on, got {port} (Address already in use); name "
        "another, or leave --port out for the next one that is free\n"
    )


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gsae-core {PROJECT['version']}\n"
