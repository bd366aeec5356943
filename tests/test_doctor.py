"""What the doctor finds, on machines better and worse than this one."""

import importlib.metadata
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gsae_core.cli import doctor
from gsae_core.cli.main import main
from gsae_core.errors import EXTRAS


def answer(*_: Any, **__: Any) -> socket.socket:
    return socket.socket()


def silence(*_: Any, **__: Any) -> socket.socket:
    raise TimeoutError("timed out")


@pytest.fixture(autouse=True)
def quiet_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.socket, "create_connection", silence)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    plenty = SimpleNamespace(available=8 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 8 * 10**9)


def test_a_sound_machine_passes_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--runs", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"ok", "note"}
    names = ["python", "torch", "transformers", "tokenizers", "safetensors", "datasets"]
    names += ["huggingface-hub", "pyarrow", "jinja2", "backports.zstd"]
    names += [f"extra {name}" for name in EXTRAS]
    names += ["device", "memory", "disk", "runs folder", "bundled model", "Hub"]
    assert [line[6:23].strip() for line in lines] == names
    assert "bundled model      loads and runs: 4 layers of width 256, 4096 tokens" in "\n".join(
        lines
    )
    assert not (tmp_path / "runs").exists()


def test_no_network_is_no_failure_and_says_what_still_works() -> None:
    check = doctor.hub()
    assert check.status == "note"
    assert check.found == (
        "huggingface.co does not answer (timed out); local folders and files work, names on the "
        "Hub need the network"
    )


def test_the_hub_is_left_alone_when_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor.hub()[1:] == ("note", "offline by HF_HUB_OFFLINE; local folders and files work")


def test_a_hub_that_answers_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.socket, "create_connection", answer)
    assert doctor.hub()[1:] == ("ok", "huggingface.co answers")


def test_what_is_wrong_comes_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    little = SimpleNamespace(available=10**8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 10**8)

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    def broken(_: str) -> None:
        raise OSError("no model.safetensors")

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr("gsae_core.lm.model.load_model", broken)
    runs = tmp_path / "runs"
    assert main(["doctor", "--runs", str(runs)]) == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [line[6:] for line in lines if line.startswith("bad")]
    assert "torch              not installed; install gsae-core again" in bad
    assert "backports.zstd     not installed; install gsae-core again" in bad
    assert (
        "note  extra app          expected streamlit, plotly, altair, vl-convert-python, pillow to "
        'be installed for the app and figures, found none; pip install "gsae-core[app]"'
    ) in lines
    assert (
        "memory             100.0 MB free; close other programs: the quick preset wants 2.0 GB"
        in bad
    )
    assert "disk               100.0 MB free; make room: the quick preset wants 1.0 GB" in bad
    assert (
        f"runs folder        {runs} cannot be written (Read-only file system); give train another "
        "place with --out"
    ) in bad
    assert "bundled model      no model.safetensors; install the package again" in bad
