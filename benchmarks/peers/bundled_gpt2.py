"""The bundled GPT-2 as a class of TransformerLens 2, which loads by published names alone."""

from typing import Any, TypeVar

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM

Model = TypeVar("Model", bound=HookedTransformer)


def bundled_gpt2(kind: type[Model], *, folder: str, device: str, tokenizer: Any) -> Model:
    """Return the model in `folder`, weights as they are, as a `kind`, ready to be read."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    shape = hf.config
    cfg = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_ctx=shape.n_positions,
        d_head=shape.n_embd // shape.n_head,
        n_heads=shape.n_head,
        d_mlp=4 * shape.n_embd,
        d_vocab=shape.vocab_size,
        act_fn=shape.activation_function,
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        device=device,
        tokenizer_prepends_bos=False,
    )
    model = kind(cfg, tokenizer=tokenizer)
    # Masks, which a checkpoint does not hold, are what is missing.
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model.eval()
