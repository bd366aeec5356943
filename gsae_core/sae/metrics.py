"""Metrics of an SAE: sums gathered batch by batch in float64, one division at the end."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gsae_core.sae.base import Count, Counts, PerLatent, Rows, Scalar


class BatchStats(NamedTuple):
    """What one batch adds to the sums; plain tensors, on the batch's device, never synchronised.

    Sums are float64 (float32 where the device has no float64). A field is None where nothing was
    gathered: the gate of a ReLU SAE, the powers of single latents while training.
    """

    n_tokens: Count
    squared_error: Scalar
    """Sum over tokens of |x - x_hat|^2."""
    x_sum: Float[Tensor, " d_in"]
    x_power: Scalar
    """Sum over tokens of |x|^2."""
    x_hat_power: Scalar
    x_dot_x_hat: Scalar
    cosine: Scalar
    """Sum over tokens of the cosine between x and x_hat."""
    fired: Counts
    """Tokens on which each latent's f > 0."""
    gate_open: Counts | None = None
    """Tokens on which each latent's pi_gate > 0."""
    gate_power: Scalar | None = None
    """Sum over tokens of |x_hat_aux|^2, the reconstruction from relu(pi_gate)."""
    x_dot_gate: Scalar | None = None
    latent_power: PerLatent | None = None
    """Sum over tokens of |f_i d_i|^2."""
    latent_aligned: PerLatent | None = None
    """Sum over tokens of f_i d_i . (f_i d_i + x - x_hat)."""

    @property
    def opened(self) -> Counts:
        """Tokens on which each latent's gate opened; on which it fired, where there is no gate."""
        return self.fired if self.gate_open is None else self.gate_open

    def without_latents(self) -> "BatchStats":
        """Return the sums without their per-latent detail, which would fill memory if kept."""
        opened = None if self.gate_open is None else self.gate_open.sum()[None]
        fired = self.fired.sum()[None]
        return self._replace(fired=fired, gate_open=opened, latent_power=None, latent_aligned=None)


@torch.no_grad()
def stats_from_counts(
    *, x: Rows, x_hat: Rows, x_hat_gate: Rows | None, fired: Counts, gate_open: Counts | None
) -> BatchStats:
    """Return the sums of a batch; `x_hat_gate` are the reconstructions from relu(pi_gate)."""
    exact = x.to(sum_dtype(x.device))  # FVU subtracts |sum x|^2 / n from sum |x|^2.
    error = x - x_hat
    rows = [(exact * exact).sum(1), _row_dot(x_hat, x_hat), _row_dot(x, x_hat)]
    rows.append(_row_dot(error, error))
    if aux := x_hat_gate is not None:
        rows += [_row_dot(x_hat_gate, x_hat_gate), _row_dot(x, x_hat_gate)]
    x_sum, row_sums = exact.sum(0), torch.stack(rows, 1)
    return stats_from_rows(
        x_sum=x_sum, row_sums=row_sums, fired=fired, gate_open=gate_open, aux=aux
    )


# Columns of the sums over d_in of each token, of which those from AUX_POWER on are about x_hat_aux.
X_POWER, X_HAT_POWER, X_DOT_X_HAT, ERROR_POWER, AUX_POWER, X_DOT_AUX, AUX_ERROR_POWER = range(7)
N_ROW_SUMS = 7


def stats_from_rows(
    *,
    x_sum: Float[Tensor, " d_in"],
    row_sums: Float[Tensor, "batch sums"],
    fired: Counts,
    gate_open: Counts | None = None,
    aux: bool = False,
) -> BatchStats:
    """Return the sums of a batch from those of its tokens over d_in, in the columns above.

    `aux` says whether there is a second reconstruction, from relu(pi_gate).
    """
    power, hat, along = row_sums[:, : X_DOT_X_HAT + 1].unbind(1)
    # A zero vector has no direction; its cosine counts as 0.
    lengths = (power * hat).sqrt()
    cosines = torch.where(lengths > 0, along / lengths, 0.0)
    totals = row_sums.sum(0)
    return BatchStats(
        n_tokens=torch.full((), len(row_sums), dtype=torch.int64, device=row_sums.device),
        squared_error=totals[ERROR_POWER],
        x_sum=x_sum,
        x_power=totals[X_POWER],
        x_hat_power=totals[X_HAT_POWER],
        x_dot_x_hat=totals[X_DOT_X_HAT],
        cosine=cosines.sum(),
        fired=fired,
        gate_open=gate_open,
        gate_power=totals[AUX_POWER] if aux else None,
        x_dot_gate=totals[X_DOT_AUX] if aux else None,
    )


