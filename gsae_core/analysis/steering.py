"""Add to, clamp or ablate features while the language model reads on.

    f'  = f with up to three latents changed
    x'  = x + (f' - f) @ W_dec                       the SAE's error stays: x - x_hat is untouched
    x'  = f' @ W_dec + b_dec                         or goes: the model reads the reconstruction

An SAE that normalises its inputs (`sae.input_norm`) reads and writes u, with scale and mean of x:

    x'  = x + scale(token) (f' - f) @ W_dec
    x'  = scale(token) (f' @ W_dec + b_dec) + mean(token)

Strengths count in units of each feature's own scale. Every counted token is edited, those of the
prompt and those that follow; special tokens (BOS, EOS, padding) keep their activations, for no SAE
is trained on them.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.analysis.features.table import quantile
from gsae_core.analysis.fidelity import n_sequences
from gsae_core.config import Site
from gsae_core.errors import InputError, is_whole
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import Edit, LanguageModel
from gsae_core.sae.base import SAE, Counts, PerLatent, Rows
from gsae_core.sae.sparse.codes import encode_sparse

if TYPE_CHECKING:
    from gsae_core.analysis.features.index import FeatureIndex

N_TOKENS = 2**14
"""Held-out tokens that scales are measured on where there is no feature index."""


class Unit(NamedTuple):
    """What strength 1 means for one feature."""

    value: float
    """What it adds to f."""
    own: bool
    """Whether it is the feature's own scale; a feature that never fired has none."""
    sentence: str
    """Where it comes from."""


class Scales(NamedTuple):
    """The scale of every feature of one SAE on some tokens."""

    p99: PerLatent
    """99th percentile of f over the tokens it fired on; NaN where it never fired."""
    largest: PerLatent
    """The largest f; 0 where it never fired."""
    fired: Counts
    """Tokens it fired on."""
    decoder_norm: PerLatent
    typical: float
    """Median over the features that fired of p99 times decoder norm: the length of what a feature
    writes. If none fired, the root mean square length of the activations, as the SAE sees them."""
    n_tokens: int
    source: str
    """Which tokens."""
    normalised: bool = False
    """Whether the SAE normalises its inputs: lengths are then times each token's own scale."""

    def unit(self, latent: int) -> Unit:
        """Return a feature's 99th percentile, or what writes a vector of length `typical`."""
        check_latent(latent, len(self.p99))
        fired, norm = int(self.fired[latent]), float(self.decoder_norm[latent])
        if fired:
            value = float(self.p99[latent])
            sentence = (
                f"1 unit = {value:.3g}, the 99th percentile of its activations "
                f"(fired on {fired:,} of {self.n_tokens:,} {self.source})"
            )
            return Unit(value, True, sentence)
        value = self.typical / norm if norm > 0 else self.typical
        sentence = (
            f"did not fire on {self.n_tokens:,} {self.source}, so it has no scale of its own: "
            f"1 unit = {value:.3g}, which writes a vector of length {value * norm:.3g}, as a "
            f"typical feature does (its decoder norm is {norm:.3g})"
        )
        if self.normalised:
            sentence += "; in activations, that length times each token's own scale"
        return Unit(value, False, sentence)


def check_latent(latent: int, d_sae: int) -> None:
    """Raise InputError if there is no such latent."""
    if not is_whole(latent) or not 0 <= latent < d_sae:
        raise InputError(
            f"expected a feature from 0 to {d_sae - 1}, got {latent!r}; "
            f"this SAE has {d_sae} features"
        )


def counted_vectors(
    model: LanguageModel,
    sequences: SequenceSet,
    *,
    layer: int,
    site: Site,
    n_tokens: int = N_TOKENS,
) -> Rows:
    """Return the activations of the first counted tokens of `sequences`."""
    harvest = Harvest(model, sequences, layer=layer, site=site)
    vectors = list(harvest.vectors(np.arange(n_sequences(sequences, n_tokens))))
    if not vectors:
        raise InputError("expected held-out text to measure features on, got none")
    return torch.cat(vectors)[:n_tokens]


@torch.no_grad()
def scales_of(sae: SAE, x: Rows, *, source: str = "held-out tokens") -> Scales:
    """Return the scales of an SAE on given activations."""
    codes = encode_sparse(sae, x)
    fires = codes.magnitude > 0  # a gate may open onto nothing
    latent, f = (column[fires].cpu().numpy() for column in (codes.latent, codes.magnitude))
    order = np.lexsort((-f, latent))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=sae.d_sae))])
    length = float(sae.normalised(x).u.square().sum(-1).mean().sqrt())
    return _of_sorted(sae, offsets, f[order], n_tokens=len(x), source=source, if_none=length)


def scales_of_index(index: "FeatureIndex", sae: SAE) -> Scales:
    """Return the scales of an SAE from its feature index; InputError if its width is another."""
    offsets = np.asarray(index.array("offsets")).astype(np.int64)
    if len(offsets) != sae.d_sae + 1:
        raise InputError(
            f"expected the feature index of an SAE with {sae.d_sae} features, got one with "
            f"{len(offsets) - 1}; build the index of this SAE"
        )
    value, source = index.array("value"), "tokens of the feature index"
    return _of_sorted(sae, offsets, value, n_tokens=index.n_tokens, source=source, if_none=1.0)


