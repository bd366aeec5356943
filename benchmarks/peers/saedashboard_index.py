"""SAEDashboard's own runner on the bundled model, in its environment: `bench index` runs it."""

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gsae_core.bench.serve import Job, Work, serve

# Sequences in a forward pass: 2048 tokens.
ROWS = 8
END = "<|endoftext|>"


def prepare(job: Job) -> Work:
    ids = load_file(job["tokens_file"])["ids"].to(job["device"])
    model = _model(job)
    hook = f"blocks.{job['layer']}.hook_resid_post"
    folder = Path(job["cache"])

    def run() -> dict[str, Any]:
        # Its runner folds decoder norms into the SAE: a fresh one each time.
        sae = SAE.load_from_disk(job["sae_folder"], device=job["device"])
        config = SaeVisConfig(
            hook_point=hook,
            features=list(range(job["slice"])),
            minibatch_size_features=job["slice"],
            minibatch_size_tokens=ROWS,
            device=job["device"],
            # The first round fills it; later ones, which count, find it full.
            cache_dir=folder,
        )
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)
        return {"n_features": len(data.feature_data_dict)}

    def look() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        return {"version": importlib.metadata.version("sae-dashboard")}

    return Work(run, look=look)


def _model(job: Job) -> HookedSAETransformer:
    """Return the bundled GPT-2, weights as they are, as the class that the runner takes."""
    hf = AutoModelForCausalLM.from_pretrained(job["model_folder"], dtype=torch.float32)
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
        device=job["device"],
        tokenizer_prepends_bos=False,
    )
    # Its transformers is older than the class that the folder names, and TransformerLens reads a
    # tokenizer again from where it came from: from a folder that this version has written.
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(
            tokenizer_file=str(Path(job["model_folder"]) / "tokenizer.json"),
            bos_token=END,
            eos_token=END,
        ).save_pretrained(folder)
        model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    # Masks, which a checkpoint does not hold, are what is missing.
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model.eval()


if __name__ == "__main__":
    serve(prepare)
