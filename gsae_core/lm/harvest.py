"""Sequences -> the activation vectors of their counted tokens, a forward pass at a time.

On a CPU the passes run one on each core: a pass whose products are spread over the cores waits at
every layer norm and softmax. Each pass has one thread to itself, however many there are, so the
number of cores changes no bit.

On disk, vectors are harvested once and read by every later run of the same model, place and text:

    activations/<model and place>/about.json            what they are
                                  <tokens>.safetensors  a shard: x (n, d_in), SHA-256 of x, and
                                                        the ids of its tokens

This is a folder as `lm.stored` reads them; one that `harvest` writes differs in the shards' names.

A shard holds the counted vectors of consecutive sequences and is named by a hash of their tokens:
runs with another seed, another length of the same text or another config find it. The vectors are
those of a harvest, bit for bit, wherever a sequence's activations do not depend on which others
share its forward pass: a test holds this on a CPU; on a GPU the two may differ by rounding.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property, partial
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gsae_core.config import Place, Site
from gsae_core.errors import InputError
from gsae_core.files import free_bytes, readable, replace_durably, write_json, writing
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import LanguageModel
from gsae_core.machine import cache_folder
from gsae_core.threads import one_thread_a_core

log: logging.Logger = logging.getLogger(__name__)

# Tokens in one forward pass. On a CPU the activations of a pass should stay in a core's cache: on
# two cores the bundled model harvests 22,700 tokens a second by 512 at a time, 21,800 by 2,048,
# 18,600 by 4,096. A GPU wants work; no GPU has been timed, and so many rows fill any for a product.
CPU_PASS_TOKENS, PASS_TOKENS = 2**9, 2**15

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_finite(
    x: Float[Tensor, "vectors d_in"], *, layer: int, site: Site, dtype: torch.dtype
) -> None:
    """Raise InputError if a vector is not finite; it waits for the device. `dtype`: the model's."""
    n_bad = int((~x.isfinite().all(dim=1)).sum())
    _refuse(n_bad, len(x), layer=layer, site=site, dtype=dtype)


def _refuse(n: int, of: int, *, layer: int, site: Site, dtype: torch.dtype) -> None:
    """Raise InputError if `n` of `of` vectors are not finite, unless `n` is 0."""
    if not n:
        return
    why = f"the language model computes in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        why += f", which overflows above {most:,.0f}; use float32 or bfloat16 for it (--dtype)"
    else:
        why += "; check its weights, or choose another layer or site"
    raise InputError(
        f"expected finite activations at {site} of layer {layer}, got {n:,} of {of:,} vectors "
        f"with infinite or NaN entries: {why}"
    )


