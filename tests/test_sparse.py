"""The sparse step, and the dense one by hand, equal autograd on the losses of the papers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples import Largest, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step

Step = Callable[..., StepResult]
STEPS: list[Step] = [sparse_step, manual_dense_step]
KINDS: dict[str, Any] = {
    "gated": GatedSAE,
    "relu": ReluSAE,
    "jumprelu": JumpReluSAE,
    "topk": TopKSAE,
}
OBJECTIVES = [("P", "frozen"), ("P", "unfrozen"), ("P", "off")]
OBJECTIVES += [("A", "unfrozen"), ("A", "off"), ("B", "frozen"), ("B", "off")]


def random_sae(
    kind: str, d_in: int, d_sae: int, *, shift: float = 0.0, seed: int = 0, **switches: Any
) -> Any:
    """Return an SAE with every parameter drawn at random, gates shifted by `shift`."""
    generator = torch.Generator().manual_seed(seed)
    sae = KINDS[kind](d_in, d_sae, **switches).double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.5 * noise + (shift if name in ("b_gate", "b_enc") else 0.0)
            if name == "threshold":
                parameter.clamp_(min=0)
    return sae


def taken(
    step: Step, sae: SAE, x: Tensor, coeff: float, dead: Tensor | None = None
) -> dict[str, Tensor]:
    """Return gradients, loss terms and statistics of one step by name; no gradient is zero."""
    result = step(sae, x, sparsity_coeff=coeff, **({} if dead is None else {"dead": dead}))
    named = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in sae.named_parameters()
    }
    named |= result.loss._asdict()
    return named | {k: v for k, v in result.stats._asdict().items() if v is not None}


def steps_of(sae: SAE) -> list[Step]:
    """Return the steps by hand that know this SAE: the dense one those with an L1 term alone."""
    return STEPS if isinstance(sae, GatedSAE | ReluSAE) else [sparse_step]


def assert_equal_steps(
    sae: SAE, x: Tensor, coeff: float, bound: float, dead: Tensor | None = None
) -> None:
    """Compare each tensor against its largest entry: the scale at which it was summed."""
    expected = taken(dense_step, sae, x, coeff, dead)
    for step in steps_of(sae):
        got = taken(step, sae, x, coeff, dead)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype, name
            error = (got[name] - value).abs().max().item()
            assert error <= bound * max(1.0, value.abs().max().item()), (step, name, error)


EVERY_KIND = ("gated", "relu", "gated", "jumprelu", "gated", "topk")
"""Most are gated, which has the most settings."""


@st.composite
def descriptions(draw: st.DrawFn, kinds: tuple[str, ...] = EVERY_KIND) -> dict[str, Any]:
    """Draw what `instance` builds; sizes, switches and the layout of x in memory."""
    d_in = draw(st.integers(1, 4))
    # Loops compare 32 latents at once: fewer, more, and no whole number of them.
    d_sae = d_in + draw(st.one_of(st.integers(1, 5), st.integers(28, 70)))
    return {
        "switches": draw(switches(d_sae, kinds)),
        "d_in": d_in,
        "d_sae": d_sae,
        "n_rows": draw(st.integers(1, 6)),
        # -50 leaves no gate open and 50 leaves none closed; to many latents of such values float32
        # itself loses the gradient of b_dec, a difference of large sums.
        "shift": draw(st.sampled_from([-50.0, -1.0, 0.0, 1.0, 50.0 if d_sae < 10 else 5.0])),
        "seed": draw(st.integers(0, 999)),
        # Every other column of a wider matrix, or a matrix stored by columns, or a plain one.
        "layout": draw(st.sampled_from(["strided", "transposed", "plain"])),
        "coeff": draw(st.sampled_from([0.0, 0.3, 2.0])),
        "dead": draw(st.sampled_from([None, 0.0, 0.4, 1.0])),
    }


@st.composite
def switches(draw: st.DrawFn, d_sae: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Draw an architecture and its settings."""
    kind = draw(st.sampled_from(kinds))
    if kind == "relu":
        return {"kind": kind, "recipe": draw(st.sampled_from("PA"))}
    if kind == "jumprelu":
        # A window that no latent is in, one that some are in, and one that reaches below zero.
        threshold, bandwidth = draw(st.sampled_from([(1.0, 1e-6), (1.0, 0.5), (0.05, 3.0)]))
        return {"kind": kind, "init_threshold": threshold, "bandwidth": bandwidth}
    if kind == "topk":
        k = draw(st.sampled_from([1, 2, d_sae // 2, d_sae]))
        return {"kind": kind, "k": k, "k_aux": draw(st.sampled_from([None, 1, 3]))}
    recipe, aux = draw(st.sampled_from(OBJECTIVES))
    tie = draw(st.sampled_from(["r_mag", "none"]))
    detach = draw(st.booleans())
    return {"kind": kind, "recipe": recipe, "aux": aux, "tie": tie, "detach_b_dec": detach}


def instance(what: dict[str, Any]) -> tuple[Any, Tensor, float, Tensor | None]:
    sizes = {name: what[name] for name in ("d_in", "d_sae", "shift", "seed")}
    sae = random_sae(**sizes, **what["switches"])
    generator = torch.Generator().manual_seed(what["seed"] + 1)
    d_in = what["d_in"]
    wide = torch.randn(what["n_rows"], 2 * d_in, generator=generator, dtype=torch.float64)
    x = wide[:, ::2] if what["layout"] == "strided" else wide[:, :d_in].contiguous()
    if what["layout"] == "transposed":
        x = x.T.contiguous().T
    share = what["dead"]
    dead = None if share is None else torch.rand(sae.d_sae, generator=generator) < share
    return sae, x, what["coeff"], dead


@settings(derandomize=True, deadline=None, max_examples=200)
@given(descriptions())
def test_gradients_terms_and_statistics_equal_autograd_in_float64(what: dict[str, Any]) -> None:
    sae, x, coeff, dead = instance(what)
    assert_equal_steps(sae, x, coeff, 1e-10, dead)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(descriptions())
def test_gradients_terms_and_statistics_equal_autograd_in_float32(what: dict[str, Any]) -> None:
    sae, x, coeff, dead = instance(what)
    assert_equal_steps(sae.float(), x.float(), coeff, 1e-5, dead)


EVERY_OBJECTIVE: list[dict[str, Any]] = [
    {"kind": "gated", "recipe": recipe, "aux": aux, "tie": tie, "detach_b_dec": detach}
    for recipe, aux in OBJECTIVES
    for tie in ("r_mag", "none")
    for detach in (False, True)
]
EVERY_OBJECTIVE += [{"kind": "relu", "recipe": recipe} for recipe in "PA"]


@pytest.mark.parametrize("switches", EVERY_OBJECTIVE)
def test_every_objective_equals_autograd(switches: dict[str, Any]) -> None:
    sae = random_sae(**switches, d_in=5, d_sae=9)
    assert_equal_steps(sae, numbers(7, 5, seed=1), 0.3, bound=1e-10)


def gate_never_binding(step: Step) -> tuple[GatedSAE, Tensor]:
    """Return an SAE with theta = b_mag - exp(r_mag) b_gate <= 0 everywhere, and inputs for it.

    Gates above magnitudes and magnitudes of 0 behind open gates both occur.
    """
    sae, x = random_sae("gated", 3, 6).float(), numbers(50, 3, seed=2).float()
    sae.b_mag.data.copy_(sae.r_mag.exp() * sae.b_gate - torch.arange(6) / 4)
    assert (sae.jumprelu_threshold() == 0).all()
    stats = step(sae, x, sparsity_coeff=0.2).stats
    assert stats.gate_open is not None
    assert (stats.fired < stats.gate_open).any()
    return sae, x


def test_latents_whose_gate_never_binds_equal_autograd() -> None:
    sae, x = gate_never_binding(sparse_step)
    assert_equal_steps(sae.double(), x.double(), 0.2, bound=1e-10)


def test_a_direction_of_length_zero_has_no_slope_under_recipe_a() -> None:
    sae = random_sae("gated", 3, 5, recipe="A")
    with torch.no_grad():
        sae.W_dec[2] = 0
    x = numbers(8, 3, seed=3)
    assert_equal_steps(sae, x, 0.4, bound=1e-10)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gated", {}), ("relu", {}), ("jumprelu", {"bandwidth": 0.3}), ("topk", {"k": 9})],
)
def test_rows_beyond_one_chunk_equal_autograd(kind: str, settings: dict[str, Any]) -> None:
    sae = random_sae(kind, 3, 2100, shift=-2.0, **settings)  # 256 rows a chunk
    x = numbers(300, 3, seed=4)
    assert_equal_steps(sae, x, 0.1, 1e-10, dead=torch.arange(2100) % 5 == 0)


def test_thresholds_of_zero_equal_autograd() -> None:
    # Such latents fire wherever z > 0, and half of their window lies below it.
    sae = random_sae("jumprelu", 3, 6, bandwidth=0.5)
    with torch.no_grad():
        sae.get_parameter("threshold")[:3] = 0
    x = numbers(50, 3, seed=2)
    assert_equal_steps(sae, x, 0.2, bound=1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_by_hand(step: Step) -> None:
    # One latent of two ever opens. d_in = 1, W_dec = W_gate = (1, -1), all biases 0, lambda = 0.5.
    #   x = 2: pi_gate = (2, -2), f = (2, 0), x_hat = x_hat_aux = 2, errors 0
    #   loss: reconstruction 0, sparsity 0.5 * 2 = 1, auxiliary 0
    #   dm = 0, dg = (0.5, 0) -> W_gate.grad = x dg = (1, 0), b_dec.grad = -1 * 0.5
    sae = GatedSAE(1, 2)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0], [-1.0]]))
        sae.W_gate.copy_(torch.tensor([[1.0, -1.0]]))
    result = step(sae, torch.tensor([[2.0]]), sparsity_coeff=0.5)
    assert [float(term) for term in result.loss] == [0.0, 1.0, 0.0]
    grads = {name: p.grad.tolist() for name, p in sae.named_parameters() if p.grad is not None}
    assert grads == {
        "W_dec": [[0.0], [0.0]],
        "b_dec": [-0.5],
        "W_gate": [[1.0, 0.0]],
        "b_gate": [0.5, 0.0],
        "r_mag": [0.0, 0.0],
        "b_mag": [0.0, 0.0],
    }
    assert result.stats.fired.tolist() == [1, 0]


