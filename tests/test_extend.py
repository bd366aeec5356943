"""Extending a finished run: SAEs added to its sweep, or training that goes on."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import mistake, refusal
from tiny_runs import finish, leave_at, outcome, tiny_config

from gsae_core.cli.arguments import Train, added_specs, run_config
from gsae_core.cli.main import main
from gsae_core.config import RunConfig, SAESpec, TrainRecipe, validated
from gsae_core.runs.run import Run, example_run
from gsae_core.runs.work import train
from gsae_core.runs.work.extend import add_saes, lengthen
from gsae_core.runs.work.finetune import create_finetuned, finetuned_config
from gsae_core.runs.work.imports import import_saes
from gsae_core.runs.work.setup import set_up
from gsae_core.runs.work.train import evaluate_run, load_state
from gsae_core.text import Progress
from gsae_core.training.dead_latents import is_resampling, joins_pool
from gsae_core.training.end_to_end import rows_of
from gsae_core.training.optimizer import lr_factor, sparsity_factor, threshold_lr

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = SAESpec(name="gated-0.3", architecture="gated", d_sae=24, sparsity=0.3)
OTHER = ONE.model_copy(update={"name": "gated-0.1", "sparsity": 0.1})
RECIPE = TrainRecipe(
    n_tokens=165, batch_size=16, lr=1e-2, lr_warmup_steps=2, revive_every=4, revive_window=3
)
OPTIONS: dict[str, Any] = {"train": RECIPE, "checkpoint_minutes": 60.0}


@pytest.fixture
def one(tiny: Run, tmp_path: Path) -> Run:
    """A finished run of one SAE; ten steps, of which the last tokens are no whole batch."""
    return Run.open(shutil.copytree(tiny.folder, tmp_path / "one"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, words: Path) -> Run:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = tiny_config(tiny_lm_folder, words, saes=(ONE,), **OPTIONS)
    run = Run.create(tmp_path_factory.mktemp("tiny") / "one", config)
    finish(run)
    torch.set_num_threads(n_threads)
    return run


@pytest.fixture(scope="module")
def both(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that had both SAEs from the start."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = tiny.config.model_copy(update={"saes": (ONE, OTHER)})
    run = Run.create(tmp_path_factory.mktemp("both") / "run", config)
    finish(run)
    torch.set_num_threads(n_threads)
    return run


def results(run: Run) -> dict[str, Any]:
    """Return what must not depend on when an SAE came; metrics are in another order."""
    found = outcome(run)
    rows = sorted(json.loads(found.pop("metrics")), key=lambda row: (row["sae"], row["step"]))
    config = (run.folder / "config.json").read_text()
    return found | {"rows": rows, "config": config}


# SAEs that are added


def test_an_added_sae_has_the_bits_it_has_from_the_start(one: Run, both: Run) -> None:
    before = one.sae_folder("gated-0.3") / "sae_weights.safetensors"
    written = before.stat().st_mtime_ns
    extended = add_saes(one, [OTHER])
    assert extended.status.state == "queued"
    finish(extended)
    assert results(extended) == results(both)
    assert before.stat().st_mtime_ns == written
    assert not (one.folder / "extend").exists()


@pytest.mark.slow
def test_interrupted_anywhere_the_finished_one_stays_and_resume_goes_on(
    one: Run, both: Run
) -> None:
    evals = one.evals()
    run = add_saes(one, [OTHER])
    for step in (3, 8):
        leave_at(run, step)
        run = Run.open(run.folder)
        assert run.status.state == "cancelled"
        assert run.evals() == evals
        assert run.samples() is not None
    finish(run)
    assert results(run) == results(both)


@pytest.mark.parametrize("at", range(4))
def test_a_crash_while_it_is_added_leaves_a_run_that_resumes(
    one: Run, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    # Of four files written: the request, the status, and the config after the first two.
    calls = itertools.count()
    from gsae_core.runs.work import extend

    def failing(name: str) -> Callable[..., None]:
        real = getattr(extend, name)

        def write(*args: Any) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt
            real(*args)

        return write

    for name in ("write_json", "write_status"):
        monkeypatch.setattr(extend, name, failing(name))
    try:
        add_saes(one, [OTHER])
        assert at == 3
    except KeyboardInterrupt:
        assert at < 3
    run = Run.open(one.folder)
    if run.status.state != "finished":
        finish(run)
    names = ["gated-0.3"] if at < 3 else ["gated-0.3", "gated-0.1"]
    assert [row["name"] for row in run.evals()] == names


# Training that goes on


def test_a_stage_has_a_schedule_of_its_own() -> None:
    # 10 steps, then 20 more; warm-up of 2 and decay over a fifth of each.
    cfg = TrainRecipe(
        n_tokens=30,
        batch_size=1,
        extended=(10,),
        lr_warmup_steps=2,
        sparsity_warmup_steps=5,
        revive_every=4,
        revive_until=0.5,
    )
    alone = cfg.model_copy(update={"n_tokens": 10, "extended": ()})
    assert [lr_factor(i, cfg) for i in range(10)] == [lr_factor(i, alone) for i in range(10)]
    # At its start 0.1 again, half-way up 0.1 + 0.9 / 2; of the last 4 steps 4/4, 3/4, 2/4, 1/4.
    assert lr_factor(10, cfg, warmup_start=8) == pytest.approx(0.1)
    assert lr_factor(11, cfg, warmup_start=8) == pytest.approx(0.55)
    assert [lr_factor(i, cfg) for i in (12, 26, 27, 29)] == [1.0, 1.0, 0.75, 0.25]
    assert [sparsity_factor(i, cfg) for i in (0, 4, 5, 9, 10, 29)] == [0, 0.8, 1, 1, 1, 1]
    # Until half of each stage: after step 4 of 10, and after 14 and 18 of 11 to 30.
    assert [i for i in range(31) if is_resampling(i, cfg)] == [4, 14, 18]
    assert [joins_pool(i, cfg, widest=1) for i in (4, 5, 10, 11, 18, 19)] == [1, 0, 0, 1, 1, 0]
    assert threshold_lr(1e-3, cfg, step=9) == pytest.approx(1 / 10)
    assert threshold_lr(1e-3, cfg, step=10) == pytest.approx(1 / 30)


def test_it_goes_on_behind_the_text_it_read_with_the_same_scale(one: Run) -> None:
    first = set_up(one)
    extended = lengthen(one, 100)
    assert extended.config.train.n_steps == 16
    assert extended.config.train.extended == (165,)
    setup = set_up(extended)
    (later,) = setup.later
    assert later.scales == first.stream.scales
    n_read = len(first.corpus.train)
    rest = setup.corpus.train[n_read:].ids
    assert torch.equal(later.harvest.sequences[:].ids, rest)
    assert torch.equal(setup.corpus.train[:n_read].ids, first.corpus.train[:].ids)
    old, new, again = (
        [rows_of(batch) for (batch,) in batches]
        for batches in (first.batches(0), setup.batches(0), setup.batches(12))
    )
    assert (len(old), len(new), len(again)) == (10, 16, 4)
    assert all(map(torch.equal, old, new))
    assert all(map(torch.equal, again, new[12:]))


def test_without_more_text_it_reads_all_again_in_another_order(one: Run) -> None:
    setup = set_up(lengthen(one, 16 * 200))
    (later,) = setup.later
    assert len(later.harvest.sequences) == len(setup.corpus.train)
    assert later._order(0).tolist() != setup.stream._order(0).tolist()
    # One batch more, of a text that was read to its end: what is left holds none.
    train = one.config.train.model_copy(update={"n_tokens": 3280, "extended": (165, 3264)})
    setup = set_up(Run(one.folder, one.config.model_copy(update={"train": train})))
    assert len(setup.later[1].harvest.sequences) == len(setup.corpus.train)
    assert len([*setup.batches(204)]) == 1


@pytest.mark.slow
def test_all_saes_learn_on_and_an_interruption_changes_no_bit(one: Run, tmp_path: Path) -> None:
    copy = Run.open(shutil.copytree(one.folder, tmp_path / "copy"))
    moments = load_state(one.folder / "resume")["trainer"]["saes"][0]["moments"]["W_dec"]["step"]
    whole = lengthen(one, 96)
    assert whole.status.state == "queued"
    finish(whole)
    state = load_state(one.folder / "resume")["trainer"]["saes"][0]
    assert state["moments"]["W_dec"]["step"] == moments + 6  # Adam goes on
    assert whole.status.step == 16
    assert max(row["step"] for row in whole.metrics()) == 16

    parts = lengthen(copy, 96)
    weights = (copy.sae_folder("gated-0.3") / "sae_weights.safetensors").read_bytes()
    for step in (11, 14):
        leave_at(parts, step)
        # What was finished is there until what is longer is.
        assert (copy.sae_folder("gated-0.3") / "sae_weights.safetensors").read_bytes() == weights
    finish(parts)
    assert outcome(parts) == outcome(whole)


@pytest.mark.slow
def test_added_to_an_extended_run_and_the_other_way_round_are_the_same(
    one: Run, both: Run, tmp_path: Path
) -> None:
    finish(lengthen(one, 96))
    longer_first = add_saes(Run.open(one.folder), [OTHER])
    finish(longer_first)
    added_first = Run.open(shutil.copytree(both.folder, tmp_path / "both"))
    finish(longer_second := lengthen(added_first, 96))
    assert results(longer_first)["files"] == results(longer_second)["files"]
    assert results(longer_first)["evals"] == results(longer_second)["evals"]
    for _ in evaluate_run(Run.open(one.folder)):
        pass  # on the text as it was read last
    assert Run.open(one.folder).evals() == longer_first.evals()
    finish(again := lengthen(Run.open(one.folder), 32))
    assert again.config.train.extended == (165, 256)
    assert again.status.step == 18


@pytest.mark.slow
def test_of_several_places_an_added_sae_shuffles_as_the_widest_does(
    one: Run, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 numbers fit: 2 vectors of width 20 at a time, or 3 of width 12.
    monkeypatch.setattr("gsae_core.lm.stream.MAX_CHUNK_BYTES", 4 * 40)
    wide = ONE.model_copy(update={"name": "wide", "layer": 1, "site": "mlp_hidden"})
    narrow = ONE.model_copy(update={"layer": 1, "site": "resid_pre"})
    other = OTHER.model_copy(update={"layer": 1, "site": "resid_pre"})
    finish(whole := new_run("whole", saes=(narrow, wide, other), **OPTIONS))
    finish(parts := new_run("parts", saes=(narrow, wide), **OPTIONS))
    finish(added := add_saes(parts, [other]))
    assert results(added) == results(whole)
    finish(made := create_finetuned(whole, one.folder / "new", finetuned_both(whole)))
    assert [row["name"] for row in made.evals()] == ["wide", "gated-0.1"]


@pytest.mark.slow
def test_a_run_with_an_sae_added_at_another_place_trains_on(
    one: Run, new_run: Callable[..., Run]
) -> None:
    elsewhere = OTHER.model_copy(update={"layer": 1, "site": "mlp_hidden"})
    finish(whole := new_run("whole", saes=(ONE, elsewhere), **OPTIONS))
    finish(parts := add_saes(one, [elsewhere]))
    assert results(parts)["files"] == results(whole)["files"]
    finish(whole := lengthen(whole, 96))
    finish(parts := lengthen(parts, 96))
    assert results(parts)["files"] == results(whole)["files"]


def finetuned_both(run: Run) -> RunConfig:
    names = ["wide", "gated-0.1"]
    return finetuned_config(run, names, n_tokens=64, loss="kl", recipe={"batch_size": 32})


def test_a_config_of_stages_is_trained_in_one_go_where_another_length_is_asked_for(
    one: Run, tmp_path: Path
) -> None:
    path = lengthen(one, 96).folder / "config.json"
    same = run_config(Train(config=path))
    assert same.train.extended == (165,)
    assert [(first, recipe.n_steps) for first, recipe in same.train.stages] == [(0, 10), (10, 6)]
    other = run_config(Train(config=path, tokens=64))
    assert (other.train.extended, other.train.n_steps) == ((), 4)
    fields = same.model_dump() | {"train": same.train.model_dump() | {"n_tokens": 170}}
    assert refusal(validated, RunConfig, fields) == (
        "train: expected n_tokens of at least one batch more than each length before [165], got 170"
    )


# What cannot be extended


def test_runs_that_cannot_be_extended_are_refused(
    one: Run, new_run: Callable[..., Run], tmp_path: Path
) -> None:
    unfinished = new_run("unfinished")
    assert refusal(lengthen, unfinished, 500) == (
        "expected a finished run to extend, got unfinished, which is queued; "
        f"python -m gsae_core resume {unfinished.folder}"
    )
    imported, _ = import_saes(one.folder / "saes" / "gated-0.3", tmp_path / "theirs")
    assert refusal(lengthen, imported, 5000) == (
        "expected a run that was trained here to extend, got theirs, which holds SAEs of another "
        "library; finetune makes a new run of them"
    )
    example = example_run()
    assert example is not None
    assert "got example, which holds what ships with the package;" in refusal(
        lengthen, example, 10**6
    )
    shutil.rmtree(one.folder / "resume")
    assert refusal(add_saes, one, [OTHER]) == (
        "expected the resumable state of one to go on from, found none in "
        f"{one.folder / 'resume'}; finetune goes on from the weights alone, in a new run"
    )
    assert refusal(lengthen, one, 15) == (
        "expected at least one batch (16) of further tokens, got 15"
    )
    assert one.status.state == "finished"


def test_what_the_flags_add_reads_where_the_sweep_does_and_begins_at_random(one: Run) -> None:
    elsewhere = ONE.model_copy(update={"site": "mlp_out"})
    (added,) = added_specs(one.config.model_copy(update={"saes": (elsewhere,)}), sparsity=(0.1,))
    assert (added.name, added.site) == ("gated-0.1", "mlp_out")
    tuned = one.config.model_copy(update={"finetuned": "one"})
    assert refusal(added_specs, tuned, arch=("relu",), sparsity=(0.1,)) == (
        "expected a sweep that began with random weights to add SAEs to, got one fine-tuned from "
        "one; fine-tune that again with another --sparsity"
    )


# The command


def test_the_command_adds_and_trains_on(one: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extend", str(one.folder), "--sparsity", "0.3", "0.1", "--tokens", "32"]
    assert main(words) == 0
    run = Run.open(one.folder)
    assert [row["name"] for row in run.evals()] == ["gated-0.3", "gated-0.1"]
    assert run.config.saes[1] == OTHER
    assert (run.status.state, run.status.step) == ("finished", 12)
    assert capsys.readouterr().out.count("gated-0.1") >= 2  # a report after each


def test_interrupted_before_further_tokens_the_command_says_they_are_left(
    one: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Run, **_: object) -> Iterator[Progress]:
        yield Progress("loading", 0, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_evaluate", interrupted)
    words = ["extend", str(one.folder), "--sparsity", "0.1", "--tokens", "32"]
    assert main(words) == 130
    folder = one.folder
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"go on with: python -m gsae_core resume {folder}, then: python -m gsae_core extend "
            f"{folder} --tokens 32"
        )
    )
    for command in ("evaluate", "finetune --sae gated-0.1 --tokens 32", "index --sae gated-0.1"):
        assert mistake([*command.split(), str(folder)], capsys) == (
            f"expected the weights of 'gated-0.1', found none in {folder / 'saes' / 'gated-0.1'}; "
            f"if its training was interrupted: python -m gsae_core resume {folder}"
        )


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("", "expected --sparsity, --k or --tokens, got none of them"),
        ("--sparsity 0.3", "expected SAEs that the run lacks; it has gated-0.3"),
        (
            "--k 4",
            "--k: expected topk among the architectures, got gated; name it after --arch, "
            "or leave --k out",
        ),
        ("--sparsity -1", "--sparsity: expected a number greater than 0, got -1.0"),
        ("--tokens 3", "expected at least one batch (16) of further tokens, got 3"),
        ("--sparsity 0.1 --tokens 3", "expected at least one batch (16) of further tokens, got 3"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_the_run_finished(
    one: Run, capsys: pytest.CaptureFixture[str], asked: str, sentence: str
) -> None:
    assert mistake(["extend", str(one.folder), *asked.split()], capsys) == sentence
    assert one.status.state == "finished"
    assert Run.open(one.folder).config == one.config


@pytest.mark.parametrize("asked", ["--sparsity 0.1", "--tokens 32"])
def test_a_mistake_met_before_the_first_step_leaves_the_run_as_it_was(
    one: Run, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    text = Path(one.config.data.source)
    before, evals = (one.folder / "config.json").read_text(), one.evals()
    text.rename(text.with_suffix(".gone"))
    try:
        assert "words.txt" in mistake(["extend", str(one.folder), *asked.split()], capsys)
    finally:
        text.with_suffix(".gone").rename(text)
    run = Run.open(one.folder)
    assert (run.folder / "config.json").read_text() == before
    assert (run.status.state, run.status.step, run.evals()) == ("finished", 10, evals)
    assert not (run.folder / "extend").exists()
