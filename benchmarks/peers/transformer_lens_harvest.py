"""TransformerLens' run_with_cache on our own environment's TransformerBridge: `bench harvest`."""

import importlib.metadata
from typing import Any

import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.serve import Job, Work, serve
from gsae_core.lm.load import open_model


def prepare(job: Job) -> Work:
    hf, tokenizer = open_model(job["model"], revision=None, device=job["device"], dtype="float32")
    bridge = TransformerBridge.boot_transformers(
        tokenizer.name_or_path, hf_model=hf, tokenizer=tokenizer, device=job["device"]
    )
    bridge.eval()
    hook = f"blocks.{job['layer']}.hook_resid_post"
    passes = load_file(job["tokens_file"])["ids"].to(job["device"]).split(job["rows"])

    @torch.inference_mode()
    def run() -> None:
        for ids in passes:
            # What SAELens asks of it: one name, no block beyond the site.
            bridge.run_with_cache(ids, names_filter=hook, stop_at_layer=job["layer"] + 1)

    def look() -> dict[str, Any]:
        return {"version": importlib.metadata.version("transformer-lens")}

    return Work(run, look=look)


if __name__ == "__main__":
    serve(prepare)
