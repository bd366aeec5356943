"""Folders and files that this user may not read: one sentence, whatever command meets them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import mistake

from gsae_core.runs.run import Run

# Tests may run as root, who may read everything.


def denied(path: Any) -> PermissionError:
    return PermissionError(13, "Permission denied", str(path))


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Closes a folder: neither its list of names nor what is in it can be had."""

    def close(folder: Path) -> None:
        def is_in(path: Any) -> bool:
            return folder in Path(os.fsdecode(path)).parents

        def closing(call: Callable[..., Any], *, itself: bool = False) -> Callable[..., Any]:
            def refuse(path: Any = ".", *args: Any, **options: Any) -> Any:
                if isinstance(path, str | bytes | Path) and (
                    is_in(path) or (itself and Path(os.fsdecode(path)) == folder)
                ):
                    raise denied(path)
                return call(path, *args, **options)

            return refuse

        monkeypatch.setattr(os, "stat", closing(os.stat))
        monkeypatch.setattr(os, "lstat", closing(os.lstat))
        monkeypatch.setattr(os, "scandir", closing(os.scandir, itself=True))
        monkeypatch.setattr(os, "listdir", closing(os.listdir, itself=True))
        real = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != folder and real(path, mode)
        )

    return close


@pytest.mark.parametrize("command", ["list", "evaluate", "index", "resume", "import"])
def test_a_closed_folder_is_one_sentence(
    finished: Run,
    command: str,
    closed: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    closed(finished.folder)
    to = ["--to", str(tmp_path / "new"), "--model", "m"] if command == "import" else []
    told = mistake([command, str(finished.folder), *to], capsys)
    assert "got no permission" in told or "expected permission for" in told
    assert str(finished.folder) in told


@pytest.mark.parametrize("command", ["list", "import"])
def test_a_closed_folder_below_is_named(
    finished: Run,
    command: str,
    closed: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = ["--to", str(tmp_path / "new"), "--model", "m"] if command == "import" else []
    saes = finished.folder / "saes"
    closed(saes / "gated-0.05")
    told = mistake([command, str(saes), *to], capsys)
    assert f"{saes / 'gated-0.05'}" in told
    assert "permission" in told
