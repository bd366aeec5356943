"""Several layers and sites in one pass of the model: each SAE is what it would be alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny
from refusals import refusal
from tiny_runs import finish, leave_at, outcome, tiny_config
from torch import Tensor

from gsae_core.analysis.generation import next_token_shift, steered_logits
from gsae_core.analysis.prompt import analyse
from gsae_core.app import cache, prompt_view, steer_view
from gsae_core.app.pickers import beside
from gsae_core.checkpoints.checkpoint import load_sae, read_cfg
from gsae_core.config import SITES, ModelConfig, Place, RunConfig, SAESpec, TrainConfig, TrainRecipe
from gsae_core.lm import harvest as harvesting
from gsae_core.lm import stream as streaming
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest, open_cache
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.stream import ActivationStream, default_chunk_vectors
from gsae_core.runs.plan.cost import memory_parts, state_bytes
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_run
from gsae_core.runs.work.setup import load_text
from gsae_core.sae.architectures import GatedSAE
from gsae_core.training.trainer import Trainer

RESID, LATER, MLP = Place(0, "resid_post"), Place(1, "resid_post"), Place(1, "mlp_out")
WIDE = Place(1, "mlp_hidden")  # 20 wide in the tiny models; the others are 12


def at(*places: Place) -> tuple[SAESpec, ...]:
    """Return a Gated SAE for each place, and a ReLU SAE for the last."""
    return tuple(
        SAESpec(
            name=f"{kind}-l{place.layer}-{place.site}",
            architecture=kind,
            d_sae=24,
            sparsity=0.3,
            layer=place.layer,
            site=place.site,
        )
        for place in places
        for kind in ("gated", "relu")
        if kind == "gated" or place == places[-1]
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, words: Path) -> Run:
    """A finished run of four SAEs at three places."""
    config = tiny_config(tiny_lm_folder, words, saes=at(RESID, LATER, MLP))
    run = Run.create(tmp_path_factory.mktemp("places") / "several", config)
    finish(run)
    return run


def sequences(n: int = 12, n_ctx: int = 7) -> SequenceSet:
    rows = np.random.default_rng(0).integers(1, 40, (n, n_ctx), np.uint16)
    rows[:, 0] = 0
    return SequenceSet(rows, (0,))


# --- The config


def test_a_spec_reads_the_runs_place_unless_it_names_its_own() -> None:
    config = RunConfig(
        model=ModelConfig(layer=3, site="attn_z"),
        saes=(
            SAESpec(name="a", architecture="relu", d_sae=4, sparsity=1),
            SAESpec(name="b", architecture="relu", d_sae=4, sparsity=1, layer=0),
            SAESpec(name="c", architecture="relu", d_sae=4, sparsity=1, site="attn_z"),
        ),
        train=TrainRecipe(n_tokens=4096),
    )
    assert config.places == (Place(3, "attn_z"), Place(0, "attn_z"))
    assert config.reads == [0, 1, 0]
    assert config.place_of("b").hook_name == "blocks.0.attn.hook_z"
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# --- One pass


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_one_pass_gives_every_site_the_bits_of_its_own(family: str, tiny_tokenizer: Any) -> None:
    # In gpt_neox attention and MLP read the same input, side by side.
    model = load_model(tiny(family), tokenizer=tiny_tokenizer)
    ids = sequences()[:3].ids
    places = [Place(layer, site) for layer in (1, 0) for site in reversed(SITES)]
    found = model.harvest_places(ids, places)
    for place, x in zip(places, found, strict=True):
        assert torch.equal(x, model.harvest(ids, layer=place.layer, site=place.site))
        assert not x.is_inference()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_the_pass_stops_at_the_deepest_place(tiny_lm: LanguageModel) -> None:
    deeper: list[str] = []
    block = tiny_lm.hf.transformer.h[1]
    handle = block.mlp.register_forward_hook(lambda *_: deeper.append("mlp"))
    try:
        tiny_lm.harvest_places(sequences()[:2].ids, [Place(1, "attn_out"), RESID])
        assert deeper == []
        tiny_lm.harvest_places(sequences()[:2].ids, [RESID, MLP])
        assert deeper == ["mlp"]
    finally:
        handle.remove()


def test_a_place_that_the_model_lacks_is_refused_by_name(tiny_lm: LanguageModel) -> None:
    ids = sequences()[:1].ids
    said = refusal(tiny_lm.harvest_places, ids, [RESID, Place(5, "mlp_out")])
    assert said.startswith("expected a layer from 0 to 1, got 5")


def batches(model: LanguageModel, *places: Place, **settings: Any) -> ActivationStream:
    (layer, site), *beside = places
    harvest = Harvest(model, sequences(), layer=layer, site=site, beside=beside)
    settings = {"batch_size": 5, "seed": 3, "n_batches": 20, "chunk_vectors": 20} | settings
    return ActivationStream(harvest, **settings)


def test_the_batches_of_each_place_are_those_it_has_alone(tiny_lm: LanguageModel) -> None:
    # 72 vectors, 20 batches of 5: an epoch and part of the next, in chunks.
    places = (MLP, RESID, WIDE)
    together = list(batches(tiny_lm, *places).batches_of_each())
    assert [x.shape for x in together[0]] == [(5, 12), (5, 12), (5, 20)]
    for number, place in enumerate(places):
        alone = list(batches(tiny_lm, place).batches())
        assert all(torch.equal(x[number], y) for x, y in zip(together, alone, strict=True))
    jumping = batches(tiny_lm, *places)
    assert all(
        torch.equal(x, y) for x, y in zip(jumping.batch_of_each(17), together[17], strict=True)
    )


def test_one_pass_serves_all_places(tiny_lm: LanguageModel) -> None:
    passes: list[int] = []
    embedding = tiny_lm.hf.transformer.wte
    handle = embedding.register_forward_hook(lambda _m, args, _o: passes.append(len(args[0])))
    try:
        list(batches(tiny_lm, MLP, RESID, scale="none", n_batches=14).batches_of_each())
    finally:
        handle.remove()
    assert sum(passes) == 12  # 70 of the 72 vectors are asked for; each sequence has 6


def test_the_chunk_is_that_of_the_widest_place(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MAX_CHUNK_BYTES", 4 * 20 * 15)  # 15 vectors of 20 numbers
    assert default_chunk_vectors(12, 100) == 25
    run = batches(tiny_lm, MLP, WIDE, chunk_vectors=None)
    assert run.chunk_vectors == 15
    assert batches(tiny_lm, MLP, LATER, chunk_vectors=None).chunk_vectors == 25


def test_each_place_is_scaled_by_its_own_length(tiny_lm: LanguageModel) -> None:
    run = batches(tiny_lm, MLP, WIDE)
    each = zip(run.batch_of_each(0), run.scales, run.mean_square_norms, strict=True)
    for x, scale, power in each:
        assert scale == pytest.approx(power**-0.5)
        assert 0.3 < float(x.square().sum(1).mean()) < 3
    assert run.scale == run.scales[0] != run.scales[1]


def test_a_vector_that_is_not_finite_is_told_with_its_place(tiny_lm: LanguageModel) -> None:
    def spoil(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return out.index_fill(1, torch.tensor([2]), math.inf)

    handle = tiny_lm.hf.transformer.h[1].mlp.register_forward_hook(spoil)
    try:
        harvest = Harvest(tiny_lm, sequences(4), layer=0, site="resid_post", beside=[MLP])
        said = refusal(lambda: list(harvest.parts(np.arange(4))))
    finally:
        handle.remove()
    assert said.startswith("expected finite activations at mlp_out of layer 1, got 4 of 24 vectors")


# --- The cache


def test_missing_shards_of_all_places_come_from_one_pass_and_equal_those_of_each(
    tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "alone"))
    # Passes of 2 sequences; shards of 4 where a vector has 12 numbers, of 2 where it has 20.
    monkeypatch.setattr(harvesting, "CPU_PASS_TOKENS", 14)
    monkeypatch.setattr(harvesting, "SHARD_BYTES", 4 * 7 * 12 * 4)
    text, which, places = sequences(10), np.array([0, 3, 4, 9]), (MLP, WIDE, RESID)
    wanted = []
    for place in places:
        cache = open_cache(tiny_lm, text, [place])
        cache.fill()
        wanted.append(torch.cat([*cache.vectors(which)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "together"))
    list(open_cache(tiny_lm, text, [RESID]).vectors(np.array([5])))  # the second shard of three
    read: list[int] = []
    embedding = tiny_lm.hf.transformer.wte
    handle = embedding.register_forward_hook(lambda _m, args, _o: read.append(len(args[0])))
    try:
        caches = open_cache(tiny_lm, text, places)
        caches.fill()
        assert sum(read) == 10
        found = [torch.cat(parts) for parts in zip(*caches.parts(which), strict=True)]
        assert sum(read) == 10
    finally:
        handle.remove()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert torch.equal(torch.cat([*caches.vectors(which)]), wanted[0])
    assert names(tmp_path / "together") == names(tmp_path / "alone")
    assert len(names(tmp_path / "alone")) == 3 + 5 + 3


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_run_from_the_cache_of_several_places_has_the_bits_of_one_without(
    new_run: Callable[..., Run], several: Run
) -> None:
    run = new_run("cached", saes=several.config.saes, cache_activations=True)
    finish(run)
    assert weights(run) == weights(several)


# --- The trainer


def test_a_trainer_is_told_which_batch_each_sae_reads() -> None:
    cfg = TrainConfig(n_tokens=8, batch_size=4, sparsity=(0.1,))
    saes = [GatedSAE(3, 5), GatedSAE(2, 5)]
    trainer = Trainer(saes, cfg, reads=[1, 0])
    trainer.step((torch.randn(4, 2), torch.randn(4, 3)))
    assert refusal(trainer.step, torch.randn(4, 2)) == (
        "expected 2 batches a step, one for each place, got 1"
    )
    assert refusal(trainer.step, (torch.randn(4, 2), torch.randn(4, 2))).startswith(
        "expected batches of shape (batch_size, d_in) = (4, 3), got (4, 2)"
    )
    for reads in ([0], [0, 2], [1, 1]):
        assert refusal(Trainer, saes, cfg, reads=reads) == (
            "expected the number of a batch from 0 for each of 2 SAEs, and every batch read, got "
            f"reads={reads}"
        )
    assert "expected SAEs of one d_in, got 2 and 3" in refusal(Trainer, saes, cfg)


# --- Runs


def weights(run: Run) -> dict[str, bytes]:
    """Return the bytes of each SAE's weights by name."""
    return {
        spec.name: (run.sae_folder(spec.name) / "sae_weights.safetensors").read_bytes()
        for spec in run.config.saes
    }


