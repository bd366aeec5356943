"""The dictionaries: a Gated SAE and the ReLU baseline it is compared with."""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsae_core.config import Architecture, Recipe, SAESpec
from gsae_core.errors import InputError
from gsae_core.sae.recipes import Aux, Objective, objective

Tie = Literal["r_mag", "none", "untied"]


class PreActivations(NamedTuple):
    """What the two paths of the gated encoder see before their nonlinearities."""

    pi_gate: Float[Tensor, "*batch d_sae"]
    pi_mag: Float[Tensor, "*batch d_sae"]


class _SAE(nn.Module, ABC):
    """The half that architectures share: `x_hat = f @ W_dec + b_dec`, and checks of width."""

    architecture: Architecture
    objective: Objective
    recipe: Recipe
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d_in: int, d_sae: int, *, recipe: Recipe, seed: int) -> None:
        super().__init__()
        for name, width in (("d_in", d_in), ("d_sae", d_sae)):
            if width < 1:
                raise InputError(f"expected {name} of at least 1, got {width}")
        _check_choice("recipe", recipe, get_args(Recipe))
        self.d_in, self.d_sae, self.recipe = d_in, d_sae, recipe
        # The paper does not state an initialisation; random unit directions with the encoder
        # transposed from them and zeros elsewhere are what its re-implementations agree on.
        directions = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def unit_norm(self) -> bool:
        """Whether rows of `W_dec` have to be kept at norm one while training."""
        return self.objective.unit_norm

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents `f >= 0`."""

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return `x_hat = f @ W_dec + b_dec` (Eq. 2).

        Raises:
            InputError: if the last axis of `f` is not `d_sae`.
        """
        if f.shape[-1] != self.d_sae:
            raise InputError(
                f"expected latents of width d_sae={self.d_sae}, got shape {tuple(f.shape)}; "
                "decode() takes what this SAE's encode() returns"
            )
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction `decode(encode(x))`."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, recipe={self.recipe!r}"

    def check_width(self, x: Float[Tensor, "*batch width"]) -> None:
        """Raise InputError if the last axis of `x` is not `d_in`."""
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"expected activations of width d_in={self.d_in}, got shape {tuple(x.shape)}; "
                "was this SAE trained on another model or site?"
            )


