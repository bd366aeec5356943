"""A tiny random model of each supported family, far enough from its start to tell sites apart."""

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


def tiny(family: str) -> Any:
    """Return a random causal LM of two layers in evaluation mode."""
    import transformers

    name, fields = CONFIGS[family]
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields))
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
