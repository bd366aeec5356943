"""What every dictionary has: a decoder, a recipe, and checks of width."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gsae_core.config import Architecture, Aux, Recipe, Site
from gsae_core.errors import InputError
from gsae_core.files import PathOrText

if TYPE_CHECKING:
    import gsae_core

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


class Objective(NamedTuple):
    """The three choices a recipe stands for.

    Shrinking `f` while growing `W_dec` would lower an L1 term and leave x_hat as it is. Either the
    norm of each direction is held at one, or the L1 term is weighted by it.
    """

    unit_norm: bool
    """Whether the optimiser holds rows of `W_dec` at norm one."""
    l1_weight: Literal["none", "norm", "detached_norm"]
    """What multiplies each latent in the L1 term: 1, the norm of its direction, or that norm as a
    constant."""
    aux: Aux
    """Decoder of the gate's auxiliary term: a frozen copy (Eq. 8), the live one, or no term."""


RECIPES: dict[Recipe, Objective] = {
    "P": Objective(unit_norm=True, l1_weight="none", aux="frozen"),
    "A": Objective(unit_norm=False, l1_weight="norm", aux="unfrozen"),
    "B": Objective(unit_norm=False, l1_weight="detached_norm", aux="frozen"),
}


# JumpReLU and TopK SAEs have no L1 term that A and B could weigh. With the norm detached in the L1
# term a ReLU SAE's latents shrink and its decoder norms grow without limit.
_ALLOWED: dict[Architecture, str] = {"gated": "PAB", "relu": "PA", "jumprelu": "P", "topk": "P"}


def objective(architecture: Architecture, *, recipe: Recipe, aux: Aux | None = None) -> Objective:
    """Return the recipe's objective, its auxiliary decoder replaced by `aux` unless that is None.

    Raises InputError for combinations in which norms can run away.
    """
    if recipe not in (allowed := _ALLOWED[architecture]):
        raise InputError(
            f"expected recipe {' or '.join(allowed)} for architecture {architecture}, got {recipe}:"
            " any other lets its norms run away, or weighs an L1 term that it lacks"
        )
    usual = RECIPES[recipe]
    if architecture != "gated":
        return usual._replace(aux="off")
    if recipe != "P" and aux not in (None, usual.aux, "off"):
        # Both terms or none may move norms (an author's comment on the paper's forum post); SAELens
        # PR #545 is A with a frozen decoder, and its users report dead latents.
        raise InputError(
            f"expected recipe {recipe} with aux {usual.aux} or off, got {aux}: where only one of "
            "the L1 and the auxiliary term moves decoder norms, they run away or latents die"
        )
    return usual._replace(aux=aux or usual.aux)


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


Kind = TypeVar("Kind", bound="SAE")


