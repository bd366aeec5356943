"""Learners on a GPU: launching waits for nothing, and what is learnt: `python -m pytest -m gpu`."""

import math

import pytest
import torch
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.training import TrainConfig, Trainer
from gsae_core.training.learner import CROSSOVER, Learner

pytestmark = pytest.mark.gpu

N_STEPS = 40
CFG = TrainConfig(
    n_tokens=512 * N_STEPS,
    batch_size=512,
    sparsity=(0.5,),
    lr=3e-3,
    lr_warmup_steps=0,
    sparsity_warmup_steps=0,
    revive_every=0,
    revive_window=10,
)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(512, 64, generator=generator) / 8).cuda() for _ in range(N_STEPS)]


def new_sae(architecture: str) -> SAE:
    match architecture:
        case "gated":
            return GatedSAE(64, 1000).cuda()
        case "relu":
            return ReluSAE(64, 1000).cuda()
        case "jumprelu":
            return JumpReluSAE(64, 1000).cuda()
    return TopKSAE(64, 1000, k=8).cuda()


KINDS = ("gated", "relu", "jumprelu", "topk")


@pytest.mark.parametrize("architecture", KINDS)
def test_on_a_gpu_launching_a_step_never_synchronises(architecture: str) -> None:
    learner = Learner(new_sae(architecture), CFG, lr=CFG.lr, sparsity=0.5)
    for number, x in enumerate(batches(), 1):
        if number > 15:  # what there is to compile is compiled, and both ways have been taken
            torch.cuda.set_sync_debug_mode("error")
        try:
            launched = learner.launch(x, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert launched is not None
        assert learner.finish(launched, x, number, pool=None).loss is not None


def test_on_a_gpu_saes_trained_together_have_the_bits_of_each_trained_alone() -> None:
    together, alone = [[new_sae(kind) for kind in KINDS] for _ in range(2)]
    trainer, each = Trainer(together, CFG), [Trainer([sae], CFG) for sae in alone]
    for x in batches():
        trainer.step(x)
        for one in each:
            one.step(x)
    for sae, other in zip(together, alone, strict=True):
        for name, parameter in sae.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), name


def test_on_a_gpu_a_batch_that_is_not_finite_leaves_the_weights_of_the_step_before() -> None:
    sae, other = new_sae("gated"), new_sae("gated")
    trainer, shorter = Trainer([sae], CFG), Trainer([other], CFG)
    for x in batches()[:10]:
        trainer.step(x)
        shorter.step(x)
    trainer.step(batches()[10] * math.nan)
    trainer.step(batches()[11])
    assert trainer.stopped == ("step 11: the activations are not finite",)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_on_a_gpu_steps_that_overflow_leave_the_bits_of_dense_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowded, dense = new_sae("gated"), new_sae("gated")
    # Room for one gate, where hundreds open: every step but the first is taken again.
    monkeypatch.setattr("gsae_core.sae.gpu.step.capacity_for", lambda n_open: 1)
    for sae, crossover in ((crowded, 2.0), (dense, 0.0)):
        monkeypatch.setitem(CROSSOVER, "cuda", crossover)
        trainer = Trainer([sae], CFG)
        for x in batches():
            trainer.step(x)
    for name, parameter in crowded.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
