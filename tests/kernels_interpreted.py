"""The GPU kernels, played by Triton's interpreter: test_kernels.py runs this file on its own.

Triton reads TRITON_INTERPRET when it is first imported, for the whole process, and building a
PyTorch optimiser imports it. So these tests get a process in which it is set from the start.
"""

import ast
import logging
import re
from typing import Any

import pytest
import test_sparse
import torch
from hypothesis import given, settings
from test_sparse import EVERY_OBJECTIVE, descriptions, instance, largest, random_sae, taken
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.gpu import step as kernels
from gsae_core.sae.gpu.step import (
    Kernels,
    LaunchError,
    available,
    capacity_for,
    kernel_step,
    launch,
)
from gsae_core.sae.jumprelu import in_window
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.training import TrainConfig, Trainer
from gsae_core.training.learner import CROSSOVER, Stepper

ROOM = 8192


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def opened(sae: GatedSAE | ReluSAE, x: Tensor) -> Tensor:
    """Return which gates are open."""
    return sae.pre_activations(x).pi_gate > 0 if isinstance(sae, GatedSAE) else sae.encode(x) > 0


def on_device(
    sae: BuiltinSAE, x: Tensor, *, sparsity_coeff: float, dead: Tensor | None = None
) -> StepResult:
    attempt = kernel_step(sae, x, sparsity_coeff=sparsity_coeff, capacity=ROOM, dead=dead)
    assert not attempt.overflowed
    return attempt


def assert_equals_dense(
    sae: BuiltinSAE, x: Tensor, coeff: float = 0.3, dead: Tensor | None = None
) -> None:
    """Compare each tensor against its largest entry: the scale at which it was summed."""
    expected = taken(dense_step, sae, x, coeff, dead)
    got = taken(on_device, sae, x, coeff, dead)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name] - value).abs().max().item()
        assert error <= 1e-5 * max(1.0, value.abs().max().item()), (name, error)


def test_the_kernels_are_available_to_an_interpreter_on_a_cpu() -> None:
    assert available(torch.device("cpu"), GatedSAE(2, 3)) is None


@pytest.mark.parametrize("switches", EVERY_OBJECTIVE)
def test_every_objective_equals_the_dense_step(switches: dict[str, Any]) -> None:
    assert_equals_dense(random_sae(**switches, d_in=5, d_sae=7).float(), numbers(3, 5))


@settings(derandomize=True, deadline=None, max_examples=10)
@given(descriptions())
def test_random_sizes_switches_and_layouts_equal_the_dense_step(what: dict[str, Any]) -> None:
    sae, x, coeff, dead = instance(what)
    assert_equals_dense(sae.float(), x.float(), coeff, dead)


@pytest.mark.parametrize("bandwidth", [1e-6, 0.5, 3.0])
def test_thresholds_and_their_windows_equal_the_dense_step(bandwidth: float) -> None:
    # Windows that nothing is in, that some latents are in, and that reach below zero.
    sae = random_sae("jumprelu", 5, 9, init_threshold=1.0, bandwidth=bandwidth).float()
    x = numbers(70, 5)
    near = in_window(sae.pre_activations(x), sae.threshold, bandwidth)
    assert bool(near.any()) is (bandwidth > 0.1)
    assert_equals_dense(sae, x)
    entries = Kernels(capacity=ROOM).active(sae, x - sae.b_dec.detach())
    assert int(entries.n_entries) == int((near | (sae.encode(x) > 0)).sum())


@pytest.mark.parametrize("dead", [None, (), (1, 4), range(9)])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_ranks_and_dead_latents_equal_the_dense_step(k: int, dead: Any) -> None:
    # With k = 9 a latent has twenty entries, more than the 16 that its sums read at once.
    sae = random_sae("topk", 5, 9, k=k).float()
    lost = None if dead is None else torch.isin(torch.arange(9), torch.tensor(list(dead)))
    assert_equals_dense(sae, numbers(20 if k == 9 else 6, 5), dead=lost)


def test_ranks_of_several_blocks_of_rows_equal_the_dense_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gsae_core.sae.gpu.step.PRODUCTS_AT_ONCE", 27)
    assert_equals_dense(random_sae("topk", 5, 9, k=2).float(), numbers(7, 5))


