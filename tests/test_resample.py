"""Dead latents: which ones, from which inputs, with what weights, and nothing else touched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gsae_core.config import TrainRecipe
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.training import dead_latents as resampling
from gsae_core.training.dead_latents import (
    DeadLatentCounter,
    draw,
    input_losses,
    is_resampling,
    joins_pool,
    resample_,
)
from gsae_core.training.optimizer import DictionaryAdam

D_IN, D_SAE = 3, 6
DEAD = torch.tensor([1, 4])
ALIVE = torch.tensor([0, 2, 3, 5])
SAES: dict[str, Callable[[], SAE]] = {
    "gated": lambda: GatedSAE(D_IN, D_SAE),
    "no r_mag": lambda: GatedSAE(D_IN, D_SAE, tie="none"),
    "untied": lambda: GatedSAE(D_IN, D_SAE, tie="untied"),
    "free norms": lambda: GatedSAE(D_IN, D_SAE, recipe="A"),
    "relu": lambda: ReluSAE(D_IN, D_SAE),
    "jumprelu": lambda: JumpReluSAE(D_IN, D_SAE, init_threshold=0.1, threshold_unit=5.0),
    "topk": lambda: TopKSAE(D_IN, D_SAE, k=2),
}


def trained(kind: str) -> tuple[SAE, DictionaryAdam]:
    """An SAE of random weights, no two alike, whose optimiser has seen one random gradient."""
    sae = SAES[kind]()
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    adam = DictionaryAdam(sae, beta1=0.0, beta2=0.999)
    adam.step(lr=0.01)
    return sae, adam


def of_latents(name: str, values: Tensor, latents: Tensor) -> Tensor:
    """The entries of a parameter that belong to some latents, latents first."""
    return (values.T if name in ("W_gate", "W_mag", "W_enc") else values)[latents]


def test_resamplings_come_at_whole_periods_until_their_share_of_the_steps_is_done() -> None:
    cfg = TrainRecipe(n_tokens=50, batch_size=1, revive_every=10, revive_until=0.7)
    assert [step for step in range(51) if is_resampling(step, cfg)] == [
        10,
        20,
        30,
    ]  # 35 is the last


def test_a_period_of_zero_never_resamples() -> None:
    cfg = TrainRecipe(n_tokens=50, batch_size=1, revive_every=0)
    assert not any(is_resampling(step, cfg) for step in range(51))
    assert not any(joins_pool(step, cfg, widest=D_SAE) for step in range(51))


def test_the_pool_is_the_last_batches_up_to_a_resampling() -> None:
    cfg = TrainRecipe(n_tokens=25 * 2**13, batch_size=2**13, revive_every=10, revive_until=0.9)

    def steps(widest: int) -> list[int]:
        return [step for step in range(1, 26) if joins_pool(step, cfg, widest=widest)]

    assert steps(widest=100) == [9, 10, 19, 20]  # 2^14 inputs are two batches
    assert steps(widest=2**14 + 1) == [8, 9, 10, 18, 19, 20]  # an input for each latent


def test_a_latent_is_dead_when_the_whole_window_passed_without_it() -> None:
    counter = DeadLatentCounter(ReluSAE(2, 4), window=5)
    counter.since_fired.copy_(torch.tensor([0, 5, 4, 6]))
    assert counter.mask.tolist() == [False, True, False, True]


def test_losses_are_squared_errors_of_each_input() -> None:
    sae = ReluSAE(2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
    # The SAE returns (relu(x_1), 0): it misses x_2, and x_1 where that is negative.
    pool = torch.tensor([[3.0, 2.0], [-1.0, 1.0], [5.0, 0.0]])
    assert input_losses(sae, pool).tolist() == [4.0, 2.0, 0.0]


def test_losses_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, _ = trained("gated")
    pool = torch.randn(11, D_IN, generator=torch.Generator().manual_seed(0))
    whole = input_losses(sae, pool)
    monkeypatch.setattr(resampling, "CHUNK_ENTRIES", 4 * D_SAE)  # 4 + 4 + 3 inputs
    assert torch.allclose(input_losses(sae, pool), whole, rtol=1e-6)


def test_an_input_equal_to_b_dec_is_never_drawn() -> None:
    sae, _ = trained("relu")
    assert isinstance(sae, ReluSAE)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)  # so that b_dec itself is badly reconstructed
    pool = torch.stack([sae.b_dec.detach(), sae.b_dec.detach() + 1])
    losses = input_losses(sae, pool)
    assert losses[0] == 0
    assert losses[1] > 0


def test_inputs_are_drawn_in_proportion_to_squared_loss() -> None:
    losses = torch.tensor([1.0, 0.0, 2.0, 3.0])
    n = 3000
    drawn = torch.cat([draw(losses, n=1, seed=seed) for seed in range(n)])
    shares = torch.bincount(drawn, minlength=4) / n
    # 1 : 0 : 4 : 9 of 14; three standard deviations are at most 3 sqrt(.25 / 3000) = 0.028.
    assert torch.allclose(shares, torch.tensor([1.0, 0.0, 4.0, 9.0]) / 14, atol=0.028)
    assert shares[1] == 0


def test_no_input_is_drawn_twice_and_none_without_loss() -> None:
    losses = torch.tensor([1.0, 0.0, 1e30, 1.0, 0.0])
    assert sorted(draw(losses * 0 + 1, n=5, seed=0).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(draw(losses, n=5, seed=0).tolist()) == [0, 2, 3]
    assert draw(torch.zeros(4), n=2, seed=0).tolist() == []


def test_equal_seeds_draw_equal_inputs() -> None:
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(losses, n=9, seed=5), draw(losses, n=9, seed=5))
    assert not torch.equal(draw(losses, n=9, seed=5), draw(losses, n=9, seed=6))


@pytest.mark.parametrize("kind", SAES)
def test_each_weight_of_a_resampled_latent(kind: str) -> None:
    sae, adam = trained(kind)
    pool = torch.tensor([[4.0, -2.0, 1.0], [0.5, 3.0, -6.0]])
    encoders = [name for name, _ in sae.named_parameters() if name in ("W_gate", "W_mag", "W_enc")]
    mean_norms = {
        name: sum(sae.get_parameter(name)[:, i].norm().item() for i in ALIVE) / len(ALIVE)
        for name in encoders
    }
    drawn = draw(input_losses(sae, pool), n=2, seed=7)
    resampled = resample_(sae, adam, dead=DEAD, pool=pool, seed=7)
    assert resampled.tolist() == DEAD.tolist()
    directions = torch.nn.functional.normalize(pool[drawn] - sae.b_dec, dim=1)
    assert torch.allclose(sae.W_dec[DEAD], directions, atol=1e-6)
    assert torch.allclose(sae.W_dec[DEAD].norm(dim=1), torch.ones(2), atol=1e-6)
    assert encoders
    for name in encoders:
        columns = sae.get_parameter(name)[:, DEAD].T
        assert torch.allclose(columns, 0.2 * mean_norms[name] * directions, atol=1e-6), name
    for name, parameter in sae.named_parameters():
        if name in ("b_gate", "b_mag", "b_enc", "r_mag"):
            assert parameter[DEAD].tolist() == [0.0, 0.0], name
    if isinstance(sae, JumpReluSAE):
        assert sae.threshold[DEAD].tolist() == pytest.approx([0.5, 0.5])
    if isinstance(sae, GatedSAE) and sae.W_mag is None:
        assert sae.jumprelu_threshold()[DEAD].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", SAES)
def test_everything_else_keeps_its_bits(kind: str) -> None:
    sae, adam = trained(kind)
    weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = adam.state_dict()
    pool = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(3))
    resample_(sae, adam, dead=DEAD, pool=pool, seed=0)
    assert torch.equal(sae.b_dec, weights["b_dec"])
    for name, parameter in sae.named_parameters():
        now = adam.moments(name)
        assert torch.equal(now["step"], moments[name]["step"])
        if name == "b_dec":
            assert torch.equal(now["exp_avg_sq"], moments[name]["exp_avg_sq"])
            continue
        assert torch.equal(
            of_latents(name, parameter, ALIVE), of_latents(name, weights[name], ALIVE)
        ), name
        for key in ("exp_avg", "exp_avg_sq"):
            before = moments[name][key]
            kept = of_latents(name, now[key], ALIVE)
            assert torch.equal(kept, of_latents(name, before, ALIVE)), name
            assert of_latents(name, before, DEAD).abs().max() > 0
            assert of_latents(name, now[key], DEAD).abs().max() == 0, name


def test_a_resampled_latent_fires_on_the_input_it_came_from() -> None:
    sae, adam = trained("gated")
    pool = torch.tensor([[4.0, -2.0, 1.0]])
    (latent,) = resample_(sae, adam, dead=DEAD, pool=pool, seed=0).tolist()
    assert sae.encode(pool)[0, latent] > 0


def test_more_dead_latents_than_inputs_wait() -> None:
    sae, adam = trained("gated")
    second = sae.W_dec[4].detach().clone()
    resampled = resample_(sae, adam, dead=DEAD, pool=torch.tensor([[4.0, -2.0, 1.0]]), seed=0)
    assert resampled.tolist() == [1]
    assert torch.equal(sae.W_dec[4], second)


def test_with_nothing_alive_encoders_start_at_a_fifth() -> None:
    sae, adam = trained("gated")
    assert isinstance(sae, GatedSAE)
    pool = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(0))
    resample_(sae, adam, dead=torch.arange(D_SAE), pool=pool, seed=0)
    assert torch.allclose(sae.W_gate.norm(dim=0), torch.full((D_SAE,), 0.2), atol=1e-6)


def test_resampling_before_the_first_step_needs_no_moments() -> None:
    sae = GatedSAE(D_IN, D_SAE)
    adam = DictionaryAdam(sae, beta1=0.0, beta2=0.999)
    pool = torch.ones(4, D_IN) * torch.arange(1.0, 5.0)[:, None]
    assert len(resample_(sae, adam, dead=DEAD, pool=pool, seed=0)) == 2
