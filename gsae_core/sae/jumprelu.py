"""JumpReLU SAEs: a threshold learnt for each latent, and a penalty on how many latents fire.

Rajamanoharan et al. 2024 (arXiv:2407.14435), section 3. Neither the threshold's effect on a latent
nor the number of latents has a useful derivative, so both get a pseudo-derivative in the backward
pass: kernel density estimates of the gradient of the *expected* loss, with a rectangle for kernel.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gsae_core.config import Recipe
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE, transposed
from gsae_core.sae.recipes import objective

# Both in units in which E|x|^2 = 1 (arXiv:2408.05147, section 3), which are ours as well.
INIT_THRESHOLD = 0.001
BANDWIDTH = 0.001


class JumpReluSAE(SAE):
    """Dictionary whose latents fire above a threshold of their own, and keep their whole height.

        z     = (x - b_dec) @ W_enc + b_enc
        f     = z * H(z - theta),   theta = exp(log_threshold)
        x_hat = f @ W_dec + b_dec

    The input is centred, as everywhere in this package; the paper's own SAEs are not, and folding
    `b_dec @ W_enc` into `b_enc` turns one form into the other.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        init_threshold: theta of every latent at the start and after a revival.
        bandwidth: width of the window around theta in which a pre-activation tells theta where to
            go, in the units the SAE trains in (E|x|^2 = 1 by default).
        recipe: `P`, the only one: its penalty does not weigh latents by anything.
        seed: of the initial directions.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        init_threshold: float = INIT_THRESHOLD,
        bandwidth: float = BANDWIDTH,
        recipe: Recipe = "P",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        self.objective = objective("jumprelu", recipe=recipe)
        for name, value in (("init_threshold", init_threshold), ("bandwidth", bandwidth)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"expected a positive, finite {name}, got {value}")
        self.init_threshold, self.bandwidth = init_threshold, bandwidth
        self.W_enc = nn.Parameter(transposed(self.W_dec))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(init_threshold)))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """theta = exp(log_threshold), which no step can make negative."""
        return self.log_threshold.exp()

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return z.

        Raises:
            InputError: if the last axis of `x` is not `d_in`.
        """
        self.check_width(x)
        return (self.normalised(x).u - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents `f >= 0`; exactly at its threshold a latent is silent.

        Raises:
            InputError: if the last axis of `x` is not `d_in`.
        """
        return jump(self.pre_activations(x), self.threshold, self.bandwidth)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bandwidth={self.bandwidth:g}"


def jump(
    z: Float[Tensor, "*batch d_sae"], theta: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """Return JumpReLU_theta(z) = z H(z - theta), with the paper's pseudo-derivative to theta.

        d/dz     = H(z - theta)
        d/dtheta = -(theta / eps) K((z - theta) / eps),    K(u) = 1 where |u| < 1/2

    The derivative to z is the true one: the jump itself is not let through to the encoder.
    The paper's listing clamps z at zero first, so that where theta < eps / 2 every silent latent
    lies in the window; its equations do not, and neither does this.
    """
    return _Jump.apply(z, theta, bandwidth)  # pyright: ignore[reportReturnType]


def step(
    z: Float[Tensor, "*batch d_sae"], theta: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "*batch d_sae"]:
    """Return H(z - theta), whose sum over latents is L0, with the paper's pseudo-derivative.

    d/dz     = 0                                the penalty moves thresholds alone
    d/dtheta = -(1 / eps) K((z - theta) / eps)
    """
    return _Step.apply(z, theta, bandwidth)  # pyright: ignore[reportReturnType]


def in_window(
    z: Float[Tensor, "*batch d_sae"], theta: Float[Tensor, " d_sae"], bandwidth: float
) -> Bool[Tensor, "*batch d_sae"]:
    """Return where K((z - theta) / eps) = 1."""
    return (z - theta).abs() < bandwidth / 2


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > theta, z, 0.0)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        z, theta = ctx.saved_tensors
        near = grad * in_window(z, theta, ctx.bandwidth)
        return grad * (z > theta), -(theta / ctx.bandwidth) * _over_batch(near), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        z, theta = ctx.saved_tensors
        near = grad * in_window(z, theta, ctx.bandwidth)
        return None, _over_batch(near) / -ctx.bandwidth, None


def _over_batch(entries: Tensor) -> Tensor:
    return entries.reshape(-1, entries.shape[-1]).sum(0)
