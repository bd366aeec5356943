"""One pass of a language model and an SAE -> shards -> the feature index.

    building/  plan.json  shard-00000.safetensors ...

A shard holds what fires on about 2^16 tokens. It is whole or not there, and depends on the plan
alone, so an interrupted build loses one shard and ends with the same bytes. Shards of another plan
are thrown away. Those that are whole are then sorted by counting: memory holds one of them.
"""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.collect import Collector, NearBand
from gsae_core.analysis.features.files import (
    MANIFEST,
    NEAR_KEPT,
    SCHEMA_VERSION,
    VECTOR,
    Manifest,
    Split,
    allocate,
    evenly,
    unsigned,
)
from gsae_core.analysis.features.table import describe
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.files import read_json, replace_durably, write_json, writing
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.stored import StoredVectors
from gsae_core.lm.texts import raw_texts
from gsae_core.lm.vectors import StoredHarvest, VectorSource
from gsae_core.sae.base import SAE, check_width
from gsae_core.text import Progress
from gsae_core.threads import over_rows

log: logging.Logger = logging.getLogger(__name__)

SHARD_TOKENS = 2**16
CALIBRATION_TOKENS = 2**12  # from which the bands of near misses are measured


class Part(NamedTuple):
    """The first `n` sequences of a split of the text."""

    split: str
    sequences: SequenceSet
    n: int

    @property
    def n_tokens(self) -> int:
        """Counted tokens of those sequences."""
        return int(self.sequences.counts[: self.n].sum())


class Shard(NamedTuple):
    """Some sequences of one part, and the file of what fires on them."""

    path: Path
    part: int
    first: int
    last: int


def build_index(
    model: LanguageModel | VectorSource,
    sae: SAE,
    parts: Sequence[Part],
    folder: Path,
    *,
    layer: int,
    site: Site,
    name: str,
    text: str,
    weights_sha256: str,
    revision: str | None = None,
    n_tokens_asked: int | None = None,
    shortage: str | None = None,
    max_norm: float = math.inf,
) -> Iterator[Progress]:
    """Build the feature index of an SAE in `folder`, from where an earlier build stopped.

    An index that is there stays, and stays open for its readers, until the new one is whole.

    Args:
        model: or a folder of vectors, whose `corpus` then has the sequences of `parts`.
        sae: takes raw activations, on the model's device.
        name, text: of the SAE and of the corpus.
        weights_sha256: of the SAE's file.
        n_tokens_asked: None: as many as `parts` have.
        shortage: why they are fewer, where they are.
        max_norm: activations longer than this are left out, as those of special tokens are.

    Raises:
        InputError: while iterating, of an SAE of another width, no token to read, or a full disk.
    """
    model.check(layer, site)
    check_width(sae, model.width(site), name=name, hook_name=f"{site} of layer {layer}")
    began, building, data = time.time(), folder / "building", folder / "building" / "data"
    parts, harvests, texts = _sources(model, parts, layer=layer, site=site)
    # Of no text: every vector stands for itself.
    bare = model.vectors if isinstance(model, VectorSource) and not model.is_harvested else None
    shards, n_tokens = _cut_into_shards(parts, building), sum(part.n_tokens for part in parts)
    hashes = {"weights_sha256": weights_sha256, "tokens_sha256": _tokens_sha256(parts, bare)}
    plan = {"schema_version": SCHEMA_VERSION, **hashes, "hook": [layer, site]}
    _resume_or_clear(building, plan | _how(model, shards, max_norm))
    for now in _read_shards(sae, parts, shards, harvests, max_norm):
        yield now._replace(unit="token" if bare is None else "vector")
    yield Progress("sorting", 0, sae.d_sae, "feature")
    totals, facts = _sort_shards(shards, parts, data, d_sae=sae.d_sae)
    n_read, n_tokens = n_tokens, int(totals["sums"][0])
    if bare is not None:
        _keep_numbers(data, parts)
    yield Progress("describing", 0, sae.d_sae, "feature")
    head = None if isinstance(model, VectorSource) else model
    facts |= describe(data, sae, head, totals, texts=texts, layer=layer, site=site)
    manifest = Manifest(
        sae=name,
        **{key: getattr(sae, key) for key in ("architecture", "d_in", "d_sae")},
        **hashes,
        model=model.name,
        revision=revision,
        numerics=model.numerics,
        layer=layer,
        site=site,
        text=text,
        vectors=None if bare is None else str(bare.folder),
        vectors_digest=None if bare is None else bare.digest,
        n_ctx=parts[0].sequences.n_ctx,
        splits=tuple(Split(name=p.split, n_sequences=p.n, n_tokens=p.n_tokens) for p in parts),
        n_tokens=n_tokens,
        n_tokens_asked=n_tokens_asked or n_tokens,
        shortage=shortage if n_read < (n_tokens_asked or n_tokens) else None,
        n_left_out=n_read - n_tokens,
        l0=facts["n_entries"] / n_tokens,
        **facts,
        made=time.time(),
        seconds=time.time() - began,
        versions={each: version(each) for each in ("gsae-core", "torch", "transformers", "numpy")},
        data=f"data-{time.time_ns():x}",
        files={path.name: path.stat().st_size for path in sorted(data.iterdir())},
    )
    _publish(folder, manifest)
    yield Progress("describing", sae.d_sae, sae.d_sae, "feature")


