"""Building an index: interrupted, resumed, on a full disk, as a job; and files gone wrong."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_pages import edited
from index_cases import D_SAE, built, some_parts, some_sae
from refusals import mistake
from tiny_runs import ended

from gsae_core.analysis.features import build, files
from gsae_core.analysis.features.build import build_index
from gsae_core.analysis.features.index import open_index
from gsae_core.cli import main
from gsae_core.errors import InputError
from gsae_core.files import write_json
from gsae_core.lm.corpus import Corpus
from gsae_core.lm.model import LanguageModel
from gsae_core.runs.jobs.job import (
    Job,
    escalate_cancel,
    new_status,
    of_process,
    read_status,
    write_status,
)
from gsae_core.runs.run import Run
from gsae_core.runs.work import index as index_jobs
from gsae_core.runs.work.index import choose_parts, index_folder, index_job, index_run, start_index


def contents(folder: Path) -> dict[str, bytes]:
    (data,) = folder.glob("data-*")
    return {path.name: path.read_bytes() for path in sorted(data.iterdir())}


def steps(model: LanguageModel, folder: Path, kind: str = "gated") -> Any:
    place: dict[str, Any] = {"layer": 1, "site": "mlp_hidden", "name": "small", "text": "words"}
    return build_index(model, some_sae(kind), some_parts(), folder, weights_sha256=kind, **place)


def whole(model: LanguageModel, folder: Path, kind: str = "gated") -> dict[str, bytes]:
    """Build an index to its end; return its files."""
    for _ in steps(model, folder, kind):
        pass
    return contents(folder)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard ends with the sequence that holds its 100th token: 7 sequences of 15."""
    monkeypatch.setattr(build, "SHARD_TOKENS", 100)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["gated", "topk"])
