"""Runs whose text has outliers: the scale they begin with, what they say, and how they resume."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_pages import edited, opened, text
from refusals import refusal
from synthetic import write_run
from test_stream import TokenModel, tokens
from tiny_runs import finish, leave_at, outcome, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from gsae_core.checkpoints.checkpoint import read_cfg
from gsae_core.cli.main import main
from gsae_core.config import ModelConfig, RunConfig, validated
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.stream import ActivationStream
from gsae_core.runs.run import Run
from gsae_core.runs.work import setup
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.setup import load_lm, load_text
from gsae_core.runs.work.train import evaluate_run, load_state

# Twelve rows of four tokens: 1 to 24, each twice. Activations are (t, 2t), so the median is that
# of token 12 and 1.5 medians are those of token 18.
ROWS = np.arange(48).reshape(12, 4) % 24 + 1


def stream(**settings: Any) -> ActivationStream:
    harvest = Harvest(TokenModel(), SequenceSet(ROWS, ()), layer=1, site="resid_post")
    usual: dict[str, Any] = {"batch_size": 6, "n_batches": 16, "seed": 0, "chunk_vectors": 16}
    usual["scale"] = "none"
    return ActivationStream(harvest, **usual | settings)


def test_what_is_left_out_gives_its_place_to_another_of_the_chunk_and_moves_nothing_else() -> None:
    before = tokens(list(stream().batches()))
    after = tokens(list(stream(max_norm_ratio=1.5).batches()))
    assert len(before) == len(after) == 96
    assert all(b == a for b, a in zip(before, after, strict=True) if b <= 18)
    assert max(after) == 18
    # Chunks are of 4 rows, so of 16 tokens that follow each other.
    for i in range(0, 96, 16):
        assert set(after[i : i + 16]) == {t for t in before[i : i + 16] if t <= 18}
    stand_ins = [a for b, a in zip(before, after, strict=True) if b > 18]
    assert len(stand_ins) == 2 * 2 * 6
    assert len(set(stand_ins)) > 6


def test_batch_i_is_still_a_function_of_i_alone() -> None:
    in_order = list(stream(max_norm_ratio=1.5).batches())
    jumping = stream(max_norm_ratio=1.5)
    for i in np.random.default_rng(0).permutation(16):
        assert torch.equal(jumping.batch(int(i)), in_order[i])


def test_the_scale_is_that_of_ordinary_vectors_and_earlier_versions_was_of_all() -> None:
    # Tokens 1, 2, 1, 2, 40: medians of (t, 2t) are 5**0.5 t, |x|^2 = 5, 20, 5, 20, 8000.
    harvest = Harvest(
        TokenModel(), SequenceSet(np.array([[1, 2, 1, 2, 40]]), ()), layer=1, site="resid_post"
    )
    usual: dict[str, Any] = {"batch_size": 5, "n_batches": 1, "seed": 0}
    new = ActivationStream(harvest, **usual)
    old = ActivationStream(harvest, **usual, scale_of="all")
    assert new.mean_square_norm == 12.5
    assert old.mean_square_norm == 8050 / 5
    assert (new.scale, old.scale) == (12.5**-0.5, 1610**-0.5)
    kept = ActivationStream(harvest, **usual, max_norm_ratio=15.0)  # 40 is 20 medians
    assert kept.batch(0).square().sum(1).max() == pytest.approx(20 / 12.5)
    assert kept.limits == (15 * kept.lengths[0].median,)


def test_a_chunk_without_an_ordinary_vector_is_told() -> None:
    rows = np.array([[1] * 8, [1] * 8, [40] * 8])
    harvest = Harvest(TokenModel(), SequenceSet(rows, ()), layer=1, site="resid_post")
    run = ActivationStream(
        harvest, batch_size=8, n_batches=3, seed=0, chunk_vectors=8, max_norm_ratio=5.0
    )
    assert refusal(list, run.batches()) == (
        f"expected activations of a length up to {5 * 5**0.5:g} at blocks.1.hook_resid_post, got "
        "none among 8 in a row: raise max_norm_ratio"
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_norm_ratio": 1.0}, "max_norm_ratio: expected a number greater than 1, got 1.0"),
        (
            {"max_norm_ratio": 10.0, "loss": "kl"},
            "RunConfig: expected no max_norm_ratio with loss kl, which reads whole sequences, got "
            "10.0; leave one of them out",
        ),
        (
            {"cache_activations": True, "loss": "kl"},
            "RunConfig: expected no cache_activations with loss kl, which reads whole sequences, "
            "got True; leave one of them out",
        ),
    ],
)
def test_what_cannot_be_left_out_is_told(fields: dict[str, Any], sentence: str) -> None:
    spec = {"name": "a", "architecture": "relu", "d_sae": 4, "sparsity": 0.1}
    wanted = {"saes": [spec], "train": {"n_tokens": 16, "batch_size": 8}}
    assert refusal(validated, RunConfig, wanted | fields) == sentence
    assert "max_norm_ratio" not in validated(RunConfig, wanted).model_dump()


# Whole runs

SINK = 39  # the last word of the tiny tokenizer


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path) -> Path:
    """The tiny model with one word 100 times as long as it was."""
    hf: Any = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    with torch.no_grad():
        hf.transformer.wte.weight[SINK] *= 100.0
    folder = tmp_path_factory.mktemp("sinks")
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def run(new_run: Callable[..., Run], sinking: Path) -> Callable[..., Run]:
    def make(name: str, **fields: Any) -> Run:
        place = ModelConfig(name=str(sinking), layer=1, site="resid_pre")
        return new_run(name, model=place, **fields)

    return make


def test_a_run_says_what_outliers_hold_and_learns_at_the_scale_of_the_others(
    sinking: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*small_run(sinking, words, out), "--site", "resid_pre"]) == 0
    said = capsys.readouterr()
    run = Run.open(out)
    corpus = load_text(run.config, model := load_lm(run.config))
    ids, mask = corpus.train[:]
    power = model.harvest(ids, layer=1, site="resid_pre")[mask].double().square().sum(1)
    long = power > 100 * power.median()
    assert set(ids[mask][long].tolist()) == {SINK}
    share = float(power[long].sum() / power.sum())
    assert share > 0.9
    (noted,) = (event for event in run.events() if event["event"] == "set up")
    found = noted["lengths"]["blocks.1.hook_resid_pre"]
    assert found["n_outliers"] == int(long.sum())
    assert found["outlier_share"] == pytest.approx(share)
    assert found["median_norm"] == pytest.approx(math.sqrt(float(power.median())))
    assert noted["mean_square_norm"] == pytest.approx(float(power[~long].mean()))
    assert noted["activation_scale"] == pytest.approx(float(power[~long].mean()) ** -0.5)
    percent = f"{100 * float(long.double().mean()):.2f} %"
    assert (
        f"gsae_core: {percent} of tokens have activations longer than 10 times the median and hold "
        f"{100 * share:.0f} % of E|x|^2; leave them out with --max-norm-ratio 10"
    ) in said.err.splitlines()
    assert "leave them out with --max-norm-ratio 10" in (out / "log.txt").read_text()
    # What was measured is not shown without a word either.
    for row in run.evals():
        assert row["n_outliers"] > 0
        assert row["fvu_ordinary"] > 1.2 * row["fvu"]
        assert row["max_norm_ratio"] is None
    assert "times the median" in said.out
    assert main(["list", str(out)]) == 0
    assert "FVU of the others is" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_left_out_is_left_out_everywhere(run: Callable[..., Run]) -> None:
    short = run("short", max_norm_ratio=10.0)
    finish(short)
    ids, mask = load_text(short.config, load_lm(short.config), n_held_out=10**6).held_out[:]
    n = int(mask.sum())
    n_sinks = int((ids[mask] == SINK).sum())
    assert n_sinks > 0
    list(evaluate_run(short, n_tokens=10**6))
    for row in short.evals():
        assert (row["n_tokens"], row["n_outliers"], row["max_norm_ratio"]) == (
            n - n_sinks,
            n_sinks,
            10,
        )
        assert row["fvu_ordinary"] == row["fvu"]
        assert row["shortage"] == "the held-out text has no more"
        metadata = read_cfg(short.sae_folder(row["name"]))["metadata"]
        assert metadata["max_norm_ratio"] == 10
        assert metadata["median_norm"] > 0
    list(evaluate_run(short, n_tokens=n))
    assert {row["shortage"] for row in short.evals()} == {None}
    list(index_run(short, "gated", n_tokens=n, split="held_out"))
    made = short.features("gated").manifest
    assert (made.n_tokens, made.n_left_out) == (n - n_sinks, n_sinks)
    samples = short.samples()
    assert samples is not None
    assert samples["n_tokens"] < n
    for look in samples["saes"].values():
        for example in (e for latent in look["latents"] for e in latent["examples"]):
            assert example["tokens"][example["at"]] != "w37"


@pytest.mark.usefixtures("one_thread")
def test_interrupted_and_resumed_it_has_the_same_bits(run: Callable[..., Run]) -> None:
    whole, cut = run("whole", max_norm_ratio=10.0), run("cut", max_norm_ratio=10.0)
    finish(whole)
    leave_at(cut, 13)
    assert json.loads((cut.folder / "resume" / "state.json").read_text())["scale_of"] == "ordinary"
    finish(cut)
    assert outcome(cut) == outcome(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_an_earlier_version_began_goes_on_at_the_scale_it_began_with(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = run("whole"), run("cut")
    with monkeypatch.context() as earlier:
        earlier.setattr(setup, "_scale_of", lambda run: "all")
        finish(whole)
        leave_at(cut, 13)
    path = cut.folder / "resume" / "state.json"
    pointer = json.loads(path.read_text())
    assert pointer.pop("scale_of") == "all"
    path.write_text(json.dumps(pointer))
    finish(cut)
    assert outcome(cut) == outcome(whole)
    assert load_state(cut.folder / "resume")["scale_of"] == "all"
    scales = {event["activation_scale"] for event in cut.events() if event["event"] == "set up"}
    new = run("new")
    leave_at(new, 1)
    (noted,) = (event for event in new.events() if event["event"] == "set up")
    assert len(scales) == 1
    assert scales.pop() < 0.5 * noted["activation_scale"]


@pytest.mark.slow
def test_where_no_median_was_noted_an_evaluation_measures_it(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    done = run("done")
    finish(done)
    before = done.evals()
    for name in ("gated", "relu"):
        path = done.sae_folder(name) / "cfg.json"
        cfg = json.loads(path.read_text())
        del cfg["metadata"]["median_norm"], cfg["metadata"]["max_norm_ratio"]
        path.write_text(json.dumps(cfg))
    list(evaluate_run(done))
    # The held-out tokens' own median is near that of training: the same tokens are outliers.
    assert done.evals() == before


@pytest.mark.slow
def test_pages_say_what_outliers_hold_of_a_run(root: Path) -> None:
    drowned = write_run(root, "drowned")
    found = {"n": 32_768, "n_outliers": 131, "outlier_share": 0.83, "median_norm": 1.0}
    drowned.add_event("set up", max_norm_ratio=None, lengths={"blocks.2.hook_resid_post": found})
    with edited(drowned.folder / "evals.json") as evals:
        for row in evals["saes"]:
            row |= {"n_outliers": 31, "outlier_share": 0.83, "fvu_ordinary": 0.4}
    assert "0.40 % of tokens have activations longer than 10 times the median and hold 83 %" in (
        text(opened("pages/2_Live.py", run="drowned"))
    )
    said = text(opened("pages/3_Pareto.py", run="drowned"))
    assert "hold 83 % of E|x|^2: FVU of the others is 0.4000" in said
