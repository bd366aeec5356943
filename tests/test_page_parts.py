"""The small parts behind the pages: wording, progress, failures, footprint, machine."""

import json
import math
from pathlib import Path
from typing import Any

from gsae_core.lm.catalog import ModelShape, model_facts
from gsae_core.machine import machine
from gsae_core.presets import preset
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.plan.cost import CORE_SPEED, GPU_SPEED, guessed_pace, operations
from gsae_core.runs.plan.progress import speed, timeline
from gsae_core.text import ago, count, duration, fixed, percent, signed_percent, unhidden


def status(step: int, n_steps: int) -> Status:
    return Status("running", step, n_steps, None, None, 0.0, None)


def test_numbers_read_as_people_write_them() -> None:
    assert [count(n) for n in (7, 1500, 1_048_576, 2e9)] == ["7", "1.5 k", "1.05 M", "2 B"]
    # A million tokens in whole batches of 4096; just below a unit; beyond the largest.
    assert [count(n) for n in (999_424, 999_936, 999.7, 3e12)] == ["999 k", "1 M", "1 k", "3,000 B"]
    assert [duration(s) for s in (9, 200, 3600, 90_000)] == ["9 s", "3 min 20 s", "1 h", "1 d 1 h"]
    assert [ago(s) for s in (0.5, 200)] == ["just now", "3 min ago"]
    assert [fixed(v) for v in (1.23456, None, math.nan)] == ["1.235", "–", "–"]
    assert [percent(v) for v in (0.9528, None)] == ["95.3 %", "–"]
    assert signed_percent(80.0, 90.0) == "+12.5 %"
    assert signed_percent(0.0, 1.0) == "–"


def test_what_cannot_be_seen_is_written_out() -> None:
    assert unhidden("naïve 名 λ\t\n") == "naïve 名 λ\t\n"
    assert unhidden("a\u202eb\u200b\x00") == "a⟨202E⟩b⟨200B⟩⟨0000⟩"


def test_time_left_is_steps_left_at_the_recent_speed() -> None:
    rows = [{"step": s, "tokens": 10 * s, "seconds": 0.5 * s} for s in (1, 1, 2, 3)]
    now = speed(status(3, 11), rows)
    # Two steps took 1 s for 20 tokens: 0.5 s a step, 8 steps left.
    assert now == (3 / 11, 20.0, 4.0, None, None)


def test_the_shares_are_of_all_seconds_so_far() -> None:
    row = {"step": 4, "tokens": 40, "seconds": 8.0, "seconds_lm": 2.0, "seconds_sae": 5.0}
    now = speed(status(4, 8), [row])
    assert (now.lm_share, now.sae_share) == (0.25, 0.625)


def happened(*events: tuple[str, float]) -> list[dict[str, object]]:
    return [{"event": name, "time": moment} for name, moment in events]


NAMES = ("queued", "starting", "training", "evaluating", "finished")


def told(
    events: list[dict[str, object]], state: Any, *, now: float, last: float = 0.0
) -> list[tuple[str, float | None, str]]:
    """Return the timeline of a run whose status was written `last` at."""
    stands = status(8 if state == "finished" else 4, 8)._replace(state=state, heartbeat=last)
    return [(p.name, p.seconds, p.mark) for p in timeline(events, stands, now=now)]


def test_a_timeline_measures_each_stretch_to_the_next() -> None:
    events = happened(
        ("created", 0), ("started", 1), ("waiting", 3), ("loading", 10), ("set up", 12)
    )
    events += happened(("training", 14), ("evaluating", 54), ("finished", 60))
    # Queued before the process began, and again until the device was free.
    seconds = (1 + 7, 2 + 4, 40, 6, None)
    expected = [(name, long, "done") for name, long in zip(NAMES, seconds, strict=True)]
    assert told(events, "finished", now=1000.0, last=60.0) == expected


def test_a_finished_run_whose_stages_were_not_kept_has_no_lengths() -> None:
    events = happened(("created", 0), ("finished", 270))
    expected = [(name, None, "done") for name in NAMES]
    assert told(events, "finished", now=1000.0, last=270.0) == expected


def test_a_timeline_goes_on_while_the_run_does() -> None:
    events = happened(("created", 0), ("started", 0), ("loading", 1), ("training", 5))
    assert told(events, "running", now=25.0) == [
        ("queued", 0, "done"),
        ("starting", 5, "done"),
        ("training", 20, "now"),
        ("evaluating", None, "ahead"),
        ("finished", None, "ahead"),
    ]


def test_a_run_that_was_lost_trained_until_its_last_heartbeat() -> None:
    events = happened(("created", 0), ("started", 0), ("training", 5))
    assert told(events, "lost", now=1000.0, last=25.0)[2:] == [
        ("training", 20, "stopped"),
        ("evaluating", None, "ahead"),
        ("lost", None, "stopped"),
    ]


def test_what_a_killed_process_did_since_nobody_knows_when_is_left_out() -> None:
    events = happened(("created", 0), ("started", 0), ("training", 5), ("started", 900))
    events += happened(("loading", 901), ("training", 910))
    assert told(events, "running", now=920.0)[2] == ("training", 10, "now")


def test_nothing_logged_yet_has_no_speed() -> None:
    assert speed(status(0, 10), []) == (0.0, None, None, None, None)
    assert speed(status(0, 0), []).share == 0.0


def test_a_failure_is_its_error_as_a_sentence_and_without_one_points_at_the_log() -> None:
    assert status(0, 1)._replace(error="expected 0 to 3, got 7").reason == "expected 0 to 3, got 7."
    assert "its log" in status(0, 1).reason


def test_the_width_of_each_site_is_read_from_the_folder(tmp_path: Path) -> None:
    fields = {
        "hidden_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 5,
        "intermediate_size": 7,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shape = model_facts(str(tmp_path), {}).shape
    assert shape is not None
    assert shape == ModelShape(d_model=6, d_mlp=7, d_attn=20, n_layers=2)
    assert [shape.width(site) for site in ("resid_pre", "mlp_hidden", "attn_z")] == [6, 7, 20]
    for wrong in ({"intermediate_size": "wide"}, {"head_dim": [5]}, {"hidden_size": {}}):
        (tmp_path / "config.json").write_text(json.dumps(fields | wrong), encoding="utf-8")
        assert model_facts(str(tmp_path), {}).shape is None


def test_a_hub_name_has_no_shape_before_it_is_here() -> None:
    assert model_facts("someone/some-model", {}).shape is None
    bundled = ModelShape(d_model=256, d_mlp=1024, d_attn=256, n_layers=4)
    assert model_facts("bundled", {}).shape == bundled


def test_speed_is_a_guess_where_no_run_was_trained() -> None:
    assert guessed_pace(n_cores=2, has_gpu=False) == (2 * CORE_SPEED, None)
    assert guessed_pace(n_cores=2, has_gpu=True) == (GPU_SPEED, None)
    bundled = ModelShape(d_model=256, d_mlp=1024, d_attn=256, n_layers=4)
    minutes = operations(preset("quick").config(), bundled) / (2 * CORE_SPEED) / 60
    assert 3 < minutes < 6  # as README says of 2 cores


def test_the_machine_says_what_is_free(tmp_path: Path) -> None:
    here = machine(tmp_path / "not" / "made" / "yet")
    assert 0 < here.memory_free <= here.memory_total
    assert here.disk_free > 0
    assert here.n_cores >= 1
