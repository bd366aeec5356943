"""The commands, in process: what they print, what they leave, how they end."""

import contextlib
import functools
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import write_text
from tqdm import tqdm

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.cli.main import _follow, main
from gsae_core.cli.report import run_report
from gsae_core.config import DataConfig
from gsae_core.runs.run import Run
from gsae_core.runs.work import setup, train
from gsae_core.runs.work.publish import make_card
from gsae_core.runs.work.setup import another_text, load_elsewhere, load_lm, load_text
from gsae_core.text import Progress


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_train_ends_with_a_table_a_headline_and_the_folder(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path / 'run'}"
    table = [line.split()[:2] for line in lines if line.startswith(("gated", "relu"))]
    assert table == [["gated-0.05", "6"], ["gated-0.4", "6"], ["relu-0.05", "9"], ["relu-0.4", "9"]]
    run = Run.open(tmp_path / "run")
    assert lines[-3] == matched_ratio(run.evals()).sentence
    # 20 steps of 16 vectors.
    assert re.fullmatch(
        r"320 tokens in \d+ s, [\d.]+( k)?/s on average; "
        r"time in language model \d+ %, in SAEs \d+ %",
        lines[-2],
    )
    assert lines[-1] == f"the run is in {run.folder}"
    assert run.status.state == "finished"
    assert run.config.model.site == "mlp_hidden"


def test_what_a_run_is_too_short_for_is_said_before_it_starts(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small, "--lr-warmup-steps", "20"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "loading the model and the text",
        "gsae_core: all 20 steps lie within the learning-rate warm-up of 20, so the learning rate "
        "never reaches its peak; shorten the warm-up or train longer",
    ]


