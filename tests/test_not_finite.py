"""Activations that are infinite or NaN: the run ends with the place, the count and the cause."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from tiny_runs import finish, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gsae_core.cli import main
from gsae_core.config import DataConfig, ModelConfig, Place, TrainRecipe
from gsae_core.lm import harvest as harvesting
from gsae_core.lm import stream
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import CachedActivations, Harvest, check_finite
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.stream import ActivationStream
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.setup import load_lm, load_text
from gsae_core.runs.work.train import evaluate_run, load_state

RARE = "w37"  # the last word of the tiny tokenizer, id 39
HALF = (
    "the language model computes in float16, which overflows above 65,504; use float32 or bfloat16 "
    "for it (--dtype)"
)


class Spoilt(LanguageModel):
    """Activation of token t: (t, -t); token 7 is infinite there and token 9 NaN."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype = dtype

    def width(self, site: str) -> int:
        return 2

    def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
        x = torch.stack([ids, -ids], dim=-1).float()
        x[..., 1][ids == 7] = -math.inf
        x[..., 0][ids == 9] = math.nan
        return x


def sequences(n: int, *planted: tuple[int, int]) -> SequenceSet:
    """Rows of BOS (0) and four tokens from 10 on; `planted` are (row, token) of its last place."""
    rows = np.full((n, 5), 10, np.uint16)
    rows[:, 0] = 0
    for row, token in planted:
        rows[row, 4] = token
    return SequenceSet(rows, (0,))


def sentence(n: int, of: int, why: str = HALF) -> str:
    return (
        f"expected finite activations at mlp_out of layer 3, got {n} of {of} vectors with infinite "
        f"or NaN entries: {why}"
    )


def test_a_harvest_ends_with_how_many_of_how_many_and_works_on_none_of_their_passes() -> None:
    text = sequences(6, (2, 7), (5, 9))
    harvest = Harvest(Spoilt(), text, layer=3, site="mlp_out")
    harvest.rows = 2
    seen: list[Tensor] = []
    # Six rows of four counted tokens; rows 2 and 3 share a pass, and so do 4 and 5.
    assert refusal(seen.extend, harvest.vectors(np.arange(6))) == sentence(2, 24)
    assert len(seen) == 1
    assert torch.cat(list(harvest.vectors(np.array([0, 1, 3])))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_range_is_not_the_cause_it_is_not_blamed(dtype: torch.dtype) -> None:
    harvest = Harvest(Spoilt(dtype), sequences(1, (0, 9)), layer=3, site="mlp_out")
    name = str(dtype).removeprefix("torch.")
    why = f"the language model computes in {name}; check its weights, or choose another layer or "
    assert refusal(lambda: list(harvest.vectors(np.arange(1)))) == sentence(1, 4, f"{why}site")


def test_large_numbers_are_finite() -> None:
    x = torch.full((3, 4), torch.finfo(torch.float32).max)
    check_finite(x, layer=0, site="mlp_out", dtype=torch.float32)
    check_finite(x[:0], layer=0, site="mlp_out", dtype=torch.float32)


def test_a_stream_hands_out_no_batch_of_such_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SCALE_VECTORS", 8)
    n = 40
    order = np.random.default_rng([0, 0, 0, stream.SEQUENCES]).permutation(n)
    text = sequences(n, (int(order[-1]), 7))  # in the last chunk that is harvested
    harvest = Harvest(Spoilt(), text, layer=3, site="mlp_out")
    batches = ActivationStream(harvest, batch_size=8, seed=0, n_batches=20, chunk_vectors=40)
    for i in range(15):
        assert batches.batch(i).isfinite().all()
    assert refusal(batches.batch, 15) == sentence(1, 40)


def test_the_cache_writes_no_such_shard_and_reads_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(text: SequenceSet, model: Spoilt) -> CachedActivations:
        return CachedActivations(model, text, {Place(3, "mlp_out"): tmp_path})

    # Two rows of 5 positions, 2 numbers of 2 bytes each, in a pass and in a shard.
    monkeypatch.setattr(harvesting, "CPU_PASS_TOKENS", 10)
    monkeypatch.setattr(harvesting, "SHARD_BYTES", 40)
    text = sequences(4, (2, 7))
    assert refusal(cached(text, Spoilt()).fill) == sentence(1, 8)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # the shard before it
    # As an earlier version left it.
    good = sequences(2, (0, 11))
    (path,) = cached(good, Spoilt()).shards[0].paths
    x = torch.zeros(8, 2)
    x[3, 1] = math.nan
    save_file({"x": x}, path, {"sha256": harvesting._sha256(x)})
    assert refusal(lambda: list(cached(good, Spoilt()).vectors(np.arange(2)))) == sentence(1, 8)


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path) -> Path:
    """The tiny model with one word at 65 000, to which every position adds 1000: float16 ends."""
    hf: Any = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    with torch.no_grad():
        hf.transformer.wte.weight[39, 0] = 65_000.0
        hf.transformer.wpe.weight[:, 0] = 1000.0
    folder = tmp_path_factory.mktemp("overflows")
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm_folder).save_pretrained(folder)
    return folder