def test_a_threshold_by_hand() -> None:
    # One latent, W_dec = W_enc = 1, biases 0, theta = 1, eps = 1, lambda = 0.5, x = (2, 0.8).
    #   z = x: the first fires, f = 2, error 0; the second lies in the window, error -0.8
    #   loss: reconstruction 0.8^2 / 2 = 0.32, sparsity 0.5 * 1 / 2 = 0.25
    #   df = <2e/B, W_dec> = (0, -0.8); dz = df where it fires = 0
    #   dtheta = -(theta df + lambda / B) / eps on the second = -(-0.8 + 0.25) = 0.55
    sae = JumpReluSAE(1, 1, init_threshold=1.0, bandwidth=1.0)
    with torch.no_grad():
        sae.W_dec.fill_(1.0)
        sae.W_enc.fill_(1.0)
    result = on_device(sae, torch.tensor([[2.0], [0.8]]), sparsity_coeff=0.5)
    assert [float(term) for term in result.loss] == pytest.approx([0.32, 0.25, 0.0])
    assert sae.threshold.grad is not None
    assert sae.threshold.grad.tolist() == pytest.approx([0.55])
    assert result.stats.fired.tolist() == [1]


def test_a_rank_by_hand() -> None:
    # Two latents, d_in = 1, W_dec = W_enc = (1, -1), k = 1, b_enc = (0, 3), b_dec = 0, x = 2.
    #   z = (2, 1): the first is kept, f = 2, error 0. The second is dead: e_hat = -1 for an error
    #   of 0, auxiliary 1 / 32; its slope <2 e_aux / 32, -1> = 1 / 16 goes to b_enc and W_enc.
    sae = TopKSAE(1, 2, k=1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0], [-1.0]]))
        sae.W_enc.copy_(torch.tensor([[1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 3.0]))
    dead = torch.tensor([False, True])
    result = on_device(sae, torch.tensor([[2.0]]), sparsity_coeff=0.0, dead=dead)
    assert [float(term) for term in result.loss] == pytest.approx([0.0, 0.0, 1 / 32])
    assert sae.b_enc.grad is not None
    assert sae.W_enc.grad is not None
    assert sae.b_enc.grad.tolist() == pytest.approx([0.0, 1 / 16])
    assert sae.W_enc.grad.tolist() == [pytest.approx([0.0, 1 / 8])]
    assert result.stats.fired.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae", "shift"),
    [
        pytest.param(8, 3, 9, -1.5, id="empty rows"),
        pytest.param(8, 3, 9, -50.0, id="no active latent"),
        pytest.param(8, 3, 40, 50.0, id="all active"),
        pytest.param(8, 1, 9, 0.0, id="d_in of 1"),
        pytest.param(1, 3, 9, 0.0, id="one row"),
        pytest.param(8, 16, 40, 0.0, id="d_sae no multiple of a tile"),
        pytest.param(2, 600, 9, 0.0, id="more columns than one program sums"),
    ],
)
def test_an_edge_case_equals_the_dense_step(
    n_rows: int, d_in: int, d_sae: int, shift: float
) -> None:
    sae, x = random_sae("gated", d_in, d_sae, shift=shift).float(), numbers(n_rows, d_in)
    counts = opened(sae, x).sum(1)
    if shift == -1.5:
        assert counts.min() == 0 < counts.max()
    if abs(shift) == 50:
        assert (counts == (d_sae if shift > 0 else 0)).all()
    assert_equals_dense(sae, x)


def test_activations_strided_in_memory_equal_the_dense_step() -> None:
    sae = random_sae("gated", 5, 9).float()
    for x in (numbers(7, 10)[:, ::2], numbers(5, 7).T):
        assert not x.is_contiguous()
        assert_equals_dense(sae, x)


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """Return the same numbers at other strides."""
    if layout == "transposed":
        return tensor.detach().T.contiguous().T
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor.detach()
    return wide[..., ::2]


EVERY = {
    "gated": {},
    "gated, A": {"tie": "none", "recipe": "A"},
    "relu": {"recipe": "A"},
    "jumprelu": {"init_threshold": 1.0, "bandwidth": 0.5},
    "topk": {"k": 3},
}


