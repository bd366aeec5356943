"""The ways to compute a step's gradients, equal up to rounding, and which is the fastest."""

import functools
import logging
from collections.abc import Callable

import torch

from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, TopKSAE, has_fast_step
from gsae_core.sae.base import SAE, Mask, Rows
from gsae_core.sae.gpu import step as kernels
from gsae_core.sae.gpu.step import LaunchError
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step

logger = logging.getLogger(__name__)

# Density of open gates from which a dense step is the faster one, by kind of device. Constants,
# not timed while training: a run has the same bits on a faster machine and after a resume.
# A CPU: of 512 x 16384 a sparse step costs 1.3 encoder products at L0 32 and 3.1 to 3.4 at L0 1024,
# a dense one by hand 7 to 9 (docs/scaling.json), so the two meet at 0.15 to 0.22.
# CUDA: no GPU has been timed. By bytes and operations (an H200, float32, 4096 x 2560 x 131072) the
# seven products a sparse step saves take as long as going through 0.07 of all pairs does.
CROSSOVER = {"cpu": 0.15, "cuda": 0.07}


class Stepper:
    """Takes each step of one SAE, which stays on its device, by the fastest way.

    A kernel that does not compile or fit makes every further step a dense one; the log says so.
    """

    def __init__(self, sae: SAE, *, screened: bool) -> None:
        device = sae.W_dec.device
        self._sae, self._screened, self._warned = sae, screened, False
        self._kernels = device.type == "cuda"
        if self._kernels and (refusal := kernels.available(device, sae)) is not None:
            logger.warning("every step is a dense one: %s", refusal)
            self._kernels = False

    def attempt(
        self, x: Rows, *, sparsity_coeff: float, density: float | None, dead: Mask | None
    ) -> StepResult:
        """Leave gradients in `.grad`, on a GPU without waiting for them.

        `density` is the share of open gates in the last step, None before there is one; `dead` says
        which latents a TopK SAE is to bring back.
        """
        sae = self._sae
        if density is None and isinstance(sae, TopKSAE):
            density = sae.k / sae.d_sae  # known beforehand; no latent counts as dead that early
        if self._kernels and density is not None and density < CROSSOVER["cuda"]:
            done = self._by_kernels(x, density, sparsity_coeff, dead)
            if done is not None:
                return done
        step = choose_step(sae, density, screened=self._screened)
        return step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead)

    def _by_kernels(
        self, x: Rows, density: float, sparsity_coeff: float, dead: Mask | None
    ) -> StepResult | None:
        """Take the step on the GPU; return None, and log why, where that cannot be."""
        assert isinstance(self._sae, BuiltinSAE)  # the kernels refuse others
        room = kernels.capacity_for(density * len(x) * self._sae.d_sae)
        if room > kernels.MAX_CAPACITY:
            if not self._warned:
                logger.warning(
                    "expected room for at most %d open gates in a step, got a batch that needs %d; "
                    "dense steps are taken for as long as so many are open",
                    kernels.MAX_CAPACITY,
                    room,
                )
            self._warned = True
            return None
        try:
            done = kernels.kernel_step(
                self._sae, x, sparsity_coeff=sparsity_coeff, capacity=room, dead=dead
            )
        except LaunchError as error:
            logger.warning("%s; every further step is a dense one", error)
            self._kernels = False
            return None
        return done._replace(capacity=room)


def choose_step(sae: SAE, density: float | None, *, screened: bool) -> Callable[..., StepResult]:
    """Return the fastest step without kernels, for the `density` of the last step, if any."""
    exact = sae.W_dec.dtype in (torch.float32, torch.float64)
    if not (has_fast_step(sae) and sae.W_dec.is_cpu and exact):
        return dense_step
    if density is None or density >= CROSSOVER["cpu"]:
        return manual_dense_step if isinstance(sae, GatedSAE | ReluSAE) else dense_step
    return functools.partial(sparse_step, screened=True) if screened else sparse_step
