"""A whole run of SAELens' own runner on the bundled model: `bench train` runs it."""

import tempfile
from typing import Any

import sae_lens
import torch
from bundled_gpt2 import bundled_gpt2
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.saes.gated_sae import GatedTrainingSAEConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from benchmarks.serve import Job, Work, serve

# Sequences in a forward pass of the language model, as many as our stream takes: 2048 tokens.
ROWS = 8
# Batches that its estimate of the mean norm reads: as many vectors as our scale does, 2^15.
NORM_VECTORS = 2**15


def prepare(job: Job) -> Work:
    ids = load_file(job["tokens_file"])["ids"]
    # Already tokenised: its own tokenising, a document at a time, is not counted against it.
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    kept: list[LanguageModelSAETrainingRunner] = []

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            runner = LanguageModelSAETrainingRunner(
                _config(job, n_ctx=ids.shape[1], folder=folder),
                override_dataset=dataset,
                override_model=bundled_gpt2(
                    HookedTransformer,
                    folder=job["model_folder"],
                    device=job["device"],
                    tokenizer=AutoTokenizer.from_pretrained(
                        job["model_folder"], trust_remote_code=False
                    ),
                ),
            )
            runner.run()
        kept[:] = [runner]

    @torch.no_grad()
    def look() -> dict[str, Any]:
        runner = kept[0]
        x = next(runner.activations_store)
        l0 = float((runner.sae.encode(x) > 0).sum(-1).float().mean())
        return {"l0": l0, "version": sae_lens.__version__}

    return Work(run, look=look)


def _config(job: Job, *, n_ctx: int, folder: str) -> LanguageModelSAERunnerConfig[Any]:
    batch = job["batch"]
    return LanguageModelSAERunnerConfig(
        sae=GatedTrainingSAEConfig(
            d_in=job["d_in"],
            d_sae=job["d_sae"],
            normalize_activations="expected_average_only_in",
            # Its activations have a mean norm of sqrt(d_in), ours of about 1.
            l1_coefficient=job["sparsity"] * job["d_in"] ** 0.5,
            l1_warm_up_steps=job["warm_up_steps"],
        ),
        hook_name=f"blocks.{job['layer']}.hook_resid_post",
        is_dataset_tokenized=True,
        context_size=n_ctx,
        # Its buffer holds so many contexts, whatever the name says: eight batches.
        n_batches_in_buffer=max(64, 8 * batch // n_ctx),
        store_batch_size_prompts=ROWS,
        training_tokens=job["n_tokens"],
        train_batch_size_tokens=batch,
        exclude_special_tokens=True,
        prepend_bos=False,
        lr=job["lr"],
        lr_warm_up_steps=job["warm_up_steps"],
        adam_beta1=0.0,
        n_batches_for_norm_estimate=max(1, NORM_VECTORS // batch),
        # Without W&B it logs no metric at all: in its favour here.
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=folder,
        device=job["device"],
        verbose=False,
    )


if __name__ == "__main__":
    serve(prepare)
