"""Starting runs from pages: one press, one run; Train's own tests are in test_train_page.py."""

from pathlib import Path

from app_pages import opened
from synthetic import config, write_run

from gsae_core.config import NO_MODEL, ModelConfig
from gsae_core.runs import run as launch
from gsae_core.runs.jobs.job import read_status, write_status
from gsae_core.runs.run import list_runs


def test_one_press_starts_the_quick_preset(root: Path, started: list[str]) -> None:
    write_run(root, "done")
    at = opened("app.py", run="done")  # an address that holds a bound parameter
    at.button(key="home.start_quick").click().run()
    (run,) = [run for run in list_runs(root) if run.id != "done"]
    assert started == [run.id]
    assert run.config.preset == "quick"
    assert at.title[0].value == "Live"
    assert at.selectbox(key="run").value == run.id


def test_a_double_press_starts_one_run(root: Path, started: list[str]) -> None:
    first = launch.launch(root, config(), nonce="abc123")
    write_status(first.folder, read_status(first.folder)._replace(state="finished"))
    second = launch.launch(root, config(), nonce="abc123")
    assert first.folder == second.folder
    assert started == [first.id]


def test_a_run_is_named_so_that_any_model_name_is_safe() -> None:
    hostile = config().model_copy(
        update={"preset": None, "model": ModelConfig(name="../my models/a b$(rm)")}
    )
    name = launch.run_id(hostile, "abc123")
    assert name.startswith("a-b-rm--L2-resid_post-")
    assert name.endswith("-abc123")
    folder = hostile.data.model_copy(update={"source": "/data/clip of birds"})
    of_no_model = {"model": ModelConfig(name=NO_MODEL), "data": folder}
    name = launch.run_id(hostile.model_copy(update=of_no_model), "abc123")
    assert name.startswith("clip-of-birds-vectors-")


def test_watching_another_run_opens_that_one(root: Path, worker: int) -> None:
    write_run(root, "moving", "running", share=0.5, pid=worker)
    write_run(root, "done")
    at = opened("app.py", run="done")
    at.button(key="home.watch_moving").click().run()
    assert at.title[0].value == "Live"
    assert at.selectbox(key="run").value == "moving"


def test_the_latest_results_open_whatever_run_was_chosen(root: Path) -> None:
    write_run(root, "older", "failed", share=0.5)
    write_run(root, "newer")
    at = opened("app.py", run="older")
    at.button(key="home.results").click().run()
    assert at.title[0].value == "Pareto"
    assert at.selectbox(key="run").value == "newer"
