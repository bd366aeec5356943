"""MLP and attention sites that TransformerLens names, of families that have no table of ours."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import COMMON, GROUPED, WIDE, boot
from refusals import refusal
from tiny_runs import small_run, write_text
from torch import Tensor

from gsae_core import GatedSAE, attach
from gsae_core.cli.main import main
from gsae_core.config import SITES, Site
from gsae_core.lm.model import LanguageModel, Splice, load_model, model_of
from gsae_core.runs.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # TransformerLens' own
IDS = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
GPT = {"n_embd": 12, "n_inner": 20, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT |= {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = WIDE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
ROTARY = WIDE | {"partial_rotary_factor": 0.5}


class Family(NamedTuple):
    """A config, and a block's modules as transformers' own source has them."""

    config: str
    fields: dict[str, Any]
    z: str = "self_attn.o_proj"
    attn: str = "self_attn"
    hidden: str | None = "mlp.down_proj"
    """None: a mixture of experts."""
    mlp: str = "mlp"
    scale: float = 1.0


NORMED = (
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.down_proj",
    "post_feedforward_layernorm",
)
FAMILIES = {
    "opt": Family(
        "OPTConfig",
        COMMON | {"ffn_dim": 20, "word_embed_proj_dim": 12},
        *("self_attn.out_proj", "self_attn", "fc2", "fc2"),
    ),
    "mixtral": Family("MixtralConfig", EXPERTS, hidden=None),
    "olmo2": Family("Olmo2Config", GROUPED, *NORMED),
    "granite": Family("GraniteConfig", GROUPED | {"residual_multiplier": 0.3}, scale=0.3),
    "falcon": Family(
        "FalconConfig",
        COMMON,
        *("self_attention.dense", "self_attention", "mlp.dense_4h_to_h", "mlp"),
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {"hidden_size": 12, "intermediate_size": 20, "num_layers": 2, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16}
        | {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0},
        *("attn.attention.out_proj", "attn", "mlp.c_proj", "mlp"),
    ),
    "gptj": Family(
        "GPTJConfig", GPT | {"rotary_dim": 2}, "attn.out_proj", "attn", "mlp.fc_out", "mlp"
    ),
    "bloom": Family(
        "BloomConfig",
        {"hidden_size": 12, "n_layer": 2, "n_head": 2, "vocab_size": 40},
        *("self_attention.dense", "self_attention.dense"),
        *("mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    ),
    "qwen2_moe": Family("Qwen2MoeConfig", EXPERTS, hidden=None),
    "qwen3_moe": Family("Qwen3MoeConfig", EXPERTS, hidden=None),
    "gpt_oss": Family("GptOssConfig", EXPERTS | {"sliding_window": 4}, hidden=None),
    "phi": Family(
        "PhiConfig",
        GROUPED | {"partial_rotary_factor": 1.0},
        *("self_attn.dense", "self_attn", "mlp.fc2", "mlp"),
    ),
    "phi3": Family("Phi3Config", GROUPED),
    "olmo": Family("OlmoConfig", GROUPED),
    "olmo3": Family("Olmo3Config", GROUPED | {"sliding_window": 4}, *NORMED),
    "stablelm": Family("StableLmConfig", GROUPED),
    "smollm3": Family("SmolLM3Config", GROUPED),
    "cohere": Family("CohereConfig", GROUPED),
    "starcoder2": Family("Starcoder2Config", GROUPED, hidden="mlp.c_proj"),
    "glm4": Family("Glm4Config", ROTARY, attn="post_self_attn_layernorm", mlp="post_mlp_layernorm"),
    "gpt_bigcode": Family("GPTBigCodeConfig", GPT, "attn.c_proj", "attn", "mlp.c_proj", "mlp"),
    "mpt": Family(
        "MptConfig",
        {"d_model": 12, "n_heads": 2, "n_layers": 2, "max_seq_len": 16, "vocab_size": 40},
        *("attn.out_proj", "attn", "ffn.down_proj", "ffn.down_proj"),
    ),
}
FAST = ("opt", "olmo2")
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def tiny(config: str, **fields: Any) -> Any:
    """Return a random causal LM of two layers in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, config)(**fields)
    hf = transformers.AutoModelForCausalLM.from_config(settings)
    hf.config.architectures = [type(hf).__name__]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return hf.eval()


