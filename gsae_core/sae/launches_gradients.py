"""From entries to gradients: buffers, launch shapes and arguments of the other kernels."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, JumpReluSAE, ReluSAE
from gsae_core.sae.gradients import StepSums, gain, l1_weights
from gsae_core.sae.launches import Entries, launch, power_of_two, rows_in_order


class Decoded(NamedTuple):
    """Both reconstructions, there and back: fields of the same name as in `sparse.py`."""

    error: Float[Tensor, "batch d_in"]
    aux_error: Float[Tensor, "batch d_in"] | None
    mag_slope: Float[Tensor, " capacity"]
    aux_slope: Float[Tensor, " capacity"] | None
    row_sums: Float64[Tensor, "batch sums"]


class LatentSums(NamedTuple):
    """What one walk over the latents leaves."""

    sums: StepSums
    fired: Int64[Tensor, " d_sae"]
    gate_open: Int64[Tensor, " d_sae"]


def launch_decode(
    sae: BuiltinSAE,
    entries: Entries,
    *,
    x: Float[Tensor, "batch d_in"],
    xc: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"] | None = None,
    weight: float = 1.0,
) -> Decoded:
    """Return what both reconstructions leave behind; None where no term asks for it.

    Args:
        sae: whose dictionary decodes.
        entries: what to decode.
        x: what is to be reconstructed.
        xc: the encoder's input; an untied magnitude path reads it.
        b_dec: in place of the SAE's own.
        weight: of the squared error in the loss.
    """
    from gsae_core.sae.triton_gradients import decode_rows

    W_mag = sae.W_mag if isinstance(sae, GatedSAE) else None
    aux = sae.objective.aux
    decoded = Decoded(
        error=torch.empty_like(x),
        aux_error=torch.empty_like(x) if aux == "unfrozen" else None,
        mag_slope=torch.empty_like(entries.gate),
        aux_slope=None if aux == "off" else torch.empty_like(entries.gate),
        # Zeros, for nothing is written about an auxiliary term that there is not.
        row_sums=torch.zeros(len(x), loops.N_ROW_SUMS, dtype=torch.float64, device=x.device),
    )
    width = power_of_two(max(sae.d_in, 16))
    launch(
        decode_rows,
        (len(x),),
        x,
        xc,
        rows_in_order(sae.W_dec),
        rows_in_order(sae.b_dec if b_dec is None else b_dec),
        # Turned, for entries read columns of it. A dense product for all pairs would cost more.
        None if W_mag is None else rows_in_order(W_mag.T),
        rows_in_order(sae.b_mag) if isinstance(sae, GatedSAE) else None,
        entries.row_offsets,
        entries.latent,
        entries.gate,
        entries.magnitude,
        *decoded,
        sae.d_in,
        weight * 2 / len(x),
        AUX=aux != "off",
        UNFROZEN=aux == "unfrozen",
        UNTIED=W_mag is not None,
        WIDTH=width,
        ENTRIES=_entries_at_once(width),
        num_warps=_warps(width),
    )
    return decoded


def launch_sums(
    sae: BuiltinSAE,
    entries: Entries,
    *,
    decoded: Decoded,
    xc: Float[Tensor, "batch d_in"],
    l1_slope: float,
) -> LatentSums:
    """Return what the batch leaves behind for `leave_gradients`, and how often latents fired.

    With `l1_slope` 0, of an SAE without an L1 term, `sums.W_gate` is the encoder's gradient.
    """
    from gsae_core.sae.triton_gradients import sum_latents

    gated = isinstance(sae, GatedSAE)
    untied = gated and sae.W_mag is not None
    slope = gain(sae) if gated else None
    weights = l1_weights(sae) if isinstance(sae, GatedSAE | ReluSAE) else None
    # Not `empty_like`, which lays them out as the dictionary is.
    W_dec, W_gate_T = (xc.new_empty(sae.d_sae, sae.d_in) for _ in range(2))
    W_mag_T = torch.empty_like(W_dec) if untied else None
    dm, dm_m, dg, gate = xc.new_empty(4, sae.d_sae)
    fired, gate_open = torch.empty(2, sae.d_sae, dtype=torch.int64, device=xc.device)
    # Wide rows are shared out over programs, which also shortens the longest of them.
    width = min(power_of_two(max(sae.d_in, 16)), 512)
    launch(
        sum_latents,
        (sae.d_sae, -(-sae.d_in // width)),
        xc,
        decoded.error,
        decoded.aux_error,
        entries.latent_offsets,
        entries.row_by_latent,
        entries.place_by_latent,
        entries.gate,
        entries.magnitude,
        decoded.mag_slope,
        decoded.aux_slope,
        None if slope is None else rows_in_order(slope),
        None if weights is None else rows_in_order(weights),
        W_dec,
        W_gate_T,
        W_mag_T,
        dm,
        dm_m,
        dg,
        gate,
        fired,
        gate_open,
        sae.d_in,
        l1_slope,
        AUX=decoded.aux_slope is not None,
        UNFROZEN=decoded.aux_error is not None,
        UNTIED=untied,
        GAIN=slope is not None,
        WEIGHTED=weights is not None,
        WIDTH=width,
        ENTRIES=_entries_at_once(width),
        num_warps=_warps(width),
    )
    error = decoded.error.sum(0)
    if decoded.aux_error is not None:
        error += decoded.aux_error.sum(0)
    sums = StepSums(
        W_dec=W_dec,
        # A program that wrote its column of W_gate would touch a cache line for each number.
        W_gate=W_gate_T.T.contiguous(),
        W_mag=None if W_mag_T is None else W_mag_T.T.contiguous(),
        dm=dm,
        dm_m=None if slope is None else dm_m,
        dg=dg,
        gate=gate,
        error=error,
    )
    return LatentSums(sums=sums, fired=fired, gate_open=gate_open)


def launch_windows(
    sae: JumpReluSAE, entries: Entries, slope: Float[Tensor, " capacity"]
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Return each latent's sum of `slope` over the inputs in its window, and how many those are."""
    from gsae_core.sae.triton_gradients import sum_windows

    slope_sum, n_near = slope.new_empty(2, sae.d_sae)
    launch(
        sum_windows,
        (sae.d_sae,),
        entries.latent_offsets,
        entries.place_by_latent,
        entries.gate,
        slope,
        rows_in_order(sae.threshold),
        slope_sum,
        n_near,
        sae.eps / 2,
        ENTRIES=64,
        num_warps=2,
    )
    return slope_sum, n_near


def _entries_at_once(width: int) -> int:
    """Return how many rows of `width` numbers to have under way: enough to hide their latency."""
    return min(16, max(1, (4096 if width <= 512 else 8192) // width))


def _warps(width: int) -> int:
    return 4 if width <= 512 else 8 if width <= 8192 else 16
