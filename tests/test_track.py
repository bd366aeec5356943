"""A tracker holds the numbers of metrics.jsonl and evals.json; a run without one knows none.

trackio's folder is a temporary one, W&B is offline, and nothing here reaches the network.
"""

import importlib
import json
import math
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import mistake
from test_resume import killed_at
from tiny_runs import finish, leave_at, small_run

from gsae_core.cli import main
from gsae_core.config import SAESpec, Tracker, load_config
from gsae_core.errors import InputError
from gsae_core.runs import track
from gsae_core.runs.run import Run
from gsae_core.runs.track import Mirror, Tracked
from gsae_core.runs.work.train import evaluate_run

pytestmark = pytest.mark.usefixtures("one_thread")

Held = dict[str, dict[int, dict[str, float]]]
"""Of each SAE the numbers at each step."""


@pytest.fixture(scope="module", autouse=True)
def trackers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Read when trackio is imported, here for the first time.
        assert "trackio" not in sys.modules
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("WANDB_DIR", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        yield


def expected(run: Run, *, but: str = "step") -> tuple[Held, dict[str, dict[str, float]]]:
    """Return the finite numbers of a run's files, by SAE and step; evaluations by SAE."""
    rows: Held = {}
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {k: v for k, v in row.items() if k not in ("sae", "step") and not k.startswith(but)}
        rows.setdefault(row["sae"], {})[row["step"]] = {
            name: value for name, value in kept.items() if value is not None
        }
    settings = ("name", "architecture", "sparsity", "d_in", "d_sae")
    evals = {}
    for row in json.loads((run.folder / "evals.json").read_text())["saes"]:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in settings}
        evals[row["name"]] = {f"eval/{name}": value for name, value in numbers.items()}
    return rows, evals


def split(rows: list[dict[str, Any]]) -> tuple[dict[int, dict[str, float]], list[dict[str, float]]]:
    """Return the numbers at each step, and the evaluations; no step comes twice."""
    steps, evals = {}, []
    for row in rows:
        numbers = {k: v for k, v in row.items() if k not in ("step", "timestamp")}
        if any(name.startswith("eval/") for name in numbers):
            evals.append(numbers)
            continue
        assert row["step"] not in steps
        steps[row["step"]] = numbers
    return steps, evals


