"""Buffers, launch shapes and arguments of the Triton kernels that `kernels.py` puts in a row."""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Float64, Int32, Int64
from torch import Tensor

from gsae_core.sae import loops
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.gradients import StepSums, gain, l1_weights

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
"""How the encoder's product is rounded; sums are float32 in all four, and all else is float32.

`ieee` is float32 on ordinary cores. `tf32x3` gets about as close with three products on matrix
units. `tf32` keeps 11 bits of each factor and `bf16` 8: gates near zero may open or shut.
Triton's interpreter rounds the first three alike and cannot multiply bf16.
"""

# A tile of the encoder: rows, latents. For sm_90, 8.0 and 8.9 alike it takes 96 KiB of shared
# memory at most (all of Ada's) and the 255 registers a thread has, 16 bytes beside them at worst.
ROWS = LATENTS = 128


class Entries(NamedTuple):
    """Active entries of a batch in fixed buffers, by row and by latent; none if they overflowed.

    `latent`, `gate` and `magnitude` are those of `SparseCodes`, as 32-bit numbers and with room to
    spare at the end; `row_by_latent` and `place_by_latent` are `row` and `order` of `ByLatent`.
    """

    overflowed: Bool[Tensor, ""]
    n_open: Int64[Tensor, ""]
    row_offsets: Int32[Tensor, " rows_and_end"]
    latent: Int32[Tensor, " capacity"]
    gate: Float[Tensor, " capacity"]
    magnitude: Float[Tensor, " capacity"]
    latent_offsets: Int32[Tensor, " d_sae_and_end"]
    row_by_latent: Int32[Tensor, " capacity"]
    place_by_latent: Int32[Tensor, " capacity"]


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


