"""How much memory, disk and time a run takes, from its config: asked before anything is loaded."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import psutil
import torch

from gsae_core.config import RunConfig, SAESpec
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelShape, model_shape

FLOAT32 = 4
# Weights, their gradients, and Adam's two moments.
COPIES_IN_TRAINING = 4
# Weights and both moments are what a resumed run needs.
COPIES_IN_STATE = 3
# What a step holds beyond gradients, in float32 matrices (batch, d_sae), measured at 256 x 16384.
# Autograd's dense step, which GPUs take while much is active; a TopK SAE's with dead latents:
DENSE_MATRICES = {"gated": 8.2, "relu": 3.4, "jumprelu": 7.0, "topk": 6.6}
# A sparse step's entries near the crossover, or the blocks of rows of a step by hand, whichever is
# more; a TopK SAE's entries have one number each. Blocks are as large for small batches.
SPARSE_MATRICES = {"gated": 3.5, "relu": 3.5, "jumprelu": 3.5, "topk": 2.8}
LEAST_ROWS = 512
# Encoder-sized products in a training step, forward and backward.
PRODUCTS_PER_STEP = 8
# Guesses for a machine that has trained nothing yet, in floating-point operations a second.
CORE_SPEED = 25e9
GPU_SPEED = 20e12


def n_parameters(spec: SAESpec, d_in: int) -> int:
    """Return how many numbers an SAE learns."""
    matrices = 3 if spec.architecture == "gated" and spec.tie == "untied" else 2
    # A bias each; JumpReLU thresholds; b_gate, b_mag and r_mag.
    vectors = {"gated": 3 if spec.tie == "r_mag" else 2, "relu": 1, "jumprelu": 2, "topk": 1}
    return matrices * d_in * spec.d_sae + vectors[spec.architecture] * spec.d_sae + d_in


class Memory(NamedTuple):
    """What training keeps in memory, in bytes; the language model left out."""

    learnt: int
    """Weights, gradients and both of Adam's moments, of every SAE."""
    step: int
    """What the steps taken at once hold: one on a GPU, one a core on a CPU."""
    chunk: int
    """A chunk of activations and its shuffled copy."""


def memory_parts(cfg: RunConfig, d_in: int, *, chunk_vectors: int, n_cores: int | None) -> Memory:
    """Return about how much memory each part of training takes.

    Args:
        cfg: the run.
        d_in: width of the activations.
        chunk_vectors: activations that are shuffled at a time.
        n_cores: cores that take steps at once; None on a GPU.
    """
    learnt = COPIES_IN_TRAINING * sum(n_parameters(spec, d_in) for spec in cfg.saes)
    step = _step_numbers(cfg, n_cores)
    return Memory(FLOAT32 * learnt, FLOAT32 * step, FLOAT32 * 2 * chunk_vectors * d_in)


def _step_numbers(cfg: RunConfig, n_cores: int | None) -> int:
    rows = cfg.train.batch_size
    if n_cores is None:
        return max(
            round(DENSE_MATRICES[spec.architecture] * rows * spec.d_sae) for spec in cfg.saes
        )
    widths = (SPARSE_MATRICES[spec.architecture] * spec.d_sae for spec in cfg.saes)
    return round(max(rows, LEAST_ROWS) * sum(sorted(widths, reverse=True)[:n_cores]))


def training_bytes(cfg: RunConfig, d_in: int, *, chunk_vectors: int, n_cores: int | None) -> int:
    """Return about how much memory training takes, the language model left out."""
    return sum(memory_parts(cfg, d_in, chunk_vectors=chunk_vectors, n_cores=n_cores))


def state_bytes(cfg: RunConfig, d_in: int) -> int:
    """Return about how large a resumable state is."""
    return FLOAT32 * COPIES_IN_STATE * sum(n_parameters(spec, d_in) for spec in cfg.saes)


def cache_bytes(cfg: RunConfig, d_in: int) -> int:
    """Return about how large the run's activation cache gets; 0 without one.

    An upper bound where the text is shorter than the run and is read more than once.
    """
    if not cfg.cache_activations:
        return 0
    each = FLOAT32 if cfg.model.dtype == "float32" else FLOAT32 // 2
    return each * cfg.train.n_steps * cfg.train.batch_size * d_in


def operations(cfg: RunConfig, shape: ModelShape) -> float:
    """Return about how many floating-point operations training takes, evaluation left out."""
    d_in = shape.width(cfg.model.site)
    saes = sum(2 * PRODUCTS_PER_STEP * d_in * spec.d_sae for spec in cfg.saes)
    blocks = (cfg.model.layer + 1) * 2 * 12 * shape.d_model**2
    return float(cfg.train.n_tokens * (saes + blocks))


class Pace(NamedTuple):
    """How fast this machine trains."""

    operations_per_second: float
    source: str | None
    """Id of the run it was measured on; None for a guess."""


class Measured(NamedTuple):
    """A run that says how fast this machine is."""

    id: str
    config: RunConfig
    share: float
    """Steps done over steps planned."""
    seconds: float | int
    """Training time of those steps."""


def pace(
    measured: Iterable[Measured],
    *,
    n_cores: int,
    has_gpu: bool,
    shapes: Callable[[str], ModelShape | None] = model_shape,
) -> Pace:
    """Return the speed of the first run that can tell, or a guess from the hardware.

    Args:
        shapes: returns the shape of a model by its name.
    """
    for run in measured:
        shape = shapes(run.config.model.name)
        if shape is not None and run.seconds > 0 and run.share > 0:
            return Pace(operations(run.config, shape) * run.share / run.seconds, run.id)
    return Pace(GPU_SPEED if has_gpu else CORE_SPEED * n_cores, None)


def resolve_device(name: str) -> torch.device:
    """Return the device a config means; `auto` is CUDA, then Apple's, then the CPU.

    Raises:
        InputError: if this machine has no such device.
    """
    has_mps = torch.backends.mps.is_available()
    n_cuda = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if n_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    available = ["cpu", *(f"cuda:{i}" for i in range(n_cuda)), *(["mps"] if has_mps else [])]
    fits = device is not None and (
        device.type == "cpu"
        or (device.type == "cuda" and (device.index or 0) < n_cuda)
        or (device.type == "mps" and has_mps)
    )
    if device is None or not fits:
        raise InputError(
            f"expected a device of this machine (auto, {', '.join(available)}), got {name!r}"
        )
    return device


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, by its own account."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Apple's GPUs share the machine's memory.
    return psutil.virtual_memory().available


def check_memory(cfg: RunConfig, d_in: int, device: torch.device, *, chunk_vectors: int) -> None:
    """Check that training fits in memory.

    Raises:
        InputError: says how much is needed and how much is free.
    """
    n_cores = torch.get_num_threads() if device.type == "cpu" else None
    need = training_bytes(cfg, d_in, chunk_vectors=chunk_vectors, n_cores=n_cores)
    free = free_memory(device)
    if need > free:
        widest = max(spec.d_sae for spec in cfg.saes)
        raise InputError(
            f"expected about {readable(need)} of memory on {device} for {len(cfg.saes)} SAEs of up "
            f"to {widest} latents, found {readable(free)} free; lower the width, the batch size "
            "or the number of SAEs"
        )
