"""JumpReLU SAEs: a threshold learnt for each latent, and a penalty on how many latents fire.

Rajamanoharan et al. 2024 (arXiv:2407.14435), section 3. Neither the threshold's effect on a latent
nor the number of latents has a useful derivative; both get a pseudo-derivative, a kernel density
estimate of the gradient of the expected loss, with a rectangle for kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError
from gsae_core.norms import ordinary
from gsae_core.sae.base import Inputs, Latents, PerLatent, SinglePathSAE
from gsae_core.sae.metrics import sum_dtype

# Multiples of the activations' length, sqrt(E|x|^2).
INIT_THRESHOLD = 0.1
BANDWIDTH = 0.1


class JumpReluSAE(SinglePathSAE):
    """Dictionary whose latents fire above a threshold of their own, and keep their whole height.

        z     = (x - b_dec) @ W_enc + b_enc
        f     = z * H(z - theta),   theta = threshold >= 0
        x_hat = f @ W_dec + b_dec

    The paper's own SAEs do not centre the input; folding `b_dec @ W_enc` into `b_enc` turns one
    form into the other. The paper learns log theta; a step of Adam then moves theta by a share of
    itself, and from a small start no penalty raises it within a short run. Here theta itself is the
    parameter: the optimiser sets it to 0 where a step took it below, and it is float32 where the
    SAE is made of shorter numbers.

    `init_threshold` (theta at the start and after a revival) and `bandwidth` (of the window around
    theta in which z moves theta) are multiples of `threshold_unit`, by which Adam's steps of theta
    are multiplied too. None lets training measure it, sqrt(E|x|^2) of the first batch or of what a
    sparse start is measured on, and counts as 1 until then. `P` is the only recipe: the penalty
    weighs no latent by anything.

    Raises:
        InputError: if a width is below 1, the recipe is another, or one of the three is not a
            positive, finite number.
    """

    architecture: Architecture = "jumprelu"
    threshold: nn.Parameter
    """theta, `(d_sae,)`, in units of x."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        init_threshold: float = INIT_THRESHOLD,
        bandwidth: float = BANDWIDTH,
        threshold_unit: float | None = None,
        recipe: Recipe = "P",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        self.init_threshold: float = init_threshold
        self.bandwidth: float = bandwidth
        self.threshold_unit: float | None = threshold_unit
        for name, value in self.settings.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"expected a positive, finite {name}, got {value}")
        self.threshold = nn.Parameter(torch.full((d_sae,), self.start))

    @property
    def settings(self) -> dict[str, Any]:
        """What its thresholds learn with, as the constructor takes it."""
        names = ("init_threshold", "bandwidth", "threshold_unit")
        return {name: getattr(self, name) for name in names}

    @property
    def start(self) -> float:
        """theta of a latent that has learnt nothing, in units of x."""
        return self.init_threshold * (self.threshold_unit or 1.0)

    @property
    def eps(self) -> float:
        """The paper's eps: width of the window around theta, in units of x."""
        return self.bandwidth * (self.threshold_unit or 1.0)

    @torch.no_grad()
    def measure_unit_(self, x: Inputs) -> None:
        """Take sqrt(E|x|^2) for `threshold_unit`, unless it is known, 0 or not finite.

        Outliers do not count (`norms.ordinary`). Thresholds follow if all are where they started.
        """
        if self.threshold_unit is not None:
            return
        power = x.to(sum_dtype(x.device)).square().sum(-1).flatten()
        unit = math.sqrt(float(ordinary(power).mean()))
        if not (math.isfinite(unit) and unit > 0):
            return
        untouched = torch.allclose(self.threshold, torch.full_like(self.threshold, self.start))
        self.threshold_unit = unit
        if untouched:
            self.threshold.fill_(self.start)

    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0`, 0 at theta; InputError if the last axis is not `d_in`."""
        return jump(self.pre_activations(x), self.threshold, self.eps)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"{super().extra_repr()}, bandwidth={self.eps:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JumpReluSAE":
        exact = self.threshold.detach()
        super()._apply(fn, recurse)
        if self.threshold.dtype in (torch.bfloat16, torch.float16):
            # Of 8 bits, a step of 1e-3 would leave theta where it is.
            self.threshold.data = exact.to(self.threshold.device, torch.float32)
        return self


def jump(z: Latents, theta: PerLatent, bandwidth: float) -> Latents:
    """Return JumpReLU_theta(z) = z H(z - theta), with the paper's pseudo-derivative to theta.

        d/dz     = H(z - theta)
        d/dtheta = -(theta / eps) K((z - theta) / eps),    K(u) = 1 where |u| < 1/2

    The jump itself is not let through to the encoder. The paper's listing clamps z at zero first,
    so that where theta < eps / 2 every latent that does not fire lies in the window; its equations
    do not, and neither does this.
    """
    return _AtThreshold.apply(z, theta, bandwidth, True)  # pyright: ignore[reportReturnType]


def step(z: Latents, theta: PerLatent, bandwidth: float) -> Latents:
    """Return H(z - theta), whose sum over latents is L0, with the paper's pseudo-derivative.

    d/dz     = 0                                the penalty moves thresholds alone
    d/dtheta = -(1 / eps) K((z - theta) / eps)
    """
    return _AtThreshold.apply(z, theta, bandwidth, False)  # pyright: ignore[reportReturnType]


def in_window(z: Latents, theta: PerLatent, bandwidth: float) -> Bool[Tensor, "*batch d_sae"]:
    """Return where K((z - theta) / eps) = 1."""
    return (z - theta).abs() < bandwidth / 2


class _AtThreshold(torch.autograd.Function):
    """H(z - theta), times z if `whole`."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth, whole):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth, ctx.whole = bandwidth, whole
        return torch.where(z > theta, z, 0.0) if whole else (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        z, theta = ctx.saved_tensors
        near = (grad * in_window(z, theta, ctx.bandwidth)).reshape(-1, z.shape[-1]).sum(0)
        if ctx.whole:
            return grad * (z > theta), -(theta / ctx.bandwidth) * near, None, None
        return None, near / -ctx.bandwidth, None, None