@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("gated", "W_gate"), ("gated", "W_dec"), *((kind, None) for kind in EVERY)],
)
def test_parameters_of_other_strides_have_the_dense_steps_gradients(
    kind: str, chosen: str | None, layout: str
) -> None:
    sae = random_sae(kind.partition(",")[0], 5, 9, **EVERY[kind]).float()
    for name, parameter in sae.named_parameters():
        if chosen in (None, name):
            parameter.data = relaid(parameter, "strided" if parameter.ndim == 1 else layout)
            assert not parameter.is_contiguous()
    assert_equals_dense(sae, numbers(4, 5), dead=torch.arange(9) < 4)


def test_a_tensor_that_a_kernel_would_misread_is_not_launched() -> None:
    with pytest.raises(LaunchError) as caught:
        launch("probe", (1,), torch.zeros(4, 6)[:, ::2])
    assert str(caught.value) == "expected tensors of one device, rows in order, got cpu (6, 2)"


def test_latents_whose_gate_never_binds_equal_the_dense_step() -> None:
    assert_equals_dense(*test_sparse.gate_never_binding(on_device))


def test_a_step_by_hand() -> None:
    test_sparse.test_a_step_by_hand(on_device)


@torch.no_grad()
def test_entries_of_many_tiles_come_in_the_order_of_sparse_codes() -> None:
    # Two tiles of rows by two of latents; a tile ends at 128 of either.
    sae = random_sae("gated", 3, 130, shift=-3.0).float()
    assert isinstance(sae, GatedSAE)
    sae.b_gate[129] = 0.0
    x = numbers(130, 3)
    gates = opened(sae, x)
    row, latent = gates.nonzero(as_tuple=True)
    assert gates.sum(1).min() == 0
    assert gates[128:, 128:].any()
    active = Kernels(capacity=ROOM).active(sae, x - sae.b_dec.detach())
    codes, entries, nnz = active.codes, active.entries, int(active.n_entries)
    assert codes.row_offsets.tolist() == [0, *gates.sum(1).cumsum(0).tolist()]
    assert codes.latent[:nnz].tolist() == latent.tolist()
    assert entries.offsets.tolist() == [0, *gates.sum(0).cumsum(0).tolist()]
    # The transpose: rows of each latent in turn, and where each pair stands by row.
    latent_T, row_T = gates.T.nonzero(as_tuple=True)
    assert entries.row[:nnz].tolist() == row_T.tolist()
    place = {pair: at for at, pair in enumerate(zip(row.tolist(), latent.tolist(), strict=True))}
    turned = [place[pair] for pair in zip(row_T.tolist(), latent_T.tolist(), strict=True)]
    assert entries.order[:nnz].tolist() == turned
    torch.testing.assert_close(codes.gate[:nnz], sae.pre_activations(x).pi_gate[gates])
    torch.testing.assert_close(codes.magnitude[:nnz], sae.encode(x)[gates])


def test_many_tiles_equal_the_dense_step() -> None:
    assert_equals_dense(random_sae("gated", 3, 130, shift=-3.0).float(), numbers(130, 3))


def test_a_latent_with_more_entries_in_a_tile_than_are_compared_at_once_keeps_its_order() -> None:
    # Four gates open on all of 100 rows; entries of a tile are compared 64 at a time.
    sae = random_sae("gated", 2, 4, shift=50.0).float()
    x = numbers(100, 2)
    entries = Kernels(capacity=400).active(sae, x - sae.b_dec.detach()).entries
    assert entries.row.tolist() == list(range(100)) * 4


def test_gradients_replace_earlier_ones_and_lie_as_their_parameters_do() -> None:
    test_sparse.test_gradients_replace_earlier_ones_and_lie_as_their_parameters_do(on_device)


def test_no_matrix_of_batch_by_dictionary_is_ever_made() -> None:
    sae = random_sae("gated", 2, 100, shift=-50.0).float()

    def step(sae: GatedSAE | ReluSAE, x: Tensor, *, sparsity_coeff: float) -> StepResult:
        return kernel_step(sae, x, sparsity_coeff=sparsity_coeff, capacity=100)

    # 40 x 100 pre-activations; the interpreter also copies byte by byte, at most the 2400 bytes
    # of six sums per latent.
    assert largest(step, sae, numbers(40, 2)) <= 2400 < 40 * 100
    assert largest(dense_step, sae, numbers(40, 2)) >= 40 * 100


