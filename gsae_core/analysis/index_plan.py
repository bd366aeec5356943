"""What a build reads, in which shards, and what tells that an interrupted one may go on."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gsae_core.lm.corpus import SequenceSet
from gsae_core.sae.base import SAE
from gsae_core.store.files import write_json, writing
from gsae_core.store.status import read_json

SHARD_TOKENS = 2**16


class Part(NamedTuple):
    """The first sequences of a split of the text."""

    split: str
    sequences: SequenceSet
    n: int
    """How many of them are read."""


class Shard(NamedTuple):
    """Some sequences of one part."""

    part: int
    first: int
    last: int


def cut_into_shards(parts: Sequence[Part]) -> list[Shard]:
    """Cut each part at the first sequence that brings a shard to `SHARD_TOKENS`."""
    found = []
    for number, part in enumerate(parts):
        ends = np.cumsum(part.sequences.counts[: part.n])
        first = 0
        while first < part.n:
            before = int(ends[first - 1]) if first else 0
            last = min(int(np.searchsorted(ends, before + SHARD_TOKENS)) + 1, part.n)
            found.append(Shard(number, first, last))
            first = last
    return found


def take_up(building: Path, plan: dict[str, Any]) -> None:
    """Go on with a build of the same plan, or begin anew."""
    path = building / "plan.json"
    with writing(building, 2**20):
        if not (path.is_file() and read_json(path) == plan):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            write_json(path, plan)


def tensors_sha256(sae: SAE) -> str:
    digest = hashlib.sha256((sae.input_norm or "").encode())
    for key, tensor in sorted(sae.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokens_sha256(parts: Sequence[Part]) -> str:
    """Return a hash of the ids read; it does not depend on how they are stored."""
    digest = hashlib.sha256()
    for part in parts:
        for start in range(0, part.n, 2**12):
            ids, mask = part.sequences[start : min(start + 2**12, part.n)]
            digest.update(ids.numpy().astype("<i8").tobytes())
            digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gsae-core", "torch", "transformers", "numpy")}