def captured(hf: Any, family: Family) -> list[dict[str, Tensor]]:
    """Return the sites of each block, by hooks on the modules that the source names."""
    blocks = next(
        module
        for _, module in hf.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2
    )
    found: list[dict[str, Tensor]] = [{} for _ in blocks]

    def keep(seen: dict[str, Tensor], site: str, value: Any, scale: float = 1.0) -> None:
        x = value[0] if isinstance(value, tuple) else value
        seen[site] = scale * x.clone().view(*IDS.shape, -1)

    def watch(seen: dict[str, Tensor], block: Any) -> None:
        ends = {"attn_out": family.attn, "mlp_out": family.mlp}
        for site, name in ends.items():
            block.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, site=site: keep(seen, site, out, family.scale)
            )
        inner = {"attn_z": family.z} | ({"mlp_hidden": family.hidden} if family.hidden else {})
        for site, name in inner.items():
            block.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, site=site: keep(seen, site, args)
            )

    for seen, block in zip(found, blocks, strict=True):
        watch(seen, block)
    with torch.no_grad():
        hf(input_ids=IDS, use_cache=False)
    for module in hf.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found


@pytest.mark.parametrize("name", EACH)
def test_the_sites_are_those_of_the_modules_the_source_names(name: str) -> None:
    family = FAMILIES[name]
    hf = tiny(family.config, **family.fields)
    wanted = captured(hf, family)
    model = model_of(hf)
    clean = model.logits(IDS)
    for layer, sites in enumerate(wanted):
        stream = [
            model.harvest(IDS, layer=layer, site=site) for site in ("resid_pre", "resid_post")
        ]
        added = sites["attn_out"] + sites["mlp_out"]
        assert (stream[0] + added - stream[1]).abs().max() < 1e-5
        for site, x in sites.items():
            check_site(model, layer, site, x, clean)


def check_site(model: LanguageModel, layer: int, site: Any, x: Tensor, clean: Tensor) -> None:
    found = model.harvest(IDS, layer=layer, site=site)
    assert (found - x).abs().max() < 1e-6
    assert model.width(site) == x.shape[-1]
    splice = Splice(model, IDS, layer=layer, site=site)
    assert torch.equal(splice.x, found)
    for _ in range(2):  # what is given stays as it is
        assert (splice.run(splice.x) - clean).abs().max() < 1e-6
    zeros = torch.zeros_like(found)
    edited = model.logits(IDS, layer=layer, site=site, edit=torch.zeros_like)
    assert torch.equal(splice.run(zeros), edited)
    assert (edited - clean).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_has_no_hidden_layer(name: str) -> None:
    model = model_of(tiny(FAMILIES[name].config, **FAMILIES[name].fields))
    for ask in (lambda: model.width("mlp_hidden"), lambda: model.check(0, "mlp_hidden")):
        assert refusal(ask) == (
            f"expected a site that this {name} model has, got 'mlp_hidden'; "
            "layer 0 has resid_pre, resid_post, attn_z, attn_out, mlp_out"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("OPTConfig", FAMILIES["opt"].fields | {"do_layer_norm_before": False}),
        (
            "BloomConfig",
            FAMILIES["bloom"].fields | {"apply_residual_connection_post_layernorm": True},
        ),
        ("MambaConfig", {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2}),
        ("PhimoeConfig", EXPERTS),  # TransformerLens knows no class of this name
    ],
)
@pytest.mark.parametrize("site", ["attn_z", "mlp_out"])
def test_where_the_sums_do_not_hold_only_the_stream_is_left(
    config: str, fields: dict[str, Any], site: Site
) -> None:
    model = model_of(tiny(config, **fields))
    assert refusal(model.harvest, IDS, layer=1, site=site) == (
        f"expected a site that this {model.family} model has, got {site!r}; "
        "layer 1 has resid_pre, resid_post"
    )