def test_what_is_wrong_with_the_text_is_said_alone(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    text = ["--data", str(tmp_path / "empty.txt")]
    assert main([*small, *text, "--lr-warmup-steps", "20"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "loading the model and the text",
        f"gsae_core: expected some text in {tmp_path / 'empty.txt'}, got none",
    ]


def test_a_terminal_gets_a_bar_with_l0_and_loss(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm, mininterval=0))
    assert main(small) == 0
    bars = capsys.readouterr().err
    assert re.search(
        r"training: 100%.*20/20 .*, L0 [\d.]+ to [\d.]+, loss [\d.]+ to [\d.]+\]", bars
    )
    assert re.search(r"evaluating: 100%.*64\.0/64\.0", bars)


def test_a_pipe_gets_a_line_of_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def work() -> Iterator[Progress]:
        yield Progress("loading", 0, 0, "vector")
        for done in range(0, 4000, 10):  # a second each
            now[0] += 1
            yield Progress("indexing", done, 4000, "vector")

    _follow(work())
    first, *said = capsys.readouterr().err.splitlines()
    assert first == "loading the vectors"
    assert said[0] == "gsae_core: indexing: 90 of 4,000 vectors"
    assert len(said) == 24  # ten by the hundredth second, then a tenth later each


def test_a_run_without_a_name_is_named_after_what_it_is(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSAE_RUNS", str(tmp_path / "all"))
    at = small.index("--out")
    assert main(small[:at] + small[at + 2 :]) == 0
    (folder,) = (tmp_path / "all").glob("[!.]*")
    assert "L1-mlp_hidden" in folder.name


def test_evaluate_measures_again_on_as_many_tokens_as_asked(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.evals()
    assert main(["evaluate", str(finished.folder), "--tokens", "15"]) == 0
    after = finished.evals()
    # Sequences of 15 counted tokens, as BOS is not counted; five reach the 64 that were asked for.
    assert {row["n_tokens"] for row in before} == {75}
    assert {row["n_tokens"] for row in after} == {15}
    # Of 15 tokens in a row 14 are predicted by one that counts.
    assert [row["n_predictions"] for row in before] == 4 * [70]
    said = capsys.readouterr().out
    assert "gated-0.05" in said
    assert "measured on 15 held-out tokens\nlosses: mean over 14 predictions; zeros at" in said
    assert main(["evaluate", str(finished.folder)]) == 0
    assert finished.evals() == before


def test_evaluate_takes_all_the_text_holds_out_and_says_what_was_asked_for(
    finished: Run, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2000 words and an end are 133 rows of 15; one in 20 is held out, rows 0, 20 ... 120.
    assert len(small_text.read_text().split()) == 2000
    assert main(["evaluate", str(finished.folder), "--tokens", "50_000"]) == 0
    for row in finished.evals():
        assert (row["n_tokens"], row["n_tokens_asked"], row["n_predictions"]) == (105, 50_000, 98)
    assert (
        "measured on 105 held-out tokens of 50,000 asked for: the held-out text has no more\n"
    ) in capsys.readouterr().out
    # What training takes is as it was: 320 tokens, rounded up to the row.
    resumed = load_text(finished.config, load_lm(finished.config))
    assert resumed.train.n_tokens == 330
    words = ["index", str(finished.folder), "--sae", "relu-0.4", "--split", "held_out"]
    assert main([*words, "--tokens", "50_000"]) == 0
    said = "105 held-out tokens (50,000 asked for: the held-out text has no more)"
    assert capsys.readouterr().out.startswith(f"relu-0.4: {said}, L0 ")
    index = finished.features("relu-0.4")
    assert (index.n_tokens, index.manifest.n_tokens_asked) == (105, 50_000)
    # What was measured is what was indexed, and none of it was trained on.
    measured = load_file(finished.folder / "evaluated_tokens.safetensors")["ids"]
    assert measured.tolist() == index.array("ids").tolist()
    trained_on = {tuple(row) for row in resumed.train[:].ids.tolist()}
    assert trained_on.isdisjoint(map(tuple, measured.tolist()))


def test_evaluate_replaces_every_position_when_told_and_says_so(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.evals()
    assert {(row["zeroed"], row["replaced"]) for row in before} == {("all", "counted")}
    assert main(["evaluate", str(finished.folder), "--replace", "all"]) == 0
    assert "predictions; zeros and reconstructions at every position" in capsys.readouterr().out
    after = finished.evals()
    assert {(row["zeroed"], row["replaced"]) for row in after} == {("all", "all")}
    for one, other in zip(before, after, strict=True):
        same = ("l0", "fvu", "gamma", "ce_clean", "ce_zero", "n_tokens")
        assert [one[name] for name in same] == [other[name] for name in same]
    assert main(["evaluate", str(finished.folder), "--replace", "some"]) == 2
    assert "--replace: expected one of counted, all, got 'some'" in capsys.readouterr().err


def test_evaluate_measures_on_another_text_and_everything_says_so(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = finished.evals(), str(finished.folder)
    text = write_text(tmp_path / "other.txt", n_words=300, seed=5)
    assert main(["evaluate", folder, "--data", str(text), "--tokens", "400"]) == 0
    # All of it, 20 rows of 15 tokens, for none of it was trained on.
    for row in finished.evals():
        assert (row["text"], row["n_tokens"]) == (str(text), 300)
    tokens = load_file(finished.folder / "evaluated_tokens.safetensors")
    tokenizer = load_lm(finished.config).tokenizer
    assert tokens["ids"][tokens["counted"]].tolist() == tokenizer(text.read_text()).input_ids
    said = f"measured on 300 tokens of {text}, not the run's own text, of 400 asked for: the text"
    assert capsys.readouterr().out.count(f"{said} has no more\n") == 1
    again = (
        f"measured on {text}, not on the run's own held-out text; measure that again: python -m "
        f"gsae_core evaluate {folder}"
    )
    assert main(["list", folder]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == again
    assert main(["list", str(finished.folder.parent)]) == 0
    assert f"{finished.id}: {again}" in capsys.readouterr().out
    card = make_card(finished, ["gated-0.05"], "o/n")["README.md"]
    assert "On 300 tokens of other.txt, not the run's own text." in card
    assert main(["evaluate", folder]) == 0
    assert finished.evals() == before
    assert {row["text"] for row in before} == {None}


def test_of_its_own_text_only_what_a_run_holds_out_is_measured(
    finished: Run,
    small_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = finished.evals()
    monkeypatch.chdir(small_text.parent)
    words = ["evaluate", str(finished.folder), "--data"]
    assert main([*words, small_text.name, "--split", "all"]) == 2
    assert "--split: expected train or a split that this run was not trained on, got all" in (
        capsys.readouterr().err
    )
    for name in (str(small_text), small_text.name):
        assert main([*words, name]) == 0
        assert finished.evals() == before
    # Read in another way it is another text, of which as much is held out.
    config = finished.config.model_copy(update={"data": DataConfig(source=small_text.name)})
    assert another_text(finished, {"source": small_text.name}) is None
    other = another_text(finished, {"source": small_text.name, "separator": "---"})
    assert other is not None
    assert (other.source, other.separator) == (str(small_text), "---")
    held_out = load_text(config, load_lm(config), n_held_out=10**6).held_out
    assert len(load_elsewhere(config, load_lm(config), other, 10**6)) == len(held_out)


def test_flags_of_another_text_want_one(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--text-column", "body"], ["--split", "test"], ["--chat"]):
        assert main(["evaluate", str(finished.folder), *words]) == 2
        assert f"{words[0]}: expected --data with it, got none" in capsys.readouterr().err
    words = ["evaluate", str(finished.folder), "--data", "nowhere.txt"]
    assert main(words) == 2
    assert "found nothing at nowhere.txt: check the path" in capsys.readouterr().err


def test_the_tokens_that_were_measured_are_written_out(finished: Run) -> None:
    assert main(["evaluate", str(finished.folder), "--tokens", "15"]) == 0
    tokens = load_file(finished.folder / "evaluated_tokens.safetensors")
    # One sequence of 16: BOS, which is not counted, and 15 words.
    assert tokens["ids"].shape == tokens["counted"].shape == (1, 16)
    assert tokens["ids"].dtype == np.uint16
    assert tokens["ids"][0, 0] == 0
    assert tokens["counted"].tolist() == [[False] + [True] * 15]
    assert main(["evaluate", str(finished.folder)]) == 0
    again = load_file(finished.folder / "evaluated_tokens.safetensors")
    assert again["ids"].shape == (5, 16)
    assert again["ids"][:1].tolist() == tokens["ids"].tolist()


def test_a_finished_run_of_an_earlier_version_says_what_its_losses_are(finished: Run) -> None:
    earlier = [
        {key: value for key, value in row.items() if key not in ("zeroed", "replaced")}
        for row in finished.evals()
    ]
    (finished.folder / "evals.json").write_text(json.dumps({"saes": earlier}))
    again = f"Measure again: python -m gsae_core evaluate {finished.folder}"
    assert again in "\n".join(run_report(finished))


@contextlib.contextmanager
def interruption(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Press Ctrl-C after the third step of whatever is trained inside."""
    real = train.train_and_evaluate

    def interrupted(run: Run, **_: object) -> Iterator[Progress]:
        with contextlib.closing(real(run)) as steps:  # pyright: ignore
            for progress in steps:
                yield progress
                if progress.stage == "training" and progress.done == 3:
                    signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_and_evaluate", interrupted)
        yield


@pytest.mark.usefixtures("ctrl_c")
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


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_behind_another_says_so_once_and_ctrl_c_leaves_the_line(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looks = iter([2, 2, 2])

    def living(_: object) -> list[tuple[Path, dict[str, Any]]]:
        if next(looks, None) is None:
            signal.raise_signal(signal.SIGINT)
        return [(Path("0"), {})]

    monkeypatch.setattr("gsae_core.runs.jobs.worker._living", living)
    monkeypatch.setattr("gsae_core.runs.jobs.worker.TURN_SECONDS", 0.01)
    assert main(small) == 130
    run = Run.open(tmp_path / "run")
    assert run.status.state == "cancelled"
    assert capsys.readouterr().err.splitlines() == [
        "gsae_core: waiting for the device: 2 runs go first; Ctrl-C leaves the line",
        "gsae_core: stopped after step 0 of 20; go on with: "
        f"python -m gsae_core resume {run.folder}",
    ]


def test_ctrl_c_before_the_work_begins_ends_quietly(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gsae_core.cli.main.run_config", interrupted)
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

    monkeypatch.setattr(setup, "load_corpus", broken)
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

    monkeypatch.setattr(setup, "load_corpus", broken)
    assert main(["evaluate", str(finished.folder)]) == 1
    assert "the traceback is in" in capsys.readouterr().err
    assert "ZeroDivisionError: again" in (finished.folder / "log.txt").read_text()


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
