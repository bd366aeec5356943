"""Where a run computes, and whether it fits there: asked before anything large is made."""

import psutil
import torch

from gsae_core.config import RunConfig
from gsae_core.errors import InputError
from gsae_core.footprint import training_bytes
from gsae_core.store.files import readable


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