@pytest.mark.slow
def test_layers_of_a_hybrid_have_their_own_sites() -> None:
    model = model_of(tiny("Qwen3MoeConfig", **EXPERTS | {"mlp_only_layers": [1]}))
    assert model.harvest(IDS, layer=1, site="mlp_hidden").shape[-1] == model.width("mlp_hidden")
    assert model.width("mlp_hidden") == COMMON["intermediate_size"]
    assert "layer 0 has resid_pre" in refusal(model.harvest, IDS, layer=0, site="mlp_hidden")


def test_without_transformer_lens_the_stream_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny("OlmoConfig", **GROUPED))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_lens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    for _ in range(2):
        assert refusal(model.harvest, IDS, layer=0, site="mlp_out") == (
            "expected transformer-lens to be installed for sites and models of TransformerLens, "
            'found none; pip install "gsae-core[lens]", or choose a site that is found without it, '
            "resid_pre or resid_post"
        )
    assert model.harvest(IDS, layer=0, site="resid_post").shape == (*IDS.shape, 12)


def n_hooks(hf: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def test_a_model_that_trains_is_looked_at_without_dropout_and_goes_on_training() -> None:
    hf = tiny("StableLmConfig", **GROUPED | {"hidden_dropout": 0.5}).train()
    hf.model.layers[0].mlp.eval()
    modes = [module.training for module in hf.modules()]
    state = torch.get_rng_state()
    model = model_of(hf)
    hooks = n_hooks(hf)
    model.check(1, "mlp_out")
    assert [module.training for module in hf.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert n_hooks(hf) == hooks


def test_attached_activations_stay_what_they_were_where_a_block_adds_in_place() -> None:
    family = FAMILIES["falcon"]
    hf = tiny(family.config, **family.fields)
    wanted = captured(hf, family)[0]["mlp_out"]
    with attach(GatedSAE(d_in=12, d_sae=8), hf, 0, "mlp_out", special_ids=()) as attached:
        attached_logits = hf(input_ids=IDS).logits
    assert (attached.activations - wanted).abs().max() < 1e-6
    assert torch.equal(attached_logits, hf(input_ids=IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "granite", "falcon", "mixtral", "qwen3_moe", "gpt_oss"])
def test_a_bridge_of_it_has_the_same_sites(name: str, tiny_tokenizer: Any) -> None:
    family = FAMILIES[name]
    hf = tiny(family.config, **family.fields)
    ours, model = model_of(hf), load_model(boot(hf, tiny_tokenizer))
    for site in SITES:
        if site == "mlp_hidden" and family.hidden is None:
            assert refusal(model.width, site) == (
                "expected a site that this TransformerBridge has, got 'mlp_hidden'; "
                "layer 0 has resid_pre, resid_post, attn_z, attn_out, mlp_out"
            )
            continue
        for layer in range(2):
            x = model.harvest(IDS, layer=layer, site=site)
            assert (x - ours.harvest(IDS, layer=layer, site=site)).abs().max() < 1e-5
            splice = Splice(model, IDS, layer=layer, site=site)
            assert (splice.run(splice.x) - splice.logits).abs().max() < 1e-6
        assert model.width(site) == ours.width(site)


@pytest.mark.slow
def test_a_run_at_an_mlp_site_of_such_a_family(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder, out = tmp_path / "opt", tmp_path / "run"
    tiny(FAMILIES["opt"].config, **FAMILIES["opt"].fields).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert main(small_run(folder, write_text(tmp_path / "text.txt"), out)) == 0
    assert Run.open(str(out)).status.state == "finished"
    assert main(["evaluate", str(out), "--tokens", "64"]) == 0
