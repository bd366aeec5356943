"""Starting runs from pages: one press, one run; the form is the command line; mistakes teach."""

import shlex
from pathlib import Path

import pytest
from app_pages import opened, text
from synthetic import config, write_run

from gsae_core import launch as launching
from gsae_core.command_line import parse
from gsae_core.config import ModelConfig
from gsae_core.flags import Train, run_config
from gsae_core.store.listing import list_runs
from gsae_core.store.status import read_status, write_status


def test_one_press_starts_the_quick_preset(root: Path, started: list[str]) -> None:
    write_run(root, "done")
    at = opened("app.py", run="done")  # an address that holds a bound parameter
    at.button(key="start_quick").click().run()
    assert not at.exception
    (run,) = [run for run in list_runs(root) if run.id != "done"]
    assert started == [run.id]
    assert run.config.preset == "quick"
    assert at.title[0].value == "Live"
    assert at.selectbox(key="run").value == run.id


def test_a_double_press_starts_one_run(root: Path, started: list[str]) -> None:
    first = launching.launch(root, config(), nonce="abc123")
    write_status(first.folder, read_status(first.folder)._replace(state="finished"))
    second = launching.launch(root, config(), nonce="abc123")
    assert first.folder == second.folder
    assert started == [first.id]


def test_the_form_starts_what_its_command_line_says(root: Path, started: list[str]) -> None:
    at = opened("pages/1_Train.py")
    at.text_input(key="lambdas").set_value("0.3, 0.6")
    at.number_input(key="width").set_value(768)
    at.text_input(key="tokens").set_value("2e6")
    at.text_input(key="data").set_value("my files/*.txt; rm -rf ~")
    at.run()
    assert not at.exception
    command = shlex.split(at.code[0].value)
    assert command[:4] == ["python", "-m", "gsae_core", "train"]
    flags = parse(command[3:])
    assert isinstance(flags, Train)
    at.button(key="start").click().run()
    assert at.title[0].value == "Live"
    (run,) = list_runs(root)
    assert run.config == run_config(flags)
    assert [spec.d_sae for spec in run.config.saes] == [768, 768, 1152, 1152]
    assert run.config.train.n_tokens == 2_000_000
    assert started == [run.id]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("lambdas", "0.1 lots", "λ: expected numbers separated by spaces, like 0.1 0.2, got"),
        ("lambdas", "-1", "λ: expected a number greater than 0, got -1.0"),
        ("tokens", "many", "Tokens: expected a whole number, like 2_000_000, got"),
        ("tokens", "100", "expected n_tokens of at least one batch (2048), got 100"),
        ("lr", "0", "Learning rate: expected a number greater than 0, got 0.0"),
    ],
)
def test_a_mistake_in_the_form_is_one_sentence_beside_it(
    root: Path, key: str, value: str, sentence: str
) -> None:
    at = opened("pages/1_Train.py")
    at.text_input(key=key).set_value(value).run()
    assert not at.exception
    assert sentence in text(at).replace("&#x27;", "'")
    assert at.button(key="start").disabled


def test_a_layer_the_model_lacks_is_named_before_it_starts(root: Path) -> None:
    at = opened("pages/1_Train.py")
    at.number_input(key="layer").set_value(7).run()
    assert "Layer: expected 0 to 3, got 7; the model has 4 blocks" in text(at)


def test_a_form_without_architectures_says_what_to_choose(root: Path) -> None:
    at = opened("pages/1_Train.py")
    at.multiselect(key="archs").set_value([]).run()
    wanted = "expected at least one architecture, got none; choose Gated, ReLU or both"
    assert wanted in text(at)


def test_another_preset_fills_the_form(root: Path) -> None:
    at = opened("pages/1_Train.py")
    at.selectbox(key="preset").set_value("gpt2-small").run()
    assert not at.exception
    assert at.text_input(key="model_name").value == "openai-community/gpt2"
    assert at.code[0].value == "python -m gsae_core train --preset gpt2-small"
    assert "known once the model is here" in text(at)


def test_a_run_is_named_so_that_any_model_name_is_safe() -> None:
    hostile = config().model_copy(
        update={"preset": None, "model": ModelConfig(name="../my models/a b$(rm)")}
    )
    name = launching.run_id(hostile, "abc123")
    assert name.startswith("a-b-rm--L2-resid_post-")
    assert name.endswith("-abc123")


@pytest.mark.parametrize(
    ("typed", "number"), [("2e6", 2_000_000), ("2_000", 2000), ("1,048,576", 1_048_576)]
)
def test_a_whole_number_may_be_typed_as_people_do(typed: str, number: int) -> None:
    assert launching.whole(typed, "Tokens") == number


def test_watching_another_run_opens_that_one(root: Path, worker: int) -> None:
    write_run(root, "moving", "running", share=0.5, pid=worker)
    write_run(root, "done")
    at = opened("app.py", run="done")
    at.button(key="watch_moving").click().run()
    assert not at.exception
    assert at.title[0].value == "Live"
    assert at.selectbox(key="run").value == "moving"


def test_the_latest_results_open_whatever_run_was_chosen(root: Path) -> None:
    write_run(root, "older", "failed", share=0.5)
    write_run(root, "newer")
    at = opened("app.py", run="older")
    at.button(key="results").click().run()
    assert at.title[0].value == "Pareto"
    assert at.selectbox(key="run").value == "newer"