class Harvest:
    """The counted vectors of sequences at one place of a language model, or at several at once.

    On `rows`, the sequences in a forward pass, rounding may depend. `beside` are further places;
    `layer`, `site`, `d_in`, `vectors` and `through` are of the first one. `unit`: what each vector
    is called where they are counted.
    """

    unit: str = "token"

    def __init__(
        self,
        model: LanguageModel,
        sequences: SequenceSet,
        *,
        layer: int,
        site: Site,
        beside: Sequence[Place] = (),
    ) -> None:
        self._model = model
        self.sequences: SequenceSet = sequences
        self.layer: int = layer
        self.site: Site = site
        self.places: tuple[Place, ...] = (Place(layer, site), *beside)
        self.rows: int = default_rows(sequences.n_ctx, model.device)
        self.widths: tuple[int, ...] = tuple(model.width(place.site) for place in self.places)
        self.d_in: int = self.widths[0]
        self.device: torch.device = model.device

    def vectors(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield the counted vectors of sequences, float32, in order, a part at a time."""
        return self.through(lambda x: x, which)

    def parts(self, which: np.ndarray) -> Iterator[tuple[Float[Tensor, "vectors _"], ...]]:
        """Yield what `vectors` does, of every place: those of the same tokens together."""
        if len(self.places) == 1:
            return ((x,) for x in self.vectors(which))
        return self._passes(lambda *found: found, which, self.places)

    def through(
        self, work: Callable[[Float[Tensor, "vectors d_in"]], Result], which: np.ndarray
    ) -> Iterator[Result]:
        """Yield what `work` makes of the vectors of each pass, in order.

        It runs where the pass ran: on a CPU in a thread that has one core, several at once. If a
        vector is not finite, InputError comes once all is read: do not keep what was yielded
        before. On a CPU, `work` is not called on passes with such a vector.
        """
        return self._passes(work, which, self.places[:1])

    def _passes(
        self, work: Callable[..., Result], which: np.ndarray, places: Sequence[Place]
    ) -> Iterator[Result]:
        """Do what `through` does; `work` takes the vectors of each place."""
        widths, one = self.widths[: len(places)], places[0]
        on_cpu = self.device.type == "cpu"
        groups = (which[start : start + self.rows] for start in range(0, len(which), self.rows))

        def task(group: np.ndarray) -> tuple[int, Int64[Tensor, " places"], list[Result]]:
            ids, mask = self.sequences[group]
            counted = mask.flatten().nonzero().squeeze(1)
            found = [torch.empty(0, d_in, device=self.device) for d_in in widths]
            if len(counted):
                if len(places) == 1:
                    found = [self._model.harvest(ids, layer=one.layer, site=one.site)]
                else:
                    found = self._model.harvest_places(ids, places)
                rows = counted.to(found[0].device)
                found = [x.flatten(0, 1).index_select(0, rows).float() for x in found]
            bad = torch.stack([(~x.isfinite().all(dim=1)).sum() for x in found])
            # On a GPU, to look at the number would be to wait for the pass.
            spoilt = on_cpu and bool(bad.any())
            return len(counted), bad, [work(*found)] if len(counted) and not spoilt else []

        n_threads = torch.get_num_threads() if on_cpu else 0
        n, n_bad = 0, torch.zeros(len(places), dtype=torch.int64)
        for n_read, bad, made in _side_by_side(task, groups, n_threads):
            n, n_bad = n + n_read, n_bad.to(bad.device) + bad
            yield from made
        for place, of_place in zip(places, n_bad.tolist(), strict=True):
            _refuse(of_place, n, layer=place.layer, site=place.site, dtype=self._model.dtype)


def default_rows(n_ctx: int, device: torch.device) -> int:
    """Return how many sequences a forward pass takes."""
    return max(1, (CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS) // n_ctx)


def _side_by_side(
    task: Callable[[Item], Result], items: Iterable[Item], n_threads: int
) -> Iterator[Result]:
    """Yield task(item) in order: `n_threads` at once, each with one thread; 0: here, one by one."""
    if n_threads == 0:
        yield from map(task, items)
        return
    # Two for each thread: one under way, and one to go on with while a result is being used.
    ahead = 2 * n_threads
    items, waiting = iter(items), deque[Future[Result]]()
    pool = one_thread_a_core(n_threads, os.getpid())
    try:
        waiting.extend(pool.submit(task, item) for item in islice(items, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(task, item) for item in islice(items, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


# --- Activations on disk

# Raise it when the same model, place and tokens come to give other shards.
FORMAT = 1

# A quarter of a minute of work for the bundled model on two cores: an interruption loses no more.
SHARD_BYTES = 2**28

# Fields of a Hugging Face config that say where a model came from, not what it computes.
ORIGIN = ("_name_or_path", "transformers_version", "architectures")


def open_cache(
    model: LanguageModel, sequences: SequenceSet, *, layer: int, site: Site
) -> "CachedActivations":
    """Return the cache of a model's activations at a place, in the user's cache folder."""
    return _open(model, sequences, Place(layer, site), fingerprint(model))


def open_caches(
    model: LanguageModel, sequences: SequenceSet, places: Sequence[Place]
) -> "CachedPlaces":
    """Return the caches of several places as one harvest."""
    mark = fingerprint(model)
    return CachedPlaces([_open(model, sequences, place, mark) for place in places])


def _open(
    model: LanguageModel, sequences: SequenceSet, place: Place, mark: str
) -> "CachedActivations":
    about = {
        "format": FORMAT,
        "fingerprint": mark,
        "hook_name": place.hook_name,
        "n_ctx": sequences.n_ctx,
        # What rounding may depend on.
        "rows_per_pass": default_rows(sequences.n_ctx, model.device),
        "device": model.device.type,
        "torch": torch.__version__,
    }
    name = sha256(repr(sorted(about.items())).encode()).hexdigest()[:32]
    folder = cache_folder("activations") / name
    cache = CachedActivations(model, sequences, folder, layer=place.layer, site=place.site)
    if not (folder / "about.json").exists():
        write_json(folder / "about.json", described(model, place) | about)
    return cache


def described(model: LanguageModel, place: Place) -> dict[str, Any]:
    """Return what about.json says of the language model and the place in it."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": model.name, "dtype": dtype, "numerics": model.numerics} | place._asdict()


