"""Add to, clamp or ablate features while the language model reads on.

    f'  = f with up to three latents changed
    x'  = x + (f' - f) @ W_dec                       the SAE's error stays: x - x_hat is untouched
    x'  = f' @ W_dec + b_dec                         or goes: the model reads the reconstruction

An SAE that normalises its inputs reads and writes u, whose unit is as long in x as scale(token)
(`sae.input_norm`). The same f then moves x by scale(token) times as much:

    x'  = x + scale(token) (f' - f) @ W_dec
    x'  = scale(token) (f' @ W_dec + b_dec) + mean(token)

with the scale and mean of x itself; those of x' are others.

Strengths count in units of each feature's own scale (`analysis.scales`). Every counted token is
edited, those of the prompt and those that follow; special tokens (BOS, EOS, padding) keep their
activations, for no SAE is trained on them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.analysis.scales import Scales, check_latent
from gsae_core.errors import InputError
from gsae_core.lm.splice import Edit
from gsae_core.sae.base import SAE

Mode = Literal["add", "clamp", "ablate"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_FEATURES = 3
MAX_STRENGTH = 20.0
"""Units in either direction; twenty times what a feature says at its loudest."""


class Intervention(NamedTuple):
    """What is done to one feature, on every counted token."""

    latent: int
    mode: Mode
    """`add`: f + strength units; `clamp`: strength units, f ignored; `ablate`: 0."""
    strength: float | int
    """In units; ablation takes no notice of it."""
    unit: float
    """One unit in the latent's own terms, > 0."""

    @property
    def amount(self) -> float:
        """Strength in the latent's own terms."""
        return 0.0 if self.mode == "ablate" else self.strength * self.unit


def intervention(scales: Scales, latent: int, mode: Mode, strength: float | int) -> Intervention:
    """Return an intervention in the feature's own unit.

    Raises:
        InputError: if there is no such feature.
    """
    return Intervention(latent, mode, strength, scales.unit(latent).value)


@dataclass(frozen=True)
class Steering:
    """Interventions in one SAE's features.

    Args:
        sae: takes raw activations; it is read, never changed.
        interventions: of up to three features, no feature twice.
        keep_error: whether x keeps what the SAE fails to reconstruct.

    Raises:
        InputError: if a feature does not exist or comes twice, there are more than three, a
            strength is not finite or beyond `MAX_STRENGTH`, or a unit is not positive.
    """

    sae: SAE
    interventions: tuple[Intervention, ...]
    keep_error: bool = True

    def __post_init__(self) -> None:
        check_interventions(self.interventions, self.sae.d_sae)

    @property
    def is_identity(self) -> bool:
        """Whether x' is x, to the bit, for every x."""
        nothing = all(each.mode == "add" and each.amount == 0 for each in self.interventions)
        return self.keep_error and nothing

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return x'.

        Raises:
            InputError: if the last axis of `x` is not the SAE's.
        """
        self.sae.check_width(x)
        if self.is_identity:
            return x
        inputs = x.to(self.sae.W_dec)
        seen = self.sae.normalised(inputs)
        f = None if self._needs_no_latents else self.sae.encode(inputs)
        if self.keep_error:
            return x + seen.in_raw_units(self._change(f)).to(x)
        assert f is not None
        for each in self.interventions:
            before = f[..., each.latent] if each.mode == "add" else 0.0
            f[..., each.latent] = before + each.amount
        return seen.undo(self.sae.decode(f)).to(x)

    @property
    def _needs_no_latents(self) -> bool:
        return self.keep_error and all(each.mode == "add" for each in self.interventions)

    def _change(self, f: Float[Tensor, "*batch d_sae"] | None) -> Float[Tensor, "*#batch d_in"]:
        """Return (f' - f) @ W_dec, term by term.

        What `add` changes is its amount itself and not a difference of two rounded latents.
        """
        change = torch.zeros_like(self.sae.b_dec)
        for each in self.interventions:
            direction = self.sae.W_dec[each.latent]
            if each.mode == "add":
                change = change + each.amount * direction
            else:
                assert f is not None
                change = change + (each.amount - f[..., each.latent, None]) * direction
        return change

    def edit(self, counted: Bool[Tensor, " pos"]) -> Edit | None:
        """Return the edit of a row of tokens, or None if it would change nothing.

        Args:
            counted: which of the tokens are no special ones.
        """
        if self.is_identity:
            return None

        def edited(x: Tensor) -> Tensor:
            return torch.where(counted.to(x.device)[:, None], self(x), x)

        return edited


def check_interventions(interventions: Sequence[Intervention], d_sae: int) -> None:
    """Raise InputError, a sentence with what to do, if the interventions make no sense."""
    latents = [each.latent for each in interventions]
    if len(latents) > MAX_FEATURES:
        raise InputError(
            f"expected at most {MAX_FEATURES} features to steer at once, got {len(latents)}; "
            "leave some out"
        )
    for each in interventions:
        check_latent(each.latent, d_sae)
        if latents.count(each.latent) > 1:
            raise InputError(
                f"expected each feature once, got feature {each.latent} twice; "
                "give it one mode and one strength"
            )
        if each.mode not in MODES:
            raise InputError(f"expected a mode out of {', '.join(MODES)}, got {each.mode!r}")
        check_strength(each.strength)
        if not (math.isfinite(each.unit) and each.unit > 0):
            raise InputError(
                f"expected a positive, finite unit for feature {each.latent}, got {each.unit}; "
                "take the one of Scales.unit()"
            )


def check_strength(strength: float | int) -> None:
    """Raise InputError if a strength is not finite, or is out of range."""
    if not (math.isfinite(strength) and abs(strength) <= MAX_STRENGTH):
        raise InputError(
            f"expected a strength from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, in units of the "
            f"feature's own scale, got {strength}; 1 is as strongly as it usually fires at most"
        )
