"""One look for every figure: Okabe-Ito colours, a marker per architecture, titles with units."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from gsae_core.config import Architecture, SAESpec

Theme = Literal["light", "dark"]


class Look(NamedTuple):
    """How an architecture is drawn; hue and shape both tell it, so neither has to be seen."""

    label: str
    colour: str
    dark: str  # the colour of its marks on a dark page, for Altair's figures
    shape: str  # which Plotly and Vega call by the same name
    dash: tuple[int, ...]
    tint: float = 0.25  # towards white, of its palest shade on a light page; pale hues less


LOOKS: dict[Architecture, Look] = {
    "gated": Look("Gated", "#0072B2", "#56B4E9", "circle", (1, 0)),
    "relu": Look("ReLU baseline", "#D55E00", "#f08a3c", "diamond", (5, 3)),
    "jumprelu": Look("JumpReLU", "#009E73", "#2bbf95", "triangle-up", (2, 2), 0.15),
    "topk": Look("TopK", "#CC79A7", "#CC79A7", "square", (7, 2, 2, 2), 0.05),
}
THIRD = "#3A9BD9"  # of the gate path: of the Gated hue, and lighter
NEUTRAL = "#7d8894"  # 3.6:1 on white and 5.0:1 on the dark background

AXES = {
    "tokens": "activation vectors seen",
    "step": "step",
    "seconds": "training time (s)",
    "l0": "L0 (active features per token)",
    "fvu": "fraction of variance unexplained",
    "loss": "loss (Eq. 8, scaled activations)",
    "reconstruction": "squared error (scaled activations)",
    "sparsity_loss": "sparsity penalty, λ included",
    "auxiliary": "auxiliary error (of the gate path, or of TopK's dead features)",
    "gamma": "relative reconstruction bias γ",
    "gamma_gate": "γ of the gate path",
    "dead_gate": "share of features, gate never open",
    "dead_magnitude": "share of features, gate open, no output",
    "lr": "learning rate",
    "loss_recovered": "loss recovered",
    "delta_ce": "CE increase (nats per token)",
    "kl": "KL divergence (nats per token)",
    "density": "density (share of tokens)",
}
"""Axis title of each quantity, by the name it has in the run folder."""

LOWER_IS_BETTER = {"l0", "fvu", "delta_ce", "kl"}


def hover_name(spec: SAESpec) -> str:
    """Return the text that names an SAE in tooltips, e.g. `Gated, λ 0.2` or `TopK, k 32`."""
    return f"{LOOKS[spec.architecture].label}, {knob(spec.architecture, spec.sparsity)}"


def knob(architecture: Architecture | str, sparsity: float) -> str:
    """Return what sets an SAE's sparsity: `λ 0.2`, `k 32` for TopK, `λ unknown` for NaN."""
    number = "unknown" if math.isnan(sparsity) else f"{sparsity:g}"
    return f"{'k' if architecture == 'topk' else 'λ'} {number}"


def shades(saes: Sequence[SAESpec], theme: Theme) -> dict[str, str]:
    """Return a colour per SAE: the architecture's hue, stronger for a sparser SAE.

    Stronger is darker on a light page and lighter on a dark one: lines keep a contrast of 3:1.
    """
    colours = {}
    for architecture, look in LOOKS.items():
        family = [spec for spec in saes if spec.architecture == architecture]
        # A larger lambda is sparser, a larger k is not.
        family.sort(key=lambda spec: spec.sparsity, reverse=architecture == "topk")
        for rank, spec in enumerate(family):
            strength = rank / (len(family) - 1) if len(family) > 1 else 0.5
            # From its tint to 40 % black, or from a tenth to 70 % white.
            palest, strongest = (look.tint, -0.4) if theme == "light" else (0.1, 0.7)
            colours[spec.name] = _mix(look.colour, palest + (strongest - palest) * strength)
    return colours


def round_values(values: Iterable[float]) -> list[float]:
    """Return round ticks of a log axis: 1, 2, 5 times powers of ten, more where these are too few.

    Of values that are close together: multiples of 1, 2 or 5 times a power of ten.

    The chart libraries' own choices are a grid line for every digit, or labels like `2 5 10^2`.
    """
    positive = [float(value) for value in values if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    # Around two values that are almost one, not all of the axis: that would be thousands of ticks.
    near = 3 * (high - low) or high
    first, last = max(low * 0.8, low - near), min(high * 1.25, high + near)
    found: list[float] = []
    for ticks in _candidates(first, last):
        found = [tick for tick in ticks if first <= tick <= last]
        # An axis hardly reaches beyond its points: those outside alone would leave it bare.
        inside = sum(low <= tick <= high for tick in found)
        if len(found) >= 3 and (inside >= 2 or low == high):
            break
    return found


def _candidates(first: float, last: float) -> Iterator[list[float]]:
    """Yield round numbers about `first` to `last`, more of them each time."""
    top = math.ceil(math.log10(last))
    for digits in ((1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        decades = range(math.floor(math.log10(first)), top + 1)
        yield [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    for decade, digit in itertools.product(range(top, top - 8, -1), (5, 2, 1)):
        step = float(f"{digit}e{decade}")
        numbers = range(math.ceil(first / step), math.floor(last / step) + 1)
        yield [float(f"{number * step:.12g}") for number in numbers]


def _mix(colour: str, amount: float) -> str:
    """Return `colour` moved by |amount| towards white (amount > 0) or black (amount < 0)."""
    target = 255 if amount > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (target - c) * abs(amount)):02x}" for c in channels)
