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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
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
        model: LanguageModel | Any,  # or what answers as much: a folder of vectors
        sequences: SequenceSet,
        *,
        layer: int,
        site: Site,
        beside: Sequence[Place] = (),
    ) -> None:
        self._model: LanguageModel = model
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
        return (first for first, *_ in self.parts(which))

    def parts(self, which: np.ndarray) -> Iterator[tuple[Float[Tensor, "vectors _"], ...]]:
        """Yield what `vectors` does, of every place: those of the same tokens together."""
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
        widths = [self.widths[self.places.index(place)] for place in places]
        on_cpu = self.device.type == "cpu"
        groups = (which[start : start + self.rows] for start in range(0, len(which), self.rows))

        def task(group: np.ndarray) -> tuple[int, Int64[Tensor, " places"], list[Result]]:
            ids, mask = self.sequences[group]
            counted = mask.flatten().nonzero().squeeze(1)
            found = [torch.empty(0, d_in, device=self.device) for d_in in widths]
            if len(counted):
                if len(places) == 1:
                    found = [self._model.harvest(ids, **places[0]._asdict())]
                else:
                    found = self._model.harvest_places(ids, places)
                rows = counted.to(found[0].device)
                found = [x.flatten(0, 1).index_select(0, rows).float() for x in found]
            bad = torch.stack([(~x.isfinite().all(dim=1)).sum() for x in found])
            # On a GPU, to look at the number would be to wait for the pass.
            spoilt = on_cpu and bool(bad.any())
            return len(counted), bad, [work(*found)] if len(counted) and not spoilt else []

        n, n_bad = 0, torch.zeros(len(places), dtype=torch.int64)
        for n_read, bad, made in side_by_side(task, groups, self.device):
            n, n_bad = n + n_read, n_bad.to(bad.device) + bad
            yield from made
        for place, of_place in zip(places, n_bad.tolist(), strict=True):
            _refuse(of_place, n, layer=place.layer, site=place.site, dtype=self._model.dtype)


