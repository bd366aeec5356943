"""Runs on folders of vectors: harvested ones and those from elsewhere, to their numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Chat
from refusals import mistake, refusal
from safetensors.numpy import load_file, save_file
from tiny_runs import SMALL, finish, flat, leave_at, outcome

from gsae_core.analysis.autointerp import write_label
from gsae_core.analysis.fidelity import evaluating_vectors
from gsae_core.cli.main import main
from gsae_core.config import NO_MODEL, NO_PLACE, Place, RunConfig, TrainRecipe
from gsae_core.lm.corpus import load_corpus
from gsae_core.lm.harvest import CachedActivations, Harvest, open_cache
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.stored import described, open_vectors
from gsae_core.lm.stream import ActivationStream
from gsae_core.lm.vectors import BLOCK, StoredHarvest, VectorSource
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.setup import load_lm
from gsae_core.runs.work.train import evaluate_run, load_state
from gsae_core.sae.architectures import ReluSAE

CPU = torch.device("cpu")
D_IN = 6


def made_up(n: int, seed: int = 0) -> np.ndarray:
    """Return vectors of a few directions each."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 10)) ** 8 @ rng.normal(size=(10, D_IN))).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 800 vectors in two files, with captions."""
    (made := tmp_path / "embeddings").mkdir()
    x = made_up(800)
    np.save(made / "part-1.npy", x[:300])
    np.save(made / "part-2.npy", x[300:].astype(np.float16))
    (made / "captions.txt").write_text("\n".join(f"picture {i % 200}" for i in range(800)))
    return made


@pytest.fixture
def on_vectors(folder: Path, new_run: Callable[..., Run]) -> Callable[..., Run]:
    """Makes tiny runs on that folder."""
    given = new_run("as-given").config.model_dump(exclude={"model", "data"})

    def make(name: str = "run", **fields: Any) -> Run:
        config = RunConfig.model_validate({**given, "activations": str(folder), **fields})
        return Run.create(folder.parent / name, config)

    return make


# Splits


def numbers(sequences: Any) -> list[int]:
    return sequences.numbers(np.arange(len(sequences))).tolist()


def test_every_twentieth_block_of_vectors_is_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", made_up(BLOCK * 41 + 5))
    corpus = VectorSource(str(tmp_path), device=CPU).corpus(0.05)
    # Blocks 0, 20 and 40 of 42, the last of which has five vectors.
    held_out = [n for block in (0, 20, 40) for n in range(BLOCK * block, BLOCK * (block + 1))]
    assert numbers(corpus.held_out) == held_out
    assert numbers(corpus.train) == sorted({*range(BLOCK * 41 + 5)} - {*held_out})
    assert corpus.train.n_tokens == BLOCK * 38 + 5


def test_too_few_vectors_for_two_splits_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", made_up(BLOCK))
    source = VectorSource(str(tmp_path), device=CPU)
    assert refusal(lambda: source.corpus(0.05)) == (
        f"expected more than {BLOCK} vectors in {tmp_path}, some to train on and some to hold out, "
        f"got {BLOCK}: give more"
    )


def test_vectors_without_a_length_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((40, 2), np.float32))
    source = VectorSource(str(tmp_path), device=CPU)
    harvest = StoredHarvest(source, source.corpus(0.05).train, **NO_PLACE._asdict())
    assert refusal(lambda: ActivationStream(harvest, batch_size=8, seed=0, n_batches=1)) == (
        "expected vectors with a length above 0, got E|x|^2 = 0: check what wrote the folder"
    )


def test_vectors_of_any_blocks_come_in_order(folder: Path) -> None:
    source = VectorSource(str(folder), device=CPU)
    corpus = source.corpus(0.05)
    which = np.array([0, 17, 18, 46])
    harvest = StoredHarvest(source, corpus.train, layer=0, site="resid_post")
    wanted = made_up(800)
    wanted[300:] = wanted[300:].astype(np.float16)
    at = np.array(numbers(corpus.train)).reshape(-1, BLOCK)[which].reshape(-1)
    assert torch.equal(torch.cat([*harvest.vectors(which)]), torch.from_numpy(wanted[at]))
    found = torch.cat([*harvest.through(lambda x: 2 * x, which)])
    assert torch.equal(found, torch.from_numpy(2 * wanted[at]))


# A whole run


