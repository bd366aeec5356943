"""The losses: every term by hand, and the step that leaves gradients and statistics."""

import pytest
import torch
from examples import batch_stats, loss, numbers, random_gated, random_relu, set_, worked_example

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.losses import LossParts, dense_step


def values(parts: LossParts) -> list[float]:
    return [term.item() for term in parts]


# Terms by hand. The worked example has pi_gate = (1, -1, 1) and f = (4.5, 0, 0) on x = (3, 1).

X = torch.tensor([[3.0, 1.0]], dtype=torch.float64)


def test_each_term_of_the_gated_loss() -> None:
    # x_hat     = 4.5 (0.6, 0.8) + (1, 0) = (3.7, 3.6): 0.7^2 + 2.6^2 = 7.25
    # L1        = 1 + 1 = 2, times lambda = 0.5
    # x_hat_aux = (0.6, 0.8) + (0, 1) + (1, 0) = (1.6, 1.8): 1.4^2 + 0.8^2 = 2.6
    parts = loss(worked_example(), X, sparsity_coeff=0.5)
    assert values(parts) == pytest.approx([7.25, 1.0, 2.6])
    assert parts.total.item() == pytest.approx(10.85)


@pytest.mark.parametrize("recipe", ["A", "B"])
def test_recipes_a_and_b_weigh_each_latent_by_the_norm_of_its_direction(recipe: str) -> None:
    sae = worked_example(recipe=recipe)
    set_(sae, W_dec=[[3, 4], [1, 0], [0, 2]])
    # norms (5, 1, 2) times relu(pi_gate) = (1, 0, 1): 7, times lambda = 0.5
    assert loss(sae, X, sparsity_coeff=0.5).sparsity.item() == pytest.approx(3.5)


def test_without_an_auxiliary_term_it_is_zero_and_the_gate_hears_only_be_sparse() -> None:
    sae = worked_example(aux="off")
    parts = loss(sae, X, sparsity_coeff=0.5)
    assert values(parts) == pytest.approx([7.25, 1.0, 0])
    parts.total.backward()
    # lambda wherever a gate is open, nothing elsewhere: descent closes every gate.
    assert sae.b_gate.grad is not None
    assert sae.b_gate.grad.tolist() == [0.5, 0, 0.5]


def test_each_term_of_the_baseline_loss() -> None:
    sae = ReluSAE(2, 3).double()
    set_(
        sae,
        W_enc=[[1, 0, 1], [0, 1, -1]],
        b_enc=[-1, -2, 0],
        W_dec=[[0.6, 0.8], [1, 0], [0, 1]],
        b_dec=[1, 0],
    )
    # f = (1, 0, 1); x_hat = (1.6, 1.8): 1.4^2 + 0.8^2 = 2.6; L1 = 2, times lambda = 0.5
    assert values(loss(sae, X, sparsity_coeff=0.5)) == pytest.approx([2.6, 1.0, 0])


def test_the_baselines_recipe_a_weighs_by_norm() -> None:
    sae = ReluSAE(2, 3, recipe="A").double()
    set_(sae, W_enc=[[1, 0, 1], [0, 1, -1]], b_enc=[-1, -2, 0], b_dec=[1, 0])
    set_(sae, W_dec=[[3, 4], [1, 0], [0, 2]])
    assert loss(sae, X, sparsity_coeff=0.5).sparsity.item() == pytest.approx(3.5)


@pytest.mark.parametrize("sae", [random_gated(), random_gated(recipe="A"), random_relu()])
def test_terms_do_not_depend_on_batch_size_or_leading_axes(sae: GatedSAE | ReluSAE) -> None:
    x = numbers(6, 4)
    once = values(loss(sae, x, sparsity_coeff=0.3))
    assert values(loss(sae, x.repeat(5, 1), sparsity_coeff=0.3)) == pytest.approx(once, rel=1e-12)
    assert values(loss(sae, x.view(2, 3, 4), sparsity_coeff=0.3)) == pytest.approx(once, rel=1e-12)
    token_by_token = torch.tensor([values(loss(sae, row, sparsity_coeff=0.3)) for row in x])
    assert token_by_token.mean(0).tolist() == pytest.approx(once, rel=1e-6)


