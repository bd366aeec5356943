"""One update of dictionary_learning's Gated trainer, in its environment: `bench step` runs it."""

import importlib.metadata
from typing import Any

import torch
from dictionary_learning.trainers.gdm import GatedSAETrainer

from benchmarks.ours import load_problem, measured_l0
from benchmarks.serve import Job, Work, serve


def prepare(job: Job) -> Work:
    problem = load_problem(job["problem"], job["device"])
    d_sae, d_in = problem.W_dec.shape
    trainer = GatedSAETrainer(
        steps=10**6,
        activation_dim=d_in,
        dict_size=d_sae,
        layer=0,
        lm_name="none",
        # Moves no weight: L0 stays where it is.
        lr=1e-12,
        l1_penalty=0.1,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=job["device"],
    )
    ae = trainer.ae
    with torch.no_grad():
        ae.decoder.weight.copy_(problem.W_dec.T)
        ae.encoder.weight.copy_(problem.W_dec)
        ae.gate_bias.copy_(problem.bias)
        ae.mag_bias.copy_(problem.bias)
        ae.decoder_bias.zero_()
    steps = iter(range(10**6))

    def run() -> None:
        trainer.update(next(steps), problem.x)

    @torch.no_grad()
    def look() -> dict[str, Any]:
        l0 = measured_l0(problem.x, ae.encoder.weight.T, ae.gate_bias)
        return {"l0": l0, "version": importlib.metadata.version("dictionary-learning")}

    return Work(run, lambda: trainer.optimizer.zero_grad(), look)


if __name__ == "__main__":
    serve(prepare)
