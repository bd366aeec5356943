"""A run made on another machine's device works here: evaluated, indexed, labelled and resumed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from app_pages import edited, opened, text
from refusals import refusal
from tiny_runs import finish, leave_at, outcome

from gsae_core.cli.main import main
from gsae_core.runs.plan import cost
from gsae_core.runs.plan.cost import device_here
from gsae_core.runs.run import Run
from gsae_core.runs.work.setup import on_device_here
from gsae_core.runs.work.train import train_run
from gsae_core.text import Progress

LACKED = (
    "gsae_core: the run was made with --device cuda:9, which this machine lacks: cpu takes its "
    "place; --device names another"
)
WENT_ON = (
    "gsae_core: the run was set up on cuda:9 before and goes on on cpu: the same data in the same "
    "order, numbers that differ by rounding"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cost.torch.backends.mps, "is_available", lambda: False)


def from_elsewhere(run: Run) -> Run:
    """Return a run as if all of it had been done on cuda:9."""
    with edited(run.folder / "config.json") as config:
        config["device"] = "cuda:9"
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    lines = [line | ({"device": "cuda:9"} if line["event"] == "set up" else {}) for line in lines]
    (run.folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run.open(run.folder)


def noted(run: Run) -> list[tuple[str, str]]:
    return [(e["device"], e["named"]) for e in run.events() if e["event"] == "other device"]


def test_an_index_of_several_saes_says_so_once(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, built = from_elsewhere(finished), list[str]()

    def index_run(one: Run, name: str, **_: object) -> Iterator[Progress]:
        on_device_here(one)
        built.append(name)
        yield Progress("finished", 1, 1)

    manifest = SimpleNamespace(n_bytes=1, l0=1.0, amount=lambda: "1 held-out token")
    monkeypatch.setattr("gsae_core.cli.main.index_run", index_run)
    monkeypatch.setattr("gsae_core.cli.main.read_manifest", lambda folder: manifest)
    assert main(["index", str(run.folder)]) == 0
    assert built == [spec.name for spec in run.config.saes]
    assert len(built) > 1
    assert capsys.readouterr().err.splitlines() == [LACKED]


def test_what_is_asked_for_comes_first_then_what_the_run_names_if_it_is_here(
    new_run: Callable[..., Run],
) -> None:
    assert device_here("cpu") == "cpu"
    assert device_here("cuda") == device_here("mps") == "auto"
    run = new_run(device="cuda")
    assert run.on(None) is run
    assert run.on("cpu").config.device == "cpu"
    assert refusal(run.on, "cuda") == ("expected a device of this machine (auto, cpu), got 'cuda'")


def test_it_is_evaluated_and_indexed_here_and_says_so(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before, run = finished.evals(), from_elsewhere(finished)
    name = run.config.saes[0].name
    assert main(["evaluate", str(run.folder)]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == ["loading the model and the text", LACKED]
    assert run.evals() == before
    words = ["index", str(run.folder), "--sae", name, "--tokens", "60"]
    assert main(words) == 0
    assert LACKED in capsys.readouterr().err.splitlines()
    assert noted(run) == [("cpu", "cuda:9")] * 2
    # What is asked for is not remarked on, and what is not here is refused.
    for command in (["evaluate", str(run.folder)], words):
        assert main([*command, "--device", "cpu"]) == 0
        assert LACKED not in capsys.readouterr().err.splitlines()
        assert main([*command, "--device", "cuda"]) == 2
        sentence = "gsae_core: expected a device of this machine (auto, cpu), got 'cuda'"
        assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert len(noted(run)) == 2
    assert run.config.device == "cuda:9"


@pytest.mark.slow
def test_a_label_is_written_here(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = from_elsewhere(finished)
    name = run.config.saes[0].name
    assert main(["index", str(run.folder), "--sae", name, "--tokens", "200"]) == 0
    capsys.readouterr()
    words = ["label", str(run.folder), "--sae", name, "--most", "1", "--score", "none"]
    # It is loaded, and found to have too short a context.
    assert main([*words, "--with", run.config.model.name]) == 2
    assert "on this machine writes" in capsys.readouterr().err


def test_it_goes_on_here_to_the_bits_of_this_machine(
    new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    left, run = new_run("left"), new_run("alone")
    finish(left)
    leave_at(run, 13)
    run = from_elsewhere(run)
    assert main(["resume", str(run.folder), "--device", "mps"]) == 2
    assert run.status.state == "cancelled"  # as it was
    capsys.readouterr()
    assert main(["resume", str(run.folder)]) == 0
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if line in (LACKED, WENT_ON)] == [LACKED, WENT_ON]
    assert {**outcome(run), "files": None} == {**outcome(left), "files": None}
    assert [e["device"] for e in run.events() if e["event"] == "set up"] == ["cuda:9", "cpu"]


@pytest.mark.slow
def test_a_run_that_never_began_is_held_to_its_device(new_run: Callable[..., Run]) -> None:
    run = new_run(device="cuda")
    said = "expected a device of this machine (auto, cpu), got 'cuda'"
    assert refusal(list, train_run(run)) == said
    assert run.status.error == said
    assert list(train_run(run, device="cpu"))[-1].stage == "finished"


@pytest.mark.slow
def test_a_page_that_runs_its_model_works_here(
    finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = from_elsewhere(finished)
    monkeypatch.setenv("GSAE_RUNS", str(tmp_path))
    at = opened("pages/6_Prompt.py", run=run.id, text="w1 w2 w3 w4")
    assert "expected a device" not in text(at)
