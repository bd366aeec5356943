"""The sparse step of a TopK SAE: each row's k largest latents, and the largest dead ones.

Which of two equal latents is kept is a choice: here the lower one, always. `torch.topk`, which the
dense reference uses, leaves it open.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.codes import SparseCodes, by_latent, kept_codes
from gsae_core.sae.gradients import leave_plain_gradients
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import stats_from_rows
from gsae_core.sae.passes import decode, encoder_sums, per_latent, weight_sums
from gsae_core.sae.picking import Wanted, largest_products
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE


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
        n_entries=codes.latent.numel(),
    )


def _one_after_the_other(first: SparseCodes, second: SparseCodes) -> SparseCodes:
    """Return the rows of `first`, then those of `second`."""
    offsets, *entries = (torch.cat(pair) for pair in zip(first, second, strict=True))
    n_rows = first.row_offsets.numel() - 1
    rest = second.row_offsets[1:] + first.latent.numel()
    return SparseCodes(torch.cat([offsets[: n_rows + 1], rest]), *entries)
