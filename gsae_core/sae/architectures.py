"""The dictionaries: a Gated SAE, the ReLU baseline, and how a config becomes any of the four."""

import math
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import nn

from gsae_core.config import Architecture, Aux, Recipe, SAESpec, Tie
from gsae_core.errors import InputError
from gsae_core.sae.base import SAE, Inputs, Latents, PerLatent, SinglePathSAE, check_choice
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.topk import TopKSAE


class PreActivations(NamedTuple):
    """What both paths of a Gated SAE compute, `(*batch, d_sae)` each."""

    pi_gate: Latents
    pi_mag: Latents


class GatedSAE(SAE):
    """Dictionary whose encoder decides which latents fire apart from how much.

        pi_gate = (x - b_dec) @ W_gate + b_gate
        pi_mag  = (x - b_dec) @ (W_gate * exp(r_mag)) + b_mag
        f       = 1[pi_gate > 0] * relu(pi_mag)
        x_hat   = f @ W_dec + b_dec

    Rajamanoharan et al. 2024 (arXiv:2404.16014v2), Eq. 6-7, with weights from the right, as in its
    pseudo-code.

    Args:
        recipe: `P`, `A` or `B`, see `base.RECIPES`.
        tie: `r_mag` shares directions between the paths up to a learnt scale (Eq. 7); `none` drops
            the scale (`W_mag = W_gate`); `untied` gives the magnitude path its own `W_mag`.
        aux: decoder of the auxiliary term where it differs from the recipe's; recipe `P` with
            `unfrozen` is the paper's ablation (Fig. 8).
        detach_b_dec: keep the sparsity and auxiliary terms from moving `b_dec` through the centred
            input, as the text asks and the paper's pseudo-code does not do.
        seed: of the directions that `W_dec` starts from.

    Raises:
        InputError: if a width is below 1, a choice is unknown, or `aux` does not go with `recipe`.
    """

    architecture: Architecture = "gated"
    W_gate: nn.Parameter
    """`(d_in, d_sae)`: directions of the gate; of the magnitude too, unless `tie` is `untied`."""
    b_gate: nn.Parameter
    """`(d_sae,)`."""
    b_mag: nn.Parameter
    """`(d_sae,)`."""
    r_mag: nn.Parameter | None
    """`(d_sae,)`: log of the magnitude's scale; None unless `tie` is `r_mag`."""
    W_mag: nn.Parameter | None
    """`(d_in, d_sae)`: the magnitude's own directions; None unless `tie` is `untied`."""

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
        super().__init__(d_in, d_sae, recipe=recipe, seed=seed, aux=aux)
        check_choice("tie", tie, get_args(Tie))
        self.aux: Aux = self.objective.aux
        self.tie: Tie = tie
        self.detach_b_dec = detach_b_dec
        self.W_gate = nn.Parameter(self.encoder_to_start_from())
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        # r_mag = 0 (or W_mag = W_gate) and equal biases: the start is exactly a ReLU SAE.
        self.r_mag = nn.Parameter(torch.zeros(d_sae)) if tie == "r_mag" else None
        self.W_mag = nn.Parameter(self.W_gate.detach().clone()) if tie == "untied" else None
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0` (Eq. 6); InputError if the last axis is not `d_in`."""
        pi_gate, pi_mag = self.pre_activations(x)
        return (pi_gate > 0) * torch.relu(pi_mag)

    def pre_activations(self, x: Inputs) -> PreActivations:
        """Return pi_gate and pi_mag of `x`; InputError if its last axis is not `d_in`."""
        self.check_width(x)
        xc = self.normalised(x).u - self.b_dec
        h = xc @ self.W_gate
        if self.W_mag is not None:
            return PreActivations(pi_gate=h + self.b_gate, pi_mag=xc @ self.W_mag + self.b_mag)
        # Weight sharing (Eq. 7): one product serves both paths.
        scaled = h if self.r_mag is None else h * self.r_mag.exp()
        return PreActivations(pi_gate=h + self.b_gate, pi_mag=scaled + self.b_mag)

    @torch.no_grad()
    def jumprelu_threshold(self) -> PerLatent:
        """Return theta of the JumpReLU SAE that computes the same: f = pi_mag where pi_mag > theta.

        theta = max(0, b_mag - exp(r_mag) * b_gate) (arXiv:2404.16014v2, Appendix E, which leaves
        out the maximum). At theta = 0 the gate never binds: a plain ReLU latent. InputError if the
        paths are untied.
        """
        if self.W_mag is not None:
            raise InputError(
                "expected a Gated SAE with tie 'r_mag' or 'none', got 'untied': its gate and its "
                "magnitude read different directions, so no JumpReLU threshold equals the gate"
            )
        gain = torch.ones_like(self.b_gate) if self.r_mag is None else self.r_mag.exp()
        return (self.b_mag - gain * self.b_gate).clamp(min=0)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"{super().extra_repr()}, tie={self.tie!r}, aux={self.aux!r}"


class ReluSAE(SinglePathSAE):
    """The L1 baseline: one number says both whether a latent fires and how much.

        f     = relu((x - b_dec) @ W_enc + b_enc)
        x_hat = f @ W_dec + b_dec

    Bricken et al. 2023, as arXiv:2404.16014v2 writes it (Eq. 1-3).

    Args:
        recipe: `P` or `A`, see `base.RECIPES`.
        seed: of the directions that `W_dec` starts from.

    Raises:
        InputError: if a width is below 1, or the recipe is another.
    """

    architecture: Architecture = "relu"

    def encode(self, x: Inputs) -> Latents:
        """Return the latents `f >= 0` (Eq. 3); InputError if the last axis is not `d_in`."""
        return torch.relu(self.pre_activations(x))


def build_sae(spec: SAESpec, d_in: int) -> SAE:
    """Return a new SAE as a run's config describes it, by the settings its architecture has."""
    names = ["d_sae", "recipe", "seed"]
    match spec.architecture:
        case "gated":
            kind, own = GatedSAE, ["tie", "aux", "detach_b_dec"]
        case "relu":
            kind, own = ReluSAE, []
        case "jumprelu":
            kind, own = JumpReluSAE, ["init_threshold", "bandwidth", "threshold_unit"]
        case "topk":
            kind, own = partial(TopKSAE, k=int(spec.sparsity)), ["k_aux"]
    return kind(d_in, **{name: getattr(spec, name) for name in names + own})


@torch.no_grad()
def fold_scale_(sae: SAE, scale: float) -> None:
    """Turn an SAE trained on `scale * x` into the same one for raw `x`, in place.

    With y = s x, the encoder's products are (y - b_dec) @ W = s (x - b_dec / s) @ W. Dividing every
    bias and threshold by s therefore divides pre-activations, latents and x_hat by s and leaves
    each gate and the order of the latents as they are. InputError if `scale` is not positive and
    finite, or the SAE normalises every token.
    """
    sae.check_trains()
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"expected a positive, finite activation scale, got {scale}")
    for name, parameter in sae.named_parameters():
        if name.startswith("b_"):
            parameter /= scale
    if isinstance(sae, JumpReluSAE):
        sae.threshold.div_(scale)
        sae.threshold_unit = (sae.threshold_unit or 1.0) / scale


BuiltinSAE = GatedSAE | ReluSAE | JumpReluSAE | TopKSAE


def has_fast_step(sae: SAE) -> bool:
    """Return whether its step is written out for caches and kernels; untied paths are not."""
    return isinstance(sae, BuiltinSAE) and not (isinstance(sae, GatedSAE) and sae.tie == "untied")
