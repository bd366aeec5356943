"""The dense step by hand of JumpReLU and TopK SAEs: five matrix products, rows in blocks.

One encoder, one decoder, one gradient at the latents and two at the weights; three more for the
dead latents of a TopK SAE, where there are any.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae.gradients import leave_plain_gradients, squared_norm, threshold_gradient
from gsae_core.sae.jumprelu import JumpReluSAE, in_window
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import stats_from_counts
from gsae_core.sae.picking import chunk_rows
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
