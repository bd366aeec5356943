"""Which way a step is computed."""

import copy
from typing import Any

import pytest
import torch
from examples import set_

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.sae.topk import TopKSAE
from gsae_core.training.learner import Stepper, choose_step

GATED = GatedSAE(3, 5)


def test_the_step_is_chosen_by_the_share_of_open_gates() -> None:
    def chosen(density: float | None, *, sae: SAE = GATED, screened: bool = False) -> object:
        return choose_step(sae, density, screened=screened)

    assert chosen(None) is manual_dense_step
    assert chosen(0.15) is manual_dense_step
    assert chosen(0.14) is sparse_step
    assert chosen(0.3, screened=True) is manual_dense_step
    assert chosen(0.3, sae=TopKSAE(3, 5, k=2)) is dense_step  # by hand for an L1 term alone
    step = chosen(0.1, screened=True)
    assert getattr(step, "func", None) is sparse_step
    assert getattr(step, "keywords", None) == {"screened": True}


@pytest.mark.parametrize("sae", [JumpReluSAE(3, 5), TopKSAE(3, 5, k=1)])
def test_dense_gradients_by_hand_are_those_of_an_l1_term(sae: Any) -> None:
    with pytest.raises(InputError, match=r"expected a Gated or ReLU SAE, got .*; take dense_step"):
        manual_dense_step(sae, torch.ones(4, 3), sparsity_coeff=0.1)


@pytest.mark.parametrize(
    "sae",
    [
        GatedSAE(3, 5).bfloat16(),
        JumpReluSAE(3, 5).bfloat16(),
        TopKSAE(3, 5, k=2).bfloat16(),
        GatedSAE(3, 5, tie="untied"),
    ],
)
def test_what_the_fast_steps_do_not_know_takes_autograds(
    sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in ("sparse_step", "manual_dense_step"):
        monkeypatch.setattr(f"gsae_core.training.learner.{way}", None)  # not to be taken
    sae = copy.deepcopy(sae)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(sae.W_dec)
    dead = torch.zeros(5, dtype=torch.bool)
    stepper = Stepper(sae, screened=False)
    attempt = stepper.attempt(x, sparsity_coeff=0.1, density=0.01, dead=dead)
    assert sae.W_dec.grad is not None
    assert not attempt.overflowed
    opened = attempt.stats.gate_open
    expected = attempt.stats.fired if opened is None else opened
    assert int(attempt.n_entries) >= int(expected.sum())


@pytest.mark.parametrize(
    "sae", [GatedSAE(3, 5), ReluSAE(3, 5), JumpReluSAE(3, 5), TopKSAE(3, 5, k=1)]
)
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_every_architecture_takes_the_way_its_last_density_says(
    sae: SAE, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = isinstance(sae, GatedSAE | ReluSAE)
    way = "sparse_step" if density < 0.3 else "manual_dense_step" if by_hand else "dense_step"
    taken = []

    def record(*args: Any, **settings: Any) -> StepResult:
        taken.append(way)
        return dense_step(*args, **settings)

    monkeypatch.setattr(f"gsae_core.training.learner.{way}", record)
    stepper = Stepper(copy.deepcopy(sae), screened=False)
    x, dead = torch.ones(4, 3), torch.zeros(5, dtype=torch.bool)
    stepper.attempt(x, sparsity_coeff=0.1, density=density, dead=dead)
    assert taken == [way]


def test_only_a_topk_sae_knows_its_density_before_its_first_step() -> None:
    assert first_way(TopKSAE(3, 10, k=1)) == "sparse"
    assert first_way(TopKSAE(3, 10, k=4)) == "dense"
    assert first_way(JumpReluSAE(3, 10)) == "dense"
    assert first_way(GatedSAE(3, 10)) == "dense"


def first_way(sae: SAE) -> str:
    ways = {"sparse_step": "sparse", "manual_dense_step": "dense", "dense_step": "dense"}
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for way, name in ways.items():

            def record(*args: Any, name: str = name, **settings: Any) -> StepResult:
                taken.append(name)
                return dense_step(*args, **settings)

            patch.setattr(f"gsae_core.training.learner.{way}", record)
        stepper = Stepper(sae, screened=False)
        dead = torch.zeros(sae.d_sae, dtype=torch.bool)
        stepper.attempt(torch.ones(4, 3), sparsity_coeff=0.1, density=None, dead=dead)
    return taken[0]


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_the_window_of_a_jumprelu_sae_and_the_dead_of_a_topk_sae_count_as_work(
    density: float,
) -> None:
    # z = 1, 1, 1 on both inputs; theta = 2 with a window from 0.5: nothing fires, all is near.
    # The largest latent and the two dead ones: 3 entries an input, one of them twice.
    jumprelu = JumpReluSAE(1, 3, init_threshold=2.0, bandwidth=3.0)
    topk = TopKSAE(1, 3, k=1, k_aux=5)
    dead = torch.tensor([True, False, True])
    for sae, fired in ((jumprelu, 0), (topk, 2)):
        set_(sae, W_enc=[[0, 0, 0]], b_enc=[1, 1, 1])
        stepper = Stepper(sae, screened=False)
        attempt = stepper.attempt(torch.ones(2, 1), sparsity_coeff=0.1, density=density, dead=dead)
        assert int(attempt.n_entries) == 6
        assert int(attempt.stats.fired.sum()) == fired


def test_float64_is_not_screened() -> None:
    sae = GatedSAE(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stepper = Stepper(sae, screened=True)
    dead = torch.zeros(5, dtype=torch.bool)
    attempt = stepper.attempt(x, sparsity_coeff=0.1, density=0.01, dead=dead)
    assert attempt.n_candidates is None