def _how(
    model: LanguageModel | VectorSource, shards: Sequence[Shard], max_norm: float
) -> dict[str, Any]:
    """Return what else shards that were read earlier have to agree on."""
    plan = {"device": model.device.type, "shards": [list(shard[1:]) for shard in shards]}
    return plan if max_norm == math.inf else plan | {"max_norm": max_norm}


def _keep_numbers(data: Path, parts: Sequence[Part]) -> None:
    numbers = np.concatenate([*map(_numbers, parts)])
    allocate(data, VECTOR, numbers.shape, np.int64)[:] = numbers


def _cut_into_shards(parts: Sequence[Part], building: Path) -> list[Shard]:
    """Cut each part at the first sequence that brings a shard to `SHARD_TOKENS`."""
    shards: list[Shard] = []
    for number, part in enumerate(parts):
        before = np.concatenate([[0], np.cumsum(part.sequences.counts[: part.n])])
        first = 0
        while first < part.n:
            last = min(int(np.searchsorted(before, before[first] + SHARD_TOKENS)), part.n)
            path = building / f"shard-{len(shards):05d}.safetensors"
            shards.append(Shard(path, number, first, last))
            first = last
    if not any(part.n_tokens for part in parts):
        raise InputError("expected text to index, got no tokens that count; give more --tokens")
    return shards


def _sources(
    model: LanguageModel | VectorSource, parts: Sequence[Part], *, layer: int, site: Site
) -> tuple[Sequence[Part], list[Harvest], list[str]]:
    """Return the parts as they are read, the vectors of each, and the text of every token id."""
    if isinstance(model, VectorSource):
        chosen, texts = model.readable([(p.sequences, np.arange(p.n)) for p in parts])
        harvests = [StoredHarvest(model, own, layer=layer, site=site) for own in chosen]
        read = zip(parts, chosen, strict=True)
        return [Part(part.split, own, len(own)) for part, own in read], [*harvests], texts
    tokenizer = model.tokenizer
    texts = raw_texts(tokenizer, range(min(model.d_vocab, len(tokenizer))))
    return parts, [Harvest(model, p.sequences, layer=layer, site=site) for p in parts], texts


def _numbers(part: Part) -> Int64[np.ndarray, " n"]:
    """Return the number in the folder of each vector of a part that is of no text."""
    assert part.sequences.first is not None
    return part.sequences.first


def _tokens_sha256(parts: Sequence[Part], vectors: StoredVectors | None) -> str:
    """Return a hash of the ids read, however they are stored, and of `vectors` of no text."""
    digest = hashlib.sha256(b"" if vectors is None else vectors.digest.encode())
    for part in parts:
        if vectors is not None:
            digest.update(_numbers(part).tobytes())
        for start in range(0, part.n, 2**12):
            ids, mask = part.sequences[start : min(start + 2**12, part.n)]
            digest.update(ids.numpy().astype("<i8").tobytes())
            digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def _resume_or_clear(building: Path, plan: dict[str, Any]) -> None:
    """Go on with a build of the same plan, or begin anew."""
    path = building / "plan.json"
    with writing(building, 2**20):
        if not (path.is_file() and read_json(path) == plan):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            write_json(path, plan)


def _read_shards(
    sae: SAE,
    parts: Sequence[Part],
    shards: Sequence[Shard],
    harvests: Sequence[Harvest],
    max_norm: float,
) -> Iterator[Progress]:
    """Write the shards that are not there yet."""
    done, n_tokens = 0, sum(part.n_tokens for part in parts)
    band = _band(sae, parts, harvests, n_tokens=n_tokens, max_norm=max_norm)
    collect = Collector(sae, band, max_norm=max_norm)
    yield Progress("indexing", 0, n_tokens, "token")
    for shard in shards:
        if not _is_whole(shard.path):
            _write_shard(shard, harvests[shard.part], collect)
        done += int(parts[shard.part].sequences.counts[shard.first : shard.last].sum())
        yield Progress("indexing", done, n_tokens, "token")