@pytest.mark.parametrize("step", STEPS)
def test_gradients_replace_earlier_ones_and_lie_as_their_parameters_do(step: Step) -> None:
    sae, x = random_sae("gated", 4, 7).float(), numbers(5, 4, seed=5).float()
    step(sae, x, sparsity_coeff=0.1)
    first = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    step(sae, x, sparsity_coeff=0.1)
    for name, p in sae.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, first[name]), name
        assert p.grad.stride() == p.stride(), name
        assert not p.grad.requires_grad, name


def largest(step: Step, sae: SAE, x: Tensor) -> int:
    dead = {"dead": torch.arange(sae.d_sae) % 7 == 0} if isinstance(sae, TopKSAE) else {}
    with Largest() as seen:
        step(sae, x, sparsity_coeff=0.1, **dead)
    return seen.numel


@pytest.mark.parametrize(
    ("kind", "settings"), [("gated", {}), ("relu", {}), ("jumprelu", {}), ("topk", {"k": 9})]
)
def test_no_matrix_of_batch_by_dictionary_is_ever_made(kind: str, settings: dict[str, Any]) -> None:
    sae = random_sae(kind, 2, 2100, shift=-3.0, **settings)
    x = numbers(1024, 2, seed=6)
    # A quarter of the rows at a time: 256 of 1024.
    assert all(largest(step, sae, x) <= 256 * 2100 for step in steps_of(sae))
    assert largest(dense_step, sae, x) >= 1024 * 2100


@pytest.mark.parametrize("step", STEPS)
def test_another_width_is_refused_in_the_words_of_encode(step: Step) -> None:
    with pytest.raises(InputError, match="expected activations of width d_in=2, got shape"):
        step(GatedSAE(2, 3), torch.zeros(4, 5), sparsity_coeff=0.1)


@pytest.mark.parametrize("step", STEPS)
def test_untied_paths_are_left_to_autograd(step: Step) -> None:
    with pytest.raises(
        InputError, match=r"with tie 'r_mag' or 'none', .*'untied'.*take dense_step"
    ):
        step(GatedSAE(2, 3, tie="untied"), torch.zeros(4, 2), sparsity_coeff=0.1)