def default_rows(n_ctx: int, device: torch.device) -> int:
    """Return how many sequences a forward pass takes."""
    return max(1, (CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS) // n_ctx)


def side_by_side(
    task: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield task(item) in order: on a CPU one on each core, elsewhere here, one by one."""
    if device.type != "cpu":
        yield from map(task, items)
        return
    n_threads = torch.get_num_threads()
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
    model: LanguageModel, sequences: SequenceSet, places: Sequence[Place]
) -> "CachedActivations":
    """Return the cache of a model's activations at some places, in the user's cache folder."""
    mark, folders = fingerprint(model), dict[Place, Path]()
    for place in places:
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
        folders[place] = folder = cache_folder("activations") / name
        if not (folder / "about.json").exists():
            with writing(folder, 0):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "about.json", described(model, place) | about)
    return CachedActivations(model, sequences, folders)


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
    head = (repr(model.module), model.numerics, attention, settings)
    digest = sha256(repr(head).encode())
    for name, weight in model.module.state_dict().items():
        data = weight.detach().cpu().contiguous()
        digest.update(repr((name, data.dtype, tuple(data.shape))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CachedActivations(Harvest):
    """A harvest from shards, of each place in its folder; missing or damaged ones are made first.

    They are kept in the model's precision where that loses nothing. `through` runs the model.
    Shards are named by their tokens, or called `split` and numbered.
    """

    def __init__(
        self,
        model: LanguageModel,
        sequences: SequenceSet,
        folders: Mapping[Place, Path],
        *,
        split: str | None = None,
    ) -> None:
        first, *beside = folders
        super().__init__(model, sequences, layer=first.layer, site=first.site, beside=beside)
        self.folder: Path = folders[first]
        self._split = split
        self.shards: list[Shards] = []
        """Of each place."""
        for (place, folder), d_in in zip(folders.items(), self.widths, strict=True):
            per_row = sequences.n_ctx * d_in * model.dtype.itemsize
            # Whole passes, so that the passes of a shard do not depend on where the text ends.
            n_rows = max(1, SHARD_BYTES // (per_row * self.rows)) * self.rows
            self.shards.append(Shards(sequences, place, folder, d_in, model.dtype, n_rows, split))
        # Shards of a wide place hold fewer rows.
        self._edges = np.unique(np.concatenate([each.edges for each in self.shards]))

    def fill(self) -> None:
        """Harvest every shard that is missing; the log says first how large the cache is.

        InputError if the disk lacks the room, or a vector is not finite: no such shard is written.
        """
        for _ in self.filling():
            pass

    def filling(self) -> Iterator[int]:
        """Do what `fill` does, in one pass over the text; yield how many vectors a shard has."""
        with ExitStack() as locks:
            # In the same order everywhere, so that no two runs wait for each other.
            for folder in sorted(each.folder for each in self.shards):
                locks.enter_context(FileLock(folder / ".lock"))
            missing = [each.missing() for each in self.shards]
            self._check_room(missing)
            made: list[list[Tensor]] = [[] for _ in self.shards]
            for start, stop in pairwise(self._edges.tolist()):
                lacking = [
                    i for i, each in enumerate(self.shards) if start // each.n_rows in missing[i]
                ]
                yield from self._harvest(lacking, start, stop, made)

    @property
    def n_shards(self) -> int:
        """How many shards there are or will be of each place."""
        return len(self.shards[0].paths)

    @property
    def n_missing(self) -> int:
        """How many vectors the missing shards have."""
        return sum(each.n_vectors(k) for each in self.shards for k in each.missing())

    def _check_room(self, missing: list[list[int]]) -> None:
        """Log how much is to be harvested; InputError if the disk lacks the room for it."""
        sizes = [each.d_in * each.dtype.itemsize for each in self.shards]
        each_missing = zip(sizes, self.shards, missing, strict=True)
        need = sum(size * each.n_vectors(k) for size, each, which in each_missing for k in which)
        log.info(
            f"activation cache: {readable(need)} still to be harvested of "
            f"{readable(sum(sizes) * self.sequences.n_tokens)} in "
            f"{', '.join(str(each.folder) for each in self.shards)}"
        )
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

    def _harvest(
        self, lacking: list[int], start: int, stop: int, made: list[list[Tensor]]
    ) -> Iterator[int]:
        """Add what some of the places have in a stretch of rows; write the shards it completes.

        The caller holds the locks of their folders. Yield how many vectors each shard has.
        """
        if not lacking:
            return
        places = [self.places[i] for i in lacking]
        for found in self._passes(lambda *x: x, np.arange(start, stop), places):
            for i, x in zip(lacking, found, strict=True):
                made[i].append(x.cpu())
        for each, parts in ((self.shards[i], made[i]) for i in lacking):
            if stop in each.edges:
                k = start // each.n_rows
                each.save(k, torch.cat([torch.empty(0, each.d_in), *parts]))
                parts.clear()
                name = each.place.hook_name
                log.info(f"activation cache: shard {k + 1} of {len(each.paths)} of {name}")
                yield each.n_vectors(k)

    def parts(self, which: np.ndarray) -> Iterator[tuple[Float[Tensor, "vectors _"], ...]]:
        """Yield the vectors of ascending sequences at every place, a shard's share at a time."""
        assert (np.diff(which) > 0).all(), "shards are read in ascending order"
        for rows in np.split(which, np.searchsorted(which, self._edges)):
            if self.sequences.counts[rows].any():
                yield tuple(self._read(i, rows) for i in range(len(self.shards)))

    def _read(self, i: int, which: np.ndarray) -> Float[Tensor, "vectors _"]:
        """Return the vectors of ascending sequences at a place; they lie in one of its shards."""
        each = self.shards[i]
        k = int(which[0]) // each.n_rows
        start, stop = each.edges[k : k + 2]
        if (x := each.checked(k)) is None:
            # No other run harvests for this folder meanwhile; one may have harvested it before.
            with FileLock(each.folder / ".lock"):
                if not each.paths[k].exists():
                    for _ in self._harvest([i], start, stop, [[] for _ in self.shards]):
                        pass
            x = each.read_back(k)
        rows = np.arange(start, stop)
        wanted = np.repeat(np.isin(rows, which), self.sequences.counts[rows])
        return x[torch.from_numpy(wanted)].float().to(self.device)


@dataclass
class Shards:
    """The files of a place in a folder."""

    sequences: SequenceSet
    place: Place
    folder: Path
    d_in: int
    dtype: torch.dtype
    n_rows: int
    """Sequences in each but the last."""
    split: str | None

    def __post_init__(self) -> None:
        self.edges: list[int] = [*range(0, len(self.sequences), self.n_rows), len(self.sequences)]
        self._open: dict[int, Tensor] = {}
        with writing(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def paths(self) -> list[Path]:
        """Where each shard is or will be."""
        if self.split:
            names = (f"{self.split}-{k:05d}" for k in range(len(self.edges) - 1))
            return [self.folder / f"{name}.safetensors" for name in names]
        paths = []
        for start, stop in pairwise(self.edges):
            ids, mask = self.sequences[start:stop]
            digest = sha256(repr(tuple(ids.shape)).encode())
            digest.update(ids.numpy().tobytes())
            digest.update(mask.numpy().tobytes())
            paths.append(self.folder / f"{digest.hexdigest()[:32]}.safetensors")
        return paths

    def missing(self) -> list[int]:
        """Return which shards are not there."""
        return [k for k, path in enumerate(self.paths) if not path.exists()]

    def n_vectors(self, k: int) -> int:
        """Return how many vectors a shard has."""
        return int(self.sequences.counts[slice(*self.edges[k : k + 2])].sum())

    def _ids(self, k: int) -> Integer[Tensor, "rows n_ctx"]:
        """Return the token ids of a shard, as it holds them."""
        return self.sequences[slice(*self.edges[k : k + 2])].ids.int()

    def read_back(self, k: int) -> Float[Tensor, "vectors d_in"]:
        """Return a shard that was just written; InputError if it is another."""
        if (x := self.checked(k)) is None:
            raise InputError(
                f"expected to read back what was just written to {self.paths[k]}, got something "
                "else; check the disk, or set XDG_CACHE_HOME to a folder on another one"
            )
        return x

    def checked(self, k: int) -> Float[Tensor, "vectors d_in"] | None:
        """Return a shard that is whole; None where there is none, and then no file either."""
        if k in self._open:
            return self._open[k]
        if not (path := self.paths[k]).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                x, kept = file.get_tensor("x"), (file.metadata() or {}).get("sha256")
                # Earlier versions wrote vectors alone.
                ids = file.get_tensor("ids") if "ids" in file.keys() else self._ids(k)  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            reason = str(error)
        else:
            shape = (self.n_vectors(k), self.d_in)
            if x.shape == shape and kept == _sha256(x) and ids.equal(self._ids(k)):
                # An earlier version wrote them without a check.
                check_finite(x, **self.place._asdict(), dtype=self.dtype)
                self._open[k] = x
                return x
            reason = "its checksum is another's"
        log.warning(
            f"expected the activations that were written to {path}, got damaged ones ({reason}); "
            "harvesting them again"
        )
        path.unlink(missing_ok=True)
        return None

    def save(self, k: int, x: Float[Tensor, "vectors d_in"]) -> None:
        """Write a shard; the caller holds the folder's lock."""
        path, narrow = self.paths[k], x.to(self.dtype)
        x = narrow if torch.equal(narrow.float(), x) else x
        for left in self.folder.glob(f".{path.name}.*.tmp"):
            left.unlink()  # of a killed process
        save = partial(save_file, {"x": x, "ids": self._ids(k)}, metadata={"sha256": _sha256(x)})
        replace_durably(path, save, n_bytes=x.numel() * x.element_size())
        self.read_back(k)


def _sha256(x: Tensor) -> str:
    # As bytes: numpy has no bfloat16.
    return sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
