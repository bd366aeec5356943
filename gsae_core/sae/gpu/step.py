"""The sparse step on a GPU: the functions of `sparse.py` as Triton kernels, never waiting for it.

A step launches four kernels of its own (`triton_encode.py`, `triton_gradients.py`), a JumpReLU
SAE's one more for its thresholds; a TopK SAE's entries come from PyTorch's product and topk:

    encode_tiles    pi_gate of a tile of rows x latents in registers; active entries are appended
    place_entries   the same entries, by row and latent (CSR) and by latent and row (its transpose)
    decode_rows     both reconstructions, errors, and <error, W_dec_i> at the entries
    sum_latents     weight gradients and every per-latent sum, one program a latent

How many entries a batch has is known on the device alone, so buffers have the caller's capacity.
It is one number for the whole batch, because rows and tiles vary far more than their sum does:
a tile claims a stretch of the buffer with one atomic addition and leaves its counts per row and
per latent; prefix sums over those counts say where each entry belongs. That makes the order
exact for any order in which tiles finish, and costs no sort. A batch with more entries than the
capacity leaves empty sums and a flag, and the caller takes the dense step.
"""

import functools
import logging
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, ReluSAE, has_fast_step
from gsae_core.sae.gpu.launch import (
    PRECISIONS,
    Decoded,
    Entries,
    LatentSums,
    LaunchError,
    launch_decode,
    launch_encode,
    launch_sums,
    launch_windows,
    power_of_two,
)
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import LossParts, StepResult, dense_step
from gsae_core.sae.sparse import loops
from gsae_core.sae.sparse.codes import Wanted
from gsae_core.sae.sparse.gradients import (
    leave_gradients,
    leave_plain_gradients,
    loss_parts,
    stats_from_rows,
    threshold_gradient,
)
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
    decoded = launch_decode(sae, entries, x=x)
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
    decoded = launch_decode(sae, kept, x=x)
    done = launch_sums(sae, kept, decoded=decoded, xc=xc, l1_slope=0.0)
    auxiliary = x.new_zeros(())
    if dead is not None:
        aux = launch_decode(
            sae,
            spare[0],
            # What is left of the error, a constant: b_dec hears of it through xc alone.
            x=decoded.error * (-len(x) / 2),
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


logger = logging.getLogger(__name__)

MAX_D_IN = 16384  # A row, both its reconstructions and a direction are held in registers.
MAX_CAPACITY = 2**30  # Places are 32-bit numbers, and a tile may reach beyond the end.
MIN_CAPABILITY = (8, 0)  # TF32, bf16 and asynchronous copies came with Ampere.


class KernelResult(NamedTuple):
    """What a step leaves besides `.grad`; nothing here has been waited for."""

    result: StepResult
    """Meaningless if `overflowed`, and so are the gradients."""
    overflowed: Bool[Tensor, ""]
    """Whether more gates were open than there was room for: take the dense step then."""
    n_open: Int64[Tensor, ""]
    """Open gates of the batch, right even if they overflowed."""


def available(device: torch.device, sae: nn.Module | None = None) -> str | None:
    """Return why the kernels cannot run, in a sentence fit for a log; None if they can.

    Args:
        device: of the activations.
        sae: asked about too, if given.
    """
    return _device_refusal(device) or (None if sae is None else _sae_refusal(sae))


def check_kernels(device: torch.device, sae: nn.Module | None = None) -> None:
    """Raise InputError with the sentence of `available` unless the kernels can run."""
    if (reason := available(device, sae)) is not None:
        raise InputError(reason)


def capacity_for(n_open: float) -> int:
    """Return the room to give a step of which about `n_open` open gates are expected.

    A quarter more than expected, rounded up to a power of two: sizes that come back let the
    allocator hand out the same buffers again.
    """
    return max(4096, power_of_two(int(1.25 * n_open) + 1))


def overflow_note(*, n_open: int, capacity: int) -> str:
    """Return the sentence for a log when a step had to be taken again."""
    return (
        f"expected at most {capacity} open gates, got {n_open}: "
        "this step was taken again by the dense way, with the same gradients"
    )


def cuda_step(
    sae: BuiltinSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
    capacity: int | None = None,
    precision: str = "ieee",
) -> StepResult:
    """Return what `sparse_step` returns, from the GPU; the dense step's upon overflow.

    And where a kernel does not compile or fit here.

    It waits for the device once, to see whether entries overflowed. The trainer calls `kernel_step`
    and reads the flag later.

    Args:
        sae: learns later, when an optimiser reads `.grad`.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.
        capacity: room for open gates; a sixteenth of all (input, latent) pairs by default.
        precision: of the encoder's product, one of `PRECISIONS`; a TopK SAE's is PyTorch's.

    Raises:
        InputError: as `kernel_step`.
    """
    capacity = capacity or capacity_for(len(x) * sae.d_sae / 20)
    try:
        attempt = kernel_step(
            sae, x, sparsity_coeff=sparsity_coeff, dead=dead, capacity=capacity, precision=precision
        )
    except LaunchError as error:
        logger.warning("%s; the dense step is taken", error)
        return dense_step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead)
    if bool(attempt.overflowed):
        logger.warning(overflow_note(n_open=int(attempt.n_open), capacity=capacity))
        return dense_step(sae, x, sparsity_coeff=sparsity_coeff, dead=dead)
    return attempt.result


