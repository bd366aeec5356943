"""What a person can get wrong: the sentence on the last line of stderr, and exit code 2."""

import json
import os
from pathlib import Path

import pytest

from gsae_core.cli.main import main
from gsae_core.runs.run import Run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1].removeprefix("gsae_core: ")


def test_a_layer_out_of_range_names_the_layers(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--layer", "7"], capsys)
    assert said.startswith("expected a layer from 0 to 1, got 7")


def test_a_model_folder_without_a_model_is_explained(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--model", str(tmp_path)], capsys)
    assert said == (
        f"expected a Hugging Face model folder with a config.json, found none in '{tmp_path}'; "
        "give a folder written by save_pretrained(), a name on the Hub, or 'bundled'"
    )


def test_a_hub_model_without_network_says_what_works_offline(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = mistake([*small, "--model", "nobody/has-this"], capsys)
    assert said == (
        "expected to download 'nobody/has-this' from the Hub, but we are offline and it is not in "
        "the cache; give a local model folder, or 'bundled' for the model that ships with the "
        "package"
    )


def test_a_missing_text_column_names_the_columns(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "w1 w2", "title": "w3"}) + "\n")
    table = tmp_path / "a.jsonl"
    said = mistake([*small, "--data", str(table), "--text-column", "text"], capsys)
    assert said == (
        f"expected a column 'text' in {table}, found body (strings such as 'w1 w2'), title "
        "(strings such as 'w3'): none of these reads like text; if one is, name it with "
        "--text-column"
    )


def test_an_empty_corpus_is_named(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    said = mistake([*small, "--data", str(tmp_path / "empty.txt")], capsys)
    assert said.startswith("expected some text in ")
    assert said.endswith("empty.txt, got none")


def test_a_corpus_shorter_than_a_batch_is_counted(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--batch-size", "4096", "--tokens", "8192"], capsys)
    assert said.startswith("expected at least one batch of 4096 training tokens, got 1")
    assert said.endswith("give more text or a smaller batch_size")


def test_data_that_is_not_there_is_said(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--data", str(tmp_path / "nowhere.txt")], capsys)
    assert said == (
        "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found nothing "
        f"at {tmp_path}/nowhere.txt: check the path"
    )


def test_too_wide_for_the_memory_says_what_it_would_take(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--width", "20_000_000_000"], capsys)
    assert said.startswith("expected about ")
    assert "4 SAEs of up to 30000000000 latents" in said
    assert said.endswith("lower the width, the batch size or the number of SAEs")


def test_a_device_this_machine_lacks_is_refused(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake([*small, "--device", "cuda:99"], capsys)
    assert said.startswith("expected a device of this machine (auto, cpu")
    assert said.endswith("got 'cuda:99'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    said = mistake([*small, "--out", str(tmp_path / "locked" / "run")], capsys)
    assert said.startswith("expected to be allowed to write ")
    assert said.endswith("'Permission denied'; choose a folder you own")


def test_a_read_only_disk_is_named(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_only(path: Path, **_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    said = mistake(small, capsys)
    assert said.startswith(f"expected to be allowed to write {tmp_path / 'run'}, got")
    assert said.endswith("'Read-only file system'; choose a folder you own")


def test_a_folder_that_holds_a_run_is_refused_and_kept(
    small: list[str], finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(small, capsys)
    assert said == (
        f"expected a new folder for the run, found a run in {finished.folder}; choose another, or "
        f"go on with it: python -m gsae_core resume {finished.folder}"
    )
    assert finished.status.state == "finished"


def test_resume_and_evaluate_want_a_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("resume", "evaluate"):
        assert mistake([command, str(tmp_path)], capsys) == (
            f"expected a run folder with a config.json, found none in {tmp_path}; give the folder "
            "that the training command printed"
        )


def test_a_finished_run_has_nothing_to_resume(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(["resume", str(finished.folder)], capsys)
    assert said == "expected a run with steps left, got run, which is finished"
    assert finished.status.state == "finished"


def test_evaluate_wants_a_positive_number_of_tokens(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(["evaluate", str(finished.folder), "--tokens", "0"], capsys)
    assert said == "--tokens: expected a number greater than 0, got 0"


def test_truncated_weights_are_not_evaluated(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = finished.sae_folder("relu-0.4") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    said = mistake(["evaluate", str(finished.folder)], capsys)
    assert said.startswith(f"expected whole safetensors in {weights}, found ")
    assert said.endswith("copy or train it again")


def test_changed_weights_are_not_evaluated(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = finished.sae_folder("relu-0.4") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    said = mistake(["evaluate", str(finished.folder)], capsys)
    assert said.startswith("expected the weights that ")
    assert said.endswith("copy or train it again")


def test_an_sae_of_another_width_than_the_site_is_refused(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    # mlp_hidden is 20 wide in the tiny model, the residual stream 12.
    path = finished.folder / "config.json"
    path.write_text(path.read_text().replace('"mlp_hidden"', '"resid_post"'))
    assert mistake(["evaluate", str(finished.folder)], capsys) == (
        "expected SAE 'gated-0.05' to take activations of width 12, as blocks.1.hook_resid_post "
        "has, got d_in=20; was it trained on another model or site?"
    )


def test_a_truncated_resumable_state_is_not_trusted(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    status = finished.folder / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"cancelled"'))
    state = max((finished.folder / "resume").iterdir(), key=lambda path: path.stat().st_size)
    state.write_bytes(state.read_bytes()[:-1])
    said = mistake(["resume", str(finished.folder)], capsys)
    assert f"bytes in the resumable state {state}, found" in said
    assert finished.status.state == "failed"
