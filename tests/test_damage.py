"""A damaged file costs what it held: the rest opens, and a sentence says what is wrong."""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from app_pages import edited, opened, text
from refusals import refusal

from gsae_core.analysis.labels import Labels
from gsae_core.analysis.results import evaluation_frame
from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.cli.report import list_lines
from gsae_core.errors import InputError
from gsae_core.runs.jobs.job import escalate_cancel
from gsae_core.runs.plan.progress import speed, timeline
from gsae_core.runs.run import Run, list_runs, survey
from gsae_core.runs.work.index import index_job, request
from gsae_core.runs.work.train import load_state

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1"
RUNS = ("finished", "interrupted")

HUGE = b"9" * 400
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "a quarter": lambda whole: whole[: len(whole) // 4],
    "a tail of NULs": lambda whole: whole[:-30] + b"\0" * 30,
    "nothing": lambda whole: b"",
    "another kind": lambda whole: b"[]",
    "no text": lambda whole: b"\xff\xfe",
    "a number out of reach": lambda whole: whole.replace(b": 1", b": " + HUGE),
}
MORE: dict[str, Callable[[bytes], bytes]] = {
    "all but the end": lambda whole: whole[:-2],
    "NULs behind": lambda whole: whole + b"\0" * 512,
    "an empty object": lambda whole: b"{}",
    "null in place of numbers": lambda whole: re.sub(rb": \d+(\.\d+)?", b": null", whole),
    "a text in place of numbers": lambda whole: re.sub(rb": \d+(\.\d+)?", b': "x"', whole),
    "objects in place of texts": lambda whole: re.sub(rb': "[^"]*"', b": {}", whole),
    "numbers in place of lists": lambda whole: re.sub(rb": \[[^\[\]]*\]", b": 3", whole),
    "half a character": lambda whole: whole.replace(b'"', b'"\xc3', 2),
}