def in_trackio(run: Run) -> tuple[Held, dict[str, list[dict[str, float]]]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    rows, evals = {}, {}
    for tracked in trackio.Api().runs(track.PROJECT):
        group, _, sae = tracked.name.partition("/")
        if group == run.id:
            assert sae not in rows
            found = SQLiteStorage.get_logs(track.PROJECT, tracked.name, run_id=tracked.id)
            rows[sae], evals[sae] = split(found)
    return rows, evals


def in_tensorboard(run: Run) -> tuple[Held, dict[str, dict[str, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: Held = {}
    evals: dict[str, dict[str, float]] = {}
    for folder in sorted((run.folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        rows[folder.name], evals[folder.name] = {}, {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                if tag.startswith("eval/"):
                    assert tag not in evals[folder.name]
                    evals[folder.name][tag] = event.value
                    continue
                at = rows[folder.name].setdefault(event.step, {})
                assert tag not in at
                at[tag] = event.value
    return rows, evals


def rounded(value: Any) -> Any:
    """Return numbers as float32 holds them, which is what event files have."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    return float(np.float32(value))


def test_trackio_holds_the_numbers_of_the_files(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio: Any = import_module("trackio")  # its types are not those of its values
    # Somebody is logged in to the Hub: also then trackio, kept here, asks nobody.
    monkeypatch.setenv("HF_TOKEN", "hf_notATokenOfAnybody")
    reached: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: reached.append(words))
    run = new_run("whole", checkpoint_minutes=60, track="trackio")
    finish(run)
    assert reached == []
    rows, evals = expected(run)
    assert len(rows["gated"]) == len(rows["relu"]) == 30
    assert in_trackio(run) == (rows, {name: [row] for name, row in evals.items()})
    tracked = {each.name: each for each in trackio.Api().runs(track.PROJECT)}
    config = tracked["whole/relu"].config
    assert (config["sae"]["sparsity"], config["train"]["lr"]) == (0.3, 0.01)
    assert config["_Group"] == "whole"
    assert (config["model"]["layer"], config["model"]["site"]) == run.config.places[0]
    # Folders of this machine are named, not located.
    assert "/" not in config["model"]["name"] + config["data"]["source"]


@pytest.mark.parametrize("ended", ["stopped", "killed"])
def test_a_resumed_run_goes_on_in_the_same_tracked_run(
    new_run: Callable[..., Run], ended: str
) -> None:
    run = new_run(ended, track="trackio")
    if ended == "killed":  # trackio's last half second is lost with the process
        killed_at(run, 17)
    else:
        leave_at(run, 17)
    finish(run)
    for _ in evaluate_run(run):  # measured again: nothing new
        pass
    # Steps after the saved state are taken twice, with the same bits in other seconds.
    rows, evals = expected(run, but="seconds" if ended == "killed" else "step")
    found, found_evals = in_trackio(run)
    if ended == "killed":
        found = {
            sae: {
                step: {k: v for k, v in numbers.items() if not k.startswith("seconds")}
                for step, numbers in steps.items()
            }
            for sae, steps in found.items()
        }
    assert found == rows
    assert found_evals == {name: [row] for name, row in evals.items()}


def test_a_later_run_of_the_same_name_is_another_tracked_run(
    new_run: Callable[..., Run], tmp_path: Path
) -> None:
    trackio: Any = import_module("trackio")  # its types are not those of its values
    one = new_run("first/twice", track="trackio")
    leave_at(one, 5)
    other = new_run("second/twice", seed=1, track="trackio")
    leave_at(other, 7)
    finish(one)
    of = [each for each in trackio.Api().runs(track.PROJECT) if each.name == "twice/gated"]
    from trackio.sqlite_storage import SQLiteStorage

    found = [split(SQLiteStorage.get_logs(track.PROJECT, e.name, run_id=e.id))[0] for e in of]
    rows = expected(one)[0]["gated"]
    # The first, which the name no longer finds, is whole in a third.
    assert sorted(map(len, found)) == [5, 7, 30]
    assert max(found, key=len) == rows


def test_event_files_hold_the_numbers_in_float32(new_run: Callable[..., Run]) -> None:
    run = new_run("events", checkpoint_minutes=60, track="tensorboard")
    leave_at(run, 11)
    finish(run)
    assert in_tensorboard(run) == rounded(expected(run))
    for _ in evaluate_run(run, n_tokens=60):
        pass
    rows, evals = expected(run)
    assert evals["relu"]["eval/n_tokens_asked"] == 60
    assert in_tensorboard(run) == rounded((rows, evals))


def records_of(path: Path) -> Iterator[bytes]:
    """Yield the records of a W&B file: LevelDB's log format, after seven bytes of its own.

    Each piece of a record has a CRC, its length and its kind: whole, first, middle or last.
    """
    data, block = path.read_bytes(), 2**15
    at, whole = 7, b""
    while at < len(data):
        if block - at % block < 7:  # too little for another piece
            at += block - at % block
            continue
        _, n, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):
            yield whole
            whole = b""


WANDB = "W&B is installed where TransformerLens is, which requires it"


def test_wandb_offline_writes_the_numbers(new_run: Callable[..., Run]) -> None:
    # Generated: a type checker does not see what is in it.
    messages: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason=WANDB)
    run = new_run("offline", checkpoint_minutes=60, track="wandb")
    leave_at(run, 9)
    finish(run)
    rows, evals = expected(run)
    found: Held = {}
    summaries: dict[str, dict[str, float]] = {}
    ids: dict[str, set[str]] = {}
    for path in sorted(Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/*.wandb")):
        sae = path.stem.removeprefix("run-").partition("-")[2]
        ids.setdefault(sae, set()).add(path.stem)
        for data in records_of(path):
            record = messages.Record()
            record.ParseFromString(data)
            if record.HasField("run") and record.run.run_group:
                assert record.run.run_group == "offline"
                assert record.run.display_name == f"offline/{sae}"
            for item in record.summary.update:
                name = item.key or "/".join(item.nested_key)
                if name.startswith("eval/"):
                    summaries.setdefault(sae, {})[name] = json.loads(item.value_json)
            items = {
                i.key or "/".join(i.nested_key): json.loads(i.value_json)
                for i in record.history.item
            }
            if items:
                numbers = {k: v for k, v in items.items() if not k.startswith("_")}
                steps = found.setdefault(sae, {})
                assert items["_step"] not in steps
                steps[items["_step"]] = numbers
    assert found == rows
    assert summaries == evals
    assert {sae: len(of) for sae, of in ids.items()} == {"gated": 1, "relu": 1}  # two starts


def test_wandb_without_a_key_says_how_to_go_on(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason=WANDB)
    import wandb

    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    run = new_run(track="wandb")
    with pytest.raises(InputError, match="found no key; run `wandb login`, or set WANDB_MODE"):
        finish(run)
    assert run.status.state == "failed"
    assert "wandb login" in str(run.status.error)
    wandb.teardown()


def refusing(closed: list[str]) -> Callable[..., Tracked]:
    """Return a tracker that takes two rows of an SAE, and is out of order from then on."""

    def opener(run: Run, sae: SAESpec, known: str | None, newest: int) -> Tracked:
        taken = []

        def log(*numbers: Any) -> None:
            taken.append(numbers)
            if len(taken) > 2:
                raise ConnectionError("the line is cut\nat the end")

        def close() -> None:
            closed.append(sae.name)
            raise ConnectionError

        return Tracked(sae.name, 0, log, log, close)

    return opener


def test_a_tracker_that_fails_is_said_once_and_training_goes_on(
    tiny_lm_folder: Path,
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    closed: list[str] = []
    monkeypatch.setitem(track._OPENERS, "tensorboard", refusing(closed))
    monkeypatch.setattr(track, "check_installed", lambda tracker: None)
    monkeypatch.setattr("gsae_core.runs.run.check_installed", lambda tracker: None)
    words = small_run(tiny_lm_folder, small_text, tmp_path / "run")
    assert main.main([*words, "--track", "tensorboard"]) == 0
    said = (
        "expected tensorboard to take the run's numbers, it failed (ConnectionError: the line is "
        "cut)"
    )
    assert f"no longer tracked: {said}" in capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    assert [e["why"] for e in run.events() if e["event"] == "tracker stopped"] == [said]
    assert run.status.state == "finished"
    assert len(run.evals()) == len(closed) == 4
    assert (run.folder / "log.txt").read_text().count("no longer tracked") == 1


@pytest.mark.parametrize(
    ("tracker", "advice"),
    [
        ("trackio", 'pip install "gsae-core[track]"'),
        ("wandb", 'pip install "wandb>=0.31"'),
        ("tensorboard", "pip install tensorboard"),
    ],
)
def test_a_package_that_is_missing_is_said_before_there_is_a_run(
    tracker: Tracker,
    advice: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    assert main.main([*small, "--track", tracker]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"gsae_core: expected {tracker} to be installed for --track, found none; {advice}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "below a file", "/sys"])
def test_a_folder_that_trackio_cannot_write_is_said_before_anything_is_loaded(
    place: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    utils: Any = import_module("trackio.utils")
    (tmp_path / "file").touch()
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}.get(place)
    folder = folder or Path(place)
    # Read from TRACKIO_DIR once, when it was imported.
    monkeypatch.setattr(utils, "TRACKIO_DIR", folder)
    monkeypatch.setattr("gsae_core.runs.work.train.set_up", None)
    said = mistake([*small, "--track", "trackio"], capsys)
    assert said.startswith(f"expected a folder that trackio can write, got {folder} (")
    assert said.endswith("; let TRACKIO_DIR name another")
    assert not (tmp_path / "run").exists()


def test_a_folder_named_like_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="pip install tensorboard"):
        track.check_installed("tensorboard")


def test_a_tracked_run_can_be_measured_where_its_tracker_is_not(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((finished.folder / "config.json").read_text()) | {"track": "wandb"}
    (finished.folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    run = Run.open(finished.folder)
    before = run.evals()
    for _ in evaluate_run(run, n_tokens=32):
        pass
    assert [row["n_tokens_asked"] for row in run.evals()] == [32] * len(before)
    assert "wandb" in next(e["why"] for e in run.events() if e["event"] == "tracker stopped")


def test_a_config_of_before_opens_without_a_tracker(finished: Run) -> None:
    path = finished.folder / "config.json"
    config = json.loads(path.read_text())
    del config["track"]
    path.write_text(json.dumps(config))
    assert load_config(path) == finished.config
    assert finished.config.track is None


def test_numbers_that_are_not_finite_are_left_out() -> None:
    row = {"step": 3, "sae": "gated", "l0": 2, "fvu": math.nan, "gamma": None, "lr": math.inf}
    assert track._numbers(row) == {"l0": 2}


def test_an_untracked_run_is_mirrored_nowhere(finished: Run) -> None:
    mirror = Mirror(finished)
    mirror.add(finished.metrics())
    mirror.add_evaluation()
    mirror.close()
    assert not [e for e in finished.events() if e["event"].startswith("track")]
