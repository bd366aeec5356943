"""Language models: every site of every family, edits, early stops, and each error's sentence."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, boot, tiny
from refusals import refusal
from torch import Tensor

from gsae_core.config import SITES, Site, hook_name
from gsae_core.errors import InputError
from gsae_core.lm.catalog import BUNDLED, FAMILIES
from gsae_core.lm.model import Decoding, LanguageModel, Splice, load_model

IDS = torch.tensor([[0, 5, 9, 2, 31, 7, 7], [0, 3, 3, 17, 8, 20, 39]])


def test_every_supported_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
@pytest.mark.parametrize("family", CONFIGS)
def test_sites_are_the_tensors_that_transformer_lens_caches(
    family: str, tiny_tokenizer: Any
) -> None:
    hf = tiny(family)
    model = load_model(hf, tokenizer=tiny_tokenizer)
    _, cache = boot(hf, tiny_tokenizer).run_with_cache(IDS)
    for layer in (0, 1):
        for site in SITES:
            x = model.harvest(IDS, layer=layer, site=site)
            assert x.shape == (2, 7, model.width(site))
            # TransformerLens computes attention eagerly, we by SDPA: equal up to rounding.
            wanted = cache[hook_name(layer, site)].flatten(2)
            torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_identity_edit_keeps_the_logits_bit_for_bit_and_zeros_change_them(
    family: str, tiny_tokenizer: Any
) -> None:
    model = load_model(tiny(family), tokenizer=tiny_tokenizer)
    check_edits(model)


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
@pytest.mark.parametrize("numerics", ["raw", "compatibility"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_a_bridge_is_read_and_edited_in_its_own_numerics(
    family: str, numerics: str, tiny_tokenizer: Any
) -> None:
    bridge = boot(tiny(family), tiny_tokenizer)
    if numerics == "compatibility":
        bridge.enable_compatibility_mode()
    model = load_model(bridge)
    assert (model.numerics, model.family, model.n_layers) == (numerics, family, 2)
    _, cache = bridge.run_with_cache(IDS)
    for site in SITES:
        x = model.harvest(IDS, layer=1, site=site)
        assert x.shape[-1] == model.width(site)
        assert torch.equal(x, cache[hook_name(1, site)].flatten(2))
    check_edits(model)


def check_edits(model: LanguageModel) -> None:
    clean = model.logits(IDS)
    for layer in (0, 1):
        for site in SITES:
            place: dict[str, Any] = {"layer": layer, "site": site}
            assert torch.equal(model.logits(IDS, **place, edit=lambda x: x), clean)
            zeroed = model.logits(IDS, **place, edit=torch.zeros_like)
            assert (zeroed - clean).abs().max() > 1e-3
            # A continuation from the site computes the same, having skipped what came before.
            splice = Splice(model, IDS, **place)
            assert torch.equal(splice.logits, clean)
            assert torch.equal(splice.x, model.harvest(IDS, **place))
            assert torch.equal(splice.run(splice.x), clean)
            assert torch.equal(splice.run(torch.zeros_like(splice.x)), zeroed)
    assert torch.equal(model.logits(IDS), clean)


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
def test_a_compatibility_bridge_has_another_residual_stream(tiny_tokenizer: Any) -> None:
    raw, folded = boot(tiny("gpt2"), tiny_tokenizer), boot(tiny("gpt2"), tiny_tokenizer)
    folded.enable_compatibility_mode()
    ours = [load_model(b).harvest(IDS, layer=1, site="resid_post") for b in (raw, folded)]
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
def test_a_bridge_without_some_sites_says_which_it_has(tiny_tokenizer: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    shape = {"d_model": 12, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 16, "d_vocab": 40}
    options = {"act_fn": "gelu", "normalization_type": "LN", "attn_only": True, "seed": 0}
    cls: Any = TransformerBridge  # boot_native is attached at import, unseen by type checkers
    bridge = cls.boot_native(shape | options)
    with pytest.raises(InputError, match=sentence("expected a tokenizer with the Transformer")):
        load_model(bridge)
    model = load_model(bridge, tokenizer=tiny_tokenizer)
    assert refusal(model.harvest, IDS, layer=1, site="mlp_out") == (
        "expected a site that this TransformerBridge has, got 'mlp_out'; "
        "layer 1 has resid_pre, resid_post, attn_z, attn_out"
    )
    _, cache = bridge.run_with_cache(IDS)
    z = model.harvest(IDS, layer=1, site="attn_z")
    assert torch.equal(z, cache["blocks.1.attn.hook_z"].flatten(2))
    splice = Splice(model, IDS, layer=1, site="resid_post")
    assert torch.equal(splice.run(splice.x), model.logits(IDS))
    with pytest.raises(InputError, match="expected a model that keeps keys and values"):
        Decoding(model, layer=1, site="resid_post").extend(IDS[:1])


def test_harvesting_stops_at_the_site(tiny_lm: LanguageModel) -> None:
    ran: list[str] = []
    blocks = tiny_lm.hf.transformer.h
    handles = [
        blocks[0].attn.register_forward_hook(lambda *_: ran.append("attention 0")),
        blocks[0].mlp.register_forward_hook(lambda *_: ran.append("mlp 0")),
        blocks[1].register_forward_hook(lambda *_: ran.append("block 1")),
        tiny_lm.hf.lm_head.register_forward_hook(lambda *_: ran.append("head")),
    ]
    try:
        tiny_lm.harvest(IDS, layer=0, site="attn_out")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["attention 0"]


def test_threads_continue_one_pass_side_by_side_each_from_its_own_activations(
    tiny_lm: LanguageModel,
) -> None:
    splice = Splice(tiny_lm, IDS, layer=1, site="mlp_out")
    scaled = [splice.x, splice.x * 2]
    alone = [splice.run(x) for x in scaled]
    inside = threading.Barrier(2, timeout=60)  # broken if one had to wait for the other

    def wait(*_: object) -> None:
        inside.wait()

    handle = tiny_lm.hf.lm_head.register_forward_hook(wait)
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(splice.run, scaled))
    finally:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(*together)


def test_a_continuation_skips_the_blocks_before_its_site(tiny_lm: LanguageModel) -> None:
    splice = Splice(tiny_lm, IDS, layer=1, site="mlp_out")
    ran: list[str] = []
    watch = [("c_attn", 0), ("c_attn", 1), ("c_fc", 0), ("c_fc", 1)]
    blocks = tiny_lm.hf.transformer.h
    handles = [
        (blocks[i].attn.c_attn if name == "c_attn" else blocks[i].mlp.c_fc).register_forward_hook(
            lambda *_, what=f"{name} {i}": ran.append(what)
        )
        for name, i in watch
    ]
    try:
        splice.run(splice.x)
        assert ran == []
        tiny_lm.logits(IDS)
        assert ran == ["c_attn 0", "c_fc 0", "c_attn 1", "c_fc 1"]
    finally:
        for handle in handles:
            handle.remove()


def test_an_edit_that_fails_leaves_no_hook_behind(tiny_lm: LanguageModel) -> None:
    clean = tiny_lm.logits(IDS)

    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError("broken edit")

    with pytest.raises(ArithmeticError, match="broken edit"):
        tiny_lm.logits(IDS, layer=0, site="mlp_out", edit=fail)
    assert torch.equal(tiny_lm.logits(IDS), clean)
    assert not any(module._forward_hooks for module in tiny_lm.hf.modules())
    assert not any("forward" in vars(module) for module in tiny_lm.hf.modules())


def test_threads_take_turns_at_one_model(tiny_lm: LanguageModel) -> None:
    wanted = {site: tiny_lm.harvest(IDS, layer=1, site=site) for site in SITES}
    wrong: list[str] = []

    def work(site: Site) -> None:
        for _ in range(20):
            if not torch.equal(tiny_lm.harvest(IDS, layer=1, site=site), wanted[site]):
                wrong.append(site)

    threads = [threading.Thread(target=work, args=(site,)) for site in SITES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_activations_are_float32_and_may_meet_autograd(tiny_lm_folder: Path) -> None:
    model = load_model(str(tiny_lm_folder), dtype="bfloat16")
    assert next(model.hf.parameters()).dtype == torch.bfloat16
    x = model.harvest(IDS, layer=0, site="resid_post")
    assert x.dtype == torch.float32
    weight = torch.ones(12, requires_grad=True)
    (x @ weight).sum().backward()
    assert weight.grad is not None
    # float32 and back is exact, so even here an identity edit changes nothing.
    edited = model.logits(IDS, layer=0, site="resid_post", edit=lambda x: x)
    assert torch.equal(edited, model.logits(IDS))


def test_a_folder_knows_its_shape(tiny_lm: LanguageModel) -> None:
    assert (tiny_lm.family, tiny_lm.numerics) == ("gpt2", "raw")
    assert (tiny_lm.n_layers, tiny_lm.d_model, tiny_lm.n_ctx, tiny_lm.d_vocab) == (2, 12, 16, 40)
    widths = [tiny_lm.width(site) for site in SITES]
    assert widths == [12, 12, 20, 12, 12, 12]
    assert tiny_lm.device == torch.device("cpu")
    assert tiny_lm.tokenizer("w0 w37").input_ids == [2, 39]


def test_the_bundled_model_is_a_folder_like_any_other() -> None:
    bundled, folder = load_model("bundled"), load_model(str(BUNDLED))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(bundled.logits(ids), folder.logits(ids))
    assert (bundled.name, bundled.family, bundled.n_layers) == ("bundled", "gpt2", 4)
    assert len(bundled.tokenizer) == bundled.d_vocab == 4096


def sentence(*parts: str) -> str:
    return ".*".join(re.escape(part) for part in parts)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert refusal(load_model, str(tmp_path)) == (
        "expected a Hugging Face model folder with a config.json, found none in "
        f"{str(tmp_path)!r}; give a folder written by save_pretrained(), a name on the Hub, "
        "or 'bundled'"
    )
    with pytest.raises(InputError, match=sentence("config.json, found none in './missing'")):
        load_model("./missing")


def test_a_hub_name_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(load_model, "nobody/nothing-at-all") == (
        "expected to download 'nobody/nothing-at-all' from the Hub, but we are offline and it is "
        "not in the cache; give a local model folder, or 'bundled' for the model that ships with "
        "the package"
    )


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("GatedRepoError", ("expected access to 'a/b'", "accept it on the model's page")),
        ("RepositoryNotFoundError", ("found no 'a/b' there; check its spelling",)),
        ("RevisionNotFoundError", ("expected a branch, tag or commit of 'a/b', got 'v9'",)),
    ],
)
def test_the_hub_saying_no_is_told_apart_from_no_network(
    kind: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> None:
        cause = getattr(errors, kind).__new__(getattr(errors, kind))
        raise OSError("wrapped by transformers") from cause

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(InputError, match=sentence(*parts)):
        load_model("a/b", revision="v9")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("t5", {"architectures": ["T5ForConditionalGeneration"]}),
        ("nystromformer", {}),  # reads both ways: so say its masks
        ("vitpose", {}),
    ],
)
def test_an_encoder_is_refused(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **fields}))
    assert refusal(load_model, str(tmp_path)) == (
        f"expected a causal language model, got {family!r} in {str(tmp_path)!r}; choose a model "
        "that predicts the next token from those before it"
    )


def test_a_family_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from-another-planet"}')
    with pytest.raises(InputError, match=sentence("got one that cannot be used (ValueError: The")):
        load_model(str(tmp_path))


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(architectures=["GPT2ForSequenceClassification"]).save_pretrained(tmp_path)
    wanted = sentence(
        "expected a causal language model (GPT2LMHeadModel), got GPT2ForSequenceClassification in",
        "choose a checkpoint that predicts the next token",
    )
    with pytest.raises(InputError, match=wanted):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3"])
def test_a_folder_without_a_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    said = refusal(load_model, str(tmp_path))
    place = f"beside the model in {str(tmp_path)!r}"
    assert said.startswith(f"expected a tokenizer (tokenizer.json) {place}, found none")
    assert said.endswith("; save it there with tokenizer.save_pretrained()")


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny("gpt2").config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=sentence("expected weights (model.safetensors)")):
        load_model(str(tmp_path))


def test_objects_need_a_tokenizer_and_must_be_models(tiny_tokenizer: Any) -> None:
    assert refusal(load_model, tiny("gpt2")) == (
        "expected a tokenizer with the GPT2LMHeadModel given as an object, got none; "
        "pass load_model(model, tokenizer=AutoTokenizer.from_pretrained(...))"
    )
    wanted = sentence("expected 'bundled', a folder, a name on the Hub", "Face causal LM, got int")
    with pytest.raises(InputError, match=wanted):
        load_model(3, tokenizer=tiny_tokenizer)


def test_wrong_layers_and_sites_are_answered_with_the_right_ones(tiny_lm: LanguageModel) -> None:
    assert refusal(tiny_lm.check, 2, "resid_post") == (
        f"expected a layer from 0 to 1, got 2 ({tiny_lm.name} has 2 layers)"
    )
    with pytest.raises(InputError, match=sentence("expected a layer from 0 to 1, got -1")):
        tiny_lm.check(-1, "resid_post")
    assert refusal(tiny_lm.check, 0, "resid_mid") == (
        "expected a site out of resid_pre, resid_post, mlp_hidden, mlp_out, attn_z, attn_out, "
        "got 'resid_mid'"
    )


def test_sequences_longer_than_the_context_are_refused(tiny_lm: LanguageModel) -> None:
    ids = torch.zeros(1, 17, dtype=torch.int64)
    assert refusal(tiny_lm.harvest, ids, layer=0, site="resid_pre") == (
        f"expected at most 16 tokens in a sequence ({tiny_lm.name}'s context), got 17; "
        "cut the text into shorter sequences"
    )


def test_half_given_and_shape_changing_edits_are_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=sentence("expected layer, site and edit together")):
        tiny_lm.logits(IDS, layer=0, site="mlp_out")
    assert refusal(tiny_lm.logits, IDS, layer=0, site="mlp_out", edit=lambda x: x[..., :5]) == (
        "expected an edit that keeps the shape (2, 7, 12), got (2, 7, 5); "
        "was this SAE trained at another site?"
    )