def replaced(by: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        by(path)

    return change


deleted, folder = replaced(lambda path: None), replaced(Path.mkdir)
dangling = replaced(lambda path: path.symlink_to("nowhere"))
loop = replaced(lambda path: path.symlink_to(path.name))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished and an interrupted run, on a model and a text that are there."""
    for name in ("model", *(f"runs/{run}" for run in RUNS)):
        shutil.copytree(FIXTURE / name, tmp_path / name)
    shutil.copy(FIXTURE / "text.txt", tmp_path)
    for run in RUNS:
        # One SAE and a few steps of it are enough to be damaged.
        folder = tmp_path / "runs" / run
        for path in (folder / "config.json", folder / "evals.json"):
            if path.exists():
                with edited(path) as fields:
                    del fields["saes"][1:]
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        lines = [line for line in lines if b'"sae": "gated"' in line]
        (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSAE_RUNS", "runs")
    return tmp_path / "runs"


def readers(folder: Path) -> Iterator[Callable[[], Any]]:
    """Yield everything that reads a run's files without its language model."""
    yield lambda: list_lines(folder.parent)
    yield lambda: list_lines(folder)
    try:
        run = Run.open(folder)
    except InputError:
        return
    yield lambda: timeline(run.events(), run.status, now=time.time())
    yield lambda: speed(run.status, run.metrics())
    yield lambda: speed(run.status, run.recent_metrics())
    yield lambda: evaluation_frame(run.evals())
    yield lambda: escalate_cancel(run)
    yield lambda: load_state(run.folder / "resume")
    yield run.samples
    yield run.damages
    yield run.log_tail
    for name in [spec.name for spec in run.config.saes]:
        yield lambda name=name: load_sae(run.sae_folder(name))
        yield lambda name=name: run.norm_deciles(name)
        yield lambda name=name: run.feature_stats(name)
        yield lambda name=name: run.features(name)
        yield lambda name=name: Labels(run.folder / "features" / name).frame()
        if (job := index_job(run, name)) is not None:
            yield lambda job=job: (job.status, job.events(), request(job))


def check(folder: Path) -> None:
    """Read all of a run, and hold what cannot be read to one sentence."""
    refused: list[str] = []
    for read in readers(folder):
        try:
            read()
        except InputError as error:
            refused.append(str(error))
    for sentence in refused:
        assert "expected " in sentence
        assert "\n" not in sentence
    # Whatever became of one run, the other is there, and the one is too or has a reason.
    others = {name for name in RUNS if name != folder.name}
    listed = {run.id for run in list_runs(folder.parent)}
    assert others <= listed
    assert listed | set(survey(folder.parent)[1]) == set(RUNS)


FILES = [
    *(
        f"finished/{name}"
        for name in (
            *("config.json", "status.json", "events.jsonl", "metrics.jsonl", "evals.json"),
            *("samples.json", "saes/gated/cfg.json", "saes/gated/feature_stats.safetensors"),
        )
    ),
    "interrupted/events.jsonl",
    "interrupted/resume/state.json",
]
OTHERS = [
    *(
        f"finished/{name}"
        for name in (
            *("log.txt", "saes/gated/norm_deciles.json", "features/gated/manifest.json"),
            *(f"features/gated/{name}" for name in ("status.json", "request.json", "labels.jsonl")),
        )
    ),
    *(f"interrupted/{name}" for name in ("config.json", "status.json", "metrics.jsonl")),
]


def damage(runs: Path, name: str, changes: Iterable[Callable[[Path], object]]) -> None:
    path = runs / name
    whole = path.read_bytes()
    for change in changes:
        change(path)
        check(runs / Path(name).parts[0])
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(whole)


def written(changes: Mapping[str, Callable[[bytes], bytes]]) -> list[Callable[[Path], object]]:
    return [
        lambda path, c=change: path.write_bytes(c(path.read_bytes())) for change in changes.values()
    ]


@pytest.mark.parametrize(
    "name", [*FILES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_whatever_becomes_of_a_file_is_one_sentence(runs: Path, name: str) -> None:
    damage(runs, name, [*written(CONTENTS), deleted, folder])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_rarer_damage_is_one_sentence_too(runs: Path, name: str) -> None:
    damage(runs, name, [*written(MORE), dangling, loop])


def test_the_list_says_what_is_wrong_with_each(runs: Path) -> None:
    finished = runs / "finished"
    (runs / "interrupted" / "status.json").write_text('{"state": 3}')
    (finished / "evals.json").write_text('{"saes": [{"name": "gated"}]}')
    with (finished / "events.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n\0\0\n")
    head, row, *said = list_lines(runs)
    assert head.split()[:2] == ["run", "state"]
    assert row.split()[:2] == ["finished", "finished"]
    assert said == [
        f"finished: expected numbers of each SAE in {finished / 'evals.json'}, got no "
        f"saes.0.architecture; measure again: python -m gsae_core evaluate {finished}",
        "finished: 2 lines of events.jsonl cannot be read and are left out",
        f"interrupted: expected a job's status in {runs / 'interrupted' / 'status.json'}, got 3 as "
        "state",
    ]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"state": "dreaming"}, "'dreaming' as state"),
        ({"step": "7"}, "'7' as step"),
        ({"step": True}, "True as step"),
        ({"n_steps": -1}, "-1 as n_steps"),
        ({"pid": 2**40}, f"{2**40} as pid"),
        ({"heartbeat": None}, "None as heartbeat"),
        ({"heartbeat": math.nan}, "nan as heartbeat"),
        ({"process_started": 1e12}, f"{1e12} as process_started"),
        ({"error": []}, "list as error"),
        ({"mood": "good"}, "'good' as mood"),
        (None, "no state"),
    ],
)
def test_a_status_of_wrong_fields_says_which(
    runs: Path, fields: dict[str, object] | None, wrong: str
) -> None:
    path = runs / "finished" / "status.json"
    whole = {} if fields is None else json.loads(path.read_text()) | fields
    path.write_text(json.dumps(whole))
    assert survey(runs)[1] == {"finished": f"expected a job's status in {path}, got {wrong}"}


