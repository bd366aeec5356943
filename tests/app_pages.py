"""What tests of the pages share: an empty folder of runs, and a page opened without a browser."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from gsae_core import launch as launching
from gsae_core.store.runs import Run

APP = Path(__file__).resolve().parents[1] / "app.py"
HOSTILE = "<img src=x onerror=alert(1)>![](http://evil.example/x.png)"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs that the app is pointed at."""
    monkeypatch.setenv("GSAE_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture
def worker() -> Iterator[int]:
    """Id of a process that plays the one that trains."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def opened(page: str, **parameters: str) -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=120)
    if page != "app.py":
        at.switch_page(page)
    for name, value in parameters.items():
        at.query_params[name] = value
    return at.run()


def text(at: AppTest) -> str:
    """Return all that a page says."""
    kinds = (at.html, at.caption, at.markdown, at.code, at.title, at.subheader)
    return "\n".join(
        str(element.value if hasattr(element, "value") else element.body)
        for kind in kinds
        for element in kind
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the runs that would have been started; no process is."""
    ids: list[str] = []

    def record(run: Run) -> int:
        ids.append(run.id)
        return 1

    monkeypatch.setattr(launching, "start", record)
    return ids
