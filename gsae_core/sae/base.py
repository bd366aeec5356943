"""What every dictionary has: a decoder, a recipe, and checks of width."""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError
from gsae_core.text import facts

# Shapes by name. "*batch" is any leading axes; rows are tokens.
# Anything of these widths: inputs and reconstructions; latents and their pre-activations.
Inputs = Float[Tensor, "*batch d_in"]
Latents = Float[Tensor, "*batch d_sae"]
Rows = Float[Tensor, "batch d_in"]
Encoder = Float[Tensor, "d_in d_sae"]
Dictionary = Float[Tensor, "d_sae d_in"]
PerLatent = Float[Tensor, " d_sae"]
PerEntry = Float[Tensor, " nnz"]
Counts = Int64[Tensor, " d_sae"]
Mask = Bool[Tensor, " d_sae"]
Scalar = Float[Tensor, ""]
Count = Int64[Tensor, ""]

L1Weight = Literal["none", "norm", "detached_norm"]
Aux = Literal["frozen", "unfrozen", "off"]


class Objective(NamedTuple):
    """The three choices a recipe stands for.

    Shrinking `f` while growing `W_dec` would lower an L1 term and leave x_hat as it is. Either the
    norm of each direction is held at one, or the L1 term is weighted by it.
    """

    unit_norm: bool
    """Whether the optimiser holds rows of `W_dec` at norm one."""
    l1_weight: L1Weight
    """What multiplies each latent in the L1 term: 1, the norm of its direction, or that norm as a
    constant."""
    aux: Aux
    """Decoder of the gate's auxiliary term: a frozen copy (Eq. 8), the live one, or no term."""


RECIPES: dict[Recipe, Objective] = {
    "P": Objective(unit_norm=True, l1_weight="none", aux="frozen"),
    "A": Objective(unit_norm=False, l1_weight="norm", aux="unfrozen"),
    "B": Objective(unit_norm=False, l1_weight="detached_norm", aux="frozen"),
}


def objective(architecture: Architecture, *, recipe: Recipe, aux: Aux | None = None) -> Objective:
    """Return the recipe's objective, its auxiliary decoder replaced by `aux` unless that is None.

    Raises InputError for combinations in which norms can run away.
    """
    if architecture == "relu" and recipe == "B":
        raise InputError(
            "expected recipe 'P' or 'A' for a ReLU SAE, got 'B': with the norm detached in the "
            "L1 term, latents shrink and decoder norms grow without limit"
        )
    if architecture in ("jumprelu", "topk") and recipe != "P":
        name = {"jumprelu": "JumpReLU", "topk": "TopK"}[architecture]
        raise InputError(
            f"expected recipe 'P' for a {name} SAE, got {recipe!r}: recipes A and B weigh an "
            "L1 term, and this architecture has none"
        )
    if architecture != "gated":
        return RECIPES[recipe]._replace(aux="off")
    chosen = RECIPES[recipe]._replace(aux=aux or RECIPES[recipe].aux)
    if chosen.l1_weight == "norm" and chosen.aux == "frozen":
        # The terms must agree on whether they move norms (an author's comment on the paper's forum
        # post); SAELens PR #545 is this mixture, and its users report dead latents.
        raise InputError(
            "expected recipe 'A' with aux 'unfrozen' or 'off', got 'frozen': the L1 term would "
            "shrink decoder norms that the frozen auxiliary term cannot hold up, and latents die; "
            "use recipe 'B', which freezes the norm in both terms"
        )
    if chosen.l1_weight == "detached_norm" and chosen.aux == "unfrozen":
        raise InputError(
            "expected recipe 'B' with aux 'frozen' or 'off', got 'unfrozen': the auxiliary term "
            "would grow decoder norms whose cost the L1 term, with the norm detached, cannot feel; "
            "use recipe 'A', which lets both terms move the norm"
        )
    return chosen


InputNorm = Literal["layer_norm", "constant_norm_rescale"]

# All three libraries add it to the deviation, and only when encoding.
EPS = 1e-5


