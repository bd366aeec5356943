"""A batch beside its reconstruction: what shrinkage and FVU are sums of."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.base import SAE
from gsae_core.sae.codes import SparseCodes, weighted_sums
from gsae_core.sae.metrics import sum_dtype
from gsae_core.threads import over_rows


class Compared(NamedTuple):
    """A batch beside its reconstruction."""

    toward: Float[np.ndarray, " nnz"]
    """<u - u_hat, W_dec_i> of each active entry; mostly u is x: see `SAE.normalised`."""
    x_sum: Float64[np.ndarray, " d_in"]
    sums: Float64[np.ndarray, " sums"]


def compare(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> Compared:
    """Return how far reconstructions are from their activations, along each active entry."""
    if x.device.type != "cpu" or sae.input_norm is not None:
        return _compare_elsewhere(sae, x, codes)
    offsets, latent, f, W, b, rows = (
        each.detach().contiguous().numpy()
        for each in (codes.row_offsets, codes.latent, codes.magnitude, sae.W_dec, sae.b_dec, x)
    )
    error, toward = np.empty_like(rows), np.empty_like(f)
    sums, x_sum = np.zeros((len(rows), loops.N_ROW_SUMS)), np.zeros(rows.shape[1])
    none, scale = np.empty((0, 0), rows.dtype), rows.dtype.type(-1)

    def decode(first: int, last: int) -> None:
        entries = (first, last, offsets, latent, f, f, W, b, rows, scale, False)
        loops.decode_rows(*entries, error, none, toward, toward, sums)

    over_rows(len(rows), decode)
    loops.sum_columns(rows, x_sum)
    kept = [loops.X_POWER, loops.X_HAT_POWER, loops.X_DOT_X_HAT, loops.ERROR_POWER]
    return Compared(toward, x_sum, sums[:, kept].sum(0))


def _compare_elsewhere(sae: SAE, x: Float[Tensor, "rows d_in"], codes: SparseCodes) -> Compared:
    seen = sae.normalised(x)
    with torch.enable_grad():
        f = codes.magnitude.detach().requires_grad_()
        decoded = weighted_sums(sae.W_dec.detach(), codes.latent, f, codes.row_offsets)
    u_hat = decoded.detach() + sae.b_dec
    # The product's derivative to its weights is the sampled product <., W_dec_i>.
    (toward,) = torch.autograd.grad(decoded, f, seen.u - u_hat)
    x_hat = seen.undo(u_hat)
    dtype = sum_dtype(x.device)
    pairs = [(x, x), (x_hat, x_hat), (x, x_hat), (x - x_hat, x - x_hat)]
    sums = torch.stack([(a * b).sum(1).to(dtype).sum() for a, b in pairs])
    x_sum = x.to(dtype).sum(0)
    return Compared(toward.cpu().numpy(), *(each.double().cpu().numpy() for each in (x_sum, sums)))
