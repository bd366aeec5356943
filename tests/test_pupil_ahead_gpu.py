"""The trainer on a GPU waits for no step that logs nothing: `python -m pytest -m gpu`."""

import math

import pytest
import torch
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.training import TrainConfig, Trainer, step_choice

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
def test_on_a_gpu_a_step_that_logs_nothing_never_synchronises(architecture: str) -> None:
    trainer = Trainer([new_sae(architecture)], CFG)
    data = batches()
    for x in data[:15]:  # compiles what there is to compile; then both ways have been taken
        trainer.step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reports = [trainer.step(x) for x in data[15:-1]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reports[-1].saes[0].answer.known is None
    assert reports[-1].saes[0].loss is not None


@pytest.mark.parametrize("architecture", KINDS)
def test_on_a_gpu_steps_settled_late_leave_the_bits_of_steps_settled_at_once(
    architecture: str,
) -> None:
    late, at_once = new_sae(architecture), new_sae(architecture)
    for sae, settles in ((late, False), (at_once, True)):
        trainer = Trainer([sae], CFG)
        for x in batches():
            trainer.step(x)
            if settles:
                trainer.settle()
    for name, parameter in late.named_parameters():
        assert torch.equal(parameter, at_once.get_parameter(name)), name


def test_on_a_gpu_a_batch_that_is_not_finite_leaves_the_weights_of_the_step_before() -> None:
    sae, other = new_sae("gated"), new_sae("gated")
    trainer, shorter = Trainer([sae], CFG), Trainer([other], CFG)
    for x in batches()[:10]:
        trainer.step(x)
        shorter.step(x)
    trainer.step(batches()[10] * math.nan)
    trainer.step(batches()[11])
    assert trainer.stopped == ("step 11: the activations are not finite",)
    shorter.settle()
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_on_a_gpu_steps_that_overflow_leave_the_bits_of_dense_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowded, dense = new_sae("gated"), new_sae("gated")
    # Room for one gate, where hundreds open: every step but the first two is taken again.
    monkeypatch.setattr(step_choice.kernels, "capacity_for", lambda n_open: 1)
    for sae, crossover in ((crowded, 2.0), (dense, 0.0)):
        trainer = Trainer([sae], CFG)
        monkeypatch.setattr(trainer._pupils[0]._stepper, "crossover", crossover)
        for x in batches():
            trainer.step(x)
    for name, parameter in crowded.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