@pytest.mark.parametrize("place", [RESID, pytest.param(LATER, marks=pytest.mark.slow), MLP])
def test_each_sae_has_the_bits_and_the_numbers_that_it_has_alone(
    new_run: Callable[..., Run], several: Run, place: Place
) -> None:
    together, measured = weights(several), {row["name"]: row for row in several.evals()}
    # A run of one place, as every version writes it.
    here = [spec for spec in several.config.saes if several.config.place(spec) == place]
    saes = [spec.model_copy(update={"layer": None, "site": None}) for spec in here]
    model = several.config.model.model_copy(update=place._asdict())
    run = new_run(saes=tuple(saes), model=model)
    finish(run)
    for row in run.evals():
        assert row == measured[row["name"]]
        assert (row["layer"], row["site"]) == place
    for name, own in weights(run).items():
        assert own == together[name]
        alone, beside = (read_cfg(each.sae_folder(name)) for each in (run, several))
        assert alone == beside
        assert beside["metadata"]["hook_name"] == place.hook_name
        for file in ("norm_deciles.json", "feature_stats.safetensors"):
            found = [(each.sae_folder(name) / file).read_bytes() for each in (run, several)]
            assert found[0] == found[1]


def test_the_event_says_what_each_place_measured(several: Run) -> None:
    (event,) = [event for event in several.events() if event["event"] == "set up"]
    assert list(event["places"]) == [place.hook_name for place in (RESID, LATER, MLP)]
    first = event["places"][RESID.hook_name]
    assert first == {key: event[key] for key in ("activation_scale", "mean_square_norm")}
    for name, cfg in ((spec.name, read_cfg(several.sae_folder(spec.name))) for spec in at(MLP)):
        scale = event["places"][MLP.hook_name]["activation_scale"]
        assert cfg["metadata"]["activation_scale"] == scale, name


