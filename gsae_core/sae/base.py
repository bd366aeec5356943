"""What every dictionary has: a decoder, a recipe, and checks of width."""

from abc import ABC, abstractmethod
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError
from gsae_core.markup import facts
from gsae_core.sae.input_norm import InputNorm, Normalised, normalised
from gsae_core.sae.recipes import Objective


class SAE(nn.Module, ABC):
    """The half that architectures share: `x_hat = f @ W_dec + b_dec`, and checks of width.

    One that was read from another library may normalise each token on its way in (`input_norm`);
    its equations then hold for `u` of `normalised(x)`, and its x_hat is undone from there.
    """

    architecture: Architecture
    objective: Objective
    recipe: Recipe
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    input_norm: InputNorm | None = None
    """How tokens are normalised before anything else; None, as everything trained here: not at all.
    Such an SAE still takes and returns raw activations, and cannot be trained further."""

    def __init__(self, d_in: int, d_sae: int, *, recipe: Recipe, seed: int) -> None:
        super().__init__()
        for name, width in (("d_in", d_in), ("d_sae", d_sae)):
            if width < 1:
                raise InputError(f"expected {name} of at least 1, got {width}")
        check_choice("recipe", recipe, get_args(Recipe))
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

        Latents alone do not say how a token was normalised: of an SAE with `input_norm` this is a
        reconstruction of u, which `normalised(x).undo` turns into one of x.

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
        """Return the reconstruction of `x`: `decode(encode(x))`, in units of x."""
        return self.normalised(x).undo(self.decode(self.encode(x)))

    def normalised(self, x: Float[Tensor, "*batch d_in"]) -> Normalised:
        """Return activations as the encoder sees them, and what undoes it; mostly `x` itself."""
        return normalised(x, self.input_norm)

    def extra_repr(self) -> str:
        norm = "" if self.input_norm is None else f", input_norm={self.input_norm!r}"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, recipe={self.recipe!r}{norm}"

    def _repr_html_(self) -> str:
        return facts(
            {
                "SAE": self.architecture,
                "features": f"{self.d_sae:,}",
                "width of activations": f"{self.d_in:,}",
                "recipe": self.recipe,
                "settings": self.extra_repr(),
            }
        )

    def check_width(self, x: Float[Tensor, "*batch width"]) -> None:
        """Raise InputError if the last axis of `x` is not `d_in`."""
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"expected activations of width d_in={self.d_in}, got shape {tuple(x.shape)}; "
                "was this SAE trained on another model or site?"
            )

    def check_trains(self) -> None:
        """Raise InputError if this SAE can be used and not trained."""
        if self.input_norm is not None:
            raise InputError(
                f"expected an SAE that learns from activations as they are, got one that "
                f"normalises every token ({self.input_norm}); it can be evaluated, explored and "
                "steered, not trained or converted"
            )


def transposed(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_in d_sae"]:
    """Return what an encoder starts from: its decoder transposed, in memory of its own."""
    # A clone, always: where an axis is 1, .T.contiguous() would share memory with the dictionary.
    return W_dec.detach().T.clone(memory_format=torch.contiguous_format)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError if `value` is none of the choices."""
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
