"""What a person can get wrong: the sentence on the last line of stderr, and exit code 2."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import mistake

from gsae_core.runs.run import Run


def is_said(said: str, sentence: str) -> None:
    """Check a sentence in which `…` stands for anything."""
    assert re.fullmatch(".*".join(map(re.escape, sentence.split("…"))), said), said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--layer 7", "expected a layer from 0 to 1, got 7…"),
        ("--layer 0 7", "expected a layer from 0 to 1, got 7…"),
        (
            "--model {tmp}",
            "expected a Hugging Face model folder with a config.json, found none in '{tmp}'; give "
            "a folder written by save_pretrained(), a name on the Hub, or 'bundled'",
        ),
        (
            f"--model {'m' * 400}",
            "expected a Hub repository as OWNER/NAME, got 'mmm…'; copy it from its page",
        ),
        (
            f"--data {'d' * 400}.txt",
            "expected `stdlib`, a file, a folder or …check the path",
        ),
        (
            "--data ~nobody-here/a.txt",
            "expected `stdlib`, a file, a folder or …check the path",
        ),
        (
            f"--out {{tmp}}/{'o' * 400}/run",
            "expected a shorter name or path, got one too long for this system: {tmp}/ooo…",
        ),
        (
            "--model nobody/has-this",
            "expected to download 'nobody/has-this' from the Hub, but we are offline and it is not "
            "in the cache; give a local model folder, or 'bundled' for the model that ships with "
            "the package",
        ),
        (
            "--data {tmp}/a.jsonl --text-column text",
            "expected a column 'text' in {tmp}/a.jsonl, got rows such as {{'body': 'w1 w2', "
            "'title': 'w3'}}: name a column of text with --text-column, or…",
        ),
        ("--data {tmp}/empty.txt", "expected some text in …empty.txt, got none"),
        (
            "--data {tmp}/nowhere.txt",
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            "nothing at {tmp}/nowhere.txt: check the path",
        ),
        (
            "--batch-size 4096 --tokens 8192",
            "expected at least one batch of 4096 training tokens, got 1…give more text or a "
            "smaller batch_size",
        ),
        (
            "--width 20_000_000_000",
            "expected about …4 SAEs of up to 30000000000 latents…lower the width, the batch size "
            "or the number of SAEs",
        ),
        ("--device cuda:99", "expected a device of this machine (auto, cpu…got 'cuda:99'"),
        pytest.param(
            "--out {tmp}/locked/run",
            "expected to be allowed to write …'Permission denied'; choose a folder you own",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
        ),
    ],
)
def test_a_run_that_cannot_begin_is_one_sentence_and_leaves_no_folder(
    small: list[str],
    tmp_path: Path,
    flags: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "w1 w2", "title": "w3"}) + "\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    said = mistake([*small, *shlex.split(flags.format(tmp=tmp_path))], capsys)
    is_said(said, sentence.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_read_only_disk_is_named(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_only(path: Path, **_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    is_said(
        mistake(small, capsys),
        f"expected to be allowed to write {tmp_path / 'run'}, got…'Read-only file system'; choose "
        "a folder you own",
    )


def test_a_folder_that_holds_a_run_is_refused_and_kept(
    small: list[str], finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake(small, capsys) == (
        f"expected a new folder for the run, found a run in {finished.folder}; choose another, or "
        f"go on with it: python -m gsae_core resume {finished.folder}"
    )
    assert finished.status.state == "finished"


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_resume_and_evaluate_want_a_run_folder(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake([command, str(tmp_path)], capsys) == (
        f"expected a run folder with a config.json, found none in {tmp_path}; give the folder "
        "that the training command printed"
    )


WEIGHTS = "saes/relu-0.4/sae_weights.safetensors"


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text((folder / file).read_text().replace(old, new))

    return change


def cut(file: str, n_bytes: int, end: bytes = b"") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-n_bytes] + end)

    return change


@pytest.mark.parametrize(
    ("spoil", "words", "sentence"),
    [
        (
            lambda folder: None,
            "resume {run}",
            "expected a run with steps left, got run, which is finished",
        ),
        (
            lambda folder: None,
            "evaluate {run} --tokens 0",
            "--tokens: expected a number greater than 0, got 0",
        ),
        (
            cut(WEIGHTS, 10),
            "evaluate {run}",
            f"expected whole safetensors in {{run}}/{WEIGHTS}, found …copy or train it again",
        ),
        (
            cut(WEIGHTS, 4, end=b"\x00\x00\x80\x3f"),
            "evaluate {run}",
            "expected the weights that …copy or train it again",
        ),
        # mlp_hidden is 20 wide in the tiny model, the residual stream 12.
        (
            replace("config.json", '"mlp_hidden"', '"resid_post"'),
            "evaluate {run}",
            "expected SAE 'gated-0.05' to take activations of width 12, as "
            "blocks.1.hook_resid_post has, got d_in=20; was it trained on another model or site?",
        ),
    ],
)
def test_what_a_finished_run_does_not_allow_is_one_sentence(
    finished: Run,
    spoil: Callable[[Path], None],
    words: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(finished.folder)
    said = mistake(shlex.split(words.format(run=finished.folder)), capsys)
    is_said(said, sentence.format(run=finished.folder))
    assert finished.status.state == "finished"