@pytest.mark.slow
def test_stopped_and_resumed_a_run_of_two_places_ends_with_the_same_bits(
    new_run: Callable[..., Run], several: Run, one_thread: None
) -> None:
    run = new_run("resumed", saes=several.config.saes)
    leave_at(run, 8)  # inputs that compete for the revival at step 10 are in the state
    leave_at(Run.open(run.folder), 17)
    finish(Run.open(run.folder))
    whole = outcome(several)
    again = outcome(run)
    assert again["step"] == whole["step"]
    assert again["trainer"] == whole["trainer"]
    assert again["evals"] == whole["evals"]
    assert again["files"] == whole["files"]


@pytest.mark.slow
def test_an_index_reads_the_place_of_its_sae(several: Run) -> None:
    for name, place in (("gated-l0-resid_post", RESID), ("relu-l1-mlp_out", MLP)):
        for _ in index_run(several, name, n_tokens=100):
            pass
        manifest = several.features(name).manifest
        assert (manifest.layer, manifest.site) == place


def test_a_sample_of_features_is_of_each_saes_own_place(several: Run) -> None:
    sample = several.samples()
    assert sample is not None
    assert set(sample["saes"]) == {spec.name for spec in several.config.saes}


# --- Pages


@pytest.mark.slow
def test_prompt_and_steer_read_the_place_of_their_sae(several: Run) -> None:
    text, model = "w1 w2 w3 w4", cache.language_model(several).model
    prompt = cache.prompt(several, text)
    for spec in several.config.saes[1:3]:
        layer, site = several.config.place(spec)
        assert (spec.layer, spec.site) == (layer, site)
        sae = load_sae(several.sae_folder(spec.name))
        (look,) = prompt_view.read(several, (spec.name,), text).looks
        (alone,) = analyse(model, [sae], prompt, layer=layer, site=site)
        pd.testing.assert_frame_equal(look.features, alone.features)
        push = steer_view.Push(int(look.features["latent"].iloc[0]), "add", 2.0)
        settings = steer_view.Settings((), spec.name, None, text, (push,), True, 1, 0.0, 0)
        made = steer_view.start(several, settings)
        before, after = (
            steered_logits(model, prompt, made.steerings[kind], layer=layer, site=site)[-1]
            for kind in ("unsteered", "steered")
        )
        wanted = next_token_shift(before, after, model=model)
        assert made.shifts["steered"].kl == wanted.kl > 0
        vectors = cache._held_out_vectors(several, several.config.place(spec))
        corpus = load_text(several.config, model)
        x = model.harvest(corpus.held_out[:1].ids, layer=layer, site=site)
        mask = corpus.held_out[:1].mask
        assert torch.equal(vectors[: int(mask.sum())], x[mask])


def test_an_sae_is_compared_with_those_of_its_own_place(several: Run) -> None:
    names = [spec.name for spec in several.config.saes]
    assert beside(several, "gated-l1-mlp_out", names) == "relu-l1-mlp_out"
    assert beside(several, "gated-l0-resid_post", names) is None


# --- What it costs


def test_memory_and_disk_count_every_place() -> None:
    def config(*places: Place) -> RunConfig:
        return RunConfig(saes=at(*places), train=TrainRecipe(n_tokens=4096))

    def width(site: str) -> int:
        return 20 if site == "mlp_hidden" else 12

    def parts(*places: Place) -> dict[str, int]:
        return memory_parts(config(*places), width, chunk_vectors=100, n_cores=1)

    # A float32 chunk and its shuffled copy.
    assert parts(MLP)["chunk of activations"] == 4 * 2 * 100 * 12
    assert parts(MLP, WIDE)["chunk of activations"] == 4 * 2 * 100 * (12 + 20)
    # Gated: 2 * 12 * 24 + 3 * 24 + 12 = 660 numbers, 1052 where d_in is 20; ReLU, one vector: 1004.
    assert state_bytes(config(MLP, WIDE), width) == 4 * 3 * (660 + 1052 + 1004)
