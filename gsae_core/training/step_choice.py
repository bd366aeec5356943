"""Which of the ways to compute a step is the fastest one here; all give the same gradients."""

import functools
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gsae_core.machine import known, processor, remembered
from gsae_core.sae.architectures import (
    BuiltinSAE,
    GatedSAE,
    JumpReluSAE,
    ReluSAE,
    TopKSAE,
    has_fast_step,
)
from gsae_core.sae.base import SAE
from gsae_core.sae.gpu import step as kernels
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step

logger = logging.getLogger(__name__)

Step = Callable[..., StepResult]
KIND = "crossovers"

# Taken where nothing was measured. On two cores (AVX-512) and shapes from 256 x 1024 to 512 x 16384
# the two ways cost the same at 0.08 to 0.2 on both cores and at 0.15 to 0.3 on one.
CROSSOVER = 0.15

# A crossover is measured with so many rows on a CPU, where products run at full rate with them, and
# with whole batches on a GPU.
MEASURED_ROWS = 512
# Below so many multiplications a step is too short to be worth the measurement.
WORTH_MEASURING = 2**30
DENSITIES = (0.01, 0.08)
# A sparse step's memory grows with the density (some 90 bytes an entry); that of the estimate made
# before a run is enough up to here, and the two ways cost about the same there.
HIGHEST = 0.2
ROUNDS = 3


class Attempt(NamedTuple):
    """A step that was given to the device and not waited for; gradients are in `.grad`."""

    result: StepResult
    n_open: Int64[Tensor, ""]
    """Open gates of the batch, or what else cost work: see `StepResult.n_entries`."""
    overflowed: Bool[Tensor, ""]
    """Whether more gates opened than a GPU's buffers had room for: the rest means nothing then."""
    capacity: int = 0

    def overflow_note(self, n_open: int) -> str:
        """Return the sentence for the log when the step has to be taken again."""
        return kernels.overflow_note(n_open=n_open, capacity=self.capacity)


