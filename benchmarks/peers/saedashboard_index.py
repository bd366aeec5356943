"""SAEDashboard's own runner on the bundled model, in its environment: `bench index` runs it."""

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bundled_gpt2 import bundled_gpt2
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.serve import Job, Work, serve

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
    """Return the bundled GPT-2 as the class that the runner takes."""
    # Its transformers is older than the class that the folder names, and TransformerLens reads a
    # tokenizer again from where it came from: from a folder that this version has written.
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(
            tokenizer_file=str(Path(job["model_folder"]) / "tokenizer.json"),
            bos_token=END,
            eos_token=END,
        ).save_pretrained(folder)
        return bundled_gpt2(
            HookedSAETransformer,
            folder=job["model_folder"],
            device=job["device"],
            tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )


if __name__ == "__main__":
    serve(prepare)
