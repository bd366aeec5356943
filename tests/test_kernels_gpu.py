"""The GPU kernels on a GPU: `python -m pytest -m gpu`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sparse import OBJECTIVES, random_sae, taken
from torch import Tensor

from gsae_core.sae.architectures import BuiltinSAE
from gsae_core.sae.gpu.step import Kernels, capacity_for, kernel_step
from gsae_core.sae.losses import StepResult, dense_step

pytestmark = pytest.mark.gpu


def on_gpu(
    sae: BuiltinSAE, x: Tensor, coeff: float, dead: Tensor | None = None
) -> dict[str, Tensor]:
    attempt = SimpleNamespace()

    def step(sae: BuiltinSAE, x: Tensor, *, sparsity_coeff: float, **more: Any) -> StepResult:
        room = capacity_for(len(x) * sae.d_sae)
        outcome = kernel_step(sae, x, sparsity_coeff=sparsity_coeff, capacity=room, **more)
        attempt.outcome = outcome
        return outcome

    got = taken(step, sae, x, coeff, dead)
    assert not attempt.outcome.overflowed
    return got


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of a tensor relative to its largest entry."""
    assert got.keys() == expected.keys()
    return max(
        ((got[name] - value).abs().max() / value.abs().max().clamp(min=1.0)).item()
        for name, value in expected.items()
    )


def gpu_example(
    d_in: int, d_sae: int, n_rows: int = 500, kind: str = "gated", **switches: Any
) -> tuple[Any, Tensor]:
    sae = random_sae(kind, d_in, d_sae, **switches).float().cuda()
    path = "gate" if kind == "gated" else "enc"
    with torch.no_grad():
        sae.get_parameter(f"W_{path}").div_(d_in**0.5)
        sae.get_parameter(f"b_{path}").sub_(1.5)
    return sae, torch.randn(n_rows, d_in, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize(("recipe", "aux"), OBJECTIVES)
@pytest.mark.parametrize("tie", ["r_mag", "none"])
def test_on_a_gpu_every_objective_equals_the_dense_step(recipe: str, aux: str, tie: str) -> None:
    sae, x = gpu_example(96, 1000, recipe=recipe, aux=aux, tie=tie)
    expected = taken(dense_step, sae, x, 0.3)
    assert worst(on_gpu(sae, x, 0.3), expected) < 1e-5


@pytest.mark.parametrize("d_in", [1, 17, 300, 768, 2304, 16384])
def test_on_a_gpu_every_width_equals_the_dense_step(d_in: int) -> None:
    sae, x = gpu_example(d_in, 700)
    expected = taken(dense_step, sae, x, 0.3)
    assert worst(on_gpu(sae, x, 0.3), expected) < 1e-5


@pytest.mark.parametrize("bandwidth", [1e-6, 0.5])
def test_on_a_gpu_thresholds_equal_the_dense_step(bandwidth: float) -> None:
    sae, x = gpu_example(96, 1000, kind="jumprelu", init_threshold=1.0, bandwidth=bandwidth)
    expected = taken(dense_step, sae, x, 0.3)
    assert worst(on_gpu(sae, x, 0.3), expected) < 1e-5


@pytest.mark.parametrize("share", [None, 0.0, 0.1])
def test_on_a_gpu_ranks_equal_the_dense_step(share: float | None) -> None:
    sae, x = gpu_example(96, 1000, kind="topk", k=20)
    dead = None if share is None else torch.arange(1000, device="cuda") < 1000 * share
    expected = taken(dense_step, sae, x, 0.3, dead)
    assert worst(on_gpu(sae, x, 0.3, dead), expected) < 1e-5


@torch.no_grad()
def test_on_a_gpu_gates_are_as_exact_as_float32() -> None:
    sae, x = gpu_example(512, 4096)
    exact = (x - sae.b_dec).double() @ sae.W_gate.double() + sae.b_gate
    active = Kernels(capacity=2**20).active(sae, x - sae.b_dec)
    codes, n_open = active.codes, int(active.n_entries)
    row = torch.arange(len(x), device=x.device).repeat_interleave(codes.row_offsets.diff())
    error = codes.gate[:n_open] - exact[row, codes.latent[:n_open].long()]
    assert error.abs().max() / exact.abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu", "topk"])
def test_on_a_gpu_a_step_repeats_to_the_bit_and_never_waits(kind: str) -> None:
    sae, x = gpu_example(256, 5000, n_rows=2000, kind=kind, **({"k": 32} if kind == "topk" else {}))
    dead = torch.arange(5000, device="cuda") < 100 if kind == "topk" else None
    first = on_gpu(sae, x, 0.3, dead)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attempt = kernel_step(sae, x, sparsity_coeff=0.3, capacity=2**22, dead=dead)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, term in attempt.loss._asdict().items():
        assert torch.equal(term, first[name]), name
    for name, p in sae.named_parameters():
        assert torch.equal(p.grad, first[name]), name


def test_on_a_gpu_overflow_raises_the_flag_and_counts_right() -> None:
    sae, x = gpu_example(64, 1000)
    n_open = int((sae.pre_activations(x).pi_gate > 0).sum())
    for room, overflowed in ((n_open, False), (100, True)):
        attempt = kernel_step(sae, x, sparsity_coeff=0.3, capacity=room)
        assert bool(attempt.overflowed) is overflowed
        assert int(attempt.n_entries) == n_open
