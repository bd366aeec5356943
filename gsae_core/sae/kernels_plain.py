"""Steps by the kernels of SAEs with one encoder path and no gate: JumpReLU, TopK.

`sparse_jumprelu.py` and `sparse_topk.py` do the same on a CPU and give the equations.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.gradients import leave_plain_gradients, threshold_gradient
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.launches import Entries, launch_encode
from gsae_core.sae.launches_gradients import (
    Decoded,
    LatentSums,
    launch_decode,
    launch_sums,
    launch_windows,
)
from gsae_core.sae.losses import LossParts, StepResult
from gsae_core.sae.metrics import stats_from_rows
from gsae_core.sae.picking import Wanted
from gsae_core.sae.topk import AUX_WEIGHT, TopKSAE

# Pre-activations that exist at once while a TopK SAE looks for each row's largest: 64 MiB.
PRODUCTS_AT_ONCE = 2**24


def jumprelu_step(
    sae: JumpReluSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    l0_slope: float,
    capacity: int,
    precision: str,
) -> tuple[StepResult, Entries]:
    """Return `sparse_jumprelu_step`'s result, and the entries it went through.

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations, contiguous, in the units the SAE trains in.
        l0_slope: lambda / B.
        capacity: room for entries; those in the window below a threshold count.
        precision: of the encoder's product.
    """
    xc = x - sae.b_dec
    entries = launch_encode(sae, xc, capacity=capacity, precision=precision)
    decoded = launch_decode(sae, entries, x=x, xc=xc)
    done = launch_sums(sae, entries, decoded=decoded, xc=xc, l1_slope=0.0)
    slope, n_near = launch_windows(sae, entries, decoded.mag_slope)
    sae.threshold.grad = threshold_gradient(sae, slope=slope, n_near=n_near, l0_slope=l0_slope)
    sparsity = l0_slope * done.fired.sum().to(x.dtype)
    return _leave(sae, x, decoded, done, sparsity=sparsity, auxiliary=x.new_zeros(())), entries


def topk_step(
    sae: TopKSAE, x: Float[Tensor, "batch d_in"], *, dead: Bool[Tensor, " d_sae"] | None
) -> tuple[StepResult, Entries]:
    """Return `sparse_topk_step`'s result, and the entries of each row's k largest latents.

    Where fewer latents are dead than `k_aux`, entries without a magnitude take their place: asking
    how many are dead would wait for the device.

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations, contiguous, in the units the SAE trains in.
        dead: latents that have not fired for long; None leaves the auxiliary term out.
    """
    xc = x - sae.b_dec
    wanted = [Wanted(sae.b_enc, sae.k)]
    if dead is not None:
        shut = sae.b_enc.masked_fill(~dead, -torch.inf)
        wanted.append(Wanted(shut, min(sae.k_aux, sae.d_sae)))
    kept, *spare = _largest(xc, sae.W_enc, wanted)
    decoded = launch_decode(sae, kept, x=x, xc=xc)
    done = launch_sums(sae, kept, decoded=decoded, xc=xc, l1_slope=0.0)
    auxiliary = x.new_zeros(())
    if dead is not None:
        aux = launch_decode(
            sae,
            spare[0],
            # What is left of the error, a constant: b_dec hears of it through xc alone.
            x=decoded.error * (-len(x) / 2),
            xc=xc,
            b_dec=torch.zeros_like(sae.b_dec),
            weight=AUX_WEIGHT,
        )
        more = launch_sums(sae, spare[0], decoded=aux, xc=xc, l1_slope=0.0).sums
        done.sums.W_dec += more.W_dec
        done.sums.W_gate += more.W_gate
        done.sums.dm += more.dm
        # Without a dead latent there is no such term, and what it would leave has no slope.
        auxiliary = torch.where(dead.any(), AUX_WEIGHT * _error_power(aux, x), auxiliary)
    return _leave(sae, x, decoded, done, sparsity=x.new_zeros(()), auxiliary=auxiliary), kept


def _leave(
    sae: JumpReluSAE | TopKSAE,
    x: Float[Tensor, "batch d_in"],
    decoded: Decoded,
    done: LatentSums,
    *,
    sparsity: Float[Tensor, ""],
    auxiliary: Float[Tensor, ""],
) -> StepResult:
    sums = done.sums
    leave_plain_gradients(sae, W_dec=sums.W_dec, W_enc=sums.W_gate, b_enc=sums.dm, error=sums.error)
    return StepResult(
        loss=LossParts(_error_power(decoded, x), sparsity=sparsity, auxiliary=auxiliary),
        stats=stats_from_rows(
            x=x, row_sums=decoded.row_sums, aux=False, fired=done.fired, gate_open=None
        ),
    )


def _error_power(decoded: Decoded, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return the mean over the batch of the squared error."""
    return decoded.row_sums[:, loops.ERROR_POWER].sum().to(x.dtype) / len(x)


def _largest(
    xc: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_in d_sae"], wanted: Sequence[Wanted]
) -> list[Entries]:
    """Return each row's largest products, with each of the biases, as entries by row and latent.

    The product is PyTorch's, in blocks of rows. As many entries as asked for, so that none can
    overflow; one whose product is not positive has magnitude 0.
    """
    n_rows, d_sae = len(xc), W.shape[1]
    at_once = max(1, PRODUCTS_AT_ONCE // d_sae)
    latent = [torch.empty(n_rows, k, dtype=torch.int32, device=xc.device) for _, k in wanted]
    height = [xc.new_empty(n_rows, k) for _, k in wanted]
    for start in range(0, n_rows, at_once):
        rows = slice(start, start + at_once)
        h = xc[rows] @ W
        for (bias, k), where, value in zip(wanted, latent, height, strict=True):
            top = (h + bias).topk(k, dim=1, sorted=False)
            ascending = top.indices.sort(dim=1)
            where[rows] = ascending.values
            value[rows] = top.values.gather(1, ascending.indices).relu_()
    return [_entries(*each, d_sae=d_sae) for each in zip(latent, height, strict=True)]


def _entries(
    latent: Int32[Tensor, "batch k"], height: Float[Tensor, "batch k"], *, d_sae: int
) -> Entries:
    """Return the entries of a batch in which each row has as many."""
    n_rows, k = latent.shape
    device = latent.device
    turned = latent.flatten().sort(stable=True)
    every = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
    return Entries(
        overflowed=torch.zeros((), dtype=torch.bool, device=device),
        n_open=torch.full((), n_rows * k, dtype=torch.int64, device=device),
        row_offsets=torch.arange(n_rows + 1, dtype=torch.int32, device=device) * k,
        latent=latent.flatten(),
        gate=height.flatten(),
        magnitude=height.flatten(),
        latent_offsets=torch.searchsorted(turned.values, every, out_int32=True),
        row_by_latent=(turned.indices // k).int(),
        place_by_latent=turned.indices.int(),
    )
