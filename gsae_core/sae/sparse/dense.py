"""The losses and their exact gradients by hand, for batches in which much of the dictionary fires.

Seven matrix products (one shared encoder, two decoders, two gradients at the latents, two at the
weights) where autograd runs eight, and rows in blocks that stay in cache, so that neither the
latents nor their gradients ever exist for a whole batch. Five without a gate: `dense_plain.py`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE, in_window
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import stats_from_counts
from gsae_core.sae.sparse.codes import chunk_rows
from gsae_core.sae.sparse.gradients import (
    StepSums,
    gain,
    l1_weights,
    leave_gradients,
    leave_plain_gradients,
    loss_parts,
    squared_norm,
    threshold_gradient,
)
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE, dead_latents_alone, largest


@torch.no_grad()
def plain_dense_step(
    sae: JumpReluSAE | TopKSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    l0_slope: float,
    dead: Bool[Tensor, " d_sae"] | None,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations of the right width.
        l0_slope: lambda / B, for a JumpReLU SAE.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.
    """
    batch = _JumpReluBatch(sae, x) if isinstance(sae, JumpReluSAE) else _TopKBatch(sae, x, dead)
    rows = chunk_rows(sae.d_sae)
    for start in range(0, len(x), rows):
        batch.add(slice(start, start + rows))
    leave_plain_gradients(
        sae, W_dec=batch.W_dec, W_enc=batch.W_enc, b_enc=batch.dz, error=batch.error
    )
    sparsity = auxiliary = x.new_zeros(())
    if isinstance(batch, _JumpReluBatch):
        batch.sae.threshold.grad = threshold_gradient(
            batch.sae, slope=batch.near_slope, n_near=batch.n_near, l0_slope=l0_slope
        )
        sparsity = l0_slope * batch.fired.sum()
    else:
        # Gathered as |2 w r / B|^2 with weight w: B / 4w of their sum is w times the mean of |r|^2.
        auxiliary = batch.auxiliary * (len(x) / (4 * AUX_WEIGHT))
    return StepResult(
        loss=LossParts(
            reconstruction=batch.reconstruction * (len(x) / 4),
            sparsity=sparsity,
            auxiliary=auxiliary,
        ),
        stats=stats_from_counts(
            x=x, x_hat=batch.x_hat, x_hat_gate=None, fired=batch.fired.long(), gate_open=None
        ),
        n_entries=batch.n_entries,
    )