def write_words(path: Path, *, rare_at: int | None) -> Path:
    words = [f"w{n}" for n in random.Random(0).choices(range(37), k=900)]
    if rare_at is not None:
        words[rare_at] = RARE
    path.write_text(" ".join(words))
    return path


def half_run(folder: Path, model: Path, text: Path) -> Run:
    """Return a run of 30 steps of 16 vectors that reads the embeddings in float16."""
    place = ModelConfig(name=str(model), layer=0, site="resid_pre", dtype="float16")
    recipe = TrainRecipe(n_tokens=480, batch_size=16, lr=1e-3)
    data = DataConfig(source=str(text), held_out=0.2)
    return Run.create(folder, tiny_config(model, text, model=place, train=recipe, data=data))


REFUSED = re.compile(
    r"expected finite activations at resid_pre of layer 0, got 1 of (\d+) vectors with infinite or "
    r"NaN entries: " + re.escape(HALF)
)


def test_train_says_so_and_leaves_nothing(
    tmp_path: Path, overflowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_words(tmp_path / "text.txt", rare_at=100)
    words = ["train", "--model", str(overflowing), "--data", str(text), "--layer", "0"]
    words += ["--site", "resid_pre", "--arch", "relu", "--sparsity", "0.1", "--width", "8"]
    words += ["--tokens", "320", "--batch-size", "16", "--eval-tokens", "64", "--device", "cpu"]
    out = tmp_path / "run"
    assert main.main([*words, "--dtype", "float16", "--out", str(out)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert REFUSED.fullmatch(last.removeprefix("gsae_core: "))
    assert not out.exists()
    # What it advises is enough.
    assert main.main([*words, "--dtype", "float32", "--out", str(out)]) == 0
    assert all(math.isfinite(row["fvu"]) for row in Run.open(out).evals())


def test_a_run_that_meets_it_late_fails_with_the_sentence_and_its_saved_steps_stay(
    tmp_path: Path, overflowing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SCALE_VECTORS", 8)
    monkeypatch.setattr("gsae_core.runs.work.setup.default_chunk_vectors", lambda *_: 60)
    text = write_words(tmp_path / "text.txt", rare_at=None)
    clean = half_run(tmp_path / "clean", overflowing, text)
    order = harvest_order(clean)
    # 15 words a row; the row that is read in the middle of the run.
    write_words(text, rare_at=15 * order[len(order) // 2] + 7)
    run = half_run(tmp_path / "run", overflowing, text)
    said = refusal(finish, run)
    assert REFUSED.fullmatch(said)
    status = run.status
    assert status.state == "failed"
    assert 0 < status.step < 30
    assert status.error == said
    state = load_state(run.folder / "resume")
    for sae in state["trainer"]["saes"]:
        assert sae["stopped"] is None
        assert all(weights.isfinite().all() for weights in sae["weights"].values())


def harvest_order(run: Run) -> list[int]:
    """Return rows of the text in the order in which the run's training reads them."""
    corpus = load_text(run.config, load_lm(run.config))
    ids = [tuple(corpus.train[i : i + 1].ids[0].tolist()) for i in range(len(corpus.train))]
    words = Path(run.config.data.source).read_text().split(" ")
    rows = {
        tuple(int(word[1:]) + 2 for word in words[first : first + 15]): first // 15
        for first in range(0, len(words), 15)
    }
    order = np.random.default_rng([run.config.seed, 0, 0, stream.SEQUENCES]).permutation(len(ids))
    return [rows[ids[i][1:]] for i in order if ids[i][1:] in rows]


def test_evaluation_and_index_end_with_it_and_keep_what_there_was(
    tmp_path: Path, overflowing: Path
) -> None:
    run = half_run(tmp_path / "run", overflowing, write_words(tmp_path / "text.txt", rare_at=None))
    finish(run)
    before = (run.folder / "evals.json").read_bytes()
    name = run.config.saes[0].name
    weights = load_file(run.sae_folder(name) / "sae_weights.safetensors")
    held_out = held_out_row(run)
    write_words(tmp_path / "text.txt", rare_at=15 * held_out + 7)
    assert REFUSED.fullmatch(refusal(lambda: list(evaluate_run(run))))
    assert (run.folder / "evals.json").read_bytes() == before
    said = refusal(lambda: list(index_run(run, name, n_tokens=2000, split="held_out")))
    assert REFUSED.fullmatch(said)
    assert not (run.folder / "features" / name / "manifest.json").exists()
    assert json.loads((run.folder / "features" / name / "status.json").read_text())["error"]
    after = load_file(run.sae_folder(name) / "sae_weights.safetensors")
    assert all(torch.equal(weights[key], after[key]) for key in weights)


def held_out_row(run: Run) -> int:
    (first,) = load_text(run.config, load_lm(run.config)).held_out[0:1].ids.tolist()
    words = Path(run.config.data.source).read_text().split(" ")
    ids = [int(word[1:]) + 2 for word in words]
    return next(at // 15 for at in range(0, len(ids), 15) if ids[at : at + 15] == first[1:])
