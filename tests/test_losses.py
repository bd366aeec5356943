"""The losses: every term by hand, every gradient of the paper, every stop-gradient."""

from typing import Any

import pytest
import torch
from examples import numbers, perturb_, set_, worked_example
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import Aux, GatedSAE, ReluSAE
from gsae_core.sae.losses import LossParts, dense_step, gated_loss, loss, relu_loss
from gsae_core.sae.metrics import batch_stats

TERMS = ["reconstruction", "sparsity", "auxiliary"]


def random_gated(**options: Any) -> GatedSAE:
    sae = GatedSAE(4, 7, **options).double()
    perturb_(sae)
    return sae


def random_relu(**options: Any) -> ReluSAE:
    sae = ReluSAE(4, 7, **options).double()
    perturb_(sae)
    return sae


def values(parts: LossParts) -> list[float]:
    return [term.item() for term in parts]


# Terms by hand. The worked example has pi_gate = (1, -1, 1) and f = (4.5, 0, 0) on x = (3, 1).

X = torch.tensor([[3.0, 1.0]], dtype=torch.float64)


def test_each_term_of_the_gated_loss() -> None:
    # x_hat     = 4.5 (0.6, 0.8) + (1, 0) = (3.7, 3.6): 0.7^2 + 2.6^2 = 7.25
    # L1        = 1 + 1 = 2, times lambda = 0.5
    # x_hat_aux = (0.6, 0.8) + (0, 1) + (1, 0) = (1.6, 1.8): 1.4^2 + 0.8^2 = 2.6
    parts = gated_loss(worked_example(), X, sparsity_coeff=0.5)
    assert values(parts) == pytest.approx([7.25, 1.0, 2.6])
    assert parts.total.item() == pytest.approx(10.85)


@pytest.mark.parametrize("recipe", ["A", "B"])
def test_recipes_a_and_b_weigh_each_latent_by_the_norm_of_its_direction(recipe: str) -> None:
    sae = worked_example(recipe=recipe)
    set_(sae, W_dec=[[3, 4], [1, 0], [0, 2]])
    # norms (5, 1, 2) times relu(pi_gate) = (1, 0, 1): 7, times lambda = 0.5
    assert gated_loss(sae, X, sparsity_coeff=0.5).sparsity.item() == pytest.approx(3.5)


def test_without_an_auxiliary_term_it_is_zero_and_the_gate_hears_only_be_sparse() -> None:
    sae = worked_example(aux="off")
    parts = gated_loss(sae, X, sparsity_coeff=0.5)
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
    assert values(relu_loss(sae, X, sparsity_coeff=0.5)) == pytest.approx([2.6, 1.0, 0])


def test_the_baselines_recipe_a_weighs_by_norm() -> None:
    sae = ReluSAE(2, 3, recipe="A").double()
    set_(sae, W_enc=[[1, 0, 1], [0, 1, -1]], b_enc=[-1, -2, 0], b_dec=[1, 0])
    set_(sae, W_dec=[[3, 4], [1, 0], [0, 2]])
    assert relu_loss(sae, X, sparsity_coeff=0.5).sparsity.item() == pytest.approx(3.5)


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
    assert relu_loss(sae, torch.ones(3, 5), sparsity_coeff=1.0).reconstruction.item() == 5


# One feature, lambda = 1 (arXiv:2404.16014v2, Fig. 2): (1 - f)^2 + f is least at f = 1/2.


def test_l1_halves_a_latent_that_could_reconstruct_perfectly() -> None:
    sae = ReluSAE(2, 1).double()
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    losses = {}
    for f in (0.4, 0.5, 0.6):
        set_(sae, W_enc=[0, 0], b_enc=[f], W_dec=[1, 0])
        losses[f] = relu_loss(sae, x, sparsity_coeff=1.0).total.item()
    # 0.36 + 0.4, 0.25 + 0.5, 0.16 + 0.6
    assert losses == {0.4: pytest.approx(0.76), 0.5: pytest.approx(0.75), 0.6: pytest.approx(0.76)}
    set_(sae, b_enc=[0.5])
    relu_loss(sae, x, sparsity_coeff=1.0).total.backward()
    assert sae.b_enc.grad is not None
    assert sae.b_enc.grad.item() == 0  # 2 (f - 1) + lambda


