"""Shards in the text's order -> the index's arrays, feature by feature, strongest first.

A counting sort: entries are counted by feature, each is written to where its feature's next one
goes, and every feature's own are sorted. Memory holds one shard; the rest are mapped files.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from safetensors.numpy import load_file

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.files import NEAR_KEPT
from gsae_core.files import read_json, write_json, writing
from gsae_core.lm.corpus import SequenceSet
from gsae_core.sae.base import SAE
from gsae_core.threads import spread

# Features sorted in one task.
SORTED_AT_ONCE = 64


class Totals(NamedTuple):
    """What the shards add up to."""

    n_entries: int
    n_near: int
    gate_open: Int64[np.ndarray, " d_sae"]
    toward: Float64[np.ndarray, " d_sae"]
    """Sum over tokens of f_i d_i . (x - x_hat)."""
    fvu: float | None
    gamma: float | None


def sort_shards(
    paths: Sequence[Path],
    shards: "Sequence[Shard]",
    parts: "Sequence[Part]",
    data: Path,
    *,
    d_sae: int,
) -> Totals:
    """Write ids, masks, both forms of the codes and the near misses to `data`, made anew.

    Raises:
        InputError: if the disk is full.
    """
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    mask = _write_tokens(parts, data)
    places = _places(shards, parts, mask)
    counts, near_counts, totals = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64), {}
    for path in paths:
        shard = load_file(path)
        counts += np.bincount(shard["latent"], minlength=d_sae)
        near_counts += np.bincount(shard["near_latent"], minlength=d_sae)
        for name in ("gate_open", "toward", "x_sum", "sums"):
            totals[name] = totals.get(name, 0) + shard[name]
    _write_codes(paths, places, data, counts, n_places=mask.size)
    n_near = _write_near(paths, places, data, near_counts)
    return _totals(totals, n_entries=int(counts.sum()), n_near=n_near)


def allocate(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return a new array in `name`.npy, mapped, its room on the disk taken already.

    Raises:
        InputError: if the disk is full. Written to later, a mapped file without room would end the
            process.
    """
    path, n_bytes = folder / f"{name}.npy", math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes == 0:
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    with writing(path, n_bytes):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _write_tokens(parts: "Sequence[Part]", data: Path) -> np.ndarray:
    """Write ids and masks; return the mask (sequences, n_ctx)."""
    n, n_ctx = sum(part.n for part in parts), parts[0].sequences.n_ctx
    widest = max(int(part.sequences[: part.n].ids.max()) for part in parts)
    ids = allocate(data, "ids", (n, n_ctx), np.uint16 if widest < 2**16 else np.uint32)
    mask = allocate(data, "mask", (n, n_ctx), np.bool_)
    at = 0
    for part in parts:
        batch = part.sequences[: part.n]
        ids[at : at + part.n], mask[at : at + part.n] = batch.ids.numpy(), batch.mask.numpy()
        at += part.n
    return np.array(mask)


def _places(
    shards: "Sequence[Shard]", parts: "Sequence[Part]", mask: np.ndarray
) -> list[np.ndarray]:
    """Return the place of each counted token of each shard, uint32."""
    starts = np.cumsum([0, *(part.n for part in parts)])
    n_ctx = mask.shape[1]
    found = []
    for shard in shards:
        first = int(starts[shard.part]) + shard.first
        counted = np.flatnonzero(mask[first : first + shard.last - shard.first])
        found.append((counted + first * n_ctx).astype(np.uint32))
    return found