def _band(
    sae: SAE,
    parts: Sequence[Part],
    harvests: Sequence[Harvest],
    *,
    n_tokens: int,
    max_norm: float,
) -> Float[Tensor, " d_sae"]:
    """Return the width of each latent's band of near misses: the same whenever a build goes on."""
    share = min(1.0, CALIBRATION_TOKENS / n_tokens)
    # From every part as many as it has a share in the whole.
    sample = [evenly(min(part.n, max(1, round(share * part.n))), part.n) for part in parts]
    counted = zip(parts, sample, strict=True)
    n_sample = sum(int(part.sequences.counts[which].sum()) for part, which in counted)
    n_sequences = sum(part.n for part in parts)
    log.info("band of near misses from %d tokens of %d sequences", n_sample, n_sequences)
    band = NearBand(sae, n_sample=max(n_sample, 1), n_tokens=n_tokens, max_norm=max_norm)
    for harvest, which in zip(harvests, sample, strict=True):
        for _ in harvest.through(band.add, which):
            pass
    return band.width.float()


SUMMED = ("gate_open", "toward", "x_sum", "sums")
Totals = dict[str, np.ndarray]  # of these, as in `Collected`


def _write_shard(shard: Shard, harvest: Harvest, collect: Collector) -> None:
    totals: Totals = {}
    batches: list[dict[str, np.ndarray]] = []
    n_rows = 0
    for batch in harvest.through(collect, np.arange(shard.first, shard.last)):
        arrays = batch._asdict()
        # Added up at once: each is as long as the dictionary is wide.
        totals = {name: totals.get(name, 0) + arrays.pop(name) for name in SUMMED}
        arrays["near_row"] = arrays["near_row"] + n_rows
        n_rows += len(batch.counts)
        batches.append(arrays)
    joined = {name: np.concatenate([arrays[name] for arrays in batches]) for name in batches[0]}
    joined |= {name: joined[name].astype(np.uint32) for name in ("counts", "near_row")} | totals
    n_bytes = sum(array.nbytes for array in joined.values())
    replace_durably(shard.path, lambda to: save_file(joined, to), n_bytes=n_bytes)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        load_file(path)
    except SafetensorError as error:
        log.warning("%s is damaged (%s): its tokens are read again", path.name, error)
        return False
    return True


Read = Callable[[], Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]


def _sort_shards(
    shards: Sequence[Shard], parts: Sequence[Part], data: Path, *, d_sae: int
) -> tuple[Totals, dict[str, Any]]:
    """Write tokens, firings in both orders, and near misses to `data`, made anew; return the
    totals of all shards, and n_entries, n_near, fvu and gamma."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    written = _write_tokens(parts, data)
    mask = np.array(written)
    starts = np.cumsum([0, *(part.n for part in parts)])

    def read() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield each shard, and its counted tokens' positions (sequence * n_ctx + position)."""
        for shard in shards:
            first, last = starts[shard.part] + shard.first, starts[shard.part] + shard.last
            positions = np.flatnonzero(mask[first:last]) + first * mask.shape[1]
            arrays = load_file(shard.path)
            kept = arrays.pop("kept", np.ones(len(positions), bool))  # an earlier version's
            # What was left out counts no more than a special token.
            written.reshape(-1)[positions[~kept]] = False
            yield positions[kept].astype(np.uint32), arrays

    counts, near_counts = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
    totals: Totals = {}
    for _, shard in read():
        counts += np.bincount(shard["latent"], minlength=d_sae)
        near_counts += np.bincount(shard["near_latent"], minlength=d_sae)
        totals = {name: totals.get(name, 0) + shard[name] for name in SUMMED}
    _write_codes(read, data, counts, n_places=mask.size)
    n_near = _write_near(read, data, near_counts)
    n, power, hat, along, off = totals["sums"].tolist()
    about_mean = power - float((totals["x_sum"] ** 2).sum()) / n
    return totals, {
        "n_entries": int(counts.sum()),
        "n_near": n_near,
        # What is left of equal activations is rounding, not variance.
        "fvu": None if about_mean <= 1e-13 * power else off / about_mean,
        "gamma": None if along == 0 else hat / along,
    }


