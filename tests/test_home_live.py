"""Home and Live in every state: what they say, what they offer, and what each press does once."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from app_pages import HOSTILE, NASTY, edited, opened, text, write_samples
from streamlit.testing.v1 import AppTest
from synthetic import config, two_places, write_metrics, write_run

from gsae_core.cli.report import time_spent
from gsae_core.config import RunConfig
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import of_process, read_status, write_status
from gsae_core.runs.run import Run

LIVE = "pages/2_Live.py"


def bars(at: AppTest) -> list[str]:
    return [element.proto.text for element in at.get("progress")]


def toasts(at: AppTest) -> list[str]:
    return [toast.value for toast in at.toast]


def begun(run: Run, worker: int, **fields: object) -> None:
    """Let a process play the one of the run, in a stage."""
    status = of_process(read_status(run.folder), "running", worker)
    write_status(run.folder, status._replace(**fields))


# States


def test_home_counts_one_sae_as_one(root: Path) -> None:
    alone = config()
    write_run(root, "alone", run_config=alone.model_copy(update={"saes": alone.saes[:1]}))
    assert "alone is the newest result: 1 SAE." in text(opened("app.py"))


def test_a_run_that_is_being_evaluated_counts_its_tokens(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=1.0, pid=worker)
    begun(run, worker, stage="evaluating", done=1024, total=131_072)
    at = opened(LIVE)
    assert bars(at) == ["evaluating: 1,024 of 131,072 held-out tokens"]
    begun(run, worker, stage="evaluating", done=1024, total=4335)
    at.run()
    (said,) = bars(at)
    assert said == (
        "evaluating: 1,024 of 4,335 held-out tokens; 131,072 were requested, the text has no more"
    )


def test_hook_points_of_a_run_have_a_colour_each_and_can_be_chosen(root: Path) -> None:
    write_run(root, "both", run_config=two_places())
    at = opened(LIVE)
    assert "blocks.1.hook_resid_post, blocks.3.hook_resid_post · 16 SAEs" in text(at)
    legend = next(
        str(each.value) for each in at.html if "blocks.3.hook_resid_post" in str(each.value)
    )
    assert legend.count("blocks.") == 2
    at.multiselect(key="places").set_value(["blocks.3.hook_resid_post"]).run()
    assert not any("blocks.1" in str(each.value) for each in at.html if "λ 0.8" in str(each.value))


def test_a_waiting_run_says_its_place_in_line(root: Path, worker: int) -> None:
    run = write_run(root, "waits", "queued", share=0.0, pid=worker)
    tickets = root / ".slots" / "cpu"
    tickets.mkdir(parents=True)
    started = read_status(run.folder).process_started
    for n, name in enumerate(("other", "waits")):
        ticket = {"run": name, "pid": worker, "started": started}
        (tickets / f"{n}-{name}.json").write_text(json.dumps(ticket))
    at = opened(LIVE)
    assert bars(at) == ["waits until its device is free; position 2 in the queue"]
    assert "1 queued" in text(at)
    assert at.button(key="live.cancel")


def test_a_run_that_was_made_and_not_started_can_be(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(root, "made", "queued", share=0.0)
    pressed: list[str] = []
    monkeypatch.setattr(process, "start", lambda run: pressed.append(run.id))
    at = opened(LIVE)
    assert bars(at) == ["not started yet"]
    at.button(key="live.resume").click().run()
    assert pressed == ["made"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("failed", "make room"),
        ("lost", "The run was lost"),
        ("cancelled", "Cancelled by ada at step"),
    ],
)
def test_a_run_that_stopped_says_why_shows_its_log_and_can_go_on(
    root: Path, state: str, said: str
) -> None:
    error = "expected 2 GB free, found 1 kB; make room on the disk and resume the run"
    # Without a process, a running one is lost.
    made = "running" if state == "lost" else state
    run = write_run(root, "gone", made, share=0.5, error=error)  # pyright: ignore
    run.add_event("cancel requested", by="ada")
    at = opened(LIVE)
    assert said in text(at)
    assert "loading the model" in at.code[0].value
    labels = [at.button(key=f"live.{key}").label for key in ("resume", "delete", "duplicate")]
    assert labels == ["Resume", "Delete", "Duplicate with changes"]


def test_live_opens_while_only_one_sae_has_numbers(root: Path) -> None:
    run = write_run(root, "done")
    first = run.metrics()[0]
    (run.folder / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    at = opened(LIVE, run="done")
    at.session_state["live.newest"] = True
    at.run()
    assert list(at.dataframe[0].value["SAE"]) == [first["sae"]]


def test_recent_speed_and_the_average_are_told_apart(root: Path) -> None:
    run = write_run(root, "done")
    # 12 logged steps of 500 tokens, the first after 49 s and the others in a second each.
    rows = [
        run.metrics()[0]
        | {"step": n, "tokens": 500 * (n + 1), "seconds": 49.0 + n}
        | {"seconds_lm": 30.0, "seconds_sae": 15.0}
        for n in range(12)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    at = opened(LIVE, run="done")
    (speed,) = [metric for metric in at.metric if "speed" in metric.label.lower()]
    assert (speed.label, speed.value) == ("Recent speed", "500/s")  # 9 x 500 tokens in 9 s
    assert speed.help == (
        "Tokens a second over the last 10 logged steps, BOS left out. The line that the terminal "
        "prints at the end has the average over the whole run."
    )
    # 6000 tokens in 60 s
    assert time_spent(rows) == [
        "6 k tokens in 1 min, 100/s on average; time in language model 50 %, in SAEs 25 %"
    ]
    (of_files,) = time_spent(rows, "vector")
    assert of_files.startswith("6 k vectors in 1 min, 100/s on average; time in files 50 %")


def test_the_timeline_names_each_stretch(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    now = time.time()
    events = [("created", 100), ("started", 95), ("loading", 94), ("training", 90)]
    lines = [{"time": now - ago, "event": name} for name, ago in events]
    (run.folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = text(opened(LIVE))
    assert "queued<span" in said
    assert " 5 s</span>" in said  # queued, and starting
    assert re.search(r" 1 min 3\d s</span>", said)  # and still counting while the page is drawn


# Presses


def test_cancel_is_asked_once_more_and_then_asks_the_process(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened(LIVE)
    for press in ("cancel", "keep", "cancel"):
        at.button(key=f"live.{press}").click().run()
        assert run.status.state == "running"
    at.button(key="live.confirm_cancel").click().run()
    assert run.status.state == "cancelling"
    assert "asked to finish its step and save" in text(at)


def test_a_run_is_cancelled_from_home_too(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened("app.py")
    at.button(key="home.cancel_moving").click().run()
    at.button(key="home.confirm_cancel").click().run()
    assert run.status.state == "cancelling"


def test_delete_is_asked_once_more_and_leads_home(root: Path) -> None:
    run = write_run(root, "old")
    write_run(root, "kept")
    at = opened(LIVE, run="old")
    at.button(key="live.delete").click().run()
    assert run.folder.exists()
    at.button(key="live.confirm_delete").click().run()
    assert not run.folder.exists()
    assert at.title[0].value == "Home"
    assert "old was deleted" in text(at)
    assert at.selectbox(key="run").value == "kept"


def test_two_visitors_resume_one_run_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(root, "gone", "cancelled", share=0.5)
    spawned: list[list[str]] = []

    class Child:
        pid = os.getpid()

        def __init__(self, command: list[str], **_: object) -> None:
            spawned.append(command)

        def poll(self) -> None: ...

    one, other = opened(LIVE), opened(LIVE)
    monkeypatch.setattr(process.subprocess, "Popen", Child)
    one.button(key="live.resume").click().run()
    other.button(key="live.resume").click().run()
    assert len(spawned) == 1


def test_duplicate_opens_train_with_the_run(root: Path) -> None:
    write_run(root, "done")
    at = opened(LIVE)
    at.button(key="live.duplicate").click().run()
    assert at.title[0].value == "Train"


def test_the_end_of_a_watched_run_is_told_once_on_any_page(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened("app.py")
    assert toasts(at) == []
    write_status(run.folder, read_status(run.folder)._replace(state="finished"))
    at.switch_page("pages/1_Train.py").run()
    assert toasts(at) == ["moving finished"]
    at.run()
    assert toasts(at) == toasts(opened("app.py")) == []  # to the next visitor it is no news


@pytest.mark.parametrize("page", ["app.py", LIVE])
@pytest.mark.parametrize("end", ["the run ends", "another page is opened"])
def test_a_visit_that_finds_a_run_at_work_says_so(
    root: Path, worker: int, page: str, end: str
) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened(page)
    said = "Reconnected to moving: training continues whether the app is open or not."
    assert said in text(at)
    at.run()
    assert said in text(at)
    if end == "the run ends":
        write_status(run.folder, read_status(run.folder)._replace(state="finished"))
    else:
        at.switch_page("pages/3_Pareto.py")
    at.run()
    assert "Reconnected" not in text(at)


def test_a_run_begun_in_this_visit_was_never_away(root: Path, worker: int) -> None:
    at = opened("app.py")
    write_run(root, "moving", "running", share=0.5, pid=worker)
    at.switch_page(LIVE).run()
    assert "Reconnected" not in text(at)


# The view


def test_all_that_shapes_the_view_is_in_the_address(root: Path) -> None:
    write_run(root, "done")
    write_run(root, "other", "failed", share=0.5)
    at = opened(
        LIVE, run="done", x="time", part="sparsity", smooth="0.5", log="false", overlay="other"
    )
    assert at.segmented_control(key="x").value == "time"
    assert at.slider(key="smooth").value == 0.5
    assert at.toggle(key="log").value is False
    assert at.multiselect(key="overlay").value == ["other"]
    assert "ReLU baseline" in text(at)
    assert "</span> other</span>" in text(at)


def test_end_to_end_fine_tuning_has_a_curve_of_its_kl(root: Path) -> None:
    ours = config()
    run = write_run(root, "done", run_config=ours.model_copy(update={"loss": "kl"}))
    write_metrics(run, [row | {"kl": 0.5} for row in run.metrics()])
    at = opened(LIVE, run="done", part="KL divergence")
    assert at.segmented_control(key="part").value == "KL divergence"


def test_the_newest_numbers_are_a_table_once_it_is_opened(root: Path) -> None:
    run = write_run(root, "done")
    at = opened(LIVE, run="done")
    assert not at.dataframe
    at.session_state["live.newest"] = True
    table = at.run().dataframe[0].value
    last = {row["sae"]: row for row in run.metrics()}
    assert list(table["SAE"]) == list(last)
    assert list(table["L0"]) == [f"{row['l0']:.1f}" for row in last.values()]


def test_a_run_to_lay_over_that_is_not_here_is_named(root: Path) -> None:
    write_run(root, "done")
    assert "elsewhere" in text(opened(LIVE, run="done", overlay="elsewhere"))


def test_an_overlaid_run_deleted_while_open_does_not_end_the_page(root: Path) -> None:
    write_run(root, "done")
    other = write_run(root, "other")
    at = opened(LIVE, run="done", overlay="other")
    shutil.rmtree(other.folder)
    at.run()


def test_reading_goes_on_where_it_stopped(root: Path, worker: int) -> None:
    run = write_run(root, "moving", "running", share=0.5, pid=worker)
    at = opened(LIVE)
    (_, before, _) = at.session_state["live.metrics"]["moving"]
    path = run.folder / "metrics.jsonl"
    row, torn = (json.dumps(run.metrics()[-1] | {"step": step}) for step in (300, 301))
    with path.open("a") as file:
        file.write(row + "\n" + torn[:18])
    at.run()
    table, after, damaged = at.session_state["live.metrics"]["moving"]
    assert table["step"].iloc[-1] == 300
    assert after.offset == before.offset + len(row) + 1
    assert damaged == 0
    with path.open("a") as file:
        file.write(torn[18:] + "\n")
    at.run()
    table, _, damaged = at.session_state["live.metrics"]["moving"]
    assert (table["step"].iloc[-1], damaged) == (301, 0)


@pytest.mark.parametrize("token", NASTY)
def test_a_hostile_token_is_text(root: Path, token: str) -> None:
    run = write_run(root, "done")
    write_samples(run, [token, " and", "\n"])
    at = opened(LIVE)
    (sample,) = [html.value for html in at.html if "Feature 17" in html.value]
    for piece in ("<script", "<style>*", "<img", "\u202e", "\u200b", "\x1b", "\x00"):
        assert piece not in sample
    assert "> and</span>" in sample
    assert "↵" in sample
    assert all(token not in element.value for element in at.markdown)


def test_a_hostile_log_and_error_are_text(root: Path) -> None:
    run = write_run(root, "broken", "failed", share=0.1, error="".join(NASTY[:3]))
    (run.folder / "log.txt").write_text("\n".join(NASTY), encoding="utf-8")
    at = opened(LIVE)
    assert "<script" not in "".join(element.value for element in at.html)


# What is not well


def test_a_damaged_sample_is_told(root: Path) -> None:
    run = write_run(root, "done")
    (run.folder / "samples.json").write_text("{")
    assert "The sample of features cannot be read" in text(opened(LIVE))


def test_a_run_whose_status_is_damaged_is_told(root: Path) -> None:
    run = write_run(root, "done")
    (run.folder / "status.json").write_text("{")
    assert "done cannot be opened" in text(opened(LIVE, run="done"))


def test_home_with_many_runs_lists_the_newest(root: Path) -> None:
    for n in range(30):
        run = Run.create(root / f"run-{n:03d}", config())
        os.utime(run.folder / "config.json", (n, n))
    at = opened("app.py")
    assert at.dataframe[0].value["run"].iloc[0] == "run-029"
    assert len(at.dataframe[0].value) == 20
    assert HOSTILE not in text(at)


def test_what_a_run_is_too_short_for_is_said_on_live(root: Path) -> None:
    short = config().train.model_copy(update={"lr_warmup_steps": 10**6})
    run_config = config().model_copy(update={"train": short})
    write_run(root, "short", run_config=run_config)
    write_run(root, "whole")
    said = text(opened(LIVE, run="short"))
    assert f"All {short.n_steps:,} steps lie within the learning-rate warm-up of 1,000,000" in said
    assert "never reaches its peak; shorten the warm-up or train longer." in said
    assert "never reaches its peak" not in text(opened(LIVE, run="whole"))
    imported = run_config.model_copy(update={"imported": "SAELens 6"})  # how it learnt is not known
    write_run(root, "imported", run_config=imported)
    assert "never reaches its peak" not in text(opened(LIVE, run="imported"))


def test_a_run_on_vectors_is_not_spoken_of_as_text(root: Path) -> None:
    given = config().model_dump(exclude={"model", "data"}) | {"activations": "/data/embeddings"}
    run = write_run(root, "vectors", run_config=RunConfig.model_validate(given))
    (run.folder / "log.txt").write_text("")
    with edited(run.folder / "evals.json") as found:
        for row in found["saes"]:
            row |= {"n_predictions": 0, "loss_recovered": None, "kl": None}
    rows = opened("app.py").dataframe[0].value
    assert (rows["where"].iloc[0], rows["trained on"].iloc[0]) == ("embeddings", "1.05 M vectors")
    for page in (LIVE, "pages/3_Pareto.py", "pages/4_Shrinkage.py"):
        at = opened(page, run="vectors")
        metrics = [f"{each.label} {each.help}" for each in at.metric]
        said = "\n".join([text(at), *metrics, *(each.label for each in at.select_slider)])
        assert "vectors" in said
        assert not {"loss_recovered", "kl"} & {name for each in at.dataframe for name in each.value}
        assert not re.search(r"(?i)token|the model|language model ", said), page