class SAE(nn.Module, ABC):
    """The half that architectures share: `x_hat = f @ W_dec + b_dec`, and checks of width.

    Activations are in the units that the SAE was trained in; of a saved SAE those are the language
    model's own, the training's scale being folded into the weights.
    """

    architecture: Architecture
    """As configs name it: `gated`, `relu`, `jumprelu` or `topk`."""
    objective: Objective
    """What its recipe stands for."""
    recipe: Recipe
    """`P`, `A` or `B`, see `RECIPES`."""
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    W_dec: nn.Parameter
    """The dictionary `(d_sae, d_in)`: a direction for each latent."""
    b_dec: nn.Parameter
    """`(d_in,)`: subtracted before encoding, added after decoding."""
    input_norm: InputNorm | None = None
    """How an SAE of another library normalises each token first; None for those trained here.

    Its equations then hold for `u` of `normalised(x)`. It takes and returns raw activations, and
    cannot be trained further."""

    def __init__(
        self, d_in: int, d_sae: int, *, recipe: Recipe, seed: int, aux: Aux | None = None
    ) -> None:
        super().__init__()
        for name, width in (("d_in", d_in), ("d_sae", d_sae)):
            if width < 1:
                raise InputError(f"expected {name} of at least 1, got {width}")
        check_choice("recipe", recipe, get_args(Recipe))
        if aux is not None:
            check_choice("aux", aux, get_args(Aux))
        self.objective = objective(self.architecture, recipe=recipe, aux=aux)
        self.d_in, self.d_sae, self.recipe = d_in, d_sae, recipe
        # The paper does not state an initialisation; random unit directions with the encoder
        # transposed from them and zeros elsewhere are what its re-implementations agree on.
        directions = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    # Shorthands of the package's own functions, for which this room knows no others: what is
    # imported is the package, which knows where they live.

    @classmethod
    def from_pretrained(
        cls: type[Kind], where: PathOrText, *, fold_decoder_norms: bool = False
    ) -> Kind:
        """Return the SAE in a folder or file or at an address on the Hub, as `gsae_core.load_sae`.

        InputError if it is none, or of another architecture than this class (`SAE` takes any).
        """
        import gsae_core

        sae = gsae_core.load_sae(where, fold_decoder_norms=fold_decoder_norms)
        if not isinstance(sae, cls):
            there = type(sae).__name__
            raise InputError(
                f"expected a {cls.__name__} in {where}, found a {there}; load it with "
                f"{there}.from_pretrained, or with gsae_core.load_sae, which takes any"
            )
        return sae

    def push_to_hub(
        self,
        repo: str,
        *,
        path: str = "",
        private: bool = True,
        branch: str | None = None,
        model: str | None = None,
        layer: int | None = None,
        site: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Send this SAE to OWNER/NAME on the Hub and return its address; see `gsae_core.push_sae`.

        `from_pretrained` of the address, OWNER/NAME:PATH@COMMIT, gives the same tensors.
        """
        import gsae_core

        return gsae_core.push_sae(
            self,
            repo,
            path=path,
            private=private,
            branch=branch,
            model=model,
            layer=layer,
            site=site,
            metadata=metadata,
        )

    def attach(
        self,
        model: Any,
        layer: int,
        site: Site,
        *,
        replace: bool = False,
        steer: Sequence[Any] = (),
        tokenizer: Any = None,
        special_ids: Iterable[int] | None = None,
    ) -> AbstractContextManager["gsae_core.Attached"]:
        """Hook this SAE into a language model within a `with` block; see `gsae_core.attach`.

        It shows features there and, with `replace` or `steer`, changes what the model reads.
        """
        import gsae_core

        return gsae_core.attach(
            self,
            model,
            layer,
            site,
            replace=replace,
            steer=steer,
            tokenizer=tokenizer,
            special_ids=special_ids,
        )

    def encoder_to_start_from(self) -> Encoder:
        """Return `W_dec` transposed, in memory of its own."""
        # Where an axis is 1, .T.contiguous() would share memory with the dictionary.
        return self.W_dec.detach().T.clone(memory_format=torch.contiguous_format)

    @abstractmethod
    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0`, or raise InputError if the last axis is not `d_in`."""

    def decode(self, f: Latents) -> Inputs:
        """Return `x_hat = f @ W_dec + b_dec` (Eq. 2); InputError if the last axis is not `d_sae`.

        Of an SAE with `input_norm` this reconstructs u; `normalised(x).undo` turns it into x_hat.
        """
        if f.shape[-1] != self.d_sae:
            raise InputError(
                f"expected latents of width d_sae={self.d_sae}, got shape {tuple(f.shape)}; "
                "decode() takes what this SAE's encode() returns"
            )
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Inputs) -> Inputs:
        """Return the reconstruction of `x`, in units of x; InputError as `encode`."""
        return self.normalised(x).undo(self.decode(self.encode(x)))

    def normalised(self, x: Inputs) -> Normalised:
        """Return `x` as this SAE sees it; a vector of zeros stays one."""
        match self.input_norm:
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

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        norm = "" if self.input_norm is None else f", input_norm={self.input_norm!r}"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, recipe={self.recipe!r}{norm}"

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

    W_enc: nn.Parameter
    """`(d_in, d_sae)`."""
    b_enc: nn.Parameter
    """`(d_sae,)`."""

    def __init__(self, d_in: int, d_sae: int, *, recipe: Recipe = "P", seed: int = 0) -> None:
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed)
        self.W_enc = nn.Parameter(self.encoder_to_start_from())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def pre_activations(self, x: Inputs) -> Latents:
        """Return z, or raise InputError if the last axis of `x` is not `d_in`."""
        self.check_width(x)
        return (self.normalised(x).u - self.b_dec) @ self.W_enc + self.b_enc


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError if `value` is none of the choices."""
    if value not in choices:
        raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")


def check_width(sae: SAE, width: int, *, name: str, hook_name: str) -> None:
    """Raise InputError unless an SAE fits a place in a model."""
    if sae.d_in != width:
        raise InputError(
            f"expected SAE {name!r} to take activations of width {width}, as {hook_name} has, got "
            f"d_in={sae.d_in}; was it trained on another model or site?"
        )
