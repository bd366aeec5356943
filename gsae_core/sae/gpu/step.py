"""The sparse step on a GPU: whether it can run, its arguments, and the step itself.

A step launches four kernels of its own (`kernels.py`), a JumpReLU SAE's one more for its
thresholds; a TopK SAE's entries come from PyTorch's product and topk:

    encode_tiles    pi_gate of a tile of rows x latents in registers; active entries are appended
    place_entries   the same entries, by row and latent (CSR) and by latent and row (its transpose)
    decode_rows     both reconstructions, errors, and <error, W_dec_i> at the entries
    sum_latents     weight gradients and every per-latent sum, one program a latent
"""

import functools
import subprocess

import torch
from torch import nn

from gsae_core.errors import InputError
from gsae_core.sae.architectures import BuiltinSAE, has_fast_step
from gsae_core.sae.base import Mask, Rows
from gsae_core.sae.gpu.launch import Kernels, power_of_two
from gsae_core.sae.losses import StepResult
from gsae_core.sae.sparse.step import take_step

MAX_D_IN = 16384  # A row, both its reconstructions and a direction are held in registers.
MAX_CAPACITY = 2**30  # Places are 32-bit numbers, and a tile may reach beyond the end.
MIN_CAPABILITY = (8, 0)  # TF32, bf16 and asynchronous copies came with Ampere.


def available(device: torch.device, sae: nn.Module | None = None) -> str | None:
    """Return why the kernels cannot run on a device or for an SAE, as a sentence, else None."""
    return _device_refusal(device) or (None if sae is None else _sae_refusal(sae))


def capacity_for(n_open: float) -> int:
    """Return the room to give a step of which about `n_open` open gates are expected.

    A quarter more than expected, rounded up to a power of two: with few sizes the allocator hands
    out the same buffers again.
    """
    return max(4096, power_of_two(int(1.25 * n_open) + 1))


@torch.no_grad()
def kernel_step(
    sae: BuiltinSAE, x: Rows, *, sparsity_coeff: float, capacity: int, dead: Mask | None = None
) -> StepResult:
    """Return what `sparse_step` returns, unless entries overflow; never wait for the device.

    Temporary memory: 36 bytes for each of `capacity`, two or three matrices of the shape of `x` and
    two of the shape of `W_dec`; of a TopK SAE 48 bytes for each entry and a block of products.

    Args:
        sae: on the device of `x`.
        x: activations, in the units the SAE trains in.
        sparsity_coeff: lambda, against squared error summed over d_in; a TopK SAE has none.
        capacity: how many gates may be open in the batch, and of a JumpReLU SAE how many latents
            may be above or just below their thresholds; see `capacity_for`. A TopK SAE has as many
            entries as it asks for.
        dead: latents that have not fired for long, for a TopK SAE's auxiliary loss.

    Raises:
        InputError: if the kernels cannot run here or for this SAE, or an argument does not fit.
        LaunchError: if a kernel does not compile or fit here; `.grad` means nothing then.
    """
    sae.check_width(x)
    sae.check_trains()
    if (reason := available(x.device, sae)) is not None:
        raise InputError(reason)
    if (others := {p.device for p in sae.parameters()} - {x.device}) != set():
        raise InputError(
            f"expected an SAE on {x.device}, where the activations are, got parameters on "
            f"{', '.join(sorted(map(str, others)))}; call sae.to({str(x.device)!r})"
        )
    if x.dtype != torch.float32:
        raise InputError(f"expected float32 activations, got {x.dtype}; call x.float()")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise InputError(
            f"expected a capacity of 1 to {MAX_CAPACITY} open gates, got {capacity}; "
            "take the dense step when so many gates are open"
        )
    engine = Kernels(capacity=capacity)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(x):
        return take_step(
            sae, x.contiguous(), sparsity_coeff=sparsity_coeff, dead=dead, engine=engine
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
        return None  # Triton interprets its kernels, on any device.
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
