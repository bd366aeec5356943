"""What a sparse step does with its entries: find them, decode and come back, add up by latent."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gsae_core.sae import latent_loops, loops
from gsae_core.sae.codes import ByLatent, SparseCodes
from gsae_core.sae.picking import Products, numpy, products_above
from gsae_core.sae.recipes import Aux
from gsae_core.sae.screened import screened_products_above
from gsae_core.threads import over_rows


class Found(NamedTuple):
    """Products above their thresholds, and how many candidates a screen picked them from."""

    products: Products
    n_candidates: int | None
    """None without a screen."""


class Decoded(NamedTuple):
    """Both reconstructions, there and back."""

    error: Float[Tensor, "batch d_in"]
    """scale (x_hat - x)."""
    aux_error: Float[Tensor, "batch d_in"] | None
    """scale (x_hat_aux - x), if the dictionary learns from it."""
    mag_slope: Float[Tensor, " nnz"]
    """<error, W_dec_i> on the entries."""
    aux_slope: Float[Tensor, " nnz"] | None
    """The same of the auxiliary error; None without such a term."""
    row_sums: Float64[Tensor, "batch sums"]
    """What `loops.decode_rows` adds up for the loss and the statistics."""

    def total(self, column: int) -> Float[Tensor, ""]:
        """Return one of the row sums over the whole batch, in the precision of the error."""
        return self.row_sums[:, column].sum().to(self.error.dtype)


def find(
    xc: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "d_in d_sae"],
    above: Float[Tensor, " d_sae"],
    *,
    screened: bool,
) -> Found:
    """Return the entries of xc @ W above `above`.

    Args:
        xc: centred activations.
        W: the encoder.
        above: threshold of each latent.
        screened: look by a bfloat16 product first (`screened.py`); of no effect in float64, for
            which the rounding would be too coarse a screen.
    """
    if screened and xc.dtype == torch.float32:
        return Found(*screened_products_above(xc, W, above))
    return Found(products_above(xc, W, above), None)


def decode(
    codes: SparseCodes,
    *,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    x: Float[Tensor, "batch d_in"],
    scale: float,
    aux: Aux = "off",
) -> Decoded:
    """Return the errors of the reconstructions, and what each entry would change about them.

    Args:
        codes: `magnitude` makes x_hat, and `gate` x_hat_aux.
        W_dec: the dictionary.
        b_dec: what a reconstruction without entries is.
        x: what is reconstructed; contiguous.
        scale: of the errors: 2 / B for the gradient of a mean square.
        aux: whether there is a second reconstruction, and whether the dictionary learns from it.
    """
    decoded = Decoded(
        error=torch.empty_like(x),
        aux_error=torch.empty_like(x) if aux == "unfrozen" else None,
        mag_slope=torch.empty_like(codes.magnitude),
        aux_slope=None if aux == "off" else torch.empty_like(codes.gate),
        row_sums=torch.empty(len(x), loops.N_ROW_SUMS, dtype=torch.float64),
    )
    arrays = [codes.row_offsets, codes.latent, codes.magnitude, codes.gate, W_dec, b_dec, x]
    results = [
        decoded.error,
        x[:0] if decoded.aux_error is None else decoded.aux_error,
        decoded.mag_slope,
        codes.gate[:0] if decoded.aux_slope is None else decoded.aux_slope,
        decoded.row_sums,
    ]
    inputs, outputs = map(numpy, arrays), [each.numpy() for each in results]
    arguments = (*inputs, outputs[0].dtype.type(scale), aux != "off", *outputs)
    over_rows(len(x), lambda first, last: loops.decode_rows(first, last, *arguments))
    return decoded


def weight_sums(
    entries: ByLatent,
    weight: Float[Tensor, " nnz"],
    dense: Float[Tensor, "rows d_in"],
    *,
    add_to: Float[Tensor, "d_sae d_in"] | None = None,
) -> Float[Tensor, "d_sae d_in"]:
    """Return, for each latent, the sum over its entries of weight * dense[row]."""
    d_sae = entries.offsets.numel() - 1
    out = dense.new_empty(d_sae, dense.shape[1]) if add_to is None else add_to
    arrays = tuple(numpy(each) for each in (*entries, weight, dense, out))
    over_rows(
        d_sae, lambda first, last: latent_loops.sum_rows(first, last, *arrays, add_to is not None)
    )
    return out


def encoder_sums(
    entries: ByLatent, weight: Float[Tensor, " nnz"], xc: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_in d_sae"]:
    """Return the transpose of `weight_sums`: gradients lie as their parameters do."""
    d_sae = entries.offsets.numel() - 1
    out = xc.new_empty(xc.shape[1], d_sae)
    arrays = tuple(numpy(each) for each in (*entries, weight, xc, out))
    over_rows(d_sae, lambda first, last: latent_loops.sum_rows_into_columns(first, last, *arrays))
    return out


def per_latent(
    entries: ByLatent, value: Float[Tensor, " nnz"] | Bool[Tensor, " nnz"]
) -> Float[Tensor, " d_sae"] | Int64[Tensor, " d_sae"]:
    """Return each latent's sum of `value`; a count where it is of truth values."""
    kind = torch.int64 if value.dtype == torch.bool else value.dtype
    out = torch.empty(entries.offsets.numel() - 1, dtype=kind)
    latent_loops.sum_entries(
        entries.offsets.numpy(), entries.order.numpy(), numpy(value), out.numpy()
    )
    return out
