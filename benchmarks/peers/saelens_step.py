"""One step of SAELens' own trainer, in SAELens' environment: `bench step` runs it."""

from typing import Any

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.ours import load_problem, measured_l0
from benchmarks.serve import Job, Work, serve


def prepare(job: Job) -> Work:
    problem = load_problem(job["problem"], job["device"])
    n, (d_sae, d_in) = len(problem.x), problem.W_dec.shape
    sae = GatedTrainingSAE(
        GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, device=job["device"], l1_coefficient=0.1)
    )
    with torch.no_grad():
        sae.W_dec.copy_(problem.W_dec)
        sae.W_enc.copy_(problem.W_dec.T)
        sae.b_gate.copy_(problem.bias)
        sae.b_mag.copy_(problem.bias)
        sae.b_dec.zero_()
    config = SAETrainerConfig(
        total_training_samples=10**6 * n,
        train_batch_size_samples=n,
        # Moves no weight: L0 stays where it is.
        lr=1e-12,
        lr_end=1e-13,
        device=job["device"],
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def run() -> None:
        trainer.step(problem.x)

    @torch.no_grad()
    def look() -> dict[str, Any]:
        l0 = measured_l0(problem.x, sae.W_enc, sae.b_gate)
        return {"l0": l0, "version": sae_lens.__version__}

    return Work(run, lambda: trainer.optimizer.zero_grad(), look)


if __name__ == "__main__":
    serve(prepare)
