"""The wheel works away from the repository, in an environment of its own.

Run with `python -m pytest -m wheel tests/test_wheel.py`. Without extras, then with `app`, then
with `lens` beside SAELens: later tests install on top of what earlier ones were shown in.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from documents import blocks
from hub_server import Hub
from playwright.sync_api import expect, sync_playwright
from safetensors.torch import load_file

from gsae_core import GatedSAE
from gsae_core.checkpoints.checkpoint import save_sae
from tests.browser.driver import (
    FLAGS,
    PAGES,
    PATIENCE,
    chromium_path,
    eventually,
    free_port,
    opened,
    sees,
)

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
# Of the shell, before any fixture: what pip has in its cache serves here too.
SHELL = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("GSAE_")
}
OPTIONAL = {
    *("altair", "plotly", "streamlit", "transformer-lens"),
    *("trackio", "vl-convert-python", "wandb"),
}
SMALL = ["--tokens", "4_096", "--eval-tokens", "500"]


class Away(NamedTuple):
    """A virtual environment with the wheel, and the folder that its programs start in."""

    wheel: Path
    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "environment" / "bin"

    def install(self, *requirements: str, extra: str = "") -> None:
        """Install the wheel with an extra, and what else, at the versions that the tests run."""
        lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
        pins = self.folder / "pins.txt"
        pins.write_text("\n".join(line for line in lines if "==" in line))
        # Bytecode of what nobody imports here would be half of the time.
        options = ["--quiet", "--quiet", "--no-compile", "--constraint", str(pins)]
        wheel = f"gsae-core{extra} @ {self.wheel.as_uri()}"
        pip = [str(self.bin / "python"), "-m", "pip", "install", *options]
        done([*pip, wheel, *requirements], cwd=self.folder, env=SHELL)

    @property
    def environ(self) -> dict[str, str]:
        folders = {"XDG_CACHE_HOME": self.folder / "cache", "HF_HOME": self.folder / "hf"}
        own = {name: str(folder) for name, folder in folders.items()}
        return {**SHELL, **own, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}

    def run(
        self, program: str, *words: str, code: int = 0, env: dict[str, str] | None = None
    ) -> tuple[str, str]:
        """Run a program of the environment; return what it printed to both streams."""
        command = [str(self.bin / program), *words]
        return done(command, cwd=self.folder, env=self.environ | (env or {}), code=code)

    def installed(self) -> dict[str, str]:
        """Return the version of every package."""
        packages = json.loads(self.run("python", "-m", "pip", "list", "--format", "json")[0])
        return {package["name"].lower(): package["version"] for package in packages}


def done(command: list[str], *, cwd: Path, env: dict[str, str], code: int = 0) -> tuple[str, str]:
    """Run a command to its exit code; return what it printed to both streams."""
    ended = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    said = f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}"
    assert ended.returncode == code, said
    return ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    """The wheel, built from this repository, without extras; gigabytes, so removed in the end."""
    folder = tmp_path_factory.mktemp("away")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--quiet", "--no-deps"]
    done([*build, "--wheel-dir", str(folder), str(ROOT)], cwd=folder, env=SHELL)
    (wheel,) = folder.glob("*.whl")
    away = Away(wheel, folder)
    venv.create(away.bin.parent, with_pip=True)
    away.install()
    yield away
    shutil.rmtree(away.bin.parent)


@pytest.fixture(scope="module")
def with_app(bare: Away) -> Away:
    bare.install(extra="[app]")
    return bare


@pytest.fixture(scope="module")
def with_saelens(with_app: Away) -> Away:
    with_app.install("sae-lens==6.54.12", extra="[app,lens]")
    return with_app


def sound(away: Away) -> None:
    """Fail if a package lacks what it requires."""
    found, _ = away.run("python", "-m", "pip", "check")
    assert found.strip() == "No broken requirements found."


def test_the_environment_holds_the_package_and_nothing_of_an_extra(bare: Away) -> None:
    assert bare.installed().keys() & OPTIONAL == set()
    sound(bare)
    where = "import gsae_core, sys; print(sys.prefix); print(gsae_core.__file__)"
    prefix, file = bare.run("python", "-c", where)[0].splitlines()
    assert Path(prefix) == bare.bin.parent
    assert Path(file).is_relative_to(bare.bin.parent)


def test_doctor_finds_nothing_amiss_and_names_the_extras(bare: Away) -> None:
    found, _ = bare.run("gsae", "doctor")
    assert "bad" not in {line.split()[0] for line in found.splitlines()}
    for name in ("app", "lens"):
        assert f'pip install "gsae-core[{name}]"' in found


def measured(away: Away, run: str) -> list[dict[str, Any]]:
    """Return what a run's evaluation says of each SAE."""
    evals = away.folder / "runs" / run / "evals.json"
    return json.loads(evals.read_text("utf-8"))["saes"]


@pytest.fixture(scope="module")
def first(bare: Away) -> list[dict[str, Any]]:
    """What the first run's evaluation says, trained before anything was added."""
    bare.run("gsae", "train", "--preset", "quick", *SMALL, "--out", "runs/first")
    return measured(bare, "first")