def test_squared_errors_are_summed_over_coordinates() -> None:
    # With no latent firing, x_hat = b_dec = 0 and |x|^2 = d_in for x of ones.
    sae = ReluSAE(5, 2)
    set_(sae, b_enc=[-99, -99])
    assert loss(sae, torch.ones(3, 5), sparsity_coeff=1.0).reconstruction.item() == 5


# One feature, lambda = 1 (arXiv:2404.16014v2, Fig. 2): (1 - f)^2 + f is least at f = 1/2.


def test_l1_halves_a_latent_that_could_reconstruct_perfectly() -> None:
    sae = ReluSAE(2, 1).double()
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    losses = {}
    for f in (0.4, 0.5, 0.6):
        set_(sae, W_enc=[0, 0], b_enc=[f], W_dec=[1, 0])
        losses[f] = loss(sae, x, sparsity_coeff=1.0).total.item()
    # 0.36 + 0.4, 0.25 + 0.5, 0.16 + 0.6
    assert losses == {0.4: pytest.approx(0.76), 0.5: pytest.approx(0.75), 0.6: pytest.approx(0.76)}
    set_(sae, b_enc=[0.5])
    loss(sae, x, sparsity_coeff=1.0).total.backward()
    assert sae.b_enc.grad is not None
    assert sae.b_enc.grad.item() == 0  # 2 (f - 1) + lambda


def test_a_gated_latent_shrinks_its_gate_and_not_its_magnitude() -> None:
    sae = GatedSAE(2, 1).double()
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    set_(sae, W_gate=[0, 0], b_gate=[0.5], b_mag=[1], W_dec=[1, 0])
    loss(sae, x, sparsity_coeff=1.0).total.backward()
    assert sae.b_gate.grad is not None
    assert sae.b_mag.grad is not None
    assert sae.b_gate.grad.item() == 0  # the gate rests at the L1 optimum, 1/2
    assert sae.b_mag.grad.item() == 0  # while the magnitude rests at the truth, 1
    assert sae(x).tolist() == [[1, 0]]


# The step


@pytest.mark.parametrize(
    "sae",
    [
        random_gated(),
        random_gated(tie="untied"),
        random_gated(recipe="A"),
        random_gated(detach_b_dec=True),
        random_gated(aux="off"),
        random_relu(),
        random_relu(recipe="A"),
    ],
)
def test_a_step_leaves_the_gradients_of_the_loss_and_nothing_older(sae: GatedSAE | ReluSAE) -> None:
    x = numbers(30, 4)
    parts = loss(sae, x, sparsity_coeff=0.3)
    sae.zero_grad()
    parts.total.backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, 1e9)  # stale
    result = dense_step(sae, x, sparsity_coeff=0.3)
    assert values(result.loss) == values(parts)
    for name, parameter in sae.named_parameters():
        theirs = expected[name]
        assert parameter.grad is not None
        assert theirs is not None
        assert torch.equal(parameter.grad, theirs), name
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("sae", [random_gated(), random_gated(detach_b_dec=True), random_relu()])
def test_a_steps_statistics_are_those_of_its_batch(sae: GatedSAE | ReluSAE) -> None:
    x = numbers(30, 4)
    stats = dense_step(sae, x, sparsity_coeff=0.3).stats
    x_hat_gate = pi_gate = None
    if isinstance(sae, GatedSAE):
        pi_gate = sae.pre_activations(x).pi_gate
        x_hat_gate = sae.decode(pi_gate.clamp(min=0))
    expected = batch_stats(
        x=x, x_hat=sae(x), x_hat_gate=x_hat_gate, f=sae.encode(x), pi_gate=pi_gate
    )
    for name, ours, theirs in zip(stats._fields, stats, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-12), name


def test_a_step_encodes_once_and_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, calls = random_gated(), []
    encode = sae.pre_activations
    monkeypatch.setattr(sae, "pre_activations", lambda x: calls.append(1) or encode(x))
    result = dense_step(sae, numbers(30, 4), sparsity_coeff=0.3)
    assert calls == [1]
    tensors = [*result.loss, *(t for t in result.stats if t is not None)]
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("sae", [GatedSAE(4, 7), ReluSAE(4, 7)])
def test_a_batch_of_another_width_is_refused(sae: GatedSAE | ReluSAE) -> None:
    with pytest.raises(InputError, match=r"width d_in=4, got shape \(2, 5\)"):
        dense_step(sae, torch.zeros(2, 5), sparsity_coeff=0.3)