def _write_tokens(parts: Sequence[Part], data: Path) -> np.ndarray:
    """Write ids and masks; return the mask (sequences, n_ctx), mapped."""
    n, n_ctx = sum(part.n for part in parts), parts[0].sequences.n_ctx
    widest = max(int(part.sequences[: part.n].ids.max()) for part in parts)
    ids = allocate(data, "ids", (n, n_ctx), unsigned(widest + 1))
    mask = allocate(data, "mask", (n, n_ctx), np.bool_)
    at = 0
    for part in parts:
        batch = part.sequences[: part.n]
        ids[at : at + part.n], mask[at : at + part.n] = batch.ids.numpy(), batch.mask.numpy()
        at += part.n
    return mask


def _write_codes(read: Read, data: Path, counts: np.ndarray, *, n_places: int) -> None:
    n, d_sae = int(counts.sum()), len(counts)
    offsets = _offsets(data, "offsets", counts)
    token = allocate(data, "token", (n,), np.uint32)
    value = allocate(data, "value", (n,), np.float32)
    per_token = np.zeros(n_places, np.int64)

    def entries() -> Iterator[tuple[np.ndarray, ...]]:
        # Here, to be gone before they are sorted: mapped, it counts as this process's memory.
        latent, at = allocate(data, "latent", (n,), unsigned(d_sae)), 0
        for positions, shard in read():
            latent[at : at + len(shard["latent"])] = shard["latent"]
            at += len(shard["latent"])
            per_token[positions] = shard["counts"]
            yield shard["latent"], np.repeat(positions, shard["counts"]), shard["value"]

    _by_latent(entries(), offsets, token, value, flip=2**31 - 1)
    _offsets(data, "row_offsets", per_token)


def _write_near(read: Read, data: Path, counts: np.ndarray) -> int:
    """Write each latent's nearest misses, nearest first; return how many there are."""
    n = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    token, margin = np.empty(n, np.uint32), np.empty(n, np.float32)

    def entries() -> Iterator[tuple[np.ndarray, ...]]:
        for positions, shard in read():
            # A margin of 0 becomes -0: so all have a sign.
            yield shard["near_latent"], positions[shard["near_row"]], -(0 - shard["near_margin"])

    _by_latent(entries(), offsets, token, margin, flip=0)
    kept = np.minimum(counts, NEAR_KEPT)
    near_offsets, n_near = _offsets(data, "near_offsets", kept), int(kept.sum())
    near_token = allocate(data, "near_token", (n_near,), np.uint32)
    near_margin = allocate(data, "near_margin", (n_near,), np.float32)
    for first, start, stop in zip(offsets, near_offsets, near_offsets[1:], strict=False):
        own = slice(first, first + stop - start)
        near_token[start:stop], near_margin[start:stop] = token[own], margin[own]
    return n_near


def _by_latent(
    entries: Iterable[tuple[np.ndarray, ...]],
    offsets: np.ndarray,
    token: np.ndarray,
    value: np.ndarray,
    *,
    flip: int,
) -> None:
    """Write (latent, position, value) to each latent's slice, largest value first, then by token.

    `flip` makes a value's bits rise as values fall: 0 where all are negative, 2^31 - 1 where all
    are positive.
    """
    cursor = offsets[:-1].copy()
    for latent, position, number in entries:
        index_loops.scatter(latent, position, number, cursor, token, value)

    def sort(first: int, last: int) -> None:
        for i in range(first, last):
            own = slice(offsets[i], offsets[i + 1])
            # One sort of integers orders both.
            key = (value[own].view(np.uint32) ^ np.uint32(flip)).astype(np.uint64) << 32
            key |= token[own]
            key.sort()
            token[own] = key.astype(np.uint32)
            value[own] = ((key >> 32).astype(np.uint32) ^ np.uint32(flip)).view(np.float32)

    over_rows(len(offsets) - 1, sort)


def _offsets(data: Path, name: str, counts: Int64[np.ndarray, " n"]) -> np.ndarray:
    offsets = allocate(data, name, (len(counts) + 1,), np.int64)
    offsets[0] = 0
    np.cumsum(counts, out=offsets[1:])
    return np.array(offsets)


def _publish(folder: Path, manifest: Manifest) -> None:
    """Put the new data beside the old, name them in the manifest, and drop what was before."""
    building = folder / "building"
    with writing(folder, 2**20):
        (building / "data").rename(folder / manifest.data)
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    for old in folder.glob("data-*"):
        if old.name != manifest.data:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)
