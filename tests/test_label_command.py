"""`label`: what goes where and is said before it does, what is kept, and what cannot be done."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from app_pages import opened, text
from chat_server import Chat, save_writer
from refusals import mistake
from synthetic import config, write_run
from synthetic_index import DEAD, write_index, write_weights

from gsae_core.analysis.labels import FILE, Annotation, Labels
from gsae_core.cli import main
from gsae_core.config import sweep
from gsae_core.runs import run as example
from gsae_core.runs.run import Run

SAE, OTHER = "gated-0.3", "relu-0.3"


@pytest.fixture
def indexed(root: Path) -> Run:
    """A run with an index of its first SAE alone; latent i fires on about 1 + i % 40 tokens."""
    saes = {"saes": sweep(["gated", "relu"], [0.3], 60)}
    run = write_run(root, "done", run_config=config().model_copy(update=saes))
    write_index(run, run.config.saes[0])
    write_weights(run, run.config.saes[1])
    return run


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return save_writer(tmp_path_factory.mktemp("models") / "writer", tiny_tokenizer)


def label(run: Run, *words: str, sae: str = SAE) -> int:
    return main.main(["label", str(run.folder), "--sae", sae, *words])


def labels(run: Run) -> dict[int, Annotation]:
    return run.features(SAE).labels.latest("label")


# Asked of an address


def test_a_label_by_an_address_is_kept_with_its_author_model_and_score(
    indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(indexed, "--features", "12", "7", "12", "--with", "small", "--remote") == 0
    found = labels(indexed)
    assert set(found) == {7, 12}
    assert (found[7].text, found[7].author, found[7].model) == (
        "words[31m of a kind",
        "automatic",
        "small",
    )
    # Of ten texts in an order drawn by seed and feature, the first five are said to be true.
    assert found[7].score in {k / 10 for k in range(0, 11, 2)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["feature", "score", "label"]
    assert lines[1].split()[:3] == ["12", f"{found[12].score:.2f}", "words[31m"]
    assert len(chat.questions) == 4


def test_what_goes_where_is_said_before_it_goes_and_the_token_never(
    indexed: Run,
    chat: Chat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-token")
    said: list[str] = []

    def look(question: str) -> None:
        said.append(capsys.readouterr().err)

    chat.before = look
    assert label(indexed, "--features", "7", "--with", "small", "--remote") == 0
    assert said[0] == (
        f"gsae_core: 1 feature of {SAE}: sending to {chat.address}, for small, up to 22 texts of "
        "each, of at most 19 tokens out of made-up words, and the token in OPENAI_API_KEY, over a "
        "connection that is not encrypted\n"
    )
    everything = "".join([*said, *capsys.readouterr()])
    everything += (indexed.folder / "features" / SAE / FILE).read_text()
    assert "secret" not in everything


def test_an_address_alone_sends_nothing(
    indexed: Run, chat: Chat, writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--features", "7", "--score", "none", "--device", "cpu")
    assert label(indexed, *words, "--with", str(writer)) == 0
    assert chat.questions == []
    assert "on this machine writes; no text leaves it" in capsys.readouterr().err
    said = labels(indexed)[7]
    assert (said.model, said.score) == ("writer", None)


def test_what_has_a_label_keeps_it_unless_asked_again(
    indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    indexed.features(SAE).labels.add(7, "label", "mine", author="ada")
    words = ("--features", "7", "8", "--with", "small", "--remote", "--score", "none")
    assert label(indexed, *words) == 0
    assert (labels(indexed)[7].text, labels(indexed)[8].author) == ("mine", "automatic")
    assert "1 of 2 features have a label, which stays" in capsys.readouterr().err
    assert label(indexed, *words) == 0
    assert len(chat.questions) == 1
    assert label(indexed, *words, "--again") == 0
    assert labels(indexed)[7].author == "automatic"
    assert indexed.features(SAE).labels.all()[0].text == "mine"


def test_most_takes_what_fires_most_often_and_nothing_dead(indexed: Run, chat: Chat) -> None:
    words = ("--with", "small", "--remote", "--score", "none")
    assert label(indexed, "--most", "3", *words) == 0
    fired = indexed.features(SAE).table["fired"].tolist()
    assert set(labels(indexed)) == set(sorted(range(60), key=lambda i: -fired[i])[:3])
    assert label(indexed, "--most", "1000", *words) == 0
    assert set(labels(indexed)) == set(range(60)) - {DEAD}


def test_labels_of_the_bundled_example_are_kept_beside_the_users_runs(
    root: Path, chat: Chat
) -> None:
    run = example.example_run()
    assert run is not None
    words = ("--features", "293", "--with", "small", "--remote")
    assert label(run, *words, sae="gated-0.35") == 0
    said = Labels(example.labels_folder(root, "gated-0.35")).of(293)["label"]
    assert said.model == "small"
    assert not (run.folder / "features" / "gated-0.35" / FILE).exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(indexed: Run, chat: Chat) -> None:
    words = ["--sae", SAE, "--features", "7", "8", "9", "--with", "small", "--remote"]
    command = [sys.executable, "-m", "gsae_core", "label", str(indexed.folder), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )

    def interrupt(question: str) -> None:
        if len(chat.questions) == 3:  # the second feature has its label, and no score
            # Python drops an interrupt that comes while it is freeing something: let it wait first.
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            process.wait(60)

    chat.before = interrupt
    out, err = process.communicate(timeout=120)
    assert process.returncode == main.INTERRUPTED
    assert "stopped after 1 of 3; the same command goes on from there" in err
    assert len(out.splitlines()) == 2
    assert set(labels(indexed)) == {7}
    chat.before = lambda question: None
    assert main.main(command[3:]) == 0
    assert set(labels(indexed)) == {7, 8, 9}


# On a real index


def test_a_run_is_indexed_and_labelled_by_a_model_on_this_machine(
    finished: Run, writer: Path
) -> None:
    name = finished.config.saes[0].name
    run = str(finished.folder)
    assert main.main(["index", run, "--sae", name, "--tokens", "400"]) == 0
    words = ["--most", "2", "--with", str(writer), "--score", "none"]
    assert main.main(["label", run, "--sae", name, *words]) == 0
    found = finished.features(name).labels.latest("label").values()
    assert len(found) == 2
    assert all(re.fullmatch(r"(w\d+|<unk>| )+", said.text) for said in found)


def test_the_page_shows_an_automatic_label_as_its_models_words(indexed: Run, chat: Chat) -> None:
    assert label(indexed, "--features", "7", "--with", "small", "--remote") == 0
    score = labels(indexed)[7].score
    at = opened("pages/5_Features.py", run="done", feature="7")
    shown = f"written by small (automatic); score {score:.2f} by detection, where 0.5 is guessing"
    assert shown in text(at)
    assert at.dataframe[0].value["by"].tolist()[7] == f"small, {score:.2f}"


# Mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--features 7", "expected --with MODEL, got none; give a folder"),
        ("--with small --remote", "expected --features with numbers or --most with how many, got"),
        ("--features 7 --most 2 --with small --remote", "or --most with how many, got both"),
        ("--most 0 --with small --remote", "--most: expected a number of at least 1, got 0"),
        ("--features 7 60 --with small --remote", "expected a feature from 0 to 59, got 60"),
        ("--features 7 3 --with small --remote", "expected a feature that fires, got 3, which is"),
        ("--features 7 --with no/such", "expected a model on this machine, found no 'no/such'; f"),
        ("--features 7 --with small --remote --score well", "--score: expected one of detection, "),
        ("--features 7 --wit small", "got '--wit'; did you mean --with?"),
        ("--features 7 --device tpu --with bundled", "expected a device of this machine (auto, "),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_sent(
    words: str, sentence: str, indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(indexed, *words.split()) == main.MISTAKE
    err = capsys.readouterr().err
    assert sentence in err
    assert chat.questions == []
    assert labels(indexed) == {}


def test_an_sae_without_an_index_says_how_to_build_one(
    indexed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--features", "7", "--with", "small", "--remote")
    assert label(indexed, *words, sae=OTHER) == main.MISTAKE
    assert "expected a feature index with a manifest.json, found none" in capsys.readouterr().err


def test_several_saes_need_a_name(indexed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label", str(indexed.folder), "--features", "7", "--with", "small", "--remote"]
    assert f"expected --sae with one of this run's SAEs ({SAE}, {OTHER})" in mistake(words, capsys)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (None, "expected an address in OPENAI_BASE_URL such as http://localhost:8000/v1, got"),
        ("http://127.0.0.1:1/v1", "expected an answer from http://127.0.0.1:1/v1/chat/completi"),
    ],
)
def test_an_address_that_does_not_answer_is_one_sentence(
    address: str | None,
    sentence: str,
    indexed: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if address is None:
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    else:
        monkeypatch.setenv("OPENAI_BASE_URL", address)
    words = ("--features", "7", "8", "--with", "small", "--remote")
    assert label(indexed, *words) == main.MISTAKE
    assert sentence in capsys.readouterr().err


def test_one_answer_that_is_not_understood_costs_that_feature_alone(
    indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second question is feature 7's for digits.
    chat.before = lambda question: "I cannot say." if len(chat.questions) == 1 else None
    words = ("--features", "7", "8", "9", "--with", "small", "--remote")
    assert label(indexed, *words) == main.FAILURE
    assert set(labels(indexed)) == {8, 9}
    err = capsys.readouterr().err
    assert "feature 7: expected 10 digits, 0 or 1, from small, got 'I cannot say.'" in err
    assert "in a row" not in err


def test_after_three_answers_in_a_row_that_are_not_understood_no_more_is_asked(
    indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.before = lambda question: "I cannot say."
    words = ("--most", "9", "--with", "small", "--remote", "--score", "fuzzing")
    assert label(indexed, *words) == main.FAILURE
    assert len(chat.questions) == 6
    assert labels(indexed) == {}
    assert "stopped after 3 answers in a row that were not understood" in capsys.readouterr().err


def test_an_index_of_other_weights_is_refused(
    indexed: Run, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(indexed.sae_folder(SAE))
    write_weights(indexed, indexed.config.saes[0], seed=1)
    assert label(indexed, "--features", "7", "--with", "small", "--remote") == main.MISTAKE
    assert "the SAE has changed since; build the index again" in capsys.readouterr().err
