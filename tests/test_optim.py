"""The schedules, by hand; and Adam on a dictionary that stays on the unit sphere."""

import pytest
import torch

from gsae_core.config import TrainRecipe
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.training.optimizer import (
    DictionaryAdam,
    lr_factor,
    sparsity_factor,
)

# 20 steps of one activation each.
WARMUP = TrainRecipe(
    n_tokens=20, batch_size=1, lr_warmup_steps=4, lr_decay_fraction=0.0, sparsity_warmup_steps=0
)


def adam_for(sae: GatedSAE | ReluSAE) -> DictionaryAdam:
    return DictionaryAdam(sae, beta1=0.0, beta2=0.999)


def set_gradients(sae: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def stepped(sae: GatedSAE | ReluSAE, n: int = 1) -> DictionaryAdam:
    """Return the optimiser of an SAE after so many steps."""
    adam = adam_for(sae)
    for seed in range(n):
        set_gradients(sae, seed)
        adam.step(lr=0.1)
    return adam


def test_a_cosine_rises_from_a_tenth_to_one() -> None:
    # 0.1 + 0.9 (1 - cos(pi k / 4)) / 2; cos(pi/4) = 0.70711.
    expected = [0.1, 0.23180, 0.55, 0.86820, 1.0, 1.0]
    assert [lr_factor(step, WARMUP) for step in range(6)] == pytest.approx(expected, abs=1e-5)
    assert lr_factor(19, WARMUP) == 1.0


def test_the_learning_rate_rises_again_after_a_revival() -> None:
    factors = [lr_factor(step, WARMUP, warmup_start=10) for step in (10, 12, 14)]
    assert factors == pytest.approx([0.1, 0.55, 1.0])


def test_the_learning_rate_falls_in_a_line_over_the_last_steps() -> None:
    cfg = TrainRecipe(n_tokens=20, batch_size=1, lr_warmup_steps=0, lr_decay_fraction=0.25)
    # The last 5 of 20 steps: 15 is the first of them, at 5/5.
    factors = [lr_factor(step, cfg) for step in (0, 14, 15, 16, 19)]
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.2])


def test_warm_up_and_decay_multiply_where_they_overlap() -> None:
    cfg = TrainRecipe(n_tokens=20, batch_size=1, lr_warmup_steps=4, lr_decay_fraction=0.5)
    # Revived after 12 steps: step 14 is half way up the cosine (0.55), 6 steps before the end of a
    # decay of 10 (0.6).
    assert lr_factor(14, cfg, warmup_start=12) == pytest.approx(0.33)


def test_lambda_rises_in_a_line_from_zero() -> None:
    cfg = TrainRecipe(n_tokens=20, batch_size=1, sparsity_warmup_steps=4)
    factors = [sparsity_factor(step, cfg) for step in (0, 1, 3, 4, 19)]
    assert factors == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert sparsity_factor(0, WARMUP) == 1.0


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_first_step_by_hand(dtype: torch.dtype, atol: float) -> None:
    # With beta1 = 0 Adam's first step is -lr * sign(gradient). Row by row in float32, by torch's
    # operators in bfloat16.
    sae = ReluSAE(2, 3).to(dtype)
    with torch.no_grad():
        sae.W_dec[0] = torch.tensor([1.0, 0.0])
    set_gradients(sae, seed=0)
    sae.W_dec.grad = torch.tensor([[5.0, 3.0]], dtype=dtype).repeat(3, 1)
    sae.b_enc.grad = torch.tensor([-2.0, 0.0, 7.0], dtype=dtype)
    adam = adam_for(sae)
    adam.step(lr=0.1)
    # The gradient becomes (0, 3), the row (1, -0.1) / sqrt(1.01).
    expected = torch.tensor([1.0, -0.1]) / 1.01**0.5
    assert torch.allclose(sae.W_dec[0].float(), expected, atol=atol)
    assert torch.allclose(sae.b_enc.float(), torch.tensor([0.1, 0.0, -0.1]), atol=atol)
    # The part along the row never reaches the moments: v = (1 - 0.999) * 3^2.
    moment = adam.moments("W_dec")["exp_avg_sq"]
    assert torch.allclose(moment[0].float(), torch.tensor([0.0, 0.009]), atol=atol / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_over_the_dictionary_is_projection_then_adam_then_renormalisation(
    dtype: torch.dtype,
) -> None:
    sae = GatedSAE(5, 70).to(dtype)
    adam = DictionaryAdam(sae, beta1=0.5, beta2=0.999)
    W_dec = torch.nn.Parameter(sae.W_dec.detach().clone())
    reference = torch.optim.Adam([W_dec], betas=(0.5, 0.999), eps=1e-8)
    for step in range(1, 6):
        set_gradients(sae, seed=step)
        assert sae.W_dec.grad is not None
        W_dec.grad = sae.W_dec.grad.clone()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        reference.param_groups[0]["lr"] = 0.1 / step
        reference.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        adam.step(0.1 / step)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(sae.W_dec, W_dec, rtol=0, atol=tolerance)
    moments, expected = adam.moments("W_dec"), reference.state[W_dec]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(moments[name], expected[name])


def test_free_norms_are_neither_projected_nor_renormalised() -> None:
    sae = GatedSAE(2, 3, recipe="A")
    with torch.no_grad():
        sae.W_dec[0] = torch.tensor([1.0, 0.0])
    set_gradients(sae, seed=0)
    sae.W_dec.grad = torch.tensor([[5.0, 3.0]]).repeat(3, 1)
    adam_for(sae).step(lr=0.1)
    assert torch.allclose(sae.W_dec[0], torch.tensor([0.9, -0.1]), atol=1e-6)


def test_a_parameter_that_is_a_view_of_a_wider_tensor_moves_as_any_other() -> None:
    saes = [GatedSAE(3, 5), GatedSAE(3, 5)]
    for parameter in saes[1].parameters():
        wide = torch.zeros(*parameter.shape[:-1], 2 * parameter.shape[-1])
        wide[..., ::2] = parameter.detach()
        parameter.data = wide[..., ::2]
    for sae in saes:
        stepped(sae, 3)
    for (name, p), other in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(p, other, msg=name)


def test_a_gradient_of_other_strides_reaches_its_own_entries() -> None:
    # torch's fused kernel walks raw memory; a transposed gradient would land elsewhere.
    saes = [GatedSAE(3, 5), GatedSAE(3, 5)]
    for sae, transposed in zip(saes, (False, True), strict=True):
        set_gradients(sae, seed=1)
        grad = sae.W_gate.grad
        assert grad is not None
        if transposed:
            sae.W_gate.grad = grad.T.contiguous().T
            assert sae.W_gate.grad.stride() != sae.W_gate.stride()
        adam_for(sae).step(lr=0.1)
    assert torch.equal(saes[0].W_gate, saes[1].W_gate)


def test_moments_saved_and_loaded_give_the_same_next_step() -> None:
    sae = GatedSAE(3, 5)
    adam = stepped(sae, 3)
    other = GatedSAE(3, 5)
    other.load_state_dict(sae.state_dict())
    other_adam = adam_for(other)
    other_adam.load_state_dict(adam.state_dict())
    for each, its_adam in ((sae, adam), (other, other_adam)):
        set_gradients(each, seed=9)
        its_adam.step(lr=0.1)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_saved_state_does_not_change_with_later_steps() -> None:
    sae = ReluSAE(3, 5)
    adam = stepped(sae)
    before = adam.state_dict()["W_enc"]["exp_avg_sq"]
    copy = before.clone()
    set_gradients(sae, seed=1)
    adam.step(lr=0.1)
    assert torch.equal(before, copy)