def launch_encode(
    sae: GatedSAE | ReluSAE,
    xc: Float[Tensor, "batch d_in"],
    *,
    capacity: int,
    precision: str,
) -> Entries:
    """Return the active entries of a batch, from xc = x - b_dec.

    With untied paths `magnitude` is room only: `launch_decode` fills it.
    """
    from gsae_core.sae.triton_encode import encode_tiles, place_entries

    W, bias = (sae.W_gate, sae.b_gate) if isinstance(sae, GatedSAE) else (sae.W_enc, sae.b_enc)
    bf16 = precision == "bf16"
    n_rows, d_sae = len(xc), sae.d_sae
    row_tiles, latent_tiles = -(-n_rows // ROWS), -(-d_sae // LATENTS)
    n_tiles = row_tiles * latent_tiles
    n_open = torch.zeros((), dtype=torch.int64, device=xc.device)
    tile_begin, tile_count = _ints(n_tiles, xc), _ints(n_tiles, xc)
    by_row, by_latent = _cells(n_rows * latent_tiles, xc), _cells(d_sae * row_tiles, xc)
    product, local = xc.new_empty(capacity), _ints(capacity, xc)
    # Launch options are no parameters of a kernel, hence Any.
    cast(Any, encode_tiles)[(n_tiles,)](
        xc.bfloat16() if bf16 else xc,
        W.bfloat16() if bf16 else W,
        bias,
        n_open,
        tile_begin,
        tile_count,
        by_row[1:],
        by_latent[1:],
        product,
        local,
        n_rows,
        sae.d_in,
        d_sae,
        capacity,
        PRECISION="ieee" if bf16 else precision,  # says nothing about bf16 factors
        ROWS=ROWS,
        LATENTS=LATENTS,
        DEPTH=64 if bf16 else 32,
        GROUP=8,
        num_warps=8,
        num_stages=3,
    )

    overflowed = n_open > capacity
    fits = (~overflowed).int()
    row_cells, latent_cells = _prefix_sums(by_row), _prefix_sums(by_latent)
    tied = isinstance(sae, GatedSAE) and sae.W_mag is None
    gate = xc.new_empty(capacity)
    entries = Entries(
        overflowed=overflowed,
        n_open=n_open,
        # Entries were dropped upon overflow. With none left, later kernels read nothing stale.
        row_offsets=row_cells[::latent_tiles] * fits,
        latent=_ints(capacity, xc),
        gate=gate,
        magnitude=xc.new_empty(capacity) if isinstance(sae, GatedSAE) else gate,
        latent_offsets=latent_cells[::row_tiles] * fits,
        row_by_latent=_ints(capacity, xc),
        place_by_latent=_ints(capacity, xc),
    )
    slope = gain(sae)
    cast(Any, place_entries)[(n_tiles,)](
        product,
        local,
        tile_begin,
        tile_count,
        row_cells,
        latent_cells,
        fits,
        bias,
        slope,
        sae.b_mag if isinstance(sae, GatedSAE) else None,
        entries.latent,
        gate,
        entries.magnitude,
        entries.row_by_latent,
        entries.place_by_latent,
        row_tiles,
        latent_tiles,
        TIED=tied,
        GAIN=slope is not None,
        ROWS=ROWS,
        LATENTS=LATENTS,
        ENTRIES=64,
        num_warps=4,
    )
    return entries


def launch_decode(
    sae: GatedSAE | ReluSAE,
    entries: Entries,
    *,
    x: Float[Tensor, "batch d_in"],
    xc: Float[Tensor, "batch d_in"],
) -> Decoded:
    """Return what both reconstructions leave behind; None where no term asks for it."""
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
    cast(Any, decode_rows)[(len(x),)](
        x,
        xc,
        sae.W_dec,
        sae.b_dec,
        # Turned, for entries read columns of it. A dense product for all pairs would cost more.
        None if W_mag is None else W_mag.T.contiguous(),
        sae.b_mag if isinstance(sae, GatedSAE) else None,
        entries.row_offsets,
        entries.latent,
        entries.gate,
        entries.magnitude,
        *decoded,
        sae.d_in,
        2 / len(x),
        AUX=aux != "off",
        UNFROZEN=aux == "unfrozen",
        UNTIED=W_mag is not None,
        WIDTH=width,
        ENTRIES=_entries_at_once(width),
        num_warps=_warps(width),
    )
    return decoded


def launch_sums(
    sae: GatedSAE | ReluSAE,
    entries: Entries,
    *,
    decoded: Decoded,
    xc: Float[Tensor, "batch d_in"],
    l1_slope: float,
) -> LatentSums:
    """Return what the batch leaves behind for `leave_gradients`, and how often latents fired."""
    from gsae_core.sae.triton_gradients import sum_latents

    untied = isinstance(sae, GatedSAE) and sae.W_mag is not None
    slope, weights = gain(sae), l1_weights(sae)
    W_dec, W_gate_T = torch.empty_like(sae.W_dec), torch.empty_like(sae.W_dec)
    W_mag_T = torch.empty_like(sae.W_dec) if untied else None
    dm, dm_m, dg, gate = xc.new_empty(4, sae.d_sae)
    fired, gate_open = torch.empty(2, sae.d_sae, dtype=torch.int64, device=xc.device)
    # Wide rows are shared out over programs, which also shortens the longest of them.
    width = min(power_of_two(max(sae.d_in, 16)), 512)
    cast(Any, sum_latents)[(sae.d_sae, -(-sae.d_in // width))](
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
        slope,
        weights,
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


def _ints(n: int, like: Tensor) -> Int32[Tensor, " n"]:
    return torch.empty(n, dtype=torch.int32, device=like.device)


def _cells(n: int, like: Tensor) -> Int32[Tensor, " n_and_zero"]:
    """Return room for n counts behind a zero, whose prefix sums are where each begins, and all."""
    counts = _ints(n + 1, like)
    counts[:1].zero_()
    return counts


def _prefix_sums(counts: Int32[Tensor, " n"]) -> Int32[Tensor, " n"]:
    return torch.cumsum(counts, 0, dtype=torch.int32)


def _entries_at_once(width: int) -> int:
    """Return how many rows of `width` numbers to have under way: enough to hide their latency."""
    return min(16, max(1, (4096 if width <= 512 else 8192) // width))


def _warps(width: int) -> int:
    return 4 if width <= 512 else 8 if width <= 8192 else 16


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()