class Normalised(NamedTuple):
    """A batch as an SAE sees it: x = u * scale + mean, where None stands for 1 and for 0."""

    u: Inputs
    scale: Float[Tensor, "*batch 1"] | None = None
    mean: Float[Tensor, "*batch 1"] | None = None

    def undo(self, u_hat: Inputs) -> Inputs:
        """Return reconstructions of u as reconstructions of x."""
        x_hat = self.in_raw_units(u_hat)
        return x_hat if self.mean is None else x_hat + self.mean

    def in_raw_units(self, step: Float[Tensor, "*#batch d_in"]) -> Float[Tensor, "*#batch d_in"]:
        """Return how far a step of u_hat moves x_hat."""
        return step if self.scale is None else step * self.scale


def normalised(x: Inputs, kind: InputNorm | None) -> Normalised:
    """Return `x` as an SAE with such inputs sees it; a vector of zeros stays one."""
    match kind:
        case None:
            return Normalised(x)
        case "layer_norm":
            mean = x.mean(-1, keepdim=True)
            centred = x - mean
            scale = centred.std(-1, keepdim=True)
            return Normalised(centred / (scale + EPS), scale, mean)
        case "constant_norm_rescale":
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            return Normalised(x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale)


class SAE(nn.Module, ABC):
    """The half that architectures share: `x_hat = f @ W_dec + b_dec`, and checks of width."""

    architecture: Architecture
    objective: Objective
    recipe: Recipe
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    input_norm: InputNorm | None = None
    """How an SAE of another library normalises each token first; None for those trained here.

    Its equations then hold for `u` of `normalised(x)`. It takes and returns raw activations, and
    cannot be trained further."""

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

    @abstractmethod
    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0`, or raise InputError if the last axis is not `d_in`."""

    def decode(self, f: Latents) -> Inputs:
        """Return `x_hat = f @ W_dec + b_dec` (Eq. 2).

        Of an SAE with `input_norm` this reconstructs u; `normalised(x).undo` turns it into x_hat.
        """
        if f.shape[-1] != self.d_sae:
            raise InputError(
                f"expected latents of width d_sae={self.d_sae}, got shape {tuple(f.shape)}; "
                "decode() takes what this SAE's encode() returns"
            )
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Inputs) -> Inputs:
        """Return the reconstruction of `x`, in units of x."""
        return self.normalised(x).undo(self.decode(self.encode(x)))

    def normalised(self, x: Inputs) -> Normalised:
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
        """Raise InputError if this SAE normalises every token: it can be used, not trained."""
        if self.input_norm is not None:
            raise InputError(
                f"expected an SAE that learns from activations as they are, got one that "
                f"normalises every token ({self.input_norm}); it can be evaluated, explored and "
                "steered, not trained or converted"
            )


class SinglePathSAE(SAE):
    """The half shared by those whose encoder is one path: z = (x - b_dec) @ W_enc + b_enc."""

    def __init__(self, d_in: int, d_sae: int, *, recipe: Recipe = "P", seed: int = 0) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        self.objective = objective(self.architecture, recipe=recipe)
        self.W_enc = nn.Parameter(transposed(self.W_dec))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def pre_activations(self, x: Inputs) -> Latents:
        """Return z."""
        self.check_width(x)
        return (self.normalised(x).u - self.b_dec) @ self.W_enc + self.b_enc


def transposed(W_dec: Dictionary) -> Encoder:
    """Return a decoder transposed, in memory of its own: what its encoder starts from."""
    # Where an axis is 1, .T.contiguous() would share memory with the dictionary.
    return W_dec.detach().T.clone(memory_format=torch.contiguous_format)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")


def check_width(sae: SAE, width: int, *, name: str, hook_name: str) -> None:
    """Raise InputError unless an SAE fits a place in a model."""
    if sae.d_in != width:
        raise InputError(
            f"expected SAE {name!r} to take activations of width {width}, as {hook_name} has, got "
            f"d_in={sae.d_in}; was it trained on another model or site?"
        )
