"""Every decoder's residual stream is found in its module tree; what is none is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CAPPED, CONFIGS, DECODERS, EYES, WIDE, built, tiny
from refusals import refusal
from test_logit_effect import change_of_logits
from tiny_runs import small_run
from torch import Tensor, nn

from gsae_core.analysis.attach import attach
from gsae_core.analysis.features.logit_effects import logit_map
from gsae_core.cli import main
from gsae_core.config import Site
from gsae_core.lm.blocks import UNLIMITED, find_decoder
from gsae_core.lm.model import Decoding, LanguageModel, Splice, load_model, logit_slope
from gsae_core.lm.taps import Tap, hooked
from gsae_core.sae.architectures import GatedSAE

RESIDUAL: tuple[Site, ...] = ("resid_pre", "resid_post")
ODD = ("mamba", "opt", "falcon", "gemma3", "gpt_oss")
IDS = torch.tensor([[2, 5, 9, 2, 31, 7, 7], [3, 3, 4, 17, 8, 20, 36]])


def model_of_family(family: str, tokenizer: Any = None) -> LanguageModel:
    return LanguageModel(tiny(family), tokenizer, name=family)


def check_sites(model: LanguageModel) -> None:
    """Hold sites to hidden states, or the block's own tensors, and passes edited there to logits.

    `output_hidden_states` shows the residual stream before and between the blocks; Mamba shows it
    after each of them. Behind the last one, the unembedding reads it through the final norm.
    """
    with torch.no_grad():
        out = model.hf(input_ids=IDS, output_hidden_states=True, use_cache=False)
    logits, n = out.logits.float(), model.n_layers
    entered, left = blocks_of(model)
    first = 1 if model.family in ("mamba", "mamba2") else 0
    for layer in range(n):
        pre, post = (model.harvest(IDS, layer=layer, site=site) for site in RESIDUAL)
        if layer or not first:
            torch.testing.assert_close(pre, out.hidden_states[layer - first], rtol=0, atol=1e-6)
        if layer + 1 < n:
            torch.testing.assert_close(
                post, out.hidden_states[layer + 1 - first], rtol=0, atol=1e-6
            )
        torch.testing.assert_close(pre, entered[layer], rtol=0, atol=1e-6)
        torch.testing.assert_close(post, left[layer], rtol=0, atol=1e-6)
        for site in RESIDUAL:
            check_splice(model, logits, layer=layer, site=site)


def blocks_of(model: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """Return what hooks of torch show going into and coming out of the blocks."""
    entered, left = [], []

    def before(_module: nn.Module, args: Any) -> None:
        entered.append(args[0].clone())

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        left.append((output if isinstance(output, Tensor) else output[0]).clone())

    handles = []
    for block in find_decoder(model.hf).blocks:
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.register_forward_hook(after))
    with torch.no_grad():
        model.hf(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return entered, left


def check_splice(model: LanguageModel, logits: Tensor, *, layer: int, site: Site) -> None:
    splice = Splice(model, IDS, layer=layer, site=site)
    scale = float(logits.abs().max())
    torch.testing.assert_close(splice.logits, logits, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(splice.run(splice.x), logits, rtol=0, atol=1e-6 * scale)
    zeroed = splice.run(torch.zeros_like(splice.x))
    assert (zeroed - logits).abs().max() > 1e-4 * scale
    whole = model.logits(IDS, layer=layer, site=site, edit=torch.zeros_like)
    torch.testing.assert_close(zeroed, whole, rtol=0, atol=1e-6 * scale)


def check_attach(model: LanguageModel) -> None:
    with attach(GatedSAE(12, 24), model.hf, 1, "resid_post", special_ids=()) as attached:
        model.hf(input_ids=IDS)
    x = model.harvest(IDS, layer=1, site="resid_post")
    torch.testing.assert_close(attached.activations, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ODD)
def test_odd_ones(family: str) -> None:
    model = model_of_family(family)
    check_sites(model)
    check_attach(model)


def test_at_least_thirty_families_are_tried() -> None:
    assert len({**CONFIGS, **DECODERS}) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("family", {**CONFIGS, **DECODERS})
def test_sites_a_run_and_an_evaluation_of_every_family(
    family: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny(family).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    model = load_model(str(folder))
    same = model_of_family(family).logits(IDS)
    torch.testing.assert_close(model.logits(IDS), same, rtol=0, atol=1e-5 * float(same.abs().max()))
    check_sites(model)
    if model.d_model == 12:
        check_attach(model)
    # Not text: of a Qwen 2, transformers reads no other tokenizer than Qwen 2's.
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 40, 2000, dtype=np.uint16))
    words = small_run(folder, tmp_path / "ids.npy", tmp_path / "run")
    words += ["--site", "resid_post", "--arch", "gated", "--sparsity", "0.05"]
    assert main.main(words) == 0
    (numbers,) = json.loads((tmp_path / "run" / "evals.json").read_text())["saes"]
    assert numbers["fvu"] > 0


KEEPS_NONE = ("mamba", "mamba2", "openai-gpt")


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_reading_token_by_token_equals_reading_at_once(family: str) -> None:
    model = model_of_family(family)
    decoding = Decoding(model, layer=1, site="resid_post")
    if family in KEEPS_NONE:
        assert refusal(decoding.extend, IDS[:1]) == (
            f"expected a model that keeps keys and values of earlier tokens, got {family}, which "
            "keeps none; generate with another model"
        )
        return
    parts = [
        decoding.extend(IDS[:1, :4]),
        *(decoding.extend(IDS[:1, i : i + 1]) for i in (4, 5, 6)),
    ]
    whole = model.logits(IDS[:1])[0]
    atol = 1e-5 * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("granite", "mlp_hidden"),  # what is added is halved, and so are the logits
        ("opt", "resid_post"),  # norm, projection to 8, unembedding
        ("gemma3", "mlp_hidden"),  # a table's family inside a wrapper
    ],
)
def test_logit_effects_go_through_all_that_follows_the_last_block(family: str, site: Site) -> None:
    model = model_of_family(family)
    direction = torch.randn(model.width(site), generator=torch.Generator().manual_seed(1))
    effect = logit_map(model, IDS, layer=1, site=site).effect(direction[None])[0]
    change = change_of_logits(model, IDS, direction, layer=1, site=site)
    scale = float(change.abs().max())
    torch.testing.assert_close(effect.double(), change, rtol=0, atol=1e-3 * scale)


def test_contexts_are_read_under_their_names() -> None:
    wanted = {"mamba": UNLIMITED, "bloom": UNLIMITED, "opt": 16, "gptj": 16, "mpt": 2048}
    found = {family: model_of_family(family) for family in wanted}
    assert {family: model.n_ctx for family, model in found.items()} == wanted
    assert [found[name].d_model for name in ("mamba", "gptj", "mpt")] == [12, 12, 12]
    assert {model.d_vocab for model in found.values()} == {40}


def test_the_check_leaves_no_trace_and_comes_once() -> None:
    hf = tiny("phi").train()
    passes: list[object] = []
    hf.register_forward_hook(lambda *_: passes.append(1))
    state = torch.get_rng_state()
    found = find_decoder(hf)
    assert hf.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in hf.parameters())
    assert not any("forward" in vars(module) for module in hf.modules())
    n = len(passes)
    assert find_decoder(hf) == found
    assert len(passes) == n == 2
    hf.model.layers[1] = copy.deepcopy(hf.model.layers[0])
    assert find_decoder(hf).blocks == tuple(hf.model.layers)


def test_the_nine_families_of_the_table_need_no_pass() -> None:
    hf = tiny("qwen3")
    hf.register_forward_hook(lambda *_: pytest.fail("a pass"))
    assert find_decoder(hf).blocks == tuple(hf.model.layers)


def test_a_harvest_stops_at_the_site() -> None:
    model = model_of_family("falcon")
    find_decoder(model.hf).blocks[1].register_forward_hook(lambda *_: pytest.fail("went on"))
    model.harvest(IDS, layer=0, site="resid_post")
    model.harvest(IDS, layer=1, site="resid_pre")


def test_what_an_earlier_block_leaves_besides_the_stream_is_computed_again() -> None:
    # The last two layers of this one attend to keys and values of earlier ones.
    model = model_of_family("gemma4_text")
    assert not find_decoder(model.hf).replays
    check_sites(model)


def test_a_block_that_is_given_everything_by_name_is_read_and_edited() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
            return hidden_states * scale

    block, seen = Block(), []
    with hooked(Tap(block, "input"), seen.append):
        block(scale=2.0, hidden_states=torch.ones(3))
    assert torch.equal(seen[0], torch.ones(3))
    with hooked(Tap(block, "input"), lambda x: x + 1):
        assert torch.equal(block(scale=2.0, hidden_states=torch.ones(3)), torch.full((3,), 4.0))


def test_a_site_that_a_family_lacks_is_answered_with_those_it_has() -> None:
    assert refusal(model_of_family("mamba").check, 1, "mlp_out") == (
        "expected a site that this mamba model has, got 'mlp_out'; layer 1 has resid_pre, "
        "resid_post"
    )


WANTED = "expected a decoder whose blocks hand on one residual stream"


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "Gemma3nTextConfig",
            CAPPED
            | {"layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4}
            | {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8}
            | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
            "got Gemma3nForCausalLM (gemma3n_text), in which block 0 has a tensor of shape "
            "(4, 2, 4, 12) where a vector a token was expected",
        ),
        (
            "PaliGemmaConfig",
            {
                "text_config": WIDE | {"model_type": "gemma"},
                "vision_config": EYES | {"model_type": "siglip_vision_model"},
                "projection_dim": 12,
            },
            "got PaliGemmaForConditionalGeneration (paligemma), in which a token's hidden states "
            "depend on later tokens",
        ),
        (
            "XLMConfig",
            {"vocab_size": 40, "emb_dim": 12, "n_layers": 2, "n_heads": 2, "causal": True},
            "got XLMWithLMHeadModel (xlm), in which block 1 reads something else than block 0 "
            "hands on",
        ),
        (
            "BartConfig",
            {"vocab_size": 40, "d_model": 12, "encoder_layers": 1, "decoder_layers": 2}
            | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
            | {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
            | {"is_decoder": True, "is_encoder_decoder": False},
            "found no list of blocks in BartForCausalLM (bart)",
        ),
    ],
)
def test_other_streams_are_refused(name: str, fields: dict[str, Any], said: str) -> None:
    assert refusal(find_decoder, built(name, fields)) == f"{WANTED}, {said}; choose another model"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda out: 1 / 0,
            "which gives no hidden states and logits for text alone (ZeroDivisionError: division "
            "by zero)",
        ),
        (
            lambda out: {"hidden_states": None},
            "which gives no hidden states and logits for text alone (TypeError: 'NoneType' object "
            "is not iterable)",
        ),
        (
            lambda out: {"hidden_states": [2 * x for x in out.hidden_states]},
            "in which the blocks hand on other tensors than output_hidden_states shows",
        ),
        (
            lambda out: {"hidden_states": (*out.hidden_states[:-1], 2 * out.hidden_states[-1])},
            "in which what follows the last block is not the last one that output_hidden_states "
            "shows",
        ),
    ],
)
def test_states_that_are_not_the_blocks_are_refused(spoil: Callable[..., Any], said: str) -> None:
    hf = tiny("phi")
    hf.register_forward_hook(lambda _module, _args, out: type(out)(**{**out, **spoil(out)}))
    wanted = f"{WANTED}, got PhiForCausalLM (phi), {said}; choose another model"
    assert refusal(find_decoder, hf) == wanted


def test_a_block_that_runs_twice_is_refused() -> None:
    hf = tiny("phi")
    norm, again = hf.model.final_layernorm, hf.model.layers[1]
    run = norm.forward
    norm.forward = lambda x: run(again(x, position_embeddings=rotary(hf, x)))
    assert refusal(find_decoder, hf) == (
        f"{WANTED}, got PhiForCausalLM (phi), in which the blocks do not run once each, one after "
        "the other; choose another model"
    )


def rotary(hf: Any, x: Tensor) -> Any:
    return hf.model.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("wrong", [40, -1])
def test_tokens_without_an_embedding_are_named(wrong: int, tiny_lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, wrong, 7]])
    said = (
        f"expected token ids from 0 to 39, which {tiny_lm.name} has embeddings of, got {wrong}; "
        "give it its own tokenizer and token arrays made with that, or enlarge it with "
        "resize_token_embeddings()"
    )
    place: dict[str, Any] = {"layer": 0, "site": "resid_pre"}
    assert refusal(tiny_lm.harvest, ids, **place) == said
    assert refusal(tiny_lm.logits, ids) == said
    assert refusal(Splice, tiny_lm, ids, **place) == said
    assert refusal(Decoding(tiny_lm, **place).extend, ids) == said
    assert refusal(logit_slope, tiny_lm, ids, **place, position=3, token=0) == said


def test_a_class_of_ones_own_is_told_by_its_blocks(tiny_tokenizer: Any) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    class OwnConfig(PhiConfig):
        model_type = "own-words"

    hf = PhiForCausalLM(OwnConfig(**DECODERS["phi"][1]))
    model = load_model(hf, tokenizer=tiny_tokenizer)
    assert (model.family, model.n_layers) == ("own-words", 2)
    check_sites(model)


def test_infinite_activations_are_no_reason_to_doubt_the_blocks() -> None:
    hf = tiny("phi")
    with torch.no_grad():
        hf.model.layers[0].mlp.fc2.bias.fill_(torch.inf)
    assert find_decoder(hf).blocks == tuple(hf.model.layers)
