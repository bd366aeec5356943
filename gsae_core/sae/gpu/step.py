"""The sparse step on a GPU: whether it can run, and the launches of its kernels.

A TopK SAE's entries come from PyTorch's product and topk. Kernels find a tensor's numbers by its
address, as if its rows followed each other: `launch` lets no other tensor through. What the caller
owns is read through `rows_in_order`.
"""

import functools
import subprocess
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, Mask, Rows
from gsae_core.sae.losses import StepResult
from gsae_core.sae.sparse.codes import ByLatent, SparseCodes, Wanted, gates
from gsae_core.sae.sparse.dense import StepSums, check_by_hand, gain, l1_weights
from gsae_core.sae.sparse.step import Active, Decoded, Loops, take_step, undecoded

MAX_D_IN = 16384  # A row, both its reconstructions and a direction are held in registers.
MAX_CAPACITY = 2**30  # Places are 32-bit numbers, and a tile may reach beyond the end.
MIN_CAPABILITY = (8, 0)  # TF32, bf16 and asynchronous copies came with Ampere.

# Pre-activations that exist at once while a TopK SAE looks for each row's largest: 64 MiB.
PRODUCTS_AT_ONCE = 2**24

# A tile of the encoder: rows, latents. For sm_90, 8.0 and 8.9 alike it takes 96 KiB of shared
# memory at most (all of Ada's) and the 255 registers a thread has, 16 bytes beside them at worst.
TILE = {"ROWS": 128, "LATENTS": 128}


@torch.no_grad()
def kernel_step(
    sae: BuiltinSAE, x: Rows, *, sparsity_coeff: float, capacity: int, dead: Mask | None = None
) -> StepResult:
    """Return what `sparse_step` returns, unless entries overflow; never wait for the device.

    `capacity` is the room for entries; see `StepResult.n_entries`. A TopK SAE has as many as it
    asks for. Temporary memory: 36 bytes for each of `capacity`, two or three matrices of the shape
    of `x` and two of the shape of `W_dec`; of a TopK SAE 48 bytes for each entry and a block of
    products. After a LaunchError `.grad` means nothing.
    """
    check_by_hand(sae, x)
    if (reason := available(x.device, sae)) is not None:
        raise InputError(reason)
    if x.dtype != torch.float32:
        raise InputError(f"expected float32 activations, got {x.dtype}; call x.float()")
    assert 1 <= capacity <= MAX_CAPACITY
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(x):
        done = take_step(Kernels(capacity=capacity), sae, x.contiguous(), sparsity_coeff, dead)
    return done._replace(capacity=capacity)


def capacity_for(n_open: float) -> int:
    """Return the room for about `n_open` entries: a quarter more, up to a power of two.

    With few sizes the allocator hands out the same buffers again.
    """
    return max(4096, power_of_two(int(1.25 * n_open) + 1))


