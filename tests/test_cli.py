"""The commands, in process: what they print, what they leave, how they end."""

import contextlib
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsae_core import cli, job, workshop
from gsae_core.cli import main
from gsae_core.report import matched_ratio
from gsae_core.store.runs import Run

# 320 activations of the tiny model in 20 steps; E|x|^2 = 1, so lambda 0.05 and 0.4 differ.
SMALL = shlex.split(
    "--layer 1 --site mlp_hidden --arch gated relu --sparsity 0.05 0.4 --width 6 --tokens 320 "
    "--batch-size 16 --eval-tokens 64 --lr-warmup-steps 2 --device cpu"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2000 words that the tiny tokenizer knows."""
    words = random.Random(0)
    lines = [" ".join(f"w{words.randrange(38)}" for _ in range(20)) for _ in range(100)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


def small_run(model: Path, text: Path, out: Path) -> list[str]:
    return ["train", "--model", str(model), "--data", str(text), "--out", str(out), *SMALL]


@pytest.fixture
def small(tiny_lm_folder: Path, text: Path, tmp_path: Path) -> list[str]:
    """`train` words that finish in about a second; the run goes to tmp_path / "run"."""
    return small_run(tiny_lm_folder, text, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(tiny_lm_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert main(small_run(tiny_lm_folder, text, folder)) == 0
    return folder


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Run:
    """A finished run in tmp_path / "run", to be spoilt at will."""
    return Run.open(shutil.copytree(trained, tmp_path / "run"))


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1].removeprefix("gsae_core: ")


def test_train_ends_with_a_table_a_headline_and_the_folder(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path / 'run'}"
    table = [line.split()[:2] for line in lines if line.startswith(("gated", "relu"))]
    assert table == [["gated-0.05", "6"], ["gated-0.4", "6"], ["relu-0.05", "9"], ["relu-0.4", "9"]]
    run = Run.open(tmp_path / "run")
    assert lines[-2:] == [matched_ratio(run.evals()).sentence, f"the run is in {run.folder}"]
    assert run.status.state == "finished"
    assert run.config.model.site == "mlp_hidden"


def test_a_terminal_gets_a_bar_with_l0_and_loss(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(cli, "_is_time", lambda _: True)
    assert main(small) == 0
    bars = capsys.readouterr().err
    assert re.search(
        r"training: 100%.*20/20 .*, L0 [\d.]+ to [\d.]+, loss [\d.]+ to [\d.]+\]", bars
    )
    assert re.search(r"evaluating: 100%.*30\.0/30\.0", bars)


def test_a_run_without_a_name_is_named_after_what_it_is(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSAE_RUNS", str(tmp_path / "all"))
    at = small.index("--out")
    assert main(small[:at] + small[at + 2 :]) == 0
    (folder,) = (tmp_path / "all").iterdir()
    assert "L1-mlp_hidden" in folder.name


def test_evaluate_measures_again_on_as_many_tokens_as_asked(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.evals()
    assert main(["evaluate", str(finished.folder), "--tokens", "15"]) == 0
    after = finished.evals()
    # The held-out split has two sequences of 15 counted tokens; BOS is not counted.
    assert {row["n_tokens"] for row in before} == {30}
    assert {row["n_tokens"] for row in after} == {15}
    assert "gated-0.05" in capsys.readouterr().out
    assert main(["evaluate", str(finished.folder)]) == 0
    assert finished.evals() == before


@contextlib.contextmanager
def interruption(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Press Ctrl-C after the third step of whatever is trained inside."""
    real = job.train_run

    def interrupted(run: Run) -> Iterator[job.Progress]:
        for progress in real(run):
            yield progress
            if progress.stage == "training" and progress.done == 3:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_run", interrupted)
        yield


def test_ctrl_c_saves_and_says_how_to_go_on(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with interruption(monkeypatch):
        assert main(small) == 130
    run = Run.open(tmp_path / "run")
    step = run.status.step
    assert (run.status.state, step < 20) == ("cancelled", True)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"gsae_core: stopped after step {step} of 20; go on with: "
        f"python -m gsae_core resume {run.folder}"
    )
    assert main(["resume", str(run.folder)]) == 0
    assert run.status.state == "finished"
    steps = [row["step"] for row in run.metrics() if row["sae"] == "gated-0.4"]
    assert steps == list(range(1, 21))


def test_ctrl_c_before_the_work_begins_ends_quietly(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gsae_core.cli.run_config", interrupted)
    assert main(small) == 130
    assert capsys.readouterr().err == "gsae_core: interrupted\n"


def test_what_nobody_expected_goes_to_the_log_and_exits_1(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the middle\nof it")

    monkeypatch.setattr(workshop, "load_corpus", broken)
    assert main(small) == 1
    log = tmp_path / "run" / "log.txt"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"gsae_core: ZeroDivisionError: in the middle; the traceback is in {log}"
    )
    assert "Traceback (most recent call last)" in log.read_text()
    assert Run.open(tmp_path / "run").status.state == "failed"


def test_an_evaluation_that_breaks_leaves_its_traceback_in_the_log(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("again")

    monkeypatch.setattr(workshop, "load_corpus", broken)
    assert main(["evaluate", str(finished.folder)]) == 1
    assert "the traceback is in" in capsys.readouterr().err
    assert "ZeroDivisionError: again" in (finished.folder / "log.txt").read_text()


def test_a_mistake_before_the_first_step_leaves_no_folder(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake([*small, "--layer", "7"], capsys)
    assert not (tmp_path / "run").exists()


# What a person can get wrong, each as the last line of stderr.


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
    said = mistake([*small, "--data", str(tmp_path / "a.jsonl"), "--text-column", "text"], capsys)
    assert "text" in said
    assert "body, title" in said


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
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with interruption(monkeypatch):
        assert main(small) == 130
    state = max((tmp_path / "run" / "resume").iterdir(), key=lambda path: path.stat().st_size)
    state.write_bytes(state.read_bytes()[:-1])
    said = mistake(["resume", str(tmp_path / "run")], capsys)
    assert f"bytes in the resumable state {state}, found" in said
    assert Run.open(tmp_path / "run").status.state == "failed"


def test_the_program_itself_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gsae_core", "train", "--preset", "slow"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "gsae_core: expected a preset among quick, gelu-1l, pythia-2.8b, gemma-7b, gpt2-small, "
        "gemma-2-2b, got 'slow'\n"
    )


def test_the_log_is_given_back_after_a_run(finished: Run) -> None:
    assert finished.status.state == "finished"
    assert not logging.getLogger("gsae_core").handlers
