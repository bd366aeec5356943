"""The state a run resumes from: one whole file at any moment, checked before it is believed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.files import read_json, replace_durably, sha256, write_json


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state a run resumes from; the older one stays until the new one is on the disk.

    It holds tensors, numbers, strings, None, and dicts, lists and tuples of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob("state-*.pt"))
    turn = 1 + max((int(path.stem.removeprefix("state-")) for path in older), default=0)
    path = folder / f"state-{turn:06d}.pt"
    replace_durably(path, lambda sibling: torch.save(state, sibling), n_bytes=state_bytes(state))
    # Only this small file says which state counts, so a crash at any line leaves a whole one.
    pointer = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / "state.json", pointer)
    # Half-written siblings are what a killed process leaves.
    for other in (*older, *folder.glob(".*.tmp")):
        other.unlink()


def has_state(folder: Path) -> bool:
    """Return whether there is a state to resume from."""
    return (folder / "state.json").exists()


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `save_state` wrote, its tensors on the CPU. Nothing in the file is executed."""
    afresh = f"delete the folder {folder} to train from step 0"
    pointer = read_json(folder / "state.json")
    if set(pointer) != {"file", "bytes", "sha256"}:
        found = ", ".join(pointer) or "none"
        raise InputError(
            f"expected the keys file, bytes, sha256 in {folder / 'state.json'}, found {found}; "
            f"{afresh}"
        )
    path = folder / Path(str(pointer["file"])).name
    if not path.is_file():
        raise InputError(f"expected the resumable state {path}, found no such file; {afresh}")
    n_bytes = path.stat().st_size
    if n_bytes != pointer["bytes"]:
        raise InputError(
            f"expected {pointer['bytes']} bytes in the resumable state {path}, found {n_bytes}; "
            f"{afresh}"
        )
    if sha256(path) != pointer["sha256"]:
        raise InputError(
            f"expected the resumable state {path} as it was written, found other content; {afresh}"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def state_bytes(state: Any) -> int:
    """Return the bytes of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(state_bytes(value) for value in state)
    return 0
