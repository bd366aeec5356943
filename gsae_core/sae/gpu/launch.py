"""A step on a GPU: buffers, launch shapes and arguments of the kernels, never waiting for them.

Kernels find a tensor's numbers by its address, as if its rows followed each other: `launch` lets no
other tensor through. What the caller owns is read through `rows_in_order`.
"""

from typing import Any

import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import Mask, PerEntry, PerLatent, Rows
from gsae_core.sae.sparse.codes import ByLatent, SparseCodes, gates
from gsae_core.sae.sparse.dense import StepSums, gain, l1_weights
from gsae_core.sae.sparse.step import Active, Decoded, Loops, undecoded

# Pre-activations that exist at once while a TopK SAE looks for each row's largest: 64 MiB.
PRODUCTS_AT_ONCE = 2**24

# A tile of the encoder: rows, latents. For sm_90, 8.0 and 8.9 alike it takes 96 KiB of shared
# memory at most (all of Ada's) and the 255 registers a thread has, 16 bytes beside them at worst.
ROWS = LATENTS = 128


class LaunchError(Exception):
    """A kernel that cannot be compiled or does not fit into this GPU; the text is a sentence."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch one of `kernels.py`, on so many programs along each axis.

    Raises:
        LaunchError: if the kernel cannot be compiled here, needs more than this GPU has, or would
            read other numbers than those of its tensors. Any other error, such as running out of
            memory, is raised as it is.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    tensors = [each for each in args if isinstance(each, Tensor)]
    devices = {each.device for each in tensors}
    if len(devices) > 1 or not all(each.is_contiguous() for each in tensors):
        laid = ", ".join(f"{each.device} {tuple(each.stride())}" for each in tensors)
        raise LaunchError(f"expected tensors of one device, rows in order, got {laid}")
    try:
        kernel[grid](*args, **options)
    except (OutOfResources, PTXASError, CompilationError) as error:
        raise LaunchError(_why(error)) from error
    except RuntimeError as error:
        # What a compiler pass fails with; an error of the device's has another text.
        if "PassManager::run failed" not in str(error):
            raise
        raise LaunchError(_why(error)) from error


def _why(error: Exception) -> str:
    # The text of a CompilationError begins with the source, its message says what is wrong with it.
    said = (
        str(getattr(error, "error_message", None) or error).strip().partition("\n")[0].rstrip(".")
    )
    return f"expected Triton to launch a kernel, got {type(error).__name__}: {said[:300]}"


def rows_in_order(tensor: Tensor) -> Tensor:
    """Return the tensor's numbers as kernels read them; a copy where they lie in another order."""
    return tensor.detach().contiguous()


