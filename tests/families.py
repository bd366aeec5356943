"""A tiny random model of many families, far enough from its start to tell sites apart."""

import copy
from typing import Any

import torch

COMMON = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 1}
# Heads of 8 make attn_z 16 wide beside a residual stream of 12.
WIDE = GROUPED | {"head_dim": 8}
CAPPED = WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"n_embd": 12, "n_inner": 20, "n_layer": 2, "n_head": 2, "n_positions": 16}
        | {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "llama": ("LlamaConfig", WIDE),
    "mistral": ("MistralConfig", WIDE | {"sliding_window": 4}),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", CAPPED),
    "gemma3_text": ("Gemma3TextConfig", CAPPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", WIDE),
}


# Families without a table of ours. Vocabularies of 40, as the tiny tokenizer has.
MANY = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = WIDE | MANY | {"moe_intermediate_size": 8}
OLD = {"n_embd": 12, "n_inner": 20, "n_layer": 2, "n_head": 2, "n_positions": 16} | {
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STATE = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4}
LINEAR = {"linear_num_key_heads": 1, "linear_num_value_heads": 2} | {
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
EYES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 12, "intermediate_size": 20, "num_layers": 2, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16}
        | {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gptj": ("GPTJConfig", OLD | {"rotary_dim": 4}),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 20, "word_embed_proj_dim": 8}),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 12, "n_layer": 2, "n_head": 2, "vocab_size": 40}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "falcon": ("FalconConfig", COMMON),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    # Half of each head is turned: of four numbers, two.
    "phi": ("PhiConfig", COMMON | {"num_attention_heads": 3}),
    "phi3": ("Phi3Config", GROUPED),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmo3": ("Olmo3Config", GROUPED | {"sliding_window": 4}),
    "stablelm": ("StableLmConfig", COMMON | {"num_key_value_heads": 2, "hidden_size": 16}),
    "smollm3": ("SmolLM3Config", GROUPED),
    "gpt_oss": ("GptOssConfig", EXPERTS | {"sliding_window": 4}),
    "mamba": ("MambaConfig", STATE),
    "cohere": ("CohereConfig", GROUPED),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "gemma3": ("Gemma3Config", {"text_config": CAPPED, "vision_config": EYES}),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": COMMON
            | {"num_key_value_heads": 2}
            | {"rope_parameters": SECTIONS["rope_parameters"] | {"mrope_section": [1, 1, 1]}},
            "vision_config": {"depth": 2, "hidden_size": 12, "intermediate_size": 20}
            | {"num_heads": 2, "out_hidden_size": 12, "fullatt_block_indexes": [1]},
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": WIDE | {"model_type": "mistral"},
            "vision_config": EYES | {"model_type": "pixtral", "head_dim": 4},
        },
    ),
    "llama4": (
        "Llama4Config",
        {
            "text_config": EXPERTS | {"intermediate_size_mlp": 20},
            "vision_config": EYES
            | {"vision_output_dim": 12, "projector_input_dim": 12, "projector_output_dim": 12},
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": WIDE | {"model_type": "llama"},
            "vision_config": EYES | {"model_type": "clip_vision_model"},
        },
    ),
    "mamba2": ("Mamba2Config", STATE | {"num_heads": 2, "head_dim": 12, "n_groups": 1}),
    "gpt_bigcode": ("GPTBigCodeConfig", OLD),
    "mpt": ("MptConfig", {"d_model": 12, "n_heads": 2, "n_layers": 2, "vocab_size": 40}),
    "openai-gpt": ("OpenAIGPTConfig", OLD),
    "codegen": ("CodeGenConfig", OLD | {"n_head": 4, "n_embd": 16, "rotary_dim": 4}),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": 40, "d_model": 12, "ffn_dim": 20, "num_layers": 2, "attention_heads": 2}
        | {"max_position_embeddings": 16},
    ),
    "cohere2": ("Cohere2Config", GROUPED | {"sliding_window": 4}),
    "glm4": ("Glm4Config", WIDE),
    "nemotron": ("NemotronConfig", WIDE),
    "olmoe": ("OlmoeConfig", GROUPED | MANY),
    "qwen3_5_text": ("Qwen3_5TextConfig", WIDE | LINEAR),
    "falcon_h1": (
        "FalconH1Config",
        WIDE
        | {"mamba_n_heads": 2, "mamba_d_head": 12, "mamba_d_state": 4}
        | {"mamba_n_groups": 1, "mamba_d_ssm": 24},
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        CAPPED
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8},
    ),
}


def tiny(family: str) -> Any:
    """Return a random causal LM of two layers in evaluation mode."""
    name, fields = (CONFIGS | DECODERS)[family]
    return built(name, fields)


def built(name: str, fields: dict[str, Any]) -> Any:
    """Return a random causal LM of a config's class in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    reads_images = hasattr(config, "vision_config")
    auto = "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"
    hf = getattr(transformers, auto).from_config(config)
    hf.config.architectures = [type(hf).__name__]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return hf.eval()


def boot(hf: Any, tokenizer: Any) -> Any:
    """Return a TransformerBridge of a model."""
    from transformer_lens.model_bridge import TransformerBridge

    # Its own copy: TransformerLens switches a model to eager attention in place.
    return TransformerBridge.boot_transformers(
        tokenizer.name_or_path, hf_model=copy.deepcopy(hf), tokenizer=tokenizer
    )
