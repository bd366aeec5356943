"""One pass of a language model and an SAE -> shards -> the feature index.

    building/  plan.json  band.npy  shard-00000.safetensors ...

A shard holds what fires on about 2^16 tokens. It is whole or not there, and what is in it depends
on the plan alone, so an interrupted build loses one shard and ends with the same bytes. A building
folder with another plan, of other weights or tokens, is thrown away.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gsae_core.analysis.features.collect import CALIBRATION_TOKENS, Finder, Found, NearBand, finder
from gsae_core.analysis.features.files import MANIFEST, SCHEMA_VERSION, Manifest, Split
from gsae_core.analysis.features.shards import (
    Part,
    Shard,
    cut_into_shards,
    sort_shards,
    take_up,
    tensors_sha256,
    tokens_sha256,
    versions,
)
from gsae_core.analysis.features.table import describe
from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.files import replace_durably, write_json, writing
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.base import SAE, check_width
from gsae_core.text import Progress

log = logging.getLogger(__name__)


def build_index(
    model: LanguageModel,
    sae: SAE,
    parts: Sequence[Part],
    folder: Path,
    *,
    layer: int,
    site: Site,
    name: str,
    text: str,
    weights_sha256: str | None = None,
    revision: str | None = None,
    n_tokens_asked: int | None = None,
    shortage: str | None = None,
) -> Iterator[Progress]:
    """Build the feature index of an SAE in `folder`, from where an earlier build stopped.

    An index that is there stays, and stays open for its readers, until the new one is whole.

    Args:
        model: the language model, read at `layer` and `site`.
        sae: takes raw activations, on the model's device; of any architecture.
        parts: what to read, in this order.
        folder: `runs/<id>/features/<name>`, or any other.
        name: of the SAE.
        text: name of the corpus.
        weights_sha256: of the SAE's file; None: of its tensors.
        n_tokens_asked: how many tokens somebody wanted; None: as many as `parts` have.
        shortage: why they are fewer, where they are.

    Raises:
        InputError: while iterating: if the SAE is of another width, there is no token to read, or
            the disk is full.
    """
    model.check(layer, site)
    check_width(sae, model.width(site), name=name, hook_name=f"{site} of layer {layer}")
    began = time.time()
    building = folder / "building"
    shards = cut_into_shards(parts)
    n_tokens = sum(int(part.sequences.counts[: part.n].sum()) for part in parts)
    if not n_tokens:
        raise InputError("expected text to index, got no tokens that count; give more --tokens")
    plan = {
        "schema_version": SCHEMA_VERSION,
        "weights_sha256": weights_sha256 or tensors_sha256(sae),
        "tokens_sha256": tokens_sha256(parts),
        "hook": [layer, site],
        "device": model.device.type,
        "shards": [list(shard) for shard in shards],
    }
    take_up(building, plan)
    harvests = [Harvest(model, part.sequences, layer=layer, site=site) for part in parts]
    band = _band(building, sae, parts, harvests, n_tokens=n_tokens)
    find, done = finder(sae, band), 0
    yield Progress("indexing", done, n_tokens, "token")
    for number, shard in enumerate(shards):
        path = building / f"shard-{number:05d}.safetensors"
        if not _is_whole(path):
            _write_shard(path, _read_shard(harvests[shard.part], shard, find))
        counts = parts[shard.part].sequences.counts
        done += int(counts[shard.first : shard.last].sum())
        yield Progress("indexing", done, n_tokens, "token")
    paths = [building / f"shard-{number:05d}.safetensors" for number in range(len(shards))]
    data = building / "data"
    yield Progress("sorting", 0, sae.d_sae, "feature")
    totals = sort_shards(paths, shards, parts, data, d_sae=sae.d_sae)
    yield Progress("describing", 0, sae.d_sae, "feature")
    facts = describe(
        data, sae, model, layer=layer, site=site, gate_open=totals.gate_open, toward=totals.toward
    )
    manifest = Manifest(
        sae=name,
        architecture=sae.architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        weights_sha256=plan["weights_sha256"],
        model=model.name,
        revision=revision,
        numerics=model.numerics,
        layer=layer,
        site=site,
        text=text,
        n_ctx=parts[0].sequences.n_ctx,
        splits=tuple(
            Split(name=p.split, n_sequences=p.n, n_tokens=int(p.sequences.counts[: p.n].sum()))
            for p in parts
        ),
        tokens_sha256=plan["tokens_sha256"],
        n_tokens_asked=n_tokens_asked or n_tokens,
        shortage=shortage if n_tokens < (n_tokens_asked or n_tokens) else None,
        n_tokens=n_tokens,
        n_entries=totals.n_entries,
        n_near=totals.n_near,
        l0=totals.n_entries / n_tokens,
        fvu=totals.fvu,
        gamma=totals.gamma,
        companion_stride=facts.companion_stride,
        logit_tokens=facts.logit_tokens,
        made=time.time(),
        seconds=time.time() - began,
        versions=versions(),
        data=f"data-{time.time_ns():x}",
        files={path.name: path.stat().st_size for path in sorted(data.iterdir())},
    )
    _publish(folder, manifest)
    yield Progress("describing", sae.d_sae, sae.d_sae, "feature")


def _band(
    building: Path, sae: SAE, parts: Sequence[Part], harvests: Sequence[Harvest], *, n_tokens: int
) -> Float[Tensor, " d_sae"]:
    path = building / "band.npy"
    device = sae.W_dec.device
    if path.is_file():
        return torch.from_numpy(np.load(path)).to(device)
    n_sequences = sum(part.n for part in parts)
    share = min(1.0, CALIBRATION_TOKENS / n_tokens)
    batches, n_sample = [], 0
    for part, harvest in zip(parts, harvests, strict=True):
        # Evenly spread, and from every part as many as it has a share in the whole.
        n = min(part.n, max(1, round(share * part.n)))
        which = np.unique(np.linspace(0, part.n - 1, n).round().astype(np.int64))
        batches.append((harvest, which))
        n_sample += int(part.sequences.counts[which].sum())
    log.info("band of near misses from %d tokens of %d sequences", n_sample, n_sequences)
    band = NearBand(sae, n_sample=max(n_sample, 1), n_tokens=n_tokens)
    for harvest, which in batches:
        for _ in harvest.through(band.add, which):
            pass
    array = band.width.float().cpu().numpy()

    def write(to: Path) -> None:
        with to.open("wb") as file:
            np.save(file, array)

    replace_durably(path, write, n_bytes=array.nbytes)
    return torch.from_numpy(array).to(device)


SUMMED = ("gate_open", "toward", "x_sum", "sums")


def _read_shard(harvest: Harvest, shard: Shard, find: Finder) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    found: list[Found] = []
    for each in harvest.through(find, np.arange(shard.first, shard.last)):
        totals = {name: totals.get(name, 0) + getattr(each, name) for name in SUMMED}
        # What is added up already is as long as the dictionary is wide, each time.
        found.append(each._replace(**{name: getattr(each, name)[:0] for name in SUMMED}))
    starts = np.cumsum([0, *(len(each.counts) for each in found)])
    rows = [each.near_row + start for each, start in zip(found, starts, strict=False)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(each, name) for each in found])

    return {
        "counts": joined("counts").astype(np.uint32),
        "latent": joined("latent"),
        "value": joined("value"),
        "near_row": np.concatenate(rows).astype(np.uint32),
        "near_latent": joined("near_latent"),
        "near_margin": joined("near_margin"),
        **totals,
    }


def _write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    n_bytes = sum(array.nbytes for array in arrays.values())
    replace_durably(path, lambda to: save_file(arrays, to), n_bytes=n_bytes)


def _is_whole(path: Path) -> bool:
    """Return whether a shard is there and can be read; one that cannot is made again."""
    if not path.is_file():
        return False
    try:
        load_file(path)
    except SafetensorError as error:
        log.warning("%s is damaged (%s): its tokens are read again", path.name, error)
        return False
    return True


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