def _row_dot(a: Rows, b: Rows) -> Float[Tensor, " batch"]:
    """Return each token's inner product, summed in its own precision and returned in float64.

    All in float64 takes a core five times as long, to the same six digits. Products are written
    out: a GPU may round a matrix product to TF32.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum(1).to(sum_dtype(a.device))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Metrics:
    """Running sums over batches, and the numbers they give.

    No number depends on how tokens fell into batches. A ratio with nothing beneath it is NaN.
    Reading a number waits for the device; adding does not.
    """

    def __init__(self, sums: BatchStats | None = None) -> None:
        self.sums = sums

    def add(self, stats: BatchStats) -> None:
        """Add a batch, or the sums of another part of the same set."""
        if self.sums is None:
            self.sums = stats
            return
        total = self.sums._asdict()
        for name, theirs in stats._asdict().items():
            assert (total[name] is None) == (theirs is None), name  # of one SAE, gathered alike
            total[name] = None if theirs is None else total[name] + theirs
        self.sums = BatchStats(**total)

    @property
    def n_tokens(self) -> int:
        """Tokens measured, BOS and padding left out."""
        return 0 if self.sums is None else int(self.sums.n_tokens)

    @property
    def l0(self) -> float:
        """How many latents fire on an average token."""
        return self._ratio("fired", "n_tokens")

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: |x - x_hat|^2 over |x - mean|^2, each summed.

        0 is perfect; 1 is no better than always answering with the average activation.
        """
        if self.sums is None:
            return math.nan
        about_mean = self.sums.x_power - self.sums.x_sum.square().sum() / self.sums.n_tokens
        # What is left of equal activations is rounding, not variance.
        constant = about_mean <= 1e-13 * self.sums.x_power
        return math.nan if constant else float(self.sums.squared_error / about_mean)

    @property
    def gamma(self) -> float:
        """Relative reconstruction bias E|x_hat|^2 / E[x . x_hat] (arXiv:2404.16014v2, Eq. 10).

        1 is unbiased, below 1 reconstructions are too short. Dividing every reconstruction by gamma
        brings it as close to x as one factor can.
        """
        return self._ratio("x_hat_power", "x_dot_x_hat")

    @property
    def gamma_gate(self) -> float:
        """Gamma of reconstructions from relu(pi_gate): the shrinkage that magnitudes repair."""
        return self._ratio("gate_power", "x_dot_gate")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between x and its reconstruction, averaged over tokens."""
        return self._ratio("cosine", "n_tokens")

    @property
    def density(self) -> Float64[Tensor, " d_sae"]:
        """Share of tokens on which each latent fires."""
        return self._per_latent("fired", self.n_tokens)

    @property
    def alive_fraction(self) -> float:
        """Share of latents that fired at least once; it grows with the number of tokens."""
        if self.sums is None:
            return math.nan
        return float((self.sums.fired > 0).double().mean())

    @property
    def firings(self) -> Counts:
        """Number of tokens on which each latent fired."""
        return torch.zeros(0, dtype=torch.int64) if self.sums is None else self.sums.fired.cpu()

    @property
    def gamma_per_feature(self) -> Float64[Tensor, " d_sae"]:
        """How short each latent's share of the reconstruction is; 1 is right, below 1 too short.

        Dividing latent i's activations by gamma_i, all others as they are, brings reconstructions
        as close to x as its one factor can: sum f_i^2 / sum f_i (f_i + d_i . (x - x_hat)), for unit
        directions. This project's own measure; with few firings it is mostly noise. Of an SAE that
        normalises its inputs, x is what it sees: no latent can help a token's scale.
        """
        aligned = None if self.sums is None else self.sums.latent_aligned
        return self._per_latent("latent_power", 0 if aligned is None else aligned.cpu().double())

    def _ratio(self, above: str, below: str) -> float:
        over, under = getattr(self.sums, above, None), getattr(self.sums, below, None)
        if over is None or under is None or float(under) == 0:
            return math.nan
        return float(over.sum()) / float(under)

    def _per_latent(
        self, field: str, below: int | Float64[Tensor, " d_sae"]
    ) -> Float64[Tensor, " d_sae"]:
        sums = getattr(self.sums, field, None)
        if sums is None:
            return torch.full_like(self.firings, math.nan, dtype=torch.float64)
        below = torch.as_tensor(below, dtype=torch.float64)
        return torch.where(below == 0, math.nan, sums.cpu().double() / below)
