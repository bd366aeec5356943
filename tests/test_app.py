"""Every page in every state, without a browser: no page may end in an exception."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from app_pages import APP, HOSTILE, NASTY, PAGES, hostile_run, opened, text
from synthetic import config, metric_lines, write_metrics, write_run

from gsae_core.config import sweep

SAE_PAGES = ["pages/5_Features.py", "pages/6_Prompt.py", "pages/7_Steer.py"]
RESULT_PAGES = ["pages/3_Pareto.py", "pages/4_Shrinkage.py", *SAE_PAGES]


def source(page: str) -> str:
    return (APP.parent / page).read_text(encoding="utf-8")


NEED_A_RUN = [page for page in PAGES if "need_run(" in source(page)] + SAE_PAGES
# What any page is bound to, and a few names that none is.
PARAMETERS = shlex.split(
    "model layer site preset from arch width sparsity tokens data peek x part smooth log saes "
    "overlay feat ym xm logx runs base paper pick cols diff gated lengths minfire bin topic find "
    "feature view ctx q dens text tok f s mode seed repo rev nothing"
)


def wide(root: Path, worker: int) -> None:
    saes = sweep(["gated", "relu"], [0.2], 16_384)
    write_run(root, "wide", run_config=config().model_copy(update={"saes": saes}))


def interrupted(state: str) -> Callable[[Path, int], None]:
    def make(root: Path, worker: int) -> None:
        # Without a process, a running one is lost.
        made = "running" if state == "lost" else state
        write_run(root, state, made, share=0.1, error=f"out of memory {HOSTILE}")  # type: ignore

    return make


STATES: dict[str, Callable[[Path, int], object]] = {
    "nothing": lambda root, worker: None,
    "finished": lambda root, worker: write_run(root, "done"),
    "running": lambda root, worker: write_run(root, "moving", "running", share=0.25, pid=worker),
    "waiting": lambda root, worker: write_run(root, "waits", "queued", share=0.0, pid=worker),
    "not started": lambda root, worker: write_run(root, "made", "queued", share=0.0),
    **{state: interrupted(state) for state in ("failed", "lost", "cancelled")},
    "16k features": wide,
    "hostile": lambda root, worker: hostile_run(root),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_there_in_every_state(root: Path, worker: int, page: str, state: str) -> None:
    STATES[state](root, worker)
    at = opened(page)
    said = text(at)
    for hidden in "\u202e\u2067\u200b\ufeff\x1b\x00":
        assert hidden not in said, f"{page} shows {hidden!r} as it stands"
    read_as_html = [str(element.value) for kind in (at.html, at.markdown) for element in kind]
    for tag in ("<script", "<img", "<form", "<style>*"):
        assert tag not in "".join(read_as_html), f"{page} lets {tag!r} through"
    if state == "nothing" and page in NEED_A_RUN:
        assert "No runs yet" in said
    if state == "running" and page in RESULT_PAGES:
        assert "moving is running, step 128 of 512" in said  # a quarter of 2^20 / 2048
    if state == "cancelled" and page in RESULT_PAGES:
        assert "cancelled is cancelled and was not evaluated" in said
    if state == "finished" and page in SAE_PAGES:  # without the weights
        assert "This run has no SAE weights" in said
        assert "found none; copy them back, or train the run again" in said
    if state == "finished":
        assert at.selectbox(key="run").value == "done"


@pytest.mark.parametrize("value", [HOSTILE, NASTY[2], "99999999", "-1", "nan", "x" * 5000])
@pytest.mark.parametrize("page", PAGES)
def test_bad_values_in_the_address_are_dropped(root: Path, page: str, value: str) -> None:
    write_run(root, "done")
    at = opened(page, run="done", **dict.fromkeys(PARAMETERS, value))
    assert "<img" not in text(at)
    assert "\u202e" not in text(at)


def test_a_page_about_a_failed_job_says_why_and_in_which_stage(root: Path) -> None:
    write_run(root, "broken", "failed", share=0.1, error=f"CUDA out of memory {HOSTILE}")
    said = text(opened("pages/2_Live.py"))
    assert "CUDA out of memory" in said
    assert "loading the model" in said


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
    for page in PAGES:
        opened(page)
    assert "no Gated run" not in text(opened("pages/3_Pareto.py"))


def test_every_page_begins_with_the_frame_and_none_navigates_by_itself() -> None:
    for page in PAGES:
        assert source(page).count("shell.page(") == 1
        assert "st.navigation" not in source(page)
        assert "unsafe_allow_html" not in source(page)


def test_only_the_frame_leads_to_other_pages() -> None:
    # It takes the run along, and names the page that an address is of: see assets/history.js.
    for path in (APP, *APP.parent.glob("pages/*.py"), *APP.parent.glob("gsae_core/app/*.py")):
        if path.stem != "shell":
            assert not re.search(r"\bst\.(switch_page|page_link)\b", path.read_text()), path


def test_an_address_without_a_run_is_of_the_session_s(root: Path) -> None:
    for name in ("older", "newer"):
        write_run(root, name)
    at = opened("app.py", run="older")
    for page in PAGES[1:]:
        at.switch_page(page)
        for name in list(at.query_params):
            del at.query_params[name]
        at.run()
        assert at.selectbox(key="run").value == "older", page
        assert at.query_params["run"] == "older", page


def test_a_link_of_another_run_is_followed_and_a_choice_is_kept(root: Path) -> None:
    for name in ("older", "newer"):
        write_run(root, name)
    at = opened("pages/2_Live.py", run="older")
    at.selectbox(key="run").set_value("newer").run()
    assert at.query_params["run"] == "newer"
    at.run()
    assert at.selectbox(key="run").value == "newer"
    at.switch_page("pages/3_Pareto.py")
    at.query_params["run"] = "older"
    assert at.run().selectbox(key="run").value == "older"


@pytest.mark.parametrize(
    ("rooms", "heavy"),
    [
        (
            "app.shell app.parts app.controls app.live_view runs.run runs.plan.progress machine "
            "presets",
            {"torch", "gsae_core.plots.pareto", "altair", "transformers", "tyro"},
        ),
        ("app.feature_list app.feature_view app.feature_index runs.run", {"torch"}),
        ("app.hub_view", {"torch"}),
    ],
    ids=["home", "features", "hub"],
)
def test_a_page_of_no_model_loads_nothing_heavy(rooms: str, heavy: set[str]) -> None:
    modules = ", ".join(f"gsae_core.{room}" for room in rooms.split())
    code = f"import sys; import {modules}; sys.exit(bool(set(sys.modules) & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