class Kernels(Loops):
    """The Triton kernels; nothing here waits for the device.

    How many entries a batch has is known on the device alone, so buffers have the caller's
    capacity. It is one number for the whole batch, because rows and tiles vary far more than their
    sum does: a tile claims a stretch of the buffer with one atomic addition and leaves its counts
    per row and per latent; prefix sums over those counts say where each entry belongs. That makes
    the order exact for any order in which tiles finish, and costs no sort. A batch with more
    entries than the capacity leaves empty sums and a flag.
    """

    def __init__(self, *, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def active(self, sae: GatedSAE | ReluSAE | JumpReluSAE, xc: Rows) -> Active:
        from gsae_core.sae.gpu.kernels import encode_tiles, place_entries

        jumps = isinstance(sae, JumpReluSAE)
        gated = isinstance(sae, GatedSAE)
        W, above = gates(sae, below=sae.eps / 2 if jumps else 0.0)
        n_rows, d_sae, capacity = len(xc), sae.d_sae, self._capacity
        row_tiles, latent_tiles = -(-n_rows // ROWS), -(-d_sae // LATENTS)
        n_tiles = row_tiles * latent_tiles
        n_open = torch.zeros((), dtype=torch.int64, device=xc.device)
        tiles = _ints(n_tiles, xc), _ints(n_tiles, xc)  # where each begins, and its entries
        by_row, by_latent = _cells(n_rows * latent_tiles, xc), _cells(d_sae * row_tiles, xc)
        product, local = xc.new_empty(capacity), _ints(capacity, xc)
        launch(
            encode_tiles,
            (n_tiles,),
            xc,
            rows_in_order(W),
            rows_in_order(-above),
            n_open,
            *tiles,
            by_row[1:],
            by_latent[1:],
            product,
            local,
            n_rows,
            sae.d_in,
            d_sae,
            capacity,
            ROWS=ROWS,
            LATENTS=LATENTS,
            DEPTH=32,
            GROUP=8,
            num_warps=8,
            num_stages=3,
        )
        fits = (n_open <= capacity).int()
        row_cells, latent_cells = (
            torch.cumsum(counts, 0, dtype=torch.int32) for counts in (by_row, by_latent)
        )
        gate = xc.new_empty(capacity)
        # Entries were dropped upon overflow. With none left, later kernels read nothing stale.
        codes = SparseCodes(
            row_offsets=row_cells[::latent_tiles] * fits,
            latent=_ints(capacity, xc),
            gate=gate,
            magnitude=xc.new_empty(capacity) if gated or jumps else gate,
        )
        offsets = latent_cells[::row_tiles] * fits
        entries = ByLatent(offsets, order=_ints(capacity, xc), row=_ints(capacity, xc))
        slope = gain(sae)
        launch(
            place_entries,
            (n_tiles,),
            product,
            local,
            *tiles,
            row_cells,
            latent_cells,
            fits,
            rows_in_order(sae.b_gate if gated else sae.b_enc),
            None if slope is None else rows_in_order(slope),
            rows_in_order(sae.b_mag) if gated else None,
            rows_in_order(sae.threshold) if jumps else None,
            *codes[1:],
            *entries[1:],
            row_tiles,
            latent_tiles,
            ROWS=ROWS,
            LATENTS=LATENTS,
            ENTRIES=64,
            num_warps=4,
        )
        return Active(codes, entries, n_open, overflowed=n_open > capacity)

    def largest(
        self, sae: TopKSAE, xc: Rows, dead: Mask | None
    ) -> tuple[SparseCodes, SparseCodes | None]:
        # As many entries as asked for, so that none can overflow: one whose product is not positive
        # has magnitude 0. So have those beyond the dead; asking how many are would wait.
        wanted: list[tuple[Tensor, int]] = [(sae.b_enc, sae.k)]
        if dead is not None:
            wanted.append((sae.b_enc.masked_fill(~dead, -torch.inf), min(sae.k_aux, sae.d_sae)))
        n_rows, at_once = len(xc), max(1, PRODUCTS_AT_ONCE // sae.d_sae)
        latent = [torch.empty(n_rows, k, dtype=torch.int32, device=xc.device) for _, k in wanted]
        height = [xc.new_empty(n_rows, k) for _, k in wanted]
        for start in range(0, n_rows, at_once):
            rows = slice(start, start + at_once)
            h = xc[rows] @ sae.W_enc
            for (bias, k), where, value in zip(wanted, latent, height, strict=True):
                top = (h + bias).topk(k, dim=1, sorted=False)
                ascending = top.indices.sort(dim=1)
                where[rows] = ascending.values
                value[rows] = top.values.gather(1, ascending.indices).relu_()
        every = torch.arange(n_rows + 1, dtype=torch.int32, device=xc.device)
        kept, *spare = (
            SparseCodes(every * k, where.flatten(), value.flatten(), value.flatten())
            for (_, k), where, value in zip(wanted, latent, height, strict=True)
        )
        return kept, spare[0] if spare else None

    def decode(
        self,
        sae: BuiltinSAE,
        codes: SparseCodes,
        x: Rows,
        *,
        b_dec: Float[Tensor, " d_in"] | None = None,
        weight: float = 1.0,
    ) -> Decoded:
        from gsae_core.sae.gpu.kernels import decode_rows

        decoded = undecoded(sae, codes, x)
        width = power_of_two(max(sae.d_in, 16))
        launch(
            decode_rows,
            (len(x),),
            x,
            rows_in_order(sae.W_dec),
            rows_in_order(sae.b_dec if b_dec is None else b_dec),
            *codes,
            *decoded,
            sae.d_in,
            weight * 2 / len(x),
            WIDTH=width,
            ENTRIES=_entries_at_once(width),
            num_warps=_warps(width),
        )
        return decoded

    def sums(
        self,
        sae: BuiltinSAE,
        active: Active,
        decoded: Decoded,
        xc: Rows,
        l1_slope: float | None = None,
    ) -> StepSums:
        from gsae_core.sae.gpu.kernels import sum_latents

        codes, entries = active[:2]
        slope, weights = gain(sae), l1_weights(sae)
        # Not `empty_like`, which lays them out as the dictionary is.
        W_dec, W_enc_T = (xc.new_empty(sae.d_sae, sae.d_in) for _ in range(2))
        sums = xc.new_empty(4, sae.d_sae)
        counts = torch.empty(2, sae.d_sae, dtype=torch.int64, device=xc.device)
        # Wide rows are shared out over programs, which also shortens the longest of them.
        width = min(power_of_two(max(sae.d_in, 16)), 512)
        launch(
            sum_latents,
            (sae.d_sae, -(-sae.d_in // width)),
            xc,
            decoded.error,
            decoded.aux_error,
            entries.offsets,
            entries.row,
            entries.order,
            codes.gate,
            codes.magnitude,
            decoded.mag_slope,
            decoded.aux_slope,
            None if slope is None else rows_in_order(slope),
            None if weights is None else rows_in_order(weights),
            W_dec,
            W_enc_T,
            sums,
            counts,
            sae.d_in,
            l1_slope or 0.0,
            WIDTH=width,
            ENTRIES=_entries_at_once(width),
            num_warps=_warps(width),
        )
        (dm, dm_m, dg, gate), (fired, gate_open) = sums, counts
        return StepSums(
            W_dec=W_dec,
            # A program that wrote its column of W_enc would touch a cache line for each number.
            W_enc=W_enc_T.T.contiguous(),
            dm=dm,
            dm_m=None if slope is None else dm_m,
            dg=None if l1_slope is None else dg,
            gate=None if l1_slope is None else gate,
            error=decoded.error_sum(),
            fired=fired,
            gate_open=gate_open,
        )

    def column_sums(self, x: Rows) -> Float64[Tensor, " d_in"]:
        return x.sum(0, dtype=torch.float64)

    def windows(
        self, sae: JumpReluSAE, active: Active, slope: PerEntry
    ) -> tuple[PerLatent, PerLatent]:
        from gsae_core.sae.gpu.kernels import sum_windows

        slope_sum, n_near = slope.new_empty(2, sae.d_sae)
        launch(
            sum_windows,
            (sae.d_sae,),
            active.entries.offsets,
            active.entries.order,
            active.codes.gate,
            slope,
            rows_in_order(sae.threshold),
            slope_sum,
            n_near,
            sae.eps / 2,
            ENTRIES=64,
            num_warps=2,
        )
        return slope_sum, n_near


def _ints(n: int, like: Tensor) -> Int32[Tensor, " n"]:
    return torch.empty(n, dtype=torch.int32, device=like.device)


def _cells(n: int, like: Tensor) -> Int32[Tensor, " n_and_zero"]:
    """Return room for n counts behind a zero, whose prefix sums say where each begins."""
    counts = _ints(n + 1, like)
    counts[:1].zero_()
    return counts


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _entries_at_once(width: int) -> int:
    """Return how many rows of `width` numbers to load at once: enough to hide their latency."""
    return min(16, max(1, (4096 if width <= 512 else 8192) // width))


def _warps(width: int) -> int:
    return 4 if width <= 512 else 8 if width <= 8192 else 16