def test_an_evaluation_of_an_sae_that_the_run_has_not_says_so(runs: Path) -> None:
    path = runs / "finished" / "evals.json"
    path.write_text(path.read_text().replace('"gated"', '"gatee"', 1))
    assert refusal(Run.open(runs / "finished").evals) == (
        f"expected numbers of this run's SAEs (gated) in {path}, got some of 'gatee'; measure "
        f"again: python -m gsae_core evaluate {runs / 'finished'}"
    )


def test_a_run_that_lost_its_config_is_told_and_a_folder_of_something_else_is_not(
    runs: Path,
) -> None:
    config = runs / "finished" / "config.json"
    config.unlink()
    (runs / "logs").mkdir()
    (runs / "logs" / "log.txt").write_text("something else")
    (runs / "notes.txt").write_text("no folder")
    assert survey(runs)[1] == {
        "finished": f"expected {config}, found no such file; was the run deleted?"
    }


def test_what_may_not_be_read_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = runs / "finished" / "config.json"
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        # A superuser may read everything, so the refusal is put where the system's is.
        if path == config:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert survey(runs)[1] == {
        "finished": f"expected a file to read at {config}, got: Permission denied"
    }


@pytest.fixture
def ward(runs: Path) -> Path:
    """Damaged runs of every kind beside two whole ones."""
    for name, file, content in [
        ("no-config", "config.json", b"{"),
        ("no-status", "status.json", b'{"state": "finished"}'),
        ("no-text", "config.json", b"\xff\xfe"),
        ("half-events", "events.jsonl", b'{"time": 5, "event": "created"}\n\0\0\0\0'),
        ("half-evals", "evals.json", b'{"saes": ['),
        ("half-samples", "samples.json", b"[]"),
        ("no-metrics", "metrics.jsonl", b""),
    ]:
        shutil.copytree(runs / "finished", runs / name)
        (runs / name / file).write_bytes(content)
    shutil.copytree(runs / "finished", runs / "folder")
    for name, file in [("folder", "events.jsonl"), ("no-metrics", "metrics.jsonl")]:
        (runs / name / file).unlink()
        (runs / name / file).mkdir()
    return runs


def test_the_run_picker_says_which_runs_are_not_in_it_and_why(ward: Path) -> None:
    at = opened("pages/9_Help.py", run="no-config")
    assert not at.exception, at.exception
    assert "no-config cannot be opened" in text(at)
    picker = next(box for box in at.selectbox if box.label == "Run")
    assert {"finished", "interrupted", "half-events", "half-evals", "half-samples"} <= {
        *picker.options
    }
    (said,) = [each for each in at.caption if "cannot be read" in each.value]
    assert said.value == "4 runs here cannot be read."
    assert said.help is not None
    plain = said.help.replace("\\", "")
    assert plain.count("\n\n") == 3
    assert f"no-config: expected JSON in {ward / 'no-config' / 'config.json'}, got " in plain


def test_home_says_what_is_wrong_with_runs_that_open(ward: Path) -> None:
    said = text(opened("app.py"))
    assert "Not all of half-evals can be read" in said
    assert "Not all of half-samples can be read" in said
    assert "1 line of events.jsonl cannot be read and is left out" in said
    assert "folder cannot be read" in said


def test_live_opens_a_run_with_torn_events_and_says_so(ward: Path) -> None:
    path = ward / "half-events" / "metrics.jsonl"
    whole = path.read_bytes()
    # A bit flipped in a name makes it another SAE's, which the run has not.
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1].replace(b"gated", b"gatee"))
    at = opened("pages/2_Live.py", run="half-events")
    assert not at.exception, at.exception
    # What was lost may have been the end of any stage.
    assert "Stage times are not known: part of events.jsonl is lost." in text(at)
    assert "queued<span" not in text(at)
    assert (
        "1 line of metrics.jsonl cannot be read and is left out; "
        "1 line of events.jsonl cannot be read and is left out. "
        "A power cut or a full disk can cause this" in text(at)
    )


def test_pareto_says_how_to_mend_a_damaged_evaluation(ward: Path) -> None:
    said = text(opened("pages/3_Pareto.py", run="half-evals"))
    assert "Expected JSON in" in said
    assert f"; measure again: python -m gsae_core evaluate {ward / 'half-evals'}" in said
