"""The losses and their exact gradients through SparseCodes: one matrix product where dense needs 8.

The gate decides everything. f, relu(pi_gate) and the gradients at both pre-activations are zero
wherever pi_gate <= 0, so after one dense product for the encoder all else costs
O(active entries * d_in). No matrix of batch x d_sae exists at any time. Thresholds and ranks decide
as gates do: `sparse_jumprelu.py`, `sparse_topk.py`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE, Aux
from gsae_core.sae.jumprelu import JumpReluSAE, in_window
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import (
    ByLatent,
    Products,
    SparseCodes,
    Wanted,
    by_latent,
    codes_of,
    gates,
    kept_codes,
    largest_products,
    numpy,
    products_above,
    screened_products_above,
    thresholds,
)
from gsae_core.sae.sparse.gradients import (
    StepSums,
    check_by_hand,
    gain,
    l1_weights,
    leave_gradients,
    leave_plain_gradients,
    loss_parts,
    stats_from_rows,
    threshold_gradient,
)
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE
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
    over_rows(d_sae, lambda first, last: loops.sum_rows(first, last, *arrays, add_to is not None))
    return out


def encoder_sums(
    entries: ByLatent, weight: Float[Tensor, " nnz"], xc: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "d_in d_sae"]:
    """Return the transpose of `weight_sums`: gradients lie as their parameters do."""
    d_sae = entries.offsets.numel() - 1
    out = xc.new_empty(xc.shape[1], d_sae)
    arrays = tuple(numpy(each) for each in (*entries, weight, xc, out))
    over_rows(d_sae, lambda first, last: loops.sum_rows_into_columns(first, last, *arrays))
    return out


def per_latent(
    entries: ByLatent, value: Float[Tensor, " nnz"] | Bool[Tensor, " nnz"]
) -> Float[Tensor, " d_sae"] | Int64[Tensor, " d_sae"]:
    """Return each latent's sum of `value`; a count where it is of truth values."""
    kind = torch.int64 if value.dtype == torch.bool else value.dtype
    out = torch.empty(entries.offsets.numel() - 1, dtype=kind)
    loops.sum_entries(entries.offsets.numpy(), entries.order.numpy(), numpy(value), out.numpy())
    return out


@torch.no_grad()
def sparse_jumprelu_step(
    sae: JumpReluSAE, x: Float[Tensor, "batch d_in"], *, l0_slope: float, screened: bool
) -> StepResult:
    """Leave the gradients of `losses.jumprelu_loss` in `.grad`, and return terms and statistics.

    With e = x_hat - x and df_i = <2e/B, W_dec_i>, sums over the batch:

        dz     = df where z > theta                         to W_enc and b_enc
        dtheta = -(theta df + lambda / B) / eps where |z - theta| < eps / 2

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations of the right width, contiguous.
        l0_slope: lambda / B.
        screened: whether to look for entries in bfloat16 first.
    """
    xc = x - sae.b_dec
    found = find(xc, *thresholds(sae, below=sae.eps / 2), screened=screened)
    offsets, latent, h = found.products
    z, theta = h + sae.b_enc.take(latent), sae.threshold.take(latent)
    fires, near = z > theta, in_window(z, theta, sae.eps)
    codes = SparseCodes(offsets, latent, gate=z, magnitude=z * fires)
    entries = by_latent(codes, sae.d_sae)
    decoded = decode(codes, W_dec=sae.W_dec, b_dec=sae.b_dec, x=x, scale=2 / len(x))

    df = decoded.mag_slope
    sae.threshold.grad = threshold_gradient(
        sae,
        slope=per_latent(entries, df * near),
        n_near=per_latent(entries, near).to(x.dtype),
        l0_slope=l0_slope,
    )
    dz = df * fires
    leave_plain_gradients(
        sae,
        W_dec=weight_sums(entries, codes.magnitude, decoded.error),
        W_enc=encoder_sums(entries, dz, xc),
        b_enc=per_latent(entries, dz),
        error=decoded.error.sum(0),
    )
    return StepResult(
        loss=LossParts(
            reconstruction=decoded.total(loops.ERROR_POWER) / len(x),
            sparsity=l0_slope * fires.sum().to(x.dtype),
            auxiliary=x.new_zeros(()),
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=False,
            fired=per_latent(entries, fires),
            gate_open=None,
        ),
        n_candidates=found.n_candidates,
        n_entries=torch.tensor(latent.numel()),
    )