def test_the_quick_preset_trains_and_is_measured(first: list[dict[str, Any]]) -> None:
    assert [row["architecture"] for row in first] == ["gated"] * 4 + ["relu"] * 4
    assert all(row["l0"] > 0 and row["loss_recovered"] > 0 for row in first)


(EXAMPLE,) = blocks((ROOT / "README.md").read_text("utf-8"), "python")
ALSO = """
import sys

print(sorted(name for name in sys.modules if name in {absent!r}))
"""


def test_the_readme_s_example_trains_and_imports_nothing_of_an_extra(bare: Away) -> None:
    absent = {name.replace("-", "_") for name in OPTIONAL}
    script = bare.folder / "example.py"
    script.write_text(EXAMPLE + ALSO.format(absent=absent))
    *steps, imported = bare.run("python", "example.py")[0].splitlines()
    assert [int(line.split()[0]) for line in steps] == [50, 100]
    assert imported == "[]"


def test_the_app_without_its_extra_is_a_sentence(bare: Away) -> None:
    printed, sentence = bare.run("gsae", "app", code=2)
    assert printed == ""
    assert re.fullmatch(r'gsae_core: .* pip install "gsae-core\[app\]"\n', sentence)


LOAD = """
import sys

from gsae_core import GatedSAE
from safetensors.torch import save_file

sae = GatedSAE.from_pretrained(sys.argv[1])
save_file(sae.state_dict(), "loaded.safetensors")
"""


def test_an_sae_on_the_hub_loads_in_a_line(bare: Away, hub: Hub, tmp_path: Path) -> None:
    sae = GatedSAE(6, 10, seed=3)
    save_sae(sae, tmp_path, metadata={})
    files = {f"layer_0/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}
    commit = hub.add("ada/saes", files).refs["main"]
    network = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    bare.run("python", "-c", LOAD, f"ada/saes:layer_0@{commit}", env=network)
    loaded, kept = load_file(bare.folder / "loaded.safetensors"), sae.state_dict()
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)


@contextlib.contextmanager
def app_of(away: Away) -> Iterator[str]:
    """Serve the app by its command; yield its address, and have it end without an error."""
    port = free_port()
    command = [str(away.bin / "gsae"), "app", "--port", str(port)]
    log = away.folder / "app.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=away.folder, env=away.environ, stdout=file, stderr=file
        )
    address = f"http://localhost:{port}"
    try:
        eventually(lambda: server.poll() is not None or answers(f"{address}/_stcore/health"))
        assert server.poll() is None, log.read_text()
        yield address
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    assert "Traceback" not in log.read_text()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.read() == b"ok"
    except OSError:
        return False


def rgb(colour: str) -> str:
    """Return a colour as browsers do: `#0072B2` -> `rgb(0, 114, 178)`."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return f"rgb({red}, {green}, {blue})"


@pytest.mark.skipif(chromium_path() is None, reason="no chromium on this machine's PATH")
def test_the_app_opens_with_its_pages_and_in_its_colours(with_app: Away) -> None:
    theme = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text("utf-8"))["theme"]
    colour = "element => getComputedStyle(element).backgroundColor"
    expect.set_options(timeout=PATIENCE)
    with app_of(with_app) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            page.set_default_timeout(PATIENCE)
            opened(page, address)
            button = page.get_by_role("button", name="Start training")
            found = [part.evaluate(colour) for part in (page.get_by_test_id("stApp"), button)]
            names = ("backgroundColor", "primaryColor")
            assert found == [rgb(theme[scheme][name]) for name in names]
            page.close()
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        for name in PAGES:
            page.goto(f"{address}/{name}")
            sees(page, name or "Home")
        browser.close()


def test_saelens_lives_in_the_same_environment_and_reads_and_writes_the_same(
    with_saelens: Away,
) -> None:
    packages = with_saelens.installed()
    assert packages["sae-lens"] == "6.54.12"
    assert packages["torch"] == importlib.metadata.version("torch")
    sound(with_saelens)
    interop = [str(ROOT / "benchmarks" / "interop.sh"), "--with", str(with_saelens.bin / "python")]
    table, _ = done(interop, cwd=with_saelens.folder, env=with_saelens.environ)
    print(table)
    ways = {"ours -> saelens", "saelens -> ours", "saelens folded -> ours", "releases -> ours"}
    ways.add("temporal -> ours")
    assert {line.partition("  ")[0] for line in table.splitlines()} >= ways


def test_the_catalogue_is_what_saelens_list_makes_of_it(with_saelens: Away) -> None:
    # What differs, and which releases are no SAEs of one activation, is in what it prints.
    script = str(ROOT / "scripts" / "make_catalogue.py")
    print(with_saelens.run("python", script, "--check")[0])


def test_beside_saelens_ours_still_trains_and_measures_the_same(
    first: list[dict[str, Any]], with_saelens: Away
) -> None:
    with_saelens.run("gsae", "train", "--preset", "quick", *SMALL, "--out", "runs/second")
    assert measured(with_saelens, "second") == first
    with_saelens.run("gsae", "evaluate", "runs/second", "--tokens", "1_000")
    assert measured(with_saelens, "second") != first
