"""The ways to compute a step's gradients, equal up to rounding, and which is the fastest."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, TopKSAE, has_fast_step
from gsae_core.sae.base import SAE
from gsae_core.sae.gpu import step as kernels
from gsae_core.sae.gpu.launch import LaunchError
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step

logger = logging.getLogger(__name__)

Step = Callable[..., StepResult]

# Density of open gates from which a dense step is the faster one, by kind of device. Nowhere
# measured while training: a run has the same bits on a faster machine and after a resume.
# A CPU: of 512 x 16384 a sparse step costs 1.3 encoder products at L0 32 and 3.1 to 3.4 at L0 1024,
# a dense one by hand 7 to 9 (docs/scaling.json), so the two meet at 0.15 to 0.22.
# CUDA: no GPU has been timed. By bytes and operations (an H200, float32, 4096 x 2560 x 131072) the
# seven products a sparse step saves take as long as going through 0.07 of all pairs does.
CROSSOVER = {"cpu": 0.15, "cuda": 0.07}


class Attempt(NamedTuple):
    """A step that was given to the device and not waited for; gradients are in `.grad`."""

    result: StepResult
    n_open: Int64[Tensor, ""]
    """Of `StepResult.n_entries`."""
    overflowed: Bool[Tensor, ""]
    """Whether more gates opened than a GPU's buffers had room for: the rest means nothing then."""
    capacity: int = 0


class Stepper:
    """The ways in which one SAE can compute a step.

    A kernel that does not compile or fit makes every further step a dense one; the log says so.

    Args:
        sae: stays where it is from now on.
        screened: whether sparse steps on a CPU look for open gates in bfloat16 first.
    """

    def __init__(self, sae: SAE, *, screened: bool) -> None:
        device = sae.W_dec.device
        self._sae, self._screened, self._too_many_said = sae, screened, False
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
            density: share of open gates in the last step; None before there is one.
            dead: latents that a TopK SAE is to bring back; None if there are none.
        """
        sae = self._sae
        if density is None and isinstance(sae, TopKSAE):
            density = sae.k / sae.d_sae  # known beforehand; no latent counts as dead that early
        if self._kernels and density is not None and density < CROSSOVER["cuda"]:
            done = self._by_kernels(x, density, sparsity_coeff, dead)
            if done is not None:
                return done
        step = choose_step(sae, density, screened=self._screened)
        return _attempt(step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead))

    def _by_kernels(
        self,
        x: Float[Tensor, "batch d_in"],
        density: float,
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
        except LaunchError as error:
            logger.warning("%s; every further step is a dense one", error)
            self._kernels = False
            return None
        return _attempt(done, room)

    def dense(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        sparsity_coeff: float,
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Attempt:
        """Take autograd's step, which every SAE has on every device."""
        return _attempt(dense_step(self._sae, x, sparsity_coeff=sparsity_coeff, dead=dead))


def choose_step(sae: SAE, density: float | None, *, screened: bool) -> Step:
    """Return the fastest step that is no kernel's.

    Args:
        sae: of any architecture, on any device.
        density: share of (input, latent) pairs with an open gate in the last step; None before it.
        screened: whether a sparse step is to look for open gates in bfloat16 first.
    """
    exact = sae.W_dec.dtype in (torch.float32, torch.float64)
    if not (has_fast_step(sae) and sae.W_dec.is_cpu and exact):
        return dense_step
    if density is None or density >= CROSSOVER["cpu"]:
        return manual_dense_step if isinstance(sae, GatedSAE | ReluSAE) else dense_step
    return functools.partial(sparse_step, screened=True) if screened else sparse_step


def _attempt(result: StepResult, capacity: int = 0) -> Attempt:
    never = torch.zeros_like(result.n_entries, dtype=torch.bool)
    overflowed = never if result.overflowed is None else result.overflowed
    return Attempt(result, result.n_entries, overflowed, capacity)