def test_a_gated_latent_shrinks_its_gate_and_not_its_magnitude() -> None:
    sae = GatedSAE(2, 1).double()
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    set_(sae, W_gate=[0, 0], b_gate=[0.5], b_mag=[1], W_dec=[1, 0])
    gated_loss(sae, x, sparsity_coeff=1.0).total.backward()
    assert sae.b_gate.grad is not None
    assert sae.b_mag.grad is not None
    assert sae.b_gate.grad.item() == 0  # the gate rests at the L1 optimum, 1/2
    assert sae.b_mag.grad.item() == 0  # while the magnitude rests at the truth, 1
    assert sae(x).tolist() == [[1, 0]]


# Which parameter hears which term

ENCODER = {"W_gate", "b_gate"}
HEARD: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "the paper": (
        {},
        {
            # b_gate is not there: the gate is a step. W_gate is: it also carries the magnitude.
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "without r_mag": (
        {"tie": "none"},
        {
            "reconstruction": {"W_gate", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "untied": (
        {"tie": "untied"},
        {
            "reconstruction": {"W_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
    "b_dec detached": (
        {"detach_b_dec": True},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER,
            "auxiliary": ENCODER,
        },
    ),
    "b_dec detached, untied": (
        {"detach_b_dec": True, "tie": "untied"},
        {
            "reconstruction": {"W_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER,
            "auxiliary": ENCODER,
        },
    ),
    "auxiliary decoder unfrozen": (
        {"aux": "unfrozen"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec", "W_dec"},
        },
    ),
    "recipe A": (
        {"recipe": "A"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec", "W_dec"},
            "auxiliary": ENCODER | {"b_dec", "W_dec"},
        },
    ),
    "recipe B": (
        {"recipe": "B"},
        {
            "reconstruction": {"W_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
            "sparsity": ENCODER | {"b_dec"},
            "auxiliary": ENCODER | {"b_dec"},
        },
    ),
}


def hearers(sae: GatedSAE | ReluSAE, term: Tensor) -> set[str]:
    """Return the parameters whose gradient is not exactly zero everywhere."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None and (g != 0).any()}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("variant", HEARD)
def test_a_term_moves_the_parameters_the_paper_says_and_no_others(variant: str, term: str) -> None:
    options, heard = HEARD[variant]
    sae = random_gated(**options)
    parts = gated_loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    assert hearers(sae, getattr(parts, term)) == heard[term]


@pytest.mark.parametrize(
    ("recipe", "heard"),
    [("P", {"W_enc", "b_enc", "b_dec"}), ("A", {"W_enc", "b_enc", "b_dec", "W_dec"})],
)
def test_the_baselines_sparsity_moves_norms_under_recipe_a_only(
    recipe: str, heard: set[str]
) -> None:
    sae = random_relu(recipe=recipe)
    parts = relu_loss(sae, numbers(30, 4), sparsity_coeff=0.3)
    assert hearers(sae, parts.sparsity) == heard
    assert hearers(sae, parts.reconstruction) == {"W_enc", "b_enc", "b_dec", "W_dec"}


# How much they hear


def closed_form(sae: GatedSAE, x: Tensor, lam: float) -> dict[str, Tensor]:
    """Gradients of Eq. 8 (tied by r_mag, unit norm, frozen copy), written out by hand.

    e and e_aux are the two errors; gate and magnitude pre-activations share h = xc W_gate.
    """
    assert sae.r_mag is not None
    n, gain = len(x), sae.r_mag.exp()
    xc = x - sae.b_dec
    h = xc @ sae.W_gate
    pi_gate, pi_mag = h + sae.b_gate, gain * h + sae.b_mag
    open_ = (pi_gate > 0).double()
    f = open_ * pi_mag.clamp(min=0)
    e = f @ sae.W_dec + sae.b_dec - x
    e_aux = pi_gate.clamp(min=0) @ sae.W_dec + sae.b_dec - x
    d_mag = open_ * (pi_mag > 0) * (2 * e @ sae.W_dec.T) / n
    d_gate = open_ * (lam + 2 * e_aux @ sae.W_dec.T) / n
    d_h = gain * d_mag + d_gate
    return {
        "W_gate": xc.T @ d_h,
        "b_gate": d_gate.sum(0),
        "r_mag": (d_mag * gain * h).sum(0),
        "b_mag": d_mag.sum(0),
        "W_dec": f.T @ (2 * e) / n,
        "b_dec": (2 * e / n).sum(0) - sae.W_gate @ d_h.sum(0),
    }


def test_autograd_agrees_with_the_gradients_written_out_by_hand() -> None:
    sae, x = random_gated(), numbers(30, 4)
    gated_loss(sae, x, sparsity_coeff=0.3).total.backward()
    for name, expected in closed_form(sae, x, 0.3).items():
        gradient = sae.get_parameter(name).grad
        assert gradient is not None
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("name", ["W_gate", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"])
def test_gradients_are_finite_differences_of_the_loss_with_its_copies_held(name: str) -> None:
    sae, x, lam, eps = random_gated(), numbers(30, 4), 0.3, 1e-6
    W_copy, b_copy = sae.W_dec.detach().clone(), sae.b_dec.detach().clone()

    def eq_8() -> float:
        with torch.no_grad():
            pi_gate = sae.pre_activations(x).pi_gate.clamp(min=0)
            per_token = (
                (x - sae(x)).square().sum(1)
                + lam * pi_gate.sum(1)
                + (x - pi_gate @ W_copy - b_copy).square().sum(1)
            )
            return per_token.mean().item()

    gated_loss(sae, x, sparsity_coeff=lam).total.backward()
    parameter = sae.get_parameter(name)
    assert parameter.grad is not None
    for index in range(parameter.numel()):
        entry = parameter.data.view(-1)
        was = entry[index].item()
        entry[index] = was + eps
        above = eq_8()
        entry[index] = was - eps
        below = eq_8()
        entry[index] = was
        slope = (above - below) / (2 * eps)
        assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("aux", ["frozen", "unfrozen"])
def test_the_auxiliary_term_moves_b_dec_as_an_output_bias_only_when_unfrozen(aux: Aux) -> None:
    sae, x = random_gated(aux=aux), numbers(30, 4)
    pi_gate = sae.pre_activations(x).pi_gate
    e_aux = pi_gate.clamp(min=0) @ sae.W_dec + sae.b_dec - x
    d_gate = (pi_gate > 0) * (2 * e_aux @ sae.W_dec.T) / 30
    expected = -sae.W_gate @ d_gate.sum(0)  # through the centred input
    if aux == "unfrozen":
        expected = expected + 2 * e_aux.mean(0)
    auxiliary = gated_loss(sae, x, sparsity_coeff=0.3).auxiliary
    (gradient,) = torch.autograd.grad(auxiliary, [sae.b_dec])
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)


def test_recipe_a_sparsity_pulls_each_direction_shorter_by_its_latents_mean_activity() -> None:
    sae, x = random_gated(recipe="A"), numbers(30, 4)
    sparsity = gated_loss(sae, x, sparsity_coeff=0.3).sparsity
    (gradient,) = torch.autograd.grad(sparsity, [sae.W_dec])
    # d |w| / d w = w / |w|
    activity = sae.pre_activations(x).pi_gate.clamp(min=0).mean(0)
    directions = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    assert torch.allclose(gradient, 0.3 * activity[:, None] * directions, rtol=0, atol=1e-12)


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