def _of_sorted(
    sae: SAE, offsets: np.ndarray, value: np.ndarray, *, if_none: float, **about: Any
) -> Scales:
    """Return scales from values in an index's order; `if_none`: `typical` where nothing fires."""
    fired = torch.from_numpy(np.diff(offsets))
    p99, largest = (torch.from_numpy(quantile(offsets, value, q)).float() for q in (0.99, 1.0))
    norm = sae.W_dec.detach().norm(dim=1).float().cpu()
    alive = fired > 0
    return Scales(
        p99=p99,
        largest=largest.where(alive, 0.0),
        fired=fired,
        decoder_norm=norm,
        typical=float((p99 * norm)[alive].median()) if alive.any() else if_none,
        normalised=sae.input_norm is not None,
        **about,
    )


Mode = Literal["add", "clamp", "ablate"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_FEATURES = 3
MAX_STRENGTH = 20.0


class Intervention(NamedTuple):
    """What is done to one feature, on every counted token."""

    latent: int
    mode: Mode
    """`add`: f + strength units; `clamp`: strength units, f ignored; `ablate`: 0."""
    strength: float | int
    """In units; of no effect on ablation."""
    unit: float
    """What one unit adds to f, > 0."""

    @property
    def amount(self) -> float:
        """Strength in units of f."""
        return 0.0 if self.mode == "ablate" else self.strength * self.unit


def intervention(scales: Scales, latent: int, mode: Mode, strength: float | int) -> Intervention:
    """Return an intervention in the feature's own unit."""
    return Intervention(latent, mode, strength, scales.unit(latent).value)


@dataclass(frozen=True)
class Steering:
    """Interventions in up to three features of one SAE; InputError for what cannot be done.

    `keep_error`: whether x keeps what the SAE fails to reconstruct.
    """

    sae: SAE
    interventions: tuple[Intervention, ...]
    keep_error: bool = True

    def __post_init__(self) -> None:
        latents = [each.latent for each in self.interventions]
        if len(latents) > MAX_FEATURES:
            raise InputError(
                f"expected at most {MAX_FEATURES} features to steer at once, got {len(latents)}; "
                "leave some out"
            )
        for each in self.interventions:
            check_latent(each.latent, self.sae.d_sae)
            if latents.count(each.latent) > 1:
                raise InputError(
                    f"expected each feature once, got feature {each.latent} twice; "
                    "give it one mode and one strength"
                )
            numbers = all(isinstance(of, Real) for of in (each.strength, each.unit))
            if not numbers or not 0 < each.unit < math.inf:
                raise InputError(
                    "expected a number as strength and one above 0 as unit, got "
                    f"{each.strength!r} and {each.unit!r}; intervention() gives the feature's unit"
                )
            if each.mode not in MODES or not abs(each.strength) <= MAX_STRENGTH:
                raise InputError(
                    f"expected a mode out of {', '.join(MODES)} and a strength from "
                    f"{-MAX_STRENGTH:g} to {MAX_STRENGTH:g} in units of the feature's own scale, "
                    f"got {each.mode!r} and {each.strength}; 1 is as strongly as it usually fires "
                    "at most"
                )

    @property
    def is_identity(self) -> bool:
        """Whether x' is x, to the bit, for every x."""
        nothing = all(each.mode == "add" and each.amount == 0 for each in self.interventions)
        return self.keep_error and nothing

    @property
    def reads_latents(self) -> bool:
        """Whether x' depends on f: adding to latents and keeping the error does not."""
        return not (self.keep_error and all(each.mode == "add" for each in self.interventions))

    def __call__(
        self, x: Float[Tensor, "*batch d_in"], f: Float[Tensor, "*batch d_sae"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return x'; InputError if the last axis of `x` is not the SAE's. `f`: of `x`, if known."""
        self.sae.check_width(x)
        if self.is_identity:
            return x
        inputs = x.to(self.sae.W_dec)
        normalised = self.sae.normalised(inputs)
        if f is None:
            f = self.sae.encode(inputs) if self.reads_latents else inputs[..., :0]
        if not self.keep_error:
            f = f.clone()  # to be written into
            for each in self.interventions:
                before = f[..., each.latent] if each.mode == "add" else 0.0
                f[..., each.latent] = before + each.amount
            return normalised.undo(self.sae.decode(f)).to(x)
        # (f' - f) @ W_dec, term by term: what `add` changes is its amount itself and not a
        # difference of two rounded latents.
        change = torch.zeros_like(self.sae.b_dec)
        for each in self.interventions:
            before = 0.0 if each.mode == "add" else f[..., each.latent, None]
            change = change + (each.amount - before) * self.sae.W_dec[each.latent]
        return x + normalised.in_raw_units(change).to(x)

    def edit(
        self, counted: Bool[Tensor, "*rows pos"], f: Float[Tensor, "*rows pos d_sae"] | None = None
    ) -> Edit | None:
        """Return the edit of rows of tokens, or None if it would change nothing.

        `f`: the latents where tokens count, if known.
        """
        if self.is_identity:
            return None
        return lambda x: torch.where(counted.to(x.device)[..., None], self(x, f), x)