def test_activations_that_are_no_numbers_show_in_the_loss() -> None:
    x = numbers(7, 5)
    x[3, 2] = torch.nan
    result = on_device(random_sae("gated", 5, 9).float(), x, sparsity_coeff=0.1)
    assert result.loss.total.isnan()


# As the trainer takes them


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stepper take its steps by the kernels, as on a GPU, whatever the density."""
    monkeypatch.setitem(CROSSOVER, "cuda", 1.1)
    original = Stepper.__init__

    def made(self: Stepper, *args: Any, **settings: Any) -> None:
        original(self, *args, **settings)
        self._kernels = True

    monkeypatch.setattr(Stepper, "__init__", made)


FOUR = {"gated": {}, "relu": {}, "jumprelu": {}, "topk": {"k": 2}}


@pytest.mark.parametrize("kind", FOUR)
def test_a_step_by_the_kernels_is_the_trainers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_by_kernels = []
    original = kernels.kernel_step

    def kernel_step(*args: Any, **settings: Any) -> Any:
        taken_by_kernels.append(settings["dead"])
        return original(*args, **settings)

    cfg = TrainConfig(
        n_tokens=6 * 5, batch_size=6, sparsity=(0.1,), lr=0.01, revive_window=2, revive_every=0
    )
    learnt = []
    for by in (kernel_step, None):
        sae = random_sae(kind, 5, 9, **FOUR[kind]).float()
        with torch.no_grad():
            (sae.b_gate if kind == "gated" else sae.b_enc)[3] = -100.0
        trainer = Trainer([sae], cfg)
        with monkeypatch.context() as patch:
            if by is None:
                patch.setattr(Stepper, "attempt", _dense_attempt)
            else:
                patch.setattr(kernels, "kernel_step", by)
            for i in range(5):
                trainer.step(numbers(6, 5, seed=i))
        learnt.append(sae)
    # The first step knows no density; a TopK SAE's does.
    assert len(taken_by_kernels) == (5 if kind == "topk" else 4)
    assert any(dead is not None and dead.any() for dead in taken_by_kernels)
    for (name, p), other in zip(learnt[0].named_parameters(), learnt[1].parameters(), strict=True):
        torch.testing.assert_close(p, other, atol=1e-5, rtol=1e-4, msg=name)


def triton_errors() -> list[tuple[Exception, str]]:
    """Return what Triton raises where a kernel cannot be launched, and what the log says of it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return [
        (
            OutOfResources(300000, 232448, "shared memory"),
            "OutOfResources: out of resource: shared memory, Required: 300000, Hardware limit: "
            "232448. Reducing block sizes or `num_stages` may help",
        ),
        (
            CompilationError("def kernel(): pass", ast.Pass(), "no such intrinsic"),
            "CompilationError: no such intrinsic",
        ),
        (
            PTXASError("`ptxas` failed with error code 255\n`ptxas` stderr:\n..."),
            "PTXASError: `ptxas` failed with error code 255",
        ),
        (RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
    ]


class Raises:
    """Stands in for a kernel whose launch fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.launched = error, 0

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        self.launched += 1
        raise self.error


def learnt(kind: str, x: Tensor) -> BuiltinSAE:
    """Return an SAE after a step on each of x."""
    sae = random_sae(kind, 5, 9, **FOUR[kind]).float()
    cfg = TrainConfig(
        n_tokens=x.shape[0] * x.shape[1],
        batch_size=x.shape[1],
        sparsity=(0.1,),
        lr=0.01,
        lr_warmup_steps=0,
        revive_every=0,
    )
    trainer = Trainer([sae], cfg)
    for batch in x:
        trainer.step(batch)
    return sae


@pytest.mark.parametrize(
    ("kind", "which"), [*(("gated", which) for which in range(4)), ("relu", 0), ("topk", 0)]
)
def test_a_kernel_that_cannot_be_launched_makes_every_step_a_dense_one(
    kind: str, which: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = numbers(4, 8, 5)
    error, said = triton_errors()[which]
    broken = Raises(error)
    # The last kernel of a step: what the others left in `.grad` means nothing.
    monkeypatch.setattr("gsae_core.sae.gpu.kernels.sum_latents", broken)
    with caplog.at_level(logging.WARNING, logger="gsae_core.training.learner"):
        got = learnt(kind, x)
    assert caplog.messages == [
        f"expected Triton to launch a kernel, got {said}; every further step is a dense one"
    ]
    assert broken.launched == 1
    monkeypatch.setitem(CROSSOVER, "cuda", 0.0)
    for (name, p), other in zip(got.named_parameters(), learnt(kind, x).parameters(), strict=True):
        torch.testing.assert_close(p, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
    ],
    ids=["memory", "address", "assert", "pointer"],
)
def test_other_errors_of_a_launch_are_not_swallowed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.sae.gpu.kernels.place_entries", Raises(error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        learnt("gated", numbers(3, 8, 5))


def test_room_is_asked_for_as_many_open_gates_as_there_are_places_for_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "MAX_CAPACITY", 8192)
    sae, x = random_sae("gated", 5, 9).float(), numbers(7, 5)
    monkeypatch.setitem(CROSSOVER, "cuda", 1e9)
    stepper = Stepper(sae, screened=False)
    expected = taken(dense_step, sae, x, 0.1)
    for density in (200.0, 300.0, 0.5):  # of 63 pairs: 12600, 18900 and 31.5 gates
        attempt = stepper.attempt(x, sparsity_coeff=0.1, density=density, dead=None)
        assert attempt.capacity == (4096 if density < 1 else 8192)
        for name, p in sae.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], msg=name)


def _dense_attempt(
    self: Stepper, x: Tensor, *, density: float | None, **settings: Any
) -> StepResult:
    return dense_step(self._sae, x, **settings)


# Overflow


@pytest.mark.parametrize(("spare", "overflowed"), [(0, False), (-1, True)])
def test_one_open_gate_more_than_there_is_room_for_raises_the_flag(
    spare: int, overflowed: bool
) -> None:
    sae, x = random_sae("gated", 5, 9).float(), numbers(7, 5)
    n_open = int(opened(sae, x).sum())
    attempt = kernel_step(sae, x, sparsity_coeff=0.3, capacity=n_open + spare)
    assert bool(attempt.overflowed) is overflowed
    assert int(attempt.n_entries) == n_open


def test_room_is_a_quarter_more_than_expected_and_a_power_of_two() -> None:
    assert [capacity_for(n) for n in (0.0, 3000.0, 3277.0, 1e5)] == [4096, 4096, 8192, 131072]


# Refusals


@pytest.mark.parametrize(
    ("sae", "said"),
    [
        (GatedSAE(2, 3).double(), "expected a float32 SAE .* got torch.float64; call"),
        (GatedSAE(16385, 1), "expected d_in of at most 16384 .* got 16385: they hold"),
    ],
    ids=["precision", "width"],
)
def test_saes_beyond_the_kernels_are_refused(sae: GatedSAE, said: str) -> None:
    assert re.search(said, available(torch.device("cpu"), sae) or "")


def test_activations_of_another_precision_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected float32 activations, got torch.float64; call"):
        kernel_step(GatedSAE(3, 5), numbers(2, 3).double(), sparsity_coeff=0.1, capacity=10)


@pytest.mark.parametrize("name", ["r_mag", "W_dec"])
def test_one_parameter_of_another_precision_is_refused(name: str) -> None:
    sae = GatedSAE(2, 3)
    parameter = sae.get_parameter(name)
    parameter.data = parameter.data.double()
    with pytest.raises(InputError, match=r"expected a float32 SAE .* got torch.float64; call"):
        kernel_step(sae, numbers(2, 2), sparsity_coeff=0.1, capacity=10)


def test_untied_paths_are_refused_in_the_words_of_the_other_steps() -> None:
    with pytest.raises(
        InputError, match=r"with tie 'r_mag' or 'none', .*'untied'.*take dense_step"
    ):
        kernel_step(GatedSAE(2, 3, tie="untied"), numbers(4, 2), sparsity_coeff=0.1, capacity=9)


def test_another_width_is_refused_in_the_words_of_encode() -> None:
    with pytest.raises(InputError, match="expected activations of width d_in=2, got shape"):
        kernel_step(GatedSAE(2, 3), numbers(4, 5), sparsity_coeff=0.1, capacity=9)
