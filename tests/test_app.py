"""Every page in every state, without a browser: no page may end in an exception."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from app_pages import APP, HOSTILE, opened, text
from synthetic import config, metric_lines, write_metrics, write_run

from gsae_core.config import sweep

PAGES = [
    "app.py",
    *(f"pages/{name}.py" for name in ("1_Train", "2_Live", "3_Pareto", "4_Shrinkage")),
]
RESULT_PAGES = PAGES[3:]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_runs_says_so(root: Path, page: str) -> None:
    at = opened(page)
    assert not at.exception
    if page in PAGES[2:]:
        assert "No runs yet" in text(at)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_a_finished_run(root: Path, page: str) -> None:
    write_run(root, "done")
    at = opened(page)
    assert not at.exception
    assert at.selectbox(key="run").value == "done"


@pytest.mark.parametrize("page", PAGES[2:])
def test_a_page_shows_a_running_job(root: Path, worker: int, page: str) -> None:
    write_run(root, "moving", "running", share=0.25, pid=worker)
    at = opened(page)
    assert not at.exception
    if page in RESULT_PAGES:
        assert "moving is running, step 128 of 512" in text(at)  # a quarter of 2^20 / 2048


@pytest.mark.parametrize("page", PAGES[2:])
def test_a_page_shows_a_failed_job(root: Path, page: str) -> None:
    write_run(root, "broken", "failed", share=0.1, error=f"CUDA out of memory {HOSTILE}")
    at = opened(page)
    assert not at.exception
    said = text(at)
    assert "<img src=x" not in said
    if page == "pages/2_Live.py":
        assert "Train fewer SAEs at once" in said
        assert "loading the model" in said


@pytest.mark.parametrize("page", PAGES)
def test_an_unknown_run_in_the_address_is_named_and_not_replaced(root: Path, page: str) -> None:
    write_run(root, "done")
    at = opened(page, run=HOSTILE)
    assert not at.exception
    assert "is not on this machine; choose another in the sidebar" in text(at)
    assert "<img" not in text(at)
    assert at.selectbox(key="run").value is None


def test_bad_values_in_the_address_are_dropped(root: Path) -> None:
    write_run(root, "done")
    for page, bad in (
        ("pages/2_Live.py", {"x": "parsecs", "smooth": "9", "part": "?", "saes": HOSTILE}),
        ("pages/3_Pareto.py", {"ym": "beauty", "pick": HOSTILE}),
        ("pages/4_Shrinkage.py", {"gated": "none", "base": HOSTILE, "minfire": "-3"}),
        ("pages/1_Train.py", {"preset": HOSTILE}),
    ):
        at = opened(page, run="done", **bad)
        assert not at.exception, page


def test_a_run_deleted_while_open_is_named(root: Path) -> None:
    write_run(root, "older")
    run = write_run(root, "victim")
    at = opened("pages/3_Pareto.py", run="victim")
    shutil.rmtree(run.folder)
    at.run()
    assert not at.exception
    assert "Run victim is not on this machine" in text(at)


def test_a_new_run_does_not_change_what_is_open(root: Path) -> None:
    write_run(root, "first")
    at = opened("pages/2_Live.py")
    write_run(root, "second")
    at.run()
    assert at.selectbox(key="run").value == "first"


def test_one_architecture_alone_has_pages_too(root: Path) -> None:
    base = config()
    run = write_run(
        root, "alone", run_config=base.model_copy(update={"saes": sweep(["gated"], [0.2], 512)})
    )
    write_metrics(run, metric_lines(run.config, share=1.0))
    for page in PAGES[2:]:
        at = opened(page)
        assert not at.exception, page
    assert "no Gated run" not in text(opened("pages/3_Pareto.py"))


def test_every_page_begins_with_the_frame_and_none_navigates_by_itself() -> None:
    for page in PAGES:
        source = (APP.parent / page).read_text(encoding="utf-8")
        assert source.count("shell.page(") == 1
        assert "st.navigation" not in source
        assert "unsafe_allow_html" not in source


def test_home_loads_neither_torch_nor_figures() -> None:
    code = "import sys; import {}; sys.exit(bool(set(sys.modules) & {}))"
    rooms = ["shell", "pieces", "launch", "machine", "presets", "progress", "controls", "live_view"]
    modules = ", ".join(f"gsae_core.{room}" for room in rooms)
    heavy = {"torch", "gsae_core.plots.curves", "altair", "transformers", "tyro"}
    done = subprocess.run([sys.executable, "-c", code.format(modules, heavy)], check=False)
    assert done.returncode == 0
