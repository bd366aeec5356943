"""TransformerLens' own small models by name: made-up checkpoints of their layout, from a Hub."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from lens_checkpoints import CONFIG, files, forward, weights
from refusals import refusal
from tiny_runs import write_text

from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.cli.main import main
from gsae_core.config import SITES, DataConfig
from gsae_core.lm.catalog import LENS_MODELS, ModelShape, cached_models, choices, model_facts
from gsae_core.lm.model import Splice, load_model
from gsae_core.lm.preview import preview
from gsae_core.runs.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # TransformerLens' own
IDS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
GELU_1L = "NeelNanda/GELU_1L512W_C4_Code"


@pytest.fixture
def words(tiny_tokenizer: Any) -> str:
    """The folder of a tokenizer, where the real ones name one on the Hub."""
    return tiny_tokenizer.name_or_path


@pytest.fixture
def gelu_1l(hub: Hub, words: str) -> Hub:
    """A Hub with a made-up GELU-1L."""
    hub.add(GELU_1L, files(CONFIG, weights(CONFIG), words))
    return hub


def test_gelu_1l_computes_what_its_formulas_say(gelu_1l: Hub) -> None:
    model = load_model("gelu-1l")
    assert (model.name, model.family, model.numerics) == ("gelu-1l", "native", "raw")
    assert (model.n_layers, model.d_model, model.n_ctx, model.d_vocab) == (1, 12, 16, 40)
    assert [model.width(site) for site in SITES] == [12, 12, 20, 12, 8, 12]
    wanted = forward(weights(CONFIG), CONFIG, IDS)
    for site in SITES:
        x = model.harvest(IDS, layer=0, site=site)
        assert (x - wanted[site]).abs().max() < 1e-5
        splice = Splice(model, IDS, layer=0, site=site)
        assert torch.equal(splice.run(splice.x), splice.logits)
    assert (model.logits(IDS) - wanted["logits"]).abs().max() < 1e-5
    assert model.tokenizer("w0 w37").input_ids == [2, 39]
    fetched = {request.path.rpartition("/")[2] for request in gelu_1l.requests("GET", "/resolve/")}
    assert "model_final.pth" in fetched
    assert not fetched & {"optimizer_final.pth", "model_1000.pth"}


@pytest.mark.slow
def test_a_revision_is_that_of_weights_and_config(gelu_1l: Hub, words: str) -> None:
    old = gelu_1l.repos["models", GELU_1L].refs["main"]
    wider = CONFIG | {"d_mlp": 24}
    gelu_1l.repos["models", GELU_1L].commit({**files(wider, weights(wider, seed=1), words)})
    assert load_model(GELU_1L).width("mlp_hidden") == 24
    model = load_model("gelu-1l", revision=old)
    wanted = forward(weights(CONFIG), CONFIG, IDS)["logits"]
    assert (model.logits(IDS) - wanted).abs().max() < 1e-5
    assert refusal(load_model, "gelu-1l", revision="v9").startswith(
        f"expected a branch, tag or commit of {GELU_1L!r}, got 'v9'"
    )


@pytest.mark.slow
def test_offline_it_comes_from_the_cache_or_says_that_it_is_not_there(
    gelu_1l: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    # It has taken the name of the folder when it was imported, before the Hub of this test.
    cache = "huggingface_hub.utils._cache_manager.HF_HUB_CACHE"
    monkeypatch.setattr(cache, huggingface_hub.constants.HF_HUB_CACHE)
    online = load_model("gelu-1l").logits(IDS)
    found = cached_models()
    assert list(found) == [GELU_1L]
    assert choices(found)[1] == GELU_1L
    assert model_facts("gelu-1l", found).where == "cached"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_model("gelu-1l").logits(IDS), online)
    assert refusal(load_model, "gelu-2l") == (
        "expected to download 'NeelNanda/GELU_2L512W_C4_Code' from the Hub, but we are offline and "
        "it is not in the cache; give a local model folder, or 'bundled' for the model that ships "
        "with the package"
    )


@pytest.mark.slow
@pytest.mark.parametrize("site", ["mlp_hidden", "mlp_out"])
def test_attention_only_models_have_no_mlp(hub: Hub, words: str, site: str) -> None:
    config = CONFIG | {"attn_only": True, "n_layers": 2}
    hub.add(LENS_MODELS["attn-only-2l"], files(config, weights(config), words))
    model = load_model("attn-only-2l")
    assert refusal(model.harvest, IDS, layer=1, site=site) == (
        f"expected a site that this TransformerBridge has, got {site!r}; "
        "layer 1 has resid_pre, resid_post, attn_z, attn_out"
    )


@pytest.mark.slow
def test_the_oldest_models_are_stored_transposed_and_under_other_names(
    hub: Hub, words: str
) -> None:
    config = CONFIG | {"act_fn": "gelu"}
    del config["normalization"]
    state = {}
    for name, value in weights(CONFIG).items():
        turned = "W_" in name and value.ndim > 1
        state[name.replace("ln", "norm")] = value.transpose(-2, -1) if turned else value
    state["norm.w"], state["norm.b"] = state.pop("norm_final.w"), state.pop("norm_final.b")
    repo = LENS_MODELS["solu-1l-pile"]
    hub.add(repo, files(config | {"normalization_type": "LN"}, state, words))
    wanted = forward(weights(CONFIG), CONFIG, IDS)["logits"]
    assert (load_model("solu-1l-pile").logits(IDS) - wanted).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"config.json": b"{}"}, "KeyError: 'd_model'"),
        ({"model_final.pth": b"not weights"}, "UnpicklingError: a file of more than tensors"),
        ({"model_final.pth": None}, "IndexError"),
        ({"config.json": None}, "expected a config.json in"),
    ],
)
def test_files_that_make_no_model_are_told(
    gelu_1l: Hub, changed: dict[str, bytes | None], reason: str
) -> None:
    gelu_1l.repos["models", GELU_1L].commit(changed)
    said = refusal(load_model, "gelu-1l")
    assert reason in said
    assert GELU_1L in said


@pytest.mark.slow
def test_weights_of_another_size_and_shortformer_positions_are_refused(
    hub: Hub, words: str
) -> None:
    hub.add(GELU_1L, files(CONFIG | {"d_mlp": 24}, weights(CONFIG), words))
    wanted = "expected the config.json and the weights (*final.pth) of a TransformerLens model in "
    wanted += repr(GELU_1L)
    assert refusal(load_model, "gelu-1l").startswith(f"{wanted}, got some that make none (Runtime")
    config = CONFIG | {"shortformer_pos": True}
    hub.repos["models", GELU_1L].commit({**files(config, weights(CONFIG), words)})
    assert "shortformer positions, which TransformerLens 4 does not comp" in refusal(
        load_model, "gelu-1l"
    )


def test_without_transformer_lens_or_with_an_old_one_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources.tl_legacy", None)
    assert refusal(load_model, "gelu-1l") == (
        f"expected transformer-lens 4.3 or later for {GELU_1L!r}, found an earlier one; "
        'pip install "transformer-lens>=4.3"'
    )
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    assert 'pip install "gsae-core[lens]"' in refusal(load_model, "gelu-1l")


def test_the_names_are_transformer_lens_own() -> None:
    from transformer_lens.tools.model_registry.registry_io import load_model_aliases

    theirs = load_model_aliases()
    assert {name for name, repo in LENS_MODELS.items() if name not in theirs[repo]} == set()
    assert set(LENS_MODELS) <= set(choices({}))
    assert model_facts("gelu-2l", {}).shape == ModelShape(512, 2048, 512, 2)
    assert model_facts("solu-12l", {}).shape is None


def test_the_train_page_shows_text_in_its_tokens(hub: Hub, words: str, tmp_path: Path) -> None:
    hub.add("made-up/words", {path.name: path.read_bytes() for path in Path(words).iterdir()})
    hub.add(GELU_1L, files(CONFIG, weights(CONFIG), "made-up/words"))
    (tmp_path / "text.txt").write_text("w1 w2", encoding="utf-8")
    data = DataConfig(source=str(tmp_path / "text.txt"))
    assert preview(data, "gelu-1l").lines == [["w1", " w2"]]


@pytest.mark.slow
def test_a_run_on_gelu_1l_trains_evaluates_and_is_indexed(gelu_1l: Hub, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text.txt"), str(tmp_path / "run")
    train = f"train --preset gelu-1l --model gelu-1l --data {text} --out {out} --arch gated relu "
    train += "--sparsity 0.05 --width 6 --tokens 320 --batch-size 16 --eval-tokens 64 "
    train += "--lr-warmup-steps 2 --n-ctx 16 --device cpu"
    assert main(train.split()) == 0
    run = Run.open(out)
    assert (run.status.state, run.status.step) == ("finished", 20)
    assert run.config.model.name == "gelu-1l"
    d_in = CONFIG["d_mlp"]
    assert {load_sae(path).d_in for path in (run.folder / "saes").iterdir()} == {d_in}
    assert main(["evaluate", out, "--tokens", "64"]) == main(["index", out]) == 0