def _write_codes(
    paths: Sequence[Path],
    places: Sequence[np.ndarray],
    data: Path,
    counts: np.ndarray,
    *,
    n_places: int,
) -> None:
    n, d_sae = int(counts.sum()), len(counts)
    offsets = _offsets(data, "offsets", counts)
    token = allocate(data, "token", (n,), np.uint32)
    value = allocate(data, "value", (n,), np.float32)
    latent = allocate(data, "latent", (n,), np.uint16 if d_sae <= 2**16 else np.uint32)
    per_place = np.zeros(n_places, np.int64)
    cursor, at = offsets[:-1].copy(), 0
    for path, place in zip(paths, places, strict=True):
        shard = load_file(path)
        latent[at : at + len(shard["latent"])] = shard["latent"]
        at += len(shard["latent"])
        per_place[place] = shard["counts"]
        rows = np.repeat(place, shard["counts"])
        index_loops.scatter(shard["latent"], rows, shard["value"], cursor, token, value)
    _offsets(data, "row_offsets", per_place)
    del latent  # mapped, it counts as this process's memory

    def sort(first: int, last: int) -> None:
        for i in range(first, last):
            own = slice(offsets[i], offsets[i + 1])
            # The bits of a positive float32 order as it does: one sort of integers orders both.
            key = (_LARGEST - value[own].view(np.uint32)).astype(np.uint64) << 32
            key |= token[own]
            key.sort()
            token[own] = key.astype(np.uint32)
            value[own] = (_LARGEST - (key >> 32).astype(np.uint32)).view(np.float32)

    _over_features(d_sae, sort)


_LARGEST = np.uint32(2**32 - 1)


def _write_near(
    paths: Sequence[Path], places: Sequence[np.ndarray], data: Path, counts: np.ndarray
) -> int:
    """Write each feature's nearest misses, nearest first; return how many there are."""
    n, d_sae = int(counts.sum()), len(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    token, short = np.empty(n, np.uint32), np.empty(n, np.float32)
    cursor = offsets[:-1].copy()
    for path, place in zip(paths, places, strict=True):
        shard = load_file(path)
        rows = place[shard["near_row"]]
        # How much is missing; + 0 makes -0 a 0, whose bits are the smallest.
        lacks = 0 - shard["near_margin"] + np.float32(0)
        index_loops.scatter(shard["near_latent"], rows, lacks, cursor, token, short)
    kept = np.minimum(counts, NEAR_KEPT)
    near_offsets = _offsets(data, "near_offsets", kept)
    near_token = allocate(data, "near_token", (int(kept.sum()),), np.uint32)
    near_margin = allocate(data, "near_margin", (int(kept.sum()),), np.float32)

    def sort(first: int, last: int) -> None:
        for i in range(first, last):
            own, out = (
                slice(offsets[i], offsets[i + 1]),
                slice(near_offsets[i], near_offsets[i + 1]),
            )
            key = (short[own].view(np.uint32).astype(np.uint64) << 32) | token[own]
            key.sort()
            key = key[: kept[i]]
            near_token[out] = key.astype(np.uint32)
            near_margin[out] = -(key >> 32).astype(np.uint32).view(np.float32)

    _over_features(d_sae, sort)
    return int(kept.sum())


def _offsets(data: Path, name: str, counts: np.ndarray) -> np.ndarray:
    offsets = allocate(data, name, (len(counts) + 1,), np.int64)
    offsets[0] = 0
    np.cumsum(counts, out=offsets[1:])
    return np.array(offsets)


def _over_features(d_sae: int, work: Any) -> None:
    def task(k: int) -> None:
        work(k * SORTED_AT_ONCE, min(d_sae, (k + 1) * SORTED_AT_ONCE))

    spread(task, -(-d_sae // SORTED_AT_ONCE))


def _totals(totals: dict[str, np.ndarray], *, n_entries: int, n_near: int) -> Totals:
    n, power, hat, along, off = totals["sums"].tolist()
    about_mean = power - float((totals["x_sum"] ** 2).sum()) / n
    return Totals(
        n_entries=n_entries,
        n_near=n_near,
        gate_open=totals["gate_open"],
        toward=totals["toward"],
        # What is left of equal activations is rounding, not variance.
        fvu=None if about_mean <= 1e-13 * power else off / about_mean,
        gamma=None if along == 0 else hat / along,
    )


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