def test_an_interruption_loses_one_shard_and_the_resumed_index_is_the_same(
    kind: str, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    cut = steps(tiny_lm, tmp_path / "cut", kind)
    for progress in cut:
        if progress.done >= 250:  # 105, then 150 as the held-out part ends, then 255
            break
    cut.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("shard-*")}
    assert len(before) == 3
    again = steps(tiny_lm, tmp_path / "cut", kind)
    for progress in again:
        if progress.stage == "sorting":
            break
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again.close()  # interrupted once more, while all shards are there
    assert whole(tiny_lm, tmp_path / "cut", kind) == whole(tiny_lm, tmp_path / "whole", kind)
    assert not (tmp_path / "cut" / "building").exists()


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_of_an_interrupted_build_is_read_again(
    tiny_lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = steps(tiny_lm, tmp_path / "cut")
    for _ in range(3):
        next(cut)
    cut.close()
    shard = tmp_path / "cut" / "building" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        found = whole(tiny_lm, tmp_path / "cut")
    assert "shard-00000.safetensors is damaged" in caplog.text
    assert found == whole(tiny_lm, tmp_path / "whole")


def test_other_weights_begin_anew(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    cut = steps(tiny_lm, tmp_path, "gated")
    for _ in range(2):
        next(cut)
    cut.close()
    whole(tiny_lm, tmp_path, "relu")
    assert open_index(tmp_path).manifest.architecture == "relu"


def test_shards_and_their_number_change_nothing(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = built(tiny_lm, some_sae("gated"), tmp_path / "one")
    monkeypatch.setattr(build, "SHARD_TOKENS", 100)
    many = built(tiny_lm, some_sae("gated"), tmp_path / "many")
    for name in ("offsets", "token", "latent", "near_token", "histogram", "companions"):
        np.testing.assert_array_equal(one.array(name), many.array(name))


def test_a_reader_keeps_its_index_while_a_new_one_takes_its_place(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    index = built(tiny_lm, some_sae("gated"), tmp_path)
    before = index.feature(0).values.tolist()
    built(tiny_lm, some_sae("relu"), tmp_path)
    assert index.feature(0).values.tolist() == before
    assert len(list(tmp_path.glob("data-*"))) == 1


# Bad input


def test_a_full_disk_is_one_sentence_and_nothing_read_is_lost(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"expected .* free for .*npy, found .*; make room on the"):
        whole(tiny_lm, tmp_path)
    assert (tmp_path / "building" / "shard-00000.safetensors").exists()
    monkeypatch.undo()
    built(tiny_lm, some_sae("gated"), tmp_path)


def test_an_sae_of_another_width_is_refused(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected SAE 'small' to take activations of width 12"):
        built(tiny_lm, some_sae("relu"), tmp_path, site="resid_pre")


def test_no_index_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"expected a feature index with a manifest.json, found no"
    ):
        open_index(tmp_path)


def test_a_newer_layout_is_refused(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    built(tiny_lm, some_sae("relu"), tmp_path)
    path = tmp_path / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"schema_version": 2, "colour": "blue"})
    with pytest.raises(InputError, match=r"expected a feature index of layout 1 or older, got 2"):
        open_index(tmp_path)


def test_a_file_cut_short_is_named(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    index = built(tiny_lm, some_sae("relu"), tmp_path)
    path = tmp_path / index.manifest.data / "value.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"expected .* in .*value.npy, found 1.0 kB: the index is"):
        open_index(tmp_path)


def test_a_dead_feature_is_a_feature_with_nothing_to_show(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    feature = built(tiny_lm, some_sae("gated"), tmp_path).feature(3)
    assert feature.is_dead
    assert (
        feature.top() == feature.random() == feature.near_threshold() == feature.quantiles() == []
    )
    assert len(feature.co_firing) == 0
    assert len(feature.non_activating(5)) == 5
    assert len(feature.neighbours) == 20


def test_a_feature_out_of_range_is_one_sentence(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    index = built(tiny_lm, some_sae("gated"), tmp_path)
    for number in (-1, D_SAE):
        with pytest.raises(InputError, match=rf"expected a feature from 0 to 29, got {number} \("):
            index.feature(number)
    with pytest.raises(InputError, match="expected a token id from 0 to 39, got 40"):
        index.by_token(40)
    with pytest.raises(InputError, match="expected some text to look for, got none"):
        index.by_text("")
    with pytest.raises(InputError, match=r"expected a column out of fired, .*, got 'colour'"):
        index.select(colour=(0, 1))


def test_an_index_without_a_living_feature_says_so(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    sae = some_sae("relu")
    with torch.no_grad():
        sae.get_parameter("b_enc").fill_(-1e6)
    index = built(tiny_lm, sae, tmp_path)
    assert not index.alive().any()
    assert index.by_token(7).empty
    with pytest.raises(InputError, match=r"found none in small: all 30 are dead on these 600 tok"):
        index.random_alive(seed=0)


# A run's index, as a job


def finish(run: Run, name: str, **asked: Any) -> list[str]:
    return [progress.stage for progress in index_run(run, name, **asked)]


def test_a_run_has_an_index_for_each_sae(finished: Run) -> None:
    stages = finish(finished, "gated-0.05", n_tokens=200)
    assert list(dict.fromkeys(stages)) == [
        "loading",
        "indexing",
        "sorting",
        "describing",
        "finished",
    ]
    index = finished.features("gated-0.05")
    # 100 tokens from each split, rounded up to sequences of at most 15.
    assert 200 <= index.n_tokens < 230
    assert [split.name for split in index.manifest.splits] == ["held_out", "train"]
    assert index.manifest.n_tokens_asked == 200
    job = index_job(finished, "gated-0.05")
    assert job is not None
    assert job.status.state == "finished"
    assert index_job(finished, "relu-0.05") is None


def test_the_index_of_changed_weights_is_refused(finished: Run) -> None:
    finish(finished, "gated-0.05", n_tokens=60)
    with edited(finished.sae_folder("gated-0.05") / "cfg.json") as cfg:
        cfg["metadata"]["weights_sha256"] = "0" * 64
    with pytest.raises(
        InputError, match=r"expected the feature index of the weights in .* the SAE"
    ):
        finished.features("gated-0.05")


def test_an_unknown_sae_is_one_sentence(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"expected one of this run's SAEs \(.*\), got 'no'"):
        finished.features("no")
    assert main.main(["index", str(finished.folder), "--sae", "no"]) == 2
    assert "expected one of this run's SAEs" in capsys.readouterr().err


def test_the_command_line_indexes_and_says_what_came_of_it(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", str(finished.folder), "--sae", "relu-0.4", "--tokens", "60"]
    assert main.main([*words, "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("relu-0.4: 60 train tokens, L0 ")
    assert [s.name for s in finished.features("relu-0.4").manifest.splits] == ["train"]
    assert "--tokens: expected a number greater than 0, got 0" in mistake(
        [*words[:-1], "0"], capsys
    )


@pytest.mark.usefixtures("small_shards")
def test_a_cancelled_build_stops_after_its_shard_and_goes_on_later(finished: Run) -> None:
    build = index_run(finished, "gated-0.05", n_tokens=400)
    for progress in build:
        if progress.stage == "indexing" and progress.done > 0:
            job = index_job(finished, "gated-0.05")
            assert job is not None
            job.request_cancel()
            break
    for _ in build:  # heard within a quarter of a second, between two shards
        pass
    build.close()  # pyright: ignore
    assert read_status(index_folder(finished, "gated-0.05")).state in ("cancelled", "finished")
    finish(finished, "gated-0.05")
    # Without numbers it is what was asked for last.
    assert finished.features("gated-0.05").manifest.n_tokens_asked == 400


def test_a_second_build_of_the_same_sae_is_refused_while_one_lives(
    finished: Run, worker: int
) -> None:
    folder = index_folder(finished, "gated-0.05")
    folder.mkdir(parents=True)
    write_status(folder, of_process(new_status(), "running", worker))
    with pytest.raises(
        InputError, match=rf"expected no process to be building .* got process {worker}, which is"
    ):
        finish(finished, "gated-0.05")
    assert start_index(finished, "gated-0.05") == worker


@pytest.mark.slow
def test_a_started_build_is_a_process_that_finishes_without_us(finished: Run) -> None:
    pid = start_index(finished, "gated-0.05", n_tokens=60, split="held_out")
    assert pid != os.getpid()
    assert start_index(finished, "gated-0.05") == pid
    job = index_job(finished, "gated-0.05")
    assert job is not None
    assert ended(job) == "finished", job.log_tail()
    assert escalate_cancel(job) == "none"
    assert [s.name for s in finished.features("gated-0.05").manifest.splits] == ["held_out"]


def test_a_failed_build_leaves_its_sentence_in_the_status(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished.sae_folder("gated-0.05") / "sae_weights.safetensors").unlink()
    with pytest.raises(InputError):
        finish(finished, "gated-0.05", n_tokens=60)
    status = Job(index_folder(finished, "gated-0.05")).status
    assert status.state == "failed"
    assert status.error is not None
    assert status.error.startswith("expected sae_weights.safetensors beside cfg.json")


def test_mixed_takes_half_from_the_held_out_split_as_far_as_it_reaches() -> None:
    (held_out, train) = some_parts()
    corpus = Corpus(train.sequences, held_out.sequences, "words", 16, True)

    def chosen(n_tokens: int, split: Any) -> Any:
        return choose_parts(corpus, index_jobs.Request(n_tokens=n_tokens, split=split))

    parts = chosen(90, "mixed")
    assert [(p.split, p.n) for p in parts] == [("held_out", 3), ("train", 3)]
    # The held-out split has 150 tokens in all.
    parts = chosen(450, "mixed")
    assert [(p.split, p.n) for p in parts] == [("held_out", 10), ("train", 20)]
    assert [(p.split, p.n) for p in chosen(30, "held_out")] == [("held_out", 2)]
    assert [(p.split, p.n) for p in chosen(10**6, "train")] == [("train", 30)]
    assert index_jobs.Request() == index_jobs.Request(n_tokens=1_000_000, split="mixed")