@torch.no_grad()
def kernel_step(
    sae: BuiltinSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    sparsity_coeff: float,
    capacity: int,
    dead: Bool[Tensor, " d_sae"] | None = None,
    precision: str = "ieee",
) -> KernelResult:
    """Leave the gradients of the loss in `.grad`, fresh, and return its terms and statistics.

    Equal to `dense_step` up to rounding, for every architecture, recipe and auxiliary decoder of
    tied paths (arXiv:2404.16014v2, Eq. 8 for a Gated SAE, Eq. 4 for a ReLU SAE; arXiv:2407.14435,
    section 3; arXiv:2406.04093), unless entries overflow. Never waits for the device. Temporary
    memory: 36 bytes for each of `capacity`, two or three matrices of the shape of `x` and two of
    the shape of `W_dec`; of a TopK SAE 48 bytes for each entry and a block of products besides.

    Args:
        sae: learns later, when an optimiser reads `.grad`; its parameters stay as they are.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        capacity: how many gates may be open in the batch, and of a JumpReLU SAE how many latents
            may be above or just below their thresholds; see `capacity_for`. A TopK SAE has as many
            entries as it asks for.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.
        precision: of the encoder's product, one of `PRECISIONS`; a TopK SAE's is PyTorch's.

    Raises:
        InputError: if the kernels cannot run here or for this SAE, or an argument does not fit.
        LaunchError: if a kernel does not compile or fit here; `.grad` means nothing then.
    """
    _check_arguments(sae, x, capacity, precision)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(x):
        x, slope = x.contiguous(), sparsity_coeff / len(x)
        match sae:
            case GatedSAE() | ReluSAE():
                result, entries = _gated_step(
                    sae, x, l1_slope=slope, capacity=capacity, precision=precision
                )
            case JumpReluSAE():
                result, entries = jumprelu_step(
                    sae, x, l0_slope=slope, capacity=capacity, precision=precision
                )
            case TopKSAE():
                result, entries = topk_step(sae, x, dead=dead)
    return KernelResult(result=result, overflowed=entries.overflowed, n_open=entries.n_open)


def _gated_step(
    sae: GatedSAE | ReluSAE,
    x: Float[Tensor, "batch d_in"],
    *,
    l1_slope: float,
    capacity: int,
    precision: str,
) -> tuple[StepResult, Entries]:
    xc = x - sae.b_dec
    entries = launch_encode(sae, xc, capacity=capacity, precision=precision)
    decoded = launch_decode(sae, entries, x=x)
    sums, fired, gate_open = launch_sums(sae, entries, decoded=decoded, xc=xc, l1_slope=l1_slope)
    leave_gradients(sae, sums, l1_slope)
    totals = decoded.row_sums.sum(0).to(x.dtype)
    loss = loss_parts(
        sae,
        reconstruction=totals[loops.ERROR_POWER] / len(x),
        auxiliary=totals[loops.AUX_ERROR_POWER] / len(x),
        gate=sums.gate,
        l1_slope=l1_slope,
    )
    stats = stats_from_rows(
        x=x,
        row_sums=decoded.row_sums,
        aux=decoded.aux_slope is not None,
        fired=fired,
        gate_open=gate_open if isinstance(sae, GatedSAE) else None,
    )
    return StepResult(loss=loss, stats=stats), entries


def _check_arguments(
    sae: BuiltinSAE, x: Float[Tensor, "batch d_in"], capacity: int, precision: str
) -> None:
    sae.check_width(x)
    sae.check_trains()
    check_kernels(x.device, sae)
    if (others := {p.device for p in sae.parameters()} - {x.device}) != set():
        raise InputError(
            f"expected an SAE on {x.device}, where the activations are, got parameters on "
            f"{', '.join(sorted(map(str, others)))}; call sae.to({str(x.device)!r})"
        )
    if x.dtype != torch.float32:
        raise InputError(f"expected float32 activations, got {x.dtype}; call x.float()")
    if precision not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise InputError(f"expected precision to be one of {choices}, got {precision!r}")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise InputError(
            f"expected a capacity of 1 to {MAX_CAPACITY} open gates, got {capacity}; "
            "take the dense step when so many gates are open"
        )


def _device_refusal(device: torch.device) -> str | None:
    try:
        from triton import knobs
    except ImportError as error:
        return (
            f"expected Triton for the sparse step on a GPU, got {str(error)!r}; it comes with "
            "PyTorch's CUDA builds for Linux, and without it the dense step is taken"
        )
    if knobs.runtime.interpret:
        return None  # Triton plays the GPU itself, on any device.
    if device.type != "cuda":
        return (
            f"expected a CUDA device for the sparse step's kernels, got '{device.type}'; "
            "sparse_step does the same on a CPU"
        )
    if torch.version.cuda is None:
        return (
            "expected an NVIDIA GPU for the sparse step's kernels, got another make, on which they "
            "are untried; the dense step is taken"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"expected a GPU of compute capability 8.0 or newer, got {capability[0]}."
            f"{capability[1]} ({torch.cuda.get_device_name(device)}); the dense step is taken"
        )
    return _launch_refusal(device)


@functools.cache
def _launch_refusal(device: torch.device) -> str | None:
    """Return why not even a kernel of one line runs: no compiler, no headers, an old driver."""
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


def _sae_refusal(sae: nn.Module) -> str | None:
    if not isinstance(sae, BuiltinSAE):
        return (
            "expected a Gated, ReLU, JumpReLU or TopK SAE for the sparse step's kernels, got a "
            f"{type(sae).__name__}; take the dense step"
        )
    if not has_fast_step(sae):
        return (
            "expected a Gated SAE with tie 'r_mag' or 'none' for the sparse step's kernels, got "
            "'untied'; take the dense step"
        )
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
