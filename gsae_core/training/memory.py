"""Where a run computes, and whether it fits there: asked before anything large is made."""

import psutil
import torch

from gsae_core.config import RunConfig, SAESpec
from gsae_core.errors import InputError
from gsae_core.store.files import readable

FLOAT32 = 4
# Weights, their gradients, and Adam's two moments.
COPIES_IN_TRAINING = 4
# Weights and both moments are what a resumed run needs.
COPIES_IN_STATE = 3
# (batch, d_sae) matrices alive at once in the dense step: pre-activations, latents, gradients.
DENSE_MATRICES = 6


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


def n_parameters(spec: SAESpec, d_in: int) -> int:
    """Return how many numbers an SAE learns."""
    matrices = 3 if spec.architecture == "gated" and spec.tie == "untied" else 2
    vectors = 1
    if spec.architecture == "gated":
        vectors = 3 if spec.tie == "r_mag" else 2
    return matrices * d_in * spec.d_sae + vectors * spec.d_sae + d_in


def training_bytes(cfg: RunConfig, d_in: int, *, chunk_vectors: int) -> int:
    """Return about how much memory training takes, the language model left out."""
    learnt = COPIES_IN_TRAINING * sum(n_parameters(spec, d_in) for spec in cfg.saes)
    widest = max(spec.d_sae for spec in cfg.saes)
    step = DENSE_MATRICES * cfg.train.batch_size * widest
    # A chunk and its shuffled copy.
    harvest = 2 * chunk_vectors * d_in
    return FLOAT32 * (learnt + step + harvest)


def state_bytes(cfg: RunConfig, d_in: int) -> int:
    """Return about how large a resumable state is."""
    return FLOAT32 * COPIES_IN_STATE * sum(n_parameters(spec, d_in) for spec in cfg.saes)


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
    need, free = training_bytes(cfg, d_in, chunk_vectors=chunk_vectors), free_memory(device)
    if need > free:
        widest = max(spec.d_sae for spec in cfg.saes)
        raise InputError(
            f"expected about {readable(need)} of memory on {device} for {len(cfg.saes)} SAEs of up "
            f"to {widest} latents, found {readable(free)} free; lower the width, the batch size "
            "or the number of SAEs"
        )