def fingerprint(model: LanguageModel) -> str:
    """Return a hash of the weights, the config, the precision and the numerics.

    Names and revisions do not enter: two folders with the same weights have one fingerprint.
    """
    config: Any = getattr(model.hf, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = sorted((name, repr(v)) for name, v in fields.items() if name not in ORIGIN)
    # Eager attention and SDPA round differently; so do two ways of computing one activation
    # function, which the tree of modules shows.
    attention = getattr(config, "_attn_implementation", None)
    module = model.hf if model._bridge is None else model._bridge
    head = (repr(module), model.numerics, attention, settings)
    digest = sha256(repr(head).encode())
    for name, weight in module.state_dict().items():
        data = weight.detach().cpu().contiguous()
        digest.update(repr((name, data.dtype, tuple(data.shape))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CachedActivations(Harvest):
    """A harvest from shards in `folder`; missing or damaged ones are made first.

    They are kept in the model's precision where that loses nothing. `through` runs the model.
    Shards are named by their tokens, or called `split` and numbered.
    """

    def __init__(
        self,
        model: LanguageModel,
        sequences: SequenceSet,
        folder: Path,
        *,
        layer: int,
        site: Site,
        split: str | None = None,
    ) -> None:
        super().__init__(model, sequences, layer=layer, site=site)
        self.folder: Path = folder
        self._dtype, self._split = model.dtype, split
        per_row = sequences.n_ctx * self.d_in * self._dtype.itemsize
        # Whole passes, so that the passes of a shard do not depend on where the text ends.
        self._shard_rows = max(1, SHARD_BYTES // (per_row * self.rows)) * self.rows
        self._edges = [*range(0, len(sequences), self._shard_rows), len(sequences)]
        self._open: dict[int, Tensor] = {}
        with writing(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)

    def fill(self) -> None:
        """Harvest every shard that is missing; the log says first how large the cache is.

        InputError if the disk lacks the room, or a vector is not finite: no such shard is written.
        """
        for _ in self.filling():
            pass

    def filling(self) -> Iterator[int]:
        """Do what `fill` does; yield, after each shard, how many vectors it has."""
        missing = self._missing()
        size = self.d_in * self._dtype.itemsize
        need = size * self.n_missing
        log.info(
            f"activation cache: {readable(need)} still to be harvested of "
            f"{readable(size * self.sequences.n_tokens)} in {self.folder}"
        )
        self._check_room(need)
        for done, k in enumerate(missing, 1):
            self._shard(k)
            log.info("activation cache: %d of %d missing shards", done, len(missing))
            yield self._n_vectors(k)

    @property
    def n_shards(self) -> int:
        """How many shards there are or will be."""
        return len(self._edges) - 1

    @property
    def n_missing(self) -> int:
        """How many vectors the missing shards have."""
        return sum(map(self._n_vectors, self._missing()))

    def _missing(self) -> list[int]:
        return [k for k, path in enumerate(self._paths) if not path.exists()]

    def _check_room(self, need: int) -> None:
        if need > (free := free_bytes(self.folder)):
            raise InputError(
                f"expected {readable(need)} free on the disk of {self.folder} for the activation "
                f"cache, found {readable(free)}; make room, "
                + (
                    "or write to another disk (--to)"
                    if self._split
                    else "set XDG_CACHE_HOME to a folder on another disk, or train without "
                    "--cache-activations"
                )
            )

    def vectors(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield the counted vectors of ascending sequences, float32; a shard's share at a time."""
        assert (np.diff(which) > 0).all(), "shards are read in ascending order"
        for k in np.unique(which // self._shard_rows):
            rows = np.arange(*self._edges[k : k + 2])
            wanted = np.repeat(np.isin(rows, which), self.sequences.counts[rows])
            found = self._shard(int(k))[torch.from_numpy(wanted)].float().to(self.device)
            if len(found):
                yield found

    @cached_property
    def _paths(self) -> list[Path]:
        paths = []
        if self._split:
            names = (f"{self._split}-{k:05d}.safetensors" for k in range(self.n_shards))
            return [self.folder / name for name in names]
        for start, stop in pairwise(self._edges):
            ids, mask = self.sequences[start:stop]
            digest = sha256(repr(tuple(ids.shape)).encode())
            digest.update(ids.numpy().tobytes())
            digest.update(mask.numpy().tobytes())
            paths.append(self.folder / f"{digest.hexdigest()[:32]}.safetensors")
        return paths

    def _n_vectors(self, k: int) -> int:
        return int(self.sequences.counts[slice(*self._edges[k : k + 2])].sum())

    def _ids(self, k: int) -> Integer[Tensor, "rows n_ctx"]:
        """Return the token ids of a shard, as it holds them."""
        return self.sequences[slice(*self._edges[k : k + 2])].ids.int()

    def _shard(self, k: int) -> Float[Tensor, "vectors d_in"]:
        """Return a shard, mapped into memory, checked or harvested first."""
        if k in self._open:
            return self._open[k]
        path = self._paths[k]
        if (x := self._checked(path, k)) is None:
            # No other run harvests for this folder meanwhile; one may have harvested it before.
            with FileLock(self.folder / ".lock"):
                if not path.exists():
                    self._write(path, k)
            x = self._checked(path, k)
        if x is None:
            raise InputError(
                f"expected to read back what was just written to {path}, got something else; check "
                "the disk, or set XDG_CACHE_HOME to a folder on another one"
            )
        self._open[k] = x
        return x

    def _checked(self, path: Path, k: int) -> Tensor | None:
        """Return a shard that is whole; None where there is none, and then no file either."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                x, kept = file.get_tensor("x"), (file.metadata() or {}).get("sha256")
                # Earlier versions wrote vectors alone.
                ids = file.get_tensor("ids") if "ids" in file.keys() else self._ids(k)  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            reason = str(error)
        else:
            if (
                x.shape == (self._n_vectors(k), self.d_in)
                and kept == _sha256(x)
                and ids.equal(self._ids(k))
            ):
                # An earlier version wrote them without a check.
                check_finite(x, layer=self.layer, site=self.site, dtype=self._dtype)
                return x
            reason = "its checksum is another's"
        log.warning(
            f"expected the activations that were written to {path}, got damaged ones ({reason}); "
            "harvesting them again"
        )
        path.unlink(missing_ok=True)
        return None

    def _write(self, path: Path, k: int) -> None:
        x = torch.empty(self._n_vectors(k), self.d_in)
        done = 0
        for part in super().vectors(np.arange(*self._edges[k : k + 2])):
            x[done : done + len(part)] = part.cpu()
            done += len(part)
        assert done == len(x)
        self._save(path, x)

    def _save(self, path: Path, x: Float[Tensor, "vectors d_in"]) -> None:
        """Write a shard; the caller holds the folder's lock."""
        narrow = x.to(self._dtype)
        x = narrow if torch.equal(narrow.float(), x) else x
        for left in self.folder.glob(f".{path.name}.*.tmp"):
            left.unlink()  # of a killed process
        tensors = {"x": x, "ids": self._ids(self._paths.index(path))}
        save = partial(save_file, tensors, metadata={"sha256": _sha256(x)})
        replace_durably(path, save, n_bytes=x.numel() * x.element_size())


class CachedPlaces(Harvest):
    """A harvest of several places, each from its own cache."""

    def __init__(self, caches: Sequence[CachedActivations]) -> None:
        first, *others = caches
        super().__init__(
            first._model,
            first.sequences,
            layer=first.layer,
            site=first.site,
            beside=[place for cache in others for place in cache.places],
        )
        self.caches: tuple[CachedActivations, ...] = tuple(caches)

    def fill(self) -> None:
        """Do what each cache's `fill` does, in one pass over the text."""
        with ExitStack() as locks:
            # In the same order everywhere, so that no two runs wait for each other.
            for cache in sorted(self.caches, key=lambda cache: cache.folder):
                locks.enter_context(FileLock(cache.folder / ".lock"))
            missing = [set(cache._missing()) for cache in self.caches]
            sizes = [cache.d_in * cache._dtype.itemsize for cache in self.caches]
            need = sum(
                size * cache._n_vectors(k)
                for cache, lacks, size in zip(self.caches, missing, sizes, strict=True)
                for k in lacks
            )
            log.info(
                f"activation cache: {readable(need)} still to be harvested of "
                f"{readable(sum(sizes) * self.sequences.n_tokens)} for {len(self.caches)} places"
            )
            self.caches[0]._check_room(need)
            made: list[list[Tensor]] = [[] for _ in self.caches]
            # Shards of a wide place hold fewer rows.
            edges = np.unique(np.concatenate([cache._edges for cache in self.caches])).tolist()
            for start, stop in pairwise(edges):
                each = enumerate(self.caches)
                lacking = [i for i, cache in each if start // cache._shard_rows in missing[i]]
                self._harvest(lacking, start, stop, made)

    def _harvest(self, lacking: list[int], start: int, stop: int, made: list[list[Tensor]]) -> None:
        """Add what some of the places have in a stretch of rows; write the shards it completes."""
        if not lacking:
            return
        first, *beside = (self.places[i] for i in lacking)
        harvest = Harvest(
            self._model, self.sequences, layer=first.layer, site=first.site, beside=beside
        )
        for found in harvest.parts(np.arange(start, stop)):
            for i, x in zip(lacking, found, strict=True):
                made[i].append(x.cpu())
        for i in lacking:
            cache = self.caches[i]
            if stop in cache._edges:
                k = start // cache._shard_rows
                cache._save(cache._paths[k], torch.cat([torch.empty(0, cache.d_in), *made[i]]))
                made[i].clear()
                log.info(f"activation cache: shard {k + 1} of {self.places[i].hook_name}")

    def vectors(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield what the first place's cache does."""
        return self.caches[0].vectors(which)

    def parts(self, which: np.ndarray) -> Iterator[tuple[Float[Tensor, "vectors _"], ...]]:
        """Yield the vectors of ascending sequences at every place, a shard's share at a time."""
        block = which // min(cache._shard_rows for cache in self.caches)
        for k in np.unique(block):
            rows = which[block == k]
            if self.sequences.counts[rows].any():
                yield tuple(torch.cat([*cache.vectors(rows)]) for cache in self.caches)


def _sha256(x: Tensor) -> str:
    # As bytes: numpy has no bfloat16.
    return sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