def test_a_run_on_vectors_claims_no_model_and_measures_no_loss(
    on_vectors: Callable[..., Run], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = on_vectors()
    finish(run)
    assert run.config.model.name == NO_MODEL
    assert run.config.places == (NO_PLACE,)
    assert run.config.data.source == str(folder)
    for row in run.evals():
        # Blocks 0, 20 and 40 of 50 are 48 vectors.
        assert row["n_tokens"] == 3 * BLOCK
        assert row["n_predictions"] == 0
        assert [row[name] for name in ("loss_recovered", "ce_clean", "ce_sae", "kl")] == [None] * 4
        assert 0 < row["fvu"] < 1.5
        assert row["l0"] > 0
    metadata = run.sae_cfg("gated")["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == (None, None)
    assert len(run.norm_deciles("gated")) == 10
    assert main(["list", str(run.folder)]) == 0
    assert main(["evaluate", str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert "no language model: loss recovered is not measured" in said
    assert "48 held-out vectors of 100 asked for" in said
    assert "ratio" not in said
    assert "nan" not in said
    for path in [*run.folder.rglob("*.json"), run.folder / "events.jsonl"]:
        assert "bundled" not in path.read_text()
        assert "stdlib" not in path.read_text()


@pytest.mark.slow
def test_an_interrupted_run_on_vectors_resumes_to_the_same_bits(
    on_vectors: Callable[..., Run],
) -> None:
    whole, broken = on_vectors("whole"), on_vectors("broken")
    finish(whole)
    leave_at(broken, 13)
    assert broken.status.state == "cancelled"
    finish(Run.open(broken.folder))
    assert outcome(broken) == outcome(whole)


def test_a_folder_that_has_changed_is_not_trained_on(
    on_vectors: Callable[..., Run], folder: Path
) -> None:
    run = on_vectors()
    leave_at(run, 3)
    np.save(folder / "part-1.npy", made_up(300, seed=1))
    told = refusal(lambda: finish(Run.open(run.folder)))
    assert told.startswith(
        f"expected the vectors this run began with (752 to train on), got others from {folder} "
        "(752): the folder has changed; start a new run"
    )
    told = refusal(lambda: list(evaluate_run(Run.open(run.folder))))
    assert told.endswith("bring the vectors back or train a new run")


def test_a_batch_larger_than_the_folder_asks_for_vectors(on_vectors: Callable[..., Run]) -> None:
    recipe = TrainRecipe(n_tokens=2000, batch_size=1000)
    told = refusal(lambda: finish(on_vectors(train=recipe)))
    assert told == (
        "expected at least one batch of 1000 training vectors, got 752: give more vectors or a "
        "smaller batch_size"
    )


def test_progress_and_labels_on_vectors_are_of_vectors(on_vectors: Callable[..., Run]) -> None:
    run = on_vectors()
    finish(run)
    stages = [*evaluate_run(run), *index_run(run, run.config.saes[0].name)]
    units = {now.stage: now.unit for now in stages}
    assert units["loading"] == units["evaluating"] == units["indexing"] == "vector"
    # A model is asked about captions, none of which is marked, and of no language model.
    index = run.features(run.config.saes[0].name)
    questions: list[str] = []

    class Writer:
        name = "made up"

        def answer(self, question: str, *, max_tokens: int) -> str:
            questions.append(question)
            return "0 1 " * 5

    feature = index.feature(index.random_alive(seed=0))
    write_label(feature, Writer())
    assert "fires on what these captions describe" in questions[0]
    assert "1. picture " in questions[0]
    assert not re.search("<<|token|language model", questions[0])


def test_what_needs_the_model_is_refused_in_a_sentence(on_vectors: Callable[..., Run]) -> None:
    run = on_vectors()
    assert refusal(lambda: load_lm(run.config)) == (
        f"expected a run with a language model, got one of the vectors in "
        f"{run.config.activations}, which has none; train on the model itself for that"
    )


def test_numbers_of_vectors_are_those_of_the_formulas(tmp_path: Path) -> None:
    # Two axes; the SAE writes half of the first and all of the second.
    x = np.tile(np.array([[2, 0], [0, 1], [-2, 0], [0, 3]], np.float32), (8, 1))
    np.save(tmp_path / "a.npy", x)
    source = VectorSource(str(tmp_path), device=CPU)
    sae = ReluSAE(2, 2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc.copy_(torch.diag(torch.tensor([0.5, 1.0])))
        sae.W_dec.copy_(torch.eye(2))
    held_out = source.corpus(0.5).held_out  # one block of 16: four times the four vectors
    steps = evaluating_vectors(
        [sae], StoredHarvest(source, held_out, layer=-1, site="resid_post"), n_tokens=10
    )
    now = next(steps)
    assert (now.done, now.total) == (10, 10)
    with pytest.raises(StopIteration) as end:
        next(steps)
    (found,) = end.value.value
    # f = (1, 0), (0, 1), (0, 0), (0, 3): three of four vectors have one latent.
    assert found.metrics.l0 == 0.75
    # Errors (1, 0), 0, (-2, 0), 0 are 5; about the mean (0, 1) there are 4 + 1 + 0 + 4 + 1 + 4.
    assert found.metrics.fvu == pytest.approx(5 / 14, rel=1e-6)
    # |x_hat|^2 = 1 + 1 + 0 + 9 = 11, x . x_hat = 2 + 1 + 0 + 9 = 12.
    assert found.metrics.gamma == pytest.approx(11 / 12, rel=1e-6)
    assert found.fidelity.n_tokens == 0
    assert np.isnan(found.fidelity.loss_recovered)


@pytest.mark.slow
def test_saes_of_vectors_are_fine_tuned_on_their_folder(
    on_vectors: Callable[..., Run], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(run := on_vectors())
    words = ["finetune", str(run.folder), "--sae", "gated", "--tokens", "160"]
    assert main([*words, "--out", str(folder.parent / "tuned")]) == 0
    tuned = Run.open(folder.parent / "tuned")
    assert (tuned.config.activations, tuned.config.finetuned) == (str(folder), run.id)
    assert tuned.config.places == (NO_PLACE,)
    (row,), (before, _) = tuned.evals(), run.evals()
    assert row["n_tokens"] == 3 * BLOCK
    assert row["loss_recovered"] is None
    assert row["fvu"] < 1.2 * before["fvu"]
    began = [row["fvu"] for row in tuned.metrics()]
    random = [row["fvu"] for row in run.metrics() if row["sae"] == "gated"]
    assert began[0] < 0.5 * random[0]
    for other in (["--loss", "kl"], ["--data", "stdlib"]):
        assert mistake([*words, *other, "--out", str(folder.parent / "x")], capsys).startswith(
            f"expected loss mse and no other text for SAEs of {run.id}, which learnt vectors of a "
        )


@pytest.mark.slow
def test_vectors_that_are_outliers_are_left_out_and_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.load(folder / "part-1.npy")
    rows = [0, 1, 40, 47, 200]  # the first two of block 0, which is held out
    x[rows] *= 1000 / np.linalg.norm(x[rows], axis=1, keepdims=True)
    np.save(folder / "part-1.npy", x)
    words = ["train", "--activations", str(folder), *sweep(), "--out"]
    assert main([*words, str(folder.parent / "all")]) == 0
    assert "0.40 % of vectors are longer than 10 times the median" in capsys.readouterr().err
    out = folder.parent / "ordinary"
    assert main([*words, str(out), "--max-norm-ratio", "10"]) == 0
    run = Run.open(out)
    for row in run.evals():
        assert (row["n_tokens"], row["n_outliers"]) == (3 * BLOCK - 2, 2)
        assert row["fvu"] == row["fvu_ordinary"]
    for row in Run.open(folder.parent / "all").evals():
        assert (row["n_tokens"], row["n_outliers"]) == (3 * BLOCK, 2)
    (noted,) = (event for event in run.events() if event["event"] == "set up")
    assert noted["mean_square_norm"] < 100
    assert main(["index", str(out), "--sae", "relu-0.05"]) == 0
    manifest = run.features("relu-0.05").manifest
    assert (manifest.n_tokens, manifest.n_left_out) == (795, 5)


@pytest.mark.slow
def test_labels_are_written_from_captions(
    on_vectors: Callable[..., Run], chat: Chat, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    finish(run := on_vectors())
    assert main(["index", str(run.folder), "--sae", "relu"]) == 0
    words = ["label", str(run.folder), "--sae", "relu", "--most", "1", "--with", "small"]
    assert main([*words, "--remote"]) == 0
    (label,) = run.features("relu").labels.latest("label").values()
    assert label.model == "small"
    assert 0 <= (label.score or 0) <= 1
    asked, scored = chat.questions
    assert asked.count(". picture ") == 12
    assert scored.count(". picture ") == 10
    assert "On which of these 10 captions does it fire?" in scored
    assert not re.search("<<|token|language model", asked + scored)
    said = capsys.readouterr().err
    assert f"up to 22 captions of each, out of {folder}" in said
    told = mistake([*words, "--remote", "--again", "--score", "fuzzing"], capsys)
    assert told.startswith("expected detection of captions, got fuzzing")
    assert len(chat.questions) == 2


# Harvest on one machine, train on another


@pytest.fixture
def harvested(tiny_lm_folder: Path, small_text: Path, tmp_path: Path) -> Path:
    """A folder with the activations of a `small` run."""
    return harvest_to(tiny_lm_folder, small_text, tmp_path / "there")


def harvest_to(lm: Path, text: Path, folder: Path) -> Path:
    words = ["harvest", "--model", str(lm), "--data", str(text), "--to", str(folder)]
    place = SMALL[: SMALL.index("--arch")]
    amounts = ["--tokens", "320", "--eval-tokens", "64", "--device", "cpu"]
    assert main([*words, *place, *amounts]) == 0
    return folder


@pytest.fixture(scope="module")
def harvest_once(
    tiny_lm_folder: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return harvest_to(tiny_lm_folder, small_text, tmp_path_factory.mktemp("once") / "there")


def without_seconds(run: Run) -> list[dict[str, Any]]:
    rows = run.metrics()
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def sweep() -> list[str]:
    return SMALL[SMALL.index("--arch") :]


def test_a_run_from_a_harvested_folder_has_the_bits_of_one_run(
    harvested: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "from-folder"
    assert main(["train", "--activations", str(harvested), *sweep(), "--out", str(out)]) == 0
    ours, theirs = Run.open(out), Run.open(trained)
    for spec in theirs.config.saes:
        one, other = (
            load_file(r.sae_folder(spec.name) / "sae_weights.safetensors") for r in (ours, theirs)
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    states = [load_state(run.folder / "resume")["trainer"] for run in (ours, theirs)]
    for state in states:
        del state["seconds"]
    assert flat(states[0]) == flat(states[1])
    assert without_seconds(ours) == without_seconds(theirs)
    assert ours.config.model == theirs.config.model
    assert ours.config.data == theirs.config.data
    metadata = [run.sae_cfg("gated-0.4")["metadata"] for run in (ours, theirs)]
    same = [(m["model_name"], m["hook_name"], m["context_size"]) for m in metadata]
    assert same[0] == same[1]
    # The same held-out vectors, in other sums.
    for one, other in zip(ours.evals(), theirs.evals(), strict=True):
        for name in ("l0", "fvu", "gamma", "cosine", "alive_fraction"):
            assert one[name] == pytest.approx(other[name], rel=1e-9)
        assert one["n_tokens"] == other["n_tokens"]
        assert one["loss_recovered"] is None
    tokens = [
        load_file(run.folder / "evaluated_tokens.safetensors")["ids"] for run in (ours, theirs)
    ]
    assert np.array_equal(tokens[0], tokens[1])
    assert ours.samples() == theirs.samples()


def test_a_harvested_folder_says_what_it_is_of(harvested: Path, tiny_lm_folder: Path) -> None:
    model, data = described(harvested)
    assert (model.name, model.layer, model.site) == (str(tiny_lm_folder), 1, "mlp_hidden")
    assert data is not None
    about = json.loads((harvested / "about.json").read_text())
    assert about["splits"]["train"]["n_tokens"] >= 320
    assert about["special"] == [0]
    source = VectorSource(str(harvested), device=CPU)
    lm = load_model(str(tiny_lm_folder))
    corpus = load_corpus(data, lm.tokenizer, n_tokens=320, model_n_ctx=lm.n_ctx, n_held_out=64)
    for own, theirs in zip(
        (source.corpus(0.5).train, source.corpus(0.5).held_out),
        (corpus.train, corpus.held_out),
        strict=True,
    ):
        assert torch.equal(own[:].ids, theirs[:].ids)
        assert torch.equal(own[:].mask, theirs[:].mask)
        which = np.arange(len(own))
        read = StoredHarvest(source, own, layer=1, site="mlp_hidden").vectors(which)
        wanted = Harvest(lm, theirs, layer=1, site="mlp_hidden").vectors(which)
        assert torch.equal(torch.cat([*read]), torch.cat([*wanted]))
    vocabulary = harvested / "vocabulary.json"
    path = vocabulary.rename(harvested / ".kept")
    assert refusal(source.readable, [(source.corpus(0.5).train, np.arange(1))]) == (
        f"expected {harvested / 'vocabulary.json'}, which harvest writes, found none; give its "
        "command again"
    )
    for damaged in ("{", "{}", "[]", "[1, 2]"):
        vocabulary.write_text(damaged)
        assert refusal(source.readable, [(source.corpus(0.5).train, np.arange(1))]).endswith(
            f"texts of tokens in {vocabulary}, got others; give its command again"
        )
    path.rename(vocabulary)
    x = load_file(shard := harvested / "train-00000.safetensors")["x"]
    save_file({"x": x}, shard)
    source = VectorSource(str(harvested), device=CPU)
    assert refusal(source.corpus, 0.5) == (
        f"expected 0 vectors of the train split in {harvested}, as its tokens say, got "
        f"{len(x):,}: harvest them again"
    )


def test_a_harvest_goes_on_and_refuses_another_in_its_folder(
    harvested: Path, capsys: pytest.CaptureFixture[str], tiny_lm_folder: Path, small_text: Path
) -> None:
    (harvested / "train-00000.safetensors").unlink()
    words = [
        "train",
        "--activations",
        str(harvested),
        *sweep(),
        "--out",
        str(harvested.parent / "run"),
    ]
    assert mistake(words, capsys).startswith(
        f"expected 1 shards train-* in {harvested}, found 0: the harvest was interrupted"
    )
    again = [
        "harvest",
        "--model",
        str(tiny_lm_folder),
        "--data",
        str(small_text),
        "--device",
        "cpu",
    ]
    again += ["--layer", "1", "--site", "mlp_hidden", "--tokens", "320", "--to", str(harvested)]
    assert main([*again, "--eval-tokens", "64"]) == 0
    assert (harvested / "train-00000.safetensors").is_file()
    assert mistake([*again, "--eval-tokens", "99"], capsys).startswith(
        "expected a new or empty folder, or one of the same harvest to go on with, got other files"
    )
    again[again.index("--to") + 1] = str(small_text)
    assert mistake(again, capsys) == (
        f"expected a folder at {small_text}, or a place to make one: File exists; choose another "
        "(--to)"
    )


@pytest.fixture
def filled(
    tiny_lm: LanguageModel, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CachedActivations:
    """The activation cache of 300 tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = RunConfig.model_validate(
        {"saes": [{"name": "a", "architecture": "relu", "d_sae": 2, "sparsity": 1}]}
        | {"train": {"n_tokens": 5000}, "data": {"source": str(small_text)}}
    ).data
    corpus = load_corpus(data, tiny_lm.tokenizer, n_tokens=300, model_n_ctx=tiny_lm.n_ctx)
    cache = open_cache(tiny_lm, corpus.train, [Place(1, "mlp_out")])
    cache.fill()
    return cache


def test_the_activation_cache_is_such_a_folder(
    filled: CachedActivations, tiny_lm_folder: Path
) -> None:
    cache = filled
    model, text = described(cache.folder)
    assert (model.name, model.hook_name, text) == (
        str(tiny_lm_folder),
        "blocks.1.hook_mlp_out",
        None,
    )
    source = VectorSource(str(cache.folder), device=CPU)
    assert not source.is_harvested
    (vectors,) = source.vectors.rows(np.arange(len(source.vectors)))
    which = np.arange(len(cache.sequences))
    assert np.array_equal(vectors, torch.cat([*cache.vectors(which)]).numpy())


@pytest.mark.slow
def test_vectors_of_the_activation_cache_are_shown_with_their_tokens(
    filled: CachedActivations, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    words = ["train", "--activations", str(filled.folder), *sweep(), "--out", str(tmp_path / "run")]
    assert main([*words, "--tokens", "160"]) == 0
    assert main(["index", str(tmp_path / "run"), "--sae", "relu-0.05"]) == 0
    index = Run.open(tmp_path / "run").features("relu-0.05")
    feature = index.feature(int(np.argmax(index.table["fired"])))
    ids, mask = filled.sequences[:]
    rows = [[tiny_lm.tokenizer.decode(i).strip() for i in row] for row in ids.tolist()]
    wanted = {
        " ".join([*row[max(0, at - 12) : at], f"[{row[at]}]"])
        for row, counted in zip(rows, mask.tolist(), strict=True)
        for at in np.flatnonzero(counted)
    }
    shown = {example.tokens[example.at] for example in feature.top(20)}
    assert len(shown) > 5
    assert {each.replace("[ ", " [").strip() for each in shown} <= wanted


def test_a_cache_whose_tokens_cannot_be_told_says_so_and_shows_its_rows(
    filled: CachedActivations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = filled.folder.glob("*.safetensors")
    save_file({"x": load_file(shard)["x"]}, shard)  # as earlier versions wrote it
    words = ["train", "--activations", str(filled.folder), *sweep(), "--out", str(tmp_path / "run")]
    assert main([*words, "--tokens", "160"]) == 0
    assert (
        f"gsae_core: expected token ids of {filled._model.name} beside the vectors in {shard}, got "
        "none or others: the files' names and rows are shown in place of texts; harvest writes a "
        "folder that has them"
    ) in capsys.readouterr().err.splitlines()
    samples = Run.open(tmp_path / "run").samples()
    assert samples is not None
    (latent, *_) = samples["saes"]["relu-0.05"]["latents"]
    assert latent["examples"][0]["tokens"][0].startswith(f"{shard.name} row ")


WRONG: dict[str, list[Any]] = {
    "model": [7.5, [], None],
    "layer": ["1", -1, 0.5, None],
    "site": ["resid", 0, []],
    "dtype": ["int8", 32, None],
    "numerics": [7.5, [], None],
    "revision": [7.5, []],
    "data": ["stdlib", [], {"train": 3}, {"n_ctx": "16"}],
    "splits": [
        *(None, 3, [], {}, {"train": {"n_shards": 1}}),
        *({"train": wrong, "held_out": wrong} for wrong in (3, {}, [1], None)),
        *({"train": {"n_shards": n}, "held_out": {"n_shards": n}} for n in ("1", 0, -1, None)),
    ],
    "text": [7.5, [], None],
    "n_ctx": ["16", 0, 7.5, [], None],
    "bos": ["yes", 1, None],
    "special": [None, 0, ["a"], {}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_key_of_about_json_of_a_wrong_kind_is_one_sentence(name: str, harvest_once: Path) -> None:
    about = json.loads((path := harvest_once / "about.json").read_text())
    for value in WRONG[name]:
        try:
            path.write_text(json.dumps(about | {name: value}))
            for act in (described, open_vectors):
                told = refusal(act, harvest_once)
                assert told.startswith(f"expected what harvest says of a folder in {path}, got ")
        finally:
            path.write_text(json.dumps(about))


# Flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "gpt2"], "--model: expected none with --activations, got 'gpt2'; only"),
        (["--layer", "3"], "--layer: expected none with --activations, got 3; only"),
        (["--data", "stdlib"], "--data: expected none with --activations, got 'stdlib'; only"),
        (["--cache-activations"], "expected activations alone, got cache_activations too"),
        (["--tokens", "8"], "expected n_tokens of at least one batch (16), got 8"),
        (["--batch-size", "1000", "--tokens", "1000"], "expected at least one batch of 1000"),
    ],
)
def test_flags_that_say_something_else_are_refused(
    folder: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(folder.parent / "run")]
    told = mistake(["train", "--activations", str(folder), *sweep(), *out, *flags], capsys)
    assert sentence in told
    assert not (folder.parent / "run").exists()


def test_flags_that_say_the_same_as_a_harvested_folder_are_taken(
    harvested: Path, tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gsae_core.cli.arguments import parse, run_config
    from gsae_core.cli.main import COMMANDS

    words = ["train", "--activations", str(harvested), *sweep(), "--layer", "1"]
    config = run_config(parse([*words, "--model", str(tiny_lm_folder)], COMMANDS))
    assert config.model.name == str(tiny_lm_folder)
    assert "--site: expected none" in mistake([*words, "--site", "resid_pre"], capsys)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokens", "10"], "expected --to, got none"),
        (["--to", "x"], "expected --tokens, got none"),
        (["--to", "x", "--tokens", "0"], "--tokens: expected a number greater than 0, got 0"),
        (["--to", "x", "--tokens", "9", "--layer", "0", "1"], "expected one layer and one site"),
    ],
)
def test_a_harvest_needs_a_folder_an_amount_and_one_place(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in mistake(["harvest", *flags], capsys)


def test_a_run_from_a_run_on_vectors_keeps_its_folder(
    on_vectors: Callable[..., Run], folder: Path
) -> None:
    from gsae_core.cli.arguments import parse, run_config
    from gsae_core.cli.main import COMMANDS

    run = on_vectors()
    words = ["train", "--config", str(run.folder / "config.json"), "--held-out", "0.2"]
    config = run_config(parse(words, COMMANDS))
    assert config.activations == str(folder)
    assert config.model.name == NO_MODEL
    assert config.data.held_out == 0.2
    assert config.data.source == str(folder)


def test_old_configs_say_nothing_of_vectors(run: Run) -> None:
    assert "activations" not in json.loads((run.folder / "config.json").read_text())