class _Batch:
    """A batch on its way through the loss, a block of rows at a time; sums grow in place."""

    def __init__(self, sae: JumpReluSAE | TopKSAE, x: Float[Tensor, "batch d_in"]) -> None:
        self.x, self._sae, self._scale = x, sae, 2 / len(x)
        self.x_hat = torch.empty_like(x)
        self.reconstruction = x.new_zeros(())
        self.W_dec, self.W_enc = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_enc)
        self.error = x.new_zeros(sae.d_in)
        # Counted in floating point, where a column sum is one vectorised pass; exact to 2^24 rows.
        self.dz: Tensor = x.new_zeros(sae.d_sae)
        self.fired: Tensor = x.new_zeros(sae.d_sae)
        self.n_entries = 0

    def encode(self, rows: slice) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_sae"]]:
        """Return the centred input and z."""
        xc = self.x[rows] - self._sae.b_dec
        return xc, (xc @ self._sae.W_enc).add_(self._sae.b_enc)

    def decode(
        self, f: Float[Tensor, "rows d_sae"], rows: slice
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_sae"]]:
        """Return the gradients at x_hat and at f, and add what they are to the dictionary."""
        x_hat = torch.addmm(self._sae.b_dec, f, self._sae.W_dec)
        self.x_hat[rows] = x_hat
        error = x_hat.sub_(self.x[rows]).mul_(self._scale)
        self.reconstruction += squared_norm(error)
        self.error += error.sum(0)
        self.W_dec.addmm_(f.T, error)
        return error, error @ self._sae.W_dec.T

    def hear(self, xc: Float[Tensor, "rows d_in"], dz: Float[Tensor, "rows d_sae"]) -> None:
        """Add what the gradient at z is to the encoder."""
        self.dz += dz.sum(0)
        self.W_enc.addmm_(xc.T, dz)


class _JumpReluBatch(_Batch):
    def __init__(self, sae: JumpReluSAE, x: Float[Tensor, "batch d_in"]) -> None:
        super().__init__(sae, x)
        self.sae, self._theta = sae, sae.threshold
        self.near_slope, self.n_near = x.new_zeros(sae.d_sae), x.new_zeros(sae.d_sae)

    def add(self, rows: slice) -> None:
        """Add the block `rows` to the sums."""
        xc, z = self.encode(rows)
        fires, near = z > self._theta, in_window(z, self._theta, self.sae.eps)
        self.n_entries += int((fires | near).sum())
        self.fired += fires.to(z.dtype).sum(0)
        self.n_near += near.to(z.dtype).sum(0)
        _, df = self.decode(torch.where(fires, z, 0.0), rows)
        self.near_slope += (df * near).sum(0)
        self.hear(xc, df.mul_(fires))


class _TopKBatch(_Batch):
    def __init__(
        self, sae: TopKSAE, x: Float[Tensor, "batch d_in"], dead: Bool[Tensor, " d_sae"] | None
    ) -> None:
        super().__init__(sae, x)
        self.sae, self._dead = sae, dead
        self.auxiliary = x.new_zeros(())

    def add(self, rows: slice) -> None:
        """Add the block `rows` to the sums."""
        xc, z = self.encode(rows)
        f = largest(z, k=self.sae.k)
        fires = f.sign()
        self.fired += fires.sum(0)
        self.n_entries += int(f.count_nonzero())
        error, dz = self.decode(f, rows)
        dz.mul_(fires)
        spare = None if self._dead is None else dead_latents_alone(self.sae, z, self._dead)
        if spare is not None:
            self.n_entries += int(spare.count_nonzero())
            dz += self._explain(spare, error)
        self.hear(xc, dz)

    def _explain(
        self, spare: Float[Tensor, "rows d_sae"], error: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_sae"]:
        """Return the gradient at z of what dead latents leave of e, and add the dictionary's."""
        scale = AUX_WEIGHT * self._scale
        # scale (e_hat - e), where e = x - x_hat and `error` = 2 (x_hat - x) / B.
        left = (spare @ self.sae.W_dec).mul_(scale).add_(error, alpha=AUX_WEIGHT)
        self.auxiliary += squared_norm(left)
        self.W_dec.addmm_(spare.T, left)
        return (left @ self.sae.W_dec.T).mul_(spare.sign())


@torch.no_grad()
def manual_dense_step(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, without autograd, for every architecture, recipe, tie and
    auxiliary decoder.

    Args:
        sae: learns later, when an optimiser reads `.grad`; its parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.

    Raises:
        InputError: if the last axis of `x` is not `d_in`, or the SAE normalises every token.
    """
    sae.check_width(x)
    sae.check_trains()
    match sae:
        case GatedSAE() | ReluSAE():
            return _gated_step(sae, x, sparsity_coeff)
        case JumpReluSAE() | TopKSAE():
            return plain_dense_step(sae, x, l0_slope=sparsity_coeff / len(x), dead=dead)
    raise TypeError(f"no dense step by hand is known for {type(sae).__name__}")


def _gated_step(
    sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"], sparsity_coeff: float
) -> StepResult:
    batch = _L1Batch(sae, x, sparsity_coeff)
    rows = chunk_rows(sae.d_sae)
    for start in range(0, len(x), rows):
        batch.add(slice(start, start + rows))
    leave_gradients(sae, batch.sums, batch.l1_slope)
    gated = isinstance(sae, GatedSAE)
    return StepResult(
        loss=loss_parts(
            sae,
            # Gathered as |2e/B|^2: B/4 of their sum is the mean of |e|^2.
            reconstruction=batch.reconstruction * (len(x) / 4),
            auxiliary=batch.auxiliary * (len(x) / 4),
            gate=batch.sums.gate,
            l1_slope=batch.l1_slope,
        ),
        stats=stats_from_counts(
            x=x,
            x_hat=batch.x_hat,
            x_hat_gate=batch.x_hat_aux,
            fired=batch.fired.long(),
            gate_open=batch.gate_open.long() if gated else None,
        ),
    )


class _L1Batch:
    """A batch on its way through the loss, a block of rows at a time; sums grow in place."""

    def __init__(
        self, sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"], sparsity_coeff: float
    ) -> None:
        self.sae, self.x = sae, x
        self.gated = isinstance(sae, GatedSAE)
        self.W, self.b_gate = (
            (sae.W_gate, sae.b_gate) if isinstance(sae, GatedSAE) else (sae.W_enc, sae.b_enc)
        )
        self.W_mag = sae.W_mag if isinstance(sae, GatedSAE) else None
        self.b_mag = sae.b_mag if isinstance(sae, GatedSAE) else None
        self.gain = gain(sae)
        self.l1_slope = sparsity_coeff / len(x)
        weights = l1_weights(sae)
        self.l1_slopes = self.l1_slope if weights is None else weights * self.l1_slope
        self.scale = 2 / len(x)

        self.x_hat = torch.empty_like(x)
        self.x_hat_aux = None if sae.objective.aux == "off" else torch.empty_like(x)
        self.reconstruction, self.auxiliary = x.new_zeros(()), x.new_zeros(())
        # Counted in floating point, where a column sum is one vectorised pass; exact to 2^24 rows.
        self.fired, self.gate_open = x.new_zeros(sae.d_sae), x.new_zeros(sae.d_sae)
        self.sums = StepSums(
            W_dec=torch.zeros_like(sae.W_dec),
            W_gate=torch.zeros_like(self.W),
            W_mag=None if self.W_mag is None else torch.zeros_like(self.W_mag),
            dm=x.new_zeros(sae.d_sae),
            dm_m=None if self.gain is None else x.new_zeros(sae.d_sae),
            dg=x.new_zeros(sae.d_sae),
            gate=x.new_zeros(sae.d_sae),
            error=x.new_zeros(sae.d_in),
        )

    def add(self, rows: slice) -> None:
        """Add the block `rows` to the sums."""
        xc = self.x[rows] - self.sae.b_dec
        h = xc @ self.W
        g = torch.relu_(h + self.b_gate)
        opened = g.sign()
        self.gate_open += opened.sum(0)
        self.sums.gate += g.sum(0)

        m = self._magnitude(h, g, opened, xc)
        fires = m.sign() if self.gated else opened
        self.fired += fires.sum(0)
        error = self._error(m, rows, into=self.x_hat)
        self.reconstruction += squared_norm(error)
        self.sums.error += error.sum(0)
        self.sums.W_dec.addmm_(m.T, error)
        dm = (error @ self.sae.W_dec.T).mul_(fires)
        self.sums.dm += dm.sum(0)
        if self.sums.dm_m is not None:
            self.sums.dm_m += m.mul_(dm).sum(0)

        dg = self._gate_slope(g, opened, rows)
        self.sums.dg += dg.sum(0)
        if self.sums.W_mag is not None:
            self.sums.W_mag.addmm_(xc.T, dm)
        else:
            dg.add_(dm if self.gain is None else dm.mul_(self.gain))
        self.sums.W_gate.addmm_(xc.T, dg)

    def _magnitude(
        self,
        h: Float[Tensor, "rows d_sae"],
        g: Float[Tensor, "rows d_sae"],
        opened: Float[Tensor, "rows d_sae"],
        xc: Float[Tensor, "rows d_in"],
    ) -> Float[Tensor, "rows d_sae"]:
        """Return f; `h` is used up."""
        if self.b_mag is None:
            return g
        if self.W_mag is not None:
            torch.mm(xc, self.W_mag, out=h)
        elif self.gain is not None:
            h.mul_(self.gain)
        return torch.relu_(h.add_(self.b_mag)).mul_(opened)

    def _error(
        self,
        latents: Float[Tensor, "rows d_sae"],
        rows: slice,
        *,
        into: Float[Tensor, "batch d_in"],
    ) -> Float[Tensor, "rows d_in"]:
        """Return 2 (x_hat - x) / B, and leave x_hat in `into`."""
        x_hat = torch.addmm(self.sae.b_dec, latents, self.sae.W_dec)
        into[rows] = x_hat
        return x_hat.sub_(self.x[rows]).mul_(self.scale)

    def _gate_slope(
        self,
        g: Float[Tensor, "rows d_sae"],
        opened: Float[Tensor, "rows d_sae"],
        rows: slice,
    ) -> Float[Tensor, "rows d_sae"]:
        """Return the gradient at pi_gate of the sparsity and auxiliary terms."""
        if self.x_hat_aux is None:
            return opened * self.l1_slopes
        error = self._error(g, rows, into=self.x_hat_aux)
        self.auxiliary += squared_norm(error)
        if self.sae.objective.aux == "unfrozen":
            self.sums.error += error.sum(0)
            self.sums.W_dec.addmm_(g.T, error)
        return (error @ self.sae.W_dec.T).add_(self.l1_slopes).mul_(opened)