class GatedSAE(_SAE):
    """Dictionary whose encoder decides *which* latents fire apart from *how much*.

        pi_gate = (x - b_dec) @ W_gate + b_gate
        pi_mag  = (x - b_dec) @ (W_gate * exp(r_mag)) + b_mag
        f       = 1[pi_gate > 0] * relu(pi_mag)
        x_hat   = f @ W_dec + b_dec

    Rajamanoharan et al. 2024 (arXiv:2404.16014v2), Eq. 6-7. Weights multiply from the right, as in
    the paper's pseudo-code; its text writes them transposed.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        recipe: `P`, `A` or `B`, see `recipes.RECIPES`.
        tie: `r_mag` shares directions between the paths up to a learnt scale (Eq. 7); `none` drops
            the scale (`W_mag = W_gate`); `untied` gives the magnitude path its own `W_mag`.
        aux: decoder of the auxiliary term where it differs from the recipe's; recipe `P` with
            `unfrozen` is the paper's ablation (Fig. 8).
        detach_b_dec: keep the sparsity and auxiliary terms from moving `b_dec` through the centred
            input, as the text asks and the paper's pseudo-code does not do.
        seed: of the initial directions.
    """

    architecture: Architecture = "gated"
    r_mag: nn.Parameter | None
    W_mag: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        recipe: Recipe = "P",
        tie: Tie = "r_mag",
        aux: Aux | None = None,
        detach_b_dec: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        _check_choice("tie", tie, get_args(Tie))
        if aux is not None:
            _check_choice("aux", aux, get_args(Aux))
        self.objective = objective("gated", recipe=recipe, aux=aux)
        self.aux: Aux = self.objective.aux
        self.tie: Tie = tie
        self.detach_b_dec = detach_b_dec
        self.W_gate = nn.Parameter(_transposed(self.W_dec))
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        # r_mag = 0 (or W_mag = W_gate) and equal biases: the start is exactly a ReLU SAE.
        self.r_mag = nn.Parameter(torch.zeros(d_sae)) if tie == "r_mag" else None
        self.W_mag = nn.Parameter(self.W_gate.detach().clone()) if tie == "untied" else None
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents `f >= 0` (Eq. 6).

        Raises:
            InputError: if the last axis of `x` is not `d_in`.
        """
        pi_gate, pi_mag = self.pre_activations(x)
        return (pi_gate > 0) * torch.relu(pi_mag)

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> PreActivations:
        """Return the gate and magnitude pre-activations of `x`.

        Raises:
            InputError: if the last axis of `x` is not `d_in`.
        """
        self.check_width(x)
        xc = x - self.b_dec
        h = xc @ self.W_gate
        if self.W_mag is not None:
            return PreActivations(pi_gate=h + self.b_gate, pi_mag=xc @ self.W_mag + self.b_mag)
        # Weight sharing (Eq. 7): one product serves both paths.
        scaled = h if self.r_mag is None else h * self.r_mag.exp()
        return PreActivations(pi_gate=h + self.b_gate, pi_mag=scaled + self.b_mag)

    @torch.no_grad()
    def jumprelu_threshold(self) -> Float[Tensor, " d_sae"]:
        """Return theta of the JumpReLU SAE that computes the same: f = pi_mag where pi_mag > theta.

        theta = max(0, b_mag - exp(r_mag) * b_gate) (arXiv:2404.16014v2, Appendix E, where the
        maximum is left to the reader). At theta = 0 the gate never binds: a plain ReLU latent.

        Raises:
            InputError: if the paths are untied, for then no JumpReLU SAE computes the same.
        """
        if self.W_mag is not None:
            raise InputError(
                "expected a Gated SAE with tie 'r_mag' or 'none', got 'untied': its gate and its "
                "magnitude read different directions, so no JumpReLU threshold equals the gate"
            )
        gain = torch.ones_like(self.b_gate) if self.r_mag is None else self.r_mag.exp()
        return (self.b_mag - gain * self.b_gate).clamp(min=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tie={self.tie!r}, aux={self.aux!r}"


class ReluSAE(_SAE):
    """The L1 baseline: one number says both whether a latent fires and how much.

        f     = relu((x - b_dec) @ W_enc + b_enc)
        x_hat = f @ W_dec + b_dec

    Bricken et al. 2023, as arXiv:2404.16014v2 writes it (Eq. 1-3).

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        recipe: `P` (unit norm, plain L1: the paper's baseline) or `A` (L1 weighted by free norms).
        seed: of the initial directions.
    """

    architecture: Architecture = "relu"

    def __init__(self, d_in: int, d_sae: int, *, recipe: Recipe = "P", seed: int = 0) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        self.objective = objective("relu", recipe=recipe)
        self.W_enc = nn.Parameter(_transposed(self.W_dec))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents `f >= 0` (Eq. 3).

        Raises:
            InputError: if the last axis of `x` is not `d_in`.
        """
        self.check_width(x)
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)


def build_sae(spec: SAESpec, d_in: int) -> GatedSAE | ReluSAE:
    """Return a new SAE as a run's config describes it.

    A ReLU SAE has no gate, so `tie`, `aux` and `detach_b_dec` say nothing about it: a sweep over
    both architectures may set them for its Gated half.

    Raises:
        InputError: if the recipe is unsound for the architecture.
    """
    if spec.architecture == "relu":
        return ReluSAE(d_in, spec.d_sae, recipe=spec.recipe, seed=spec.seed)
    return GatedSAE(
        d_in,
        spec.d_sae,
        recipe=spec.recipe,
        tie=spec.tie,
        aux=spec.aux,
        detach_b_dec=spec.detach_b_dec,
        seed=spec.seed,
    )


@torch.no_grad()
def fold_scale_(sae: GatedSAE | ReluSAE, scale: float) -> None:
    """Turn an SAE trained on `scale * x` into the same one for raw `x`, in place.

    With y = s x, the encoder's products are (y - b_dec) @ W = s (x - b_dec / s) @ W. Dividing every
    bias by s therefore divides pre-activations, latents and x_hat by s and leaves each gate as it
    is; directions, norms and r_mag (a ratio) stay. In raw units the same optimum has lambda / s.

    Raises:
        InputError: if `scale` is not a positive number.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"expected a positive, finite activation scale, got {scale}")
    for name, parameter in sae.named_parameters():
        if name.startswith("b_"):
            parameter /= scale


def _transposed(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_in d_sae"]:
    # A clone, always: where an axis is 1, .T.contiguous() would share memory with the dictionary.
    return W_dec.detach().T.clone(memory_format=torch.contiguous_format)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