@torch.no_grad()
def sparse_topk_step(
    sae: TopKSAE, x: Float[Tensor, "batch d_in"], *, dead: Bool[Tensor, " d_sae"] | None
) -> StepResult:
    """Leave the gradients of `losses.topk_loss` in `.grad`, and return its terms and statistics.

    The dead latents' entries follow the batch's own as if they were those of B rows more, with
    xc for input once again and the error that the others leave for target.

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations of the right width, contiguous.
        dead: latents that have not fired for long; None leaves the auxiliary term out.
    """
    n_rows, xc = len(x), x - sae.b_dec
    wanted = [Wanted(sae.b_enc, sae.k)]
    if dead is not None and (n_dead := int(dead.sum())):
        shut = sae.b_enc.masked_fill(~dead, -torch.inf)
        wanted.append(Wanted(shut, min(sae.k_aux, n_dead)))
    kept, *spare = map(kept_codes, largest_products(xc, sae.W_enc, wanted))
    decoded = decode(kept, W_dec=sae.W_dec, b_dec=sae.b_dec, x=x, scale=2 / n_rows)
    codes, slopes, errors = kept, decoded.mag_slope, decoded.error
    auxiliary = x.new_zeros(())
    for dead_codes in spare:
        aux = decode(
            dead_codes,
            W_dec=sae.W_dec,
            b_dec=torch.zeros_like(sae.b_dec),
            x=decoded.error * (-n_rows / 2),
            scale=AUX_WEIGHT * 2 / n_rows,
        )
        auxiliary = AUX_WEIGHT * aux.total(loops.ERROR_POWER) / n_rows
        codes = _one_after_the_other(kept, dead_codes)
        slopes, errors = torch.cat([slopes, aux.mag_slope]), torch.cat([errors, aux.error])

    entries = by_latent(codes, sae.d_sae)
    leave_plain_gradients(
        sae,
        W_dec=weight_sums(entries, codes.magnitude, errors),
        W_enc=encoder_sums(entries._replace(row=entries.row % n_rows), slopes, xc),
        b_enc=per_latent(entries, slopes),
        # What the dead latents are to explain is a constant: b_dec hears of it through xc alone.
        error=decoded.error.sum(0),
    )
    return StepResult(
        loss=LossParts(
            reconstruction=decoded.total(loops.ERROR_POWER) / n_rows,
            sparsity=x.new_zeros(()),
            auxiliary=auxiliary,
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=False,
            fired=torch.bincount(kept.latent, minlength=sae.d_sae),
            gate_open=None,
        ),
        n_entries=torch.tensor(codes.latent.numel()),
    )


def _one_after_the_other(first: SparseCodes, second: SparseCodes) -> SparseCodes:
    """Return the rows of `first`, then those of `second`."""
    offsets, *entries = (torch.cat(pair) for pair in zip(first, second, strict=True))
    n_rows = first.row_offsets.numel() - 1
    rest = second.row_offsets[1:] + first.latent.numel()
    return SparseCodes(torch.cat([offsets[: n_rows + 1], rest]), *entries)


@torch.no_grad()
def sparse_step(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
    screened: bool = False,
) -> StepResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, for every architecture, recipe and auxiliary decoder of
    tied paths (arXiv:2404.16014v2, Eq. 8 for a Gated SAE, Eq. 4 for a ReLU SAE; arXiv:2407.14435,
    section 3; arXiv:2406.04093).

    Args:
        sae: on the CPU, in float32 or float64; learns later, when an optimiser reads `.grad`; its
            parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.
        screened: look for entries by a bfloat16 product first (`screened.py`); of no effect in
            float64, and on a TopK SAE, whose latents have no threshold to be screened against.

    Raises:
        InputError: if the last axis of `x` is not `d_in`, the SAE normalises every token, or its
            paths are untied.
    """
    check_by_hand(sae, x)
    x = x.contiguous()
    match sae:
        case GatedSAE() | ReluSAE():
            return _gated_step(sae, x, sparsity_coeff / len(x), screened=screened)
        case JumpReluSAE():
            return sparse_jumprelu_step(sae, x, l0_slope=sparsity_coeff / len(x), screened=screened)
        case TopKSAE():
            return sparse_topk_step(sae, x, dead=dead)
    raise TypeError(f"no sparse step is known for {type(sae).__name__}")


def _gated_step(
    sae: GatedSAE | ReluSAE, x: Float[Tensor, "batch d_in"], l1_slope: float, *, screened: bool
) -> StepResult:
    """Return `sparse_step` of an SAE with a gate, or of one whose gate is its magnitude.

    Args:
        l1_slope: lambda / B.
    """
    xc = x - sae.b_dec
    found = find(xc, *gates(sae), screened=screened)
    codes = codes_of(sae, xc, found.products)
    entries = by_latent(codes, sae.d_sae)
    decoded = decode(
        codes,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        x=x,
        scale=2 / len(x),
        aux=sae.objective.aux,
    )

    fires = codes.magnitude > 0
    dm = decoded.mag_slope.mul_(fires)
    weights = l1_weights(sae)
    dg = torch.full_like(dm, l1_slope) if weights is None else weights.take(codes.latent) * l1_slope
    if decoded.aux_slope is not None:
        dg += decoded.aux_slope

    slope = gain(sae)
    dh = dm + dg if slope is None else torch.addcmul(dg, dm, slope.take(codes.latent))
    gated = isinstance(sae, GatedSAE)
    sums = StepSums(
        W_dec=weight_sums(entries, codes.magnitude, decoded.error),
        W_gate=encoder_sums(entries, dh, xc),
        dm=per_latent(entries, dm),
        dm_m=None if slope is None else per_latent(entries, dm * codes.magnitude),
        dg=per_latent(entries, dg),
        gate=per_latent(entries, codes.gate),
        error=decoded.error.sum(0),
    )
    if decoded.aux_error is not None:
        weight_sums(entries, codes.gate, decoded.aux_error, add_to=sums.W_dec)
        sums.error += decoded.aux_error.sum(0)
    leave_gradients(sae, sums, l1_slope)

    opened = entries.offsets.diff()
    return StepResult(
        loss=loss_parts(
            sae,
            reconstruction=decoded.total(loops.ERROR_POWER) / len(x),
            auxiliary=decoded.total(loops.AUX_ERROR_POWER) / len(x),
            gate=sums.gate,
            l1_slope=l1_slope,
        ),
        stats=stats_from_rows(
            x=x,
            row_sums=decoded.row_sums,
            aux=decoded.aux_slope is not None,
            fired=per_latent(entries, fires) if gated else opened,
            gate_open=opened if gated else None,
        ),
        n_candidates=found.n_candidates,
    )