def available(device: torch.device, sae: SAE) -> str | None:
    """Return why the kernels cannot run on a device or for an SAE, as a sentence, else None."""
    if (reason := _device_refusal(device)) is not None:
        return reason
    if (others := {p.dtype for p in sae.parameters()} - {torch.float32}) != set():
        return (
            "expected a float32 SAE for the sparse step's kernels, got "
            f"{', '.join(sorted(map(str, others)))}; call sae.float(), or take the dense step"
        )
    if sae.d_in > MAX_D_IN:
        return (
            f"expected d_in of at most {MAX_D_IN} for the sparse step's kernels, got {sae.d_in}: "
            "they hold a row of x in registers; take the dense step"
        )
    return None


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    try:
        from triton import knobs
    except ImportError as error:
        return (
            f"expected Triton for the sparse step on a GPU, got {str(error)!r}; it comes with "
            'PyTorch\'s CUDA builds for Linux, else with pip install "gsae-core[gpu]"; without it '
            "the dense step is taken"
        )
    if knobs.runtime.interpret:
        return None  # Triton interprets its kernels, on any device.
    if (
        device.type != "cuda"
        or torch.version.cuda is None
        or torch.cuda.get_device_capability(device) < MIN_CAPABILITY
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return (
            "expected an NVIDIA GPU of compute capability 8.0 or newer for the sparse step's "
            f"kernels, got {name}; the dense step is taken"
        )
    from gsae_core.sae.gpu.kernels import probe

    try:
        with torch.cuda.device(device):
            probe[(1,)](torch.zeros(1, device=device))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return (
            f"expected Triton to run a kernel, got {str(error)!r}; it needs a C compiler and the "
            "headers of Python (apt-get install gcc python3-dev), else the dense step is taken"
        )
    return None


class LaunchError(Exception):
    """A kernel that cannot be compiled here, does not fit, or would misread its tensors."""


def launch(kernel: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch one of `kernels.py` by its name, on so many programs along each axis.

    Errors other than a LaunchError, such as running out of memory, are raised as they are.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from gsae_core.sae.gpu import kernels

    tensors = [each for each in args if isinstance(each, Tensor)]
    devices = {each.device for each in tensors}
    if len(devices) > 1 or not all(each.is_contiguous() for each in tensors):
        laid = ", ".join(f"{each.device} {tuple(each.stride())}" for each in tensors)
        raise LaunchError(f"expected tensors of one device, rows in order, got {laid}")
    try:
        getattr(kernels, kernel)[grid](*args, **options)
    except (OutOfResources, PTXASError, CompilationError, RuntimeError) as error:
        # A compiler pass fails with this RuntimeError; one of the device's has another text.
        if isinstance(error, RuntimeError) and "PassManager::run failed" not in str(error):
            raise
        # A CompilationError's text begins with the source; its message says what is wrong with it.
        said = str(getattr(error, "error_message", None) or error).strip()
        said = said.partition("\n")[0].rstrip(".")[:300]
        raise LaunchError(
            f"expected Triton to launch a kernel, got {type(error).__name__}: {said}"
        ) from error


def rows_in_order(tensor: Tensor) -> Tensor:
    """Return the tensor as kernels read it; a copy where its rows do not follow each other."""
    return tensor.detach().contiguous()


@dataclass(kw_only=True)
class Kernels(Loops):
    """The Triton kernels; nothing here waits for the device.

    How many entries a batch has is known on the device alone, so buffers have the caller's
    capacity: one for the whole batch, because rows and tiles vary far more than their sum does. A
    tile claims a stretch of the buffer with one atomic addition and leaves its counts per row and
    latent; prefix sums over those say where each entry belongs, in whichever order tiles finish,
    without a sort. A batch with more entries than the capacity leaves empty sums and a flag.
    """

    capacity: int

    def active(self, sae: GatedSAE | ReluSAE | JumpReluSAE, xc: Rows) -> Active:
        """Return the entries above the gate, `overflowed` where they exceed the capacity."""
        jumps = isinstance(sae, JumpReluSAE)
        gated = isinstance(sae, GatedSAE)
        W, above = gates(sae, below=sae.eps / 2 if jumps else 0.0)
        n_rows, d_sae, capacity = len(xc), sae.d_sae, self.capacity
        row_tiles, latent_tiles = -(-n_rows // TILE["ROWS"]), -(-d_sae // TILE["LATENTS"])
        n_tiles = row_tiles * latent_tiles
        n_open = torch.zeros((), dtype=torch.int64, device=xc.device)
        ints = functools.partial(torch.empty, dtype=torch.int32, device=xc.device)
        tiles = ints(n_tiles), ints(n_tiles)  # where each begins, and its entries
        # Counts behind a zero: their prefix sums say where each begins.
        by_row, by_latent = ints(n_rows * latent_tiles + 1), ints(d_sae * row_tiles + 1)
        for counts in (by_row, by_latent):
            counts[:1].zero_()
        product, local = xc.new_empty(capacity), ints(capacity)
        encoder = (rows_in_order(W), rows_in_order(-above))
        found = (n_open, *tiles, by_row[1:], by_latent[1:], product, local)
        sizes = (n_rows, sae.d_in, d_sae, capacity)
        walk = {"DEPTH": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3}
        launch("encode_tiles", (n_tiles,), xc, *encoder, *found, *sizes, **TILE, **walk)
        fits = (n_open <= capacity).int()
        row_cells, latent_cells = (
            torch.cumsum(counts, 0, dtype=torch.int32) for counts in (by_row, by_latent)
        )
        gate = xc.new_empty(capacity)
        magnitude = xc.new_empty(capacity) if gated or jumps else gate
        # Entries were dropped upon overflow. With none left, later kernels read nothing stale.
        offsets = row_cells[::latent_tiles] * fits
        codes = SparseCodes(offsets, ints(capacity), gate=gate, magnitude=magnitude)
        offsets = latent_cells[::row_tiles] * fits
        entries = ByLatent(offsets, order=ints(capacity), row=ints(capacity))
        found = (product, local, *tiles, row_cells, latent_cells, fits)
        bias = rows_in_order(sae.b_gate if gated else sae.b_enc)
        b_mag = rows_in_order(sae.b_mag) if gated else None
        theta = rows_in_order(sae.threshold) if jumps else None
        arrays = (*found, bias, gain(sae), b_mag, theta, *codes[1:], *entries[1:])
        walk = {"ENTRIES": 64, "num_warps": 4}
        launch("place_entries", (n_tiles,), *arrays, row_tiles, latent_tiles, **TILE, **walk)
        return Active(codes, entries, n_open, overflowed=n_open > capacity)

    def largest(self, sae: TopKSAE, xc: Rows, wanted: Wanted) -> list[SparseCodes]:
        """Return each row's largest latents, a SparseCodes for each of `wanted`."""
        # As many entries as asked for, so that none can overflow: one whose product is not positive
        # has magnitude 0. So have those beyond the dead; asking how many are would wait.
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
        return [
            SparseCodes(every * k, where.flatten(), value.flatten(), value.flatten())
            for (_, k), where, value in zip(wanted, latent, height, strict=True)
        ]

    def decode(
        self, sae: BuiltinSAE, codes: SparseCodes, x: Rows, *, bias: Tensor, scale: float
    ) -> Decoded:
        """Return errors, slopes and row sums, computed row by row."""
        decoded = undecoded(sae, codes, x)
        width = power_of_two(max(sae.d_in, 16))
        arrays = (x, rows_in_order(sae.W_dec), rows_in_order(bias), *codes, *decoded)
        launch("decode_rows", (len(x),), *arrays, sae.d_in, scale, **_shape(width))
        return decoded

    def sums(
        self, sae: BuiltinSAE, active: Active, decoded: Decoded, xc: Rows, l1_slope: float | None
    ) -> StepSums:
        """Return every latent's sums over its entries, which the gradients are made of."""
        slope = gain(sae)
        jumps = isinstance(sae, JumpReluSAE)
        # Not `empty_like`, which lays them out as the dictionary is.
        W_dec, W_enc_T = (xc.new_empty(sae.d_sae, sae.d_in) for _ in range(2))
        sums = xc.new_empty(6, sae.d_sae)
        counts = torch.empty(2, sae.d_sae, dtype=torch.int64, device=xc.device)
        # Wide rows are shared out over programs, which also shortens the longest of them.
        width = min(power_of_two(max(sae.d_in, 16)), 512)
        grid = (sae.d_sae, -(-sae.d_in // width))
        theta = rows_in_order(sae.threshold) if jumps else None
        entries = (xc, *decoded[:4], *active.entries, *active.codes[2:])
        weights, results = (slope, l1_weights(sae), theta), (W_dec, W_enc_T, sums, counts)
        scalars = (sae.d_in, l1_slope or 0.0, sae.eps / 2 if jumps else 0.0)
        launch("sum_latents", grid, *entries, *weights, *results, *scalars, **_shape(width))
        (dm, dm_m, dg, gate, *window), (fired, gate_open) = sums, counts
        return StepSums(
            W_dec=W_dec,
            # A program that wrote its column of W_enc would touch a cache line for each number.
            W_enc=W_enc_T.T.contiguous(),
            dm=dm,
            dm_m=None if slope is None else dm_m,
            dg=None if l1_slope is None else dg,
            gate=None if l1_slope is None else gate,
            fired=fired,
            gate_open=gate_open,
            window=(window[0], window[1]) if jumps else None,
        )


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _shape(width: int) -> dict[str, int]:
    """Return how a kernel walks rows of `width` numbers: enough at once to hide their latency."""
    return {
        "WIDTH": width,
        "ENTRIES": min(16, max(1, (4096 if width <= 512 else 8192) // width)),
        "num_warps": 4 if width <= 512 else 8 if width <= 8192 else 16,
    }