class Stepper:
    """The ways in which one SAE can compute a step.

    Args:
        sae: stays where it is from now on.
        crossover: density of open gates from which the dense step is the faster one.
        screened: whether sparse steps on a CPU look for open gates in bfloat16 first.
        falls_back: whether a kernel that does not compile or fit makes every further step a dense
            one, which the log says once; else it raises LaunchError.
    """

    def __init__(
        self, sae: SAE, *, crossover: float, screened: bool, falls_back: bool = True
    ) -> None:
        self._sae, self.crossover, self._screened = sae, crossover, screened
        self._falls_back, self._too_many_said = falls_back, False
        device = sae.W_dec.device
        self._kernels = device.type == "cuda"
        if self._kernels and (refusal := kernels.available(device, sae)) is not None:
            logger.warning("every step is a dense one: %s", refusal)
            self._kernels = False

    def attempt(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        sparsity_coeff: float,
        density: float | None,
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Attempt:
        """Take a step by the fastest way.

        Args:
            x: activations.
            sparsity_coeff: lambda.
            density: share of open gates in an earlier step; None before there is one.
            dead: latents that a TopK SAE is to bring back; None if there are none.
        """
        sae = self._sae
        if density is None and isinstance(sae, TopKSAE):
            density = sae.k / sae.d_sae  # known beforehand; no latent counts as dead that early
        if self._kernels and density is not None and density < self.crossover:
            done = self._by_kernels(x, density, sparsity_coeff=sparsity_coeff, dead=dead)
            if done is not None:
                return done
        if not _has_fast_steps(sae):
            return self.dense(x, sparsity_coeff=sparsity_coeff, dead=dead)
        step = choose_step(
            sae=sae, density=density, crossover=self.crossover, screened=self._screened
        )
        return _attempt(step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead))

    def _by_kernels(
        self,
        x: Float[Tensor, "batch d_in"],
        density: float,
        *,
        sparsity_coeff: float,
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Attempt | None:
        """Take the step on the GPU; return None, and say so in the log, where that cannot be."""
        sae = self._sae
        assert isinstance(sae, BuiltinSAE)  # the kernels refuse others
        room = kernels.capacity_for(density * len(x) * sae.d_sae)
        if room > kernels.MAX_CAPACITY:
            if not self._too_many_said:
                logger.warning(
                    "expected room for at most %d open gates in a step, got a batch that needs %d; "
                    "dense steps are taken for as long as so many are open",
                    kernels.MAX_CAPACITY,
                    room,
                )
            self._too_many_said = True
            return None
        try:
            done = kernels.kernel_step(
                sae, x, sparsity_coeff=sparsity_coeff, capacity=room, dead=dead
            )
        except kernels.LaunchError as error:
            if not self._falls_back:
                raise
            logger.warning("%s; every further step is a dense one", error)
            self._kernels = False
            return None
        return Attempt(done.result, done.n_open, done.overflowed, room)

    def dense(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        sparsity_coeff: float,
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Attempt:
        """Take autograd's step, which every SAE has on every device."""
        return _attempt(dense_step(self._sae, x, sparsity_coeff=sparsity_coeff, dead=dead))


def choose_step(*, sae: SAE, density: float | None, crossover: float, screened: bool) -> Step:
    """Return the fastest step on a CPU, of any architecture.

    Args:
        sae: of `has_fast_step`.
        density: share of (input, latent) pairs with an open gate in the last step; None before it.
        crossover: density from which the dense step is the faster one.
        screened: whether the sparse step is to look for open gates in bfloat16 first.
    """
    if density is None or density >= crossover:
        return manual_dense_step if isinstance(sae, GatedSAE | ReluSAE) else dense_step
    return functools.partial(sparse_step, screened=True) if screened else sparse_step


def crossover(sae: SAE, batch_size: int, *, screened: bool, measure: bool) -> float:
    """Return the density from which the dense step is the faster one on this machine.

    The sparse step's time is a line in the density and the dense step's a constant. The line is
    drawn through `DENSITIES`, and where they meet is remembered for this processor or GPU, number
    of threads and shape.

    Args:
        sae: of the shape in question; stays as it is.
        batch_size: rows of a batch.
        screened: whether the sparse step is the screened one.
        measure: whether to take some seconds if nothing is remembered; else it is `CROSSOVER`.
    """
    device = sae.W_dec.device
    on_gpu = device.type == "cuda" and kernels.available(device, sae) is None
    if not on_gpu and not _has_fast_steps(sae):
        return CROSSOVER  # asked for nothing: its steps are dense ones
    rows = batch_size if on_gpu else min(batch_size, MEASURED_ROWS)
    shape = (type(sae).__name__, screened, rows, sae.d_in, sae.d_sae, str(sae.W_dec.dtype))
    machine = torch.cuda.get_device_name(device) if on_gpu else processor()
    if isinstance(sae, JumpReluSAE):
        shape = (*shape, sae.bandwidth)  # what lies in the window is worked on as well
    key = (machine, torch.get_num_threads(), torch.__version__, *shape)
    if not measure or batch_size * sae.d_in * sae.d_sae < WORTH_MEASURING:
        number = known(KIND, key)
        return CROSSOVER if number is None else number
    try:
        return remembered(KIND, key, lambda: _meeting_point(sae, rows, screened=screened))
    except kernels.LaunchError:
        return CROSSOVER  # asked for nothing: the first step by the kernels says what is wrong


def _attempt(result: StepResult) -> Attempt:
    stats = result.stats
    opened = stats.fired if stats.gate_open is None else stats.gate_open
    n_open = opened.sum() if result.n_entries is None else result.n_entries
    return Attempt(result, n_open, torch.zeros((), dtype=torch.bool, device=opened.device))


def _has_fast_steps(sae: SAE) -> bool:
    """Return whether the steps written for a CPU's caches can compute this one's."""
    exact = sae.W_dec.dtype in (torch.float32, torch.float64)
    return has_fast_step(sae) and sae.W_dec.is_cpu and exact


def _meeting_point(sae: SAE, rows: int, *, screened: bool) -> float:
    device = sae.W_dec.device
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(rows, sae.d_in, generator=generator) / sae.d_in**0.5).to(sae.W_dec)
    probe = _active(sae, x, None)
    ways: dict[float | None, Callable[[], object]] = {}
    for density in DENSITIES:
        probed = _active(sae, x, density)
        stepper = Stepper(probed, crossover=1.0, screened=screened, falls_back=False)
        ways[density] = functools.partial(
            stepper.attempt, x, sparsity_coeff=0.1, density=2 * density, dead=None
        )
    by_hand = device.type != "cuda" and isinstance(sae, GatedSAE | ReluSAE)
    dense = manual_dense_step if by_hand else dense_step
    ways[None] = functools.partial(dense, probe, x, sparsity_coeff=0.1)
    taken = _alternate(ways, device)
    low, high = DENSITIES
    slope = max((taken[high] - taken[low]) / (high - low), 1e-9)
    return min(max(low + (taken[None] - taken[low]) / slope, 0.0), HIGHEST)


def _active(like: SAE, x: Float[Tensor, "rows d_in"], density: float | None) -> SAE:
    """Return an SAE like this one of which such a share is active on x; None: as it starts."""
    sae = _new(like, density).to(like.W_dec)
    if density is None or isinstance(sae, TopKSAE):
        return sae
    products = (x[:64] @ sae.W_dec.T).detach().flatten()
    bias = -products.sort(descending=True).values[round(density * len(products))]
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_gate", "b_mag", "b_enc"):
                parameter.fill_(bias)
        if isinstance(sae, JumpReluSAE):
            # What lies in the window below a threshold costs as much as what fires.
            sae.b_enc.add_(sae.threshold - sae.eps / 2)
    return sae


def _new(like: SAE, density: float | None) -> SAE:
    match like:
        case TopKSAE():
            k = like.k if density is None else max(1, round(density * like.d_sae))
            return TopKSAE(like.d_in, like.d_sae, k=k)
        case JumpReluSAE():
            # Of inputs of length 1, also where those it learns from are not.
            return JumpReluSAE(like.d_in, like.d_sae, bandwidth=like.bandwidth, threshold_unit=1.0)
    build: Any = type(like)
    return build(like.d_in, like.d_sae)


def _alternate(
    ways: dict[float | None, Callable[[], object]], device: torch.device
) -> dict[float | None, float]:
    """Return each way's median seconds; they take turns, and the first round warms up."""
    taken: dict[float | None, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}
