"""What lets the norms of directions move: three recipes, and the mixtures that are refused."""

from typing import Literal, NamedTuple

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError

L1Weight = Literal["none", "norm", "detached_norm"]
Aux = Literal["frozen", "unfrozen", "off"]


class Objective(NamedTuple):
    """What keeps a dictionary from cheating: the three choices a recipe stands for.

    Shrinking `f` while growing `W_dec` would buy sparsity for nothing. Either the norm of each
    direction is held at one, or the L1 term is weighted by it.
    """

    unit_norm: bool
    """Rows of `W_dec` are held at norm one (the optimiser's job after every step)."""

    l1_weight: L1Weight
    """What multiplies each latent in the L1 term: 1, the norm of its direction, or that norm as a
    constant."""

    aux: Aux
    """Decoder of the gate's auxiliary term: a frozen copy (Eq. 8), the live one, or no such
    term."""


RECIPES: dict[Recipe, Objective] = {
    "P": Objective(unit_norm=True, l1_weight="none", aux="frozen"),
    "A": Objective(unit_norm=False, l1_weight="norm", aux="unfrozen"),
    "B": Objective(unit_norm=False, l1_weight="detached_norm", aux="frozen"),
}


def objective(architecture: Architecture, *, recipe: Recipe, aux: Aux | None = None) -> Objective:
    """Return the recipe's objective, its auxiliary decoder replaced by `aux` unless that is None.

    The others have no gate and so no auxiliary reconstruction from it (Eq. 4), for any `aux`.

    Raises:
        InputError: for combinations in which norms can run away; nothing else is looked at, so
            that a caller may ask before it builds anything.
    """
    if architecture == "relu":
        if recipe == "B":
            raise InputError(
                "expected recipe 'P' or 'A' for a ReLU SAE, got 'B': with the norm detached in the "
                "L1 term, latents shrink and decoder norms grow without limit"
            )
        return RECIPES[recipe]._replace(aux="off")
    if architecture != "gated":
        if recipe != "P":
            name = {"jumprelu": "JumpReLU", "topk": "TopK"}[architecture]
            raise InputError(
                f"expected recipe 'P' for a {name} SAE, got {recipe!r}: recipes A and B weigh an "
                "L1 term, and this architecture has none"
            )
        return RECIPES[recipe]._replace(aux="off")
    chosen = RECIPES[recipe]._replace(aux=aux or RECIPES[recipe].aux)
    if chosen.l1_weight == "norm" and chosen.aux == "frozen":
        # The terms must agree on whether norms are theirs to move (an author's comment on the
        # paper's forum post); SAELens PR #545 is this mixture, and its users met dead latents.
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
