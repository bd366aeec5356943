"""Activations on disk: harvested once, read by every later run of the same model, place and text.

    activations/<model and place>/about.json                    what they are, for those who tidy up
                                  <tokens>.safetensors          a shard: x (n, d_in), SHA-256 of x

A shard holds the counted vectors of consecutive sequences and is named by a hash of their tokens:
runs with another seed, another length of the same text or another config find it. It is written
whole or not at all. The vectors are those of a harvest, bit for bit, wherever a sequence's
activations do not depend on which others share its forward pass: a test holds this for the bundled
model on a CPU; on a GPU the two may differ by rounding.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gsae_core.config import Site, hook_name
from gsae_core.errors import InputError
from gsae_core.files import free_bytes, readable, replace_durably, write_json, writing
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest, Harvester, Stopwatch, check_finite, default_rows
from gsae_core.lm.model import LanguageModel
from gsae_core.machine import cache_folder

log = logging.getLogger(__name__)

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
    rows = default_rows(sequences.n_ctx, model.device)
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "hook_name": hook_name(layer, site),
        "n_ctx": sequences.n_ctx,
        # What rounding may depend on.
        "rows_per_pass": rows,
        "device": model.device.type,
        "torch": torch.__version__,
    }
    name = sha256(repr(sorted(about.items())).encode()).hexdigest()[:32]
    folder = cache_folder("activations") / name
    cache = CachedActivations(model, sequences, folder, layer=layer, site=site, rows=rows)
    if not (folder / "about.json").exists():
        write_json(folder / "about.json", {"model": model.name} | about)
    return cache


def fingerprint(model: LanguageModel) -> str:
    """Return a hash of the weights, the config, the precision and the numerics.

    Names and revisions do not enter: two folders with the same weights have one fingerprint.
    """
    config = getattr(model.hf, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
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
    """A harvest whose vectors come from shards in `folder`; missing or damaged ones are made first.

    They are kept in the model's precision where that loses nothing.
    """

    def __init__(
        self,
        model: Harvester,
        sequences: SequenceSet,
        folder: Path,
        *,
        layer: int,
        site: Site,
        rows: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        super().__init__(model, sequences, layer=layer, site=site, rows=rows)
        self.folder, self._dtype = folder, model.dtype
        self._disk_watch = Stopwatch(torch.device("cpu"))
        per_row = sequences.n_ctx * self.d_in * self._dtype.itemsize
        # Whole passes, so that the passes of a shard do not depend on where the text ends.
        self._shard_rows = max(1, shard_bytes // (per_row * self.rows)) * self.rows
        self._edges = [*range(0, len(sequences), self._shard_rows), len(sequences)]
        self._first = np.concatenate([[0], np.cumsum(sequences.counts)])
        self._open: dict[int, Tensor] = {}
        with writing(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds spent reading, checking and writing shards, and in the language model, so far."""
        return super().seconds + self._disk_watch.seconds

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return int(self._first[-1]) * self.d_in * self._dtype.itemsize

    def fill(self) -> None:
        """Harvest every shard that is missing; say first how large the cache is.

        Raises:
            InputError: if the disk lacks the room, before anything is harvested, or on the way; if
                a vector is not finite, and then its shard is not written.
        """
        missing = [k for k, path in enumerate(self._paths) if not path.exists()]
        need = sum(self._n_vectors(k) for k in missing) * self.d_in * self._dtype.itemsize
        log.info(
            "activation cache: %s for %d vectors, %s of them still to be harvested, in %s",
            readable(self.n_bytes),
            self._first[-1],
            readable(need),
            self.folder,
        )
        if need > (free := free_bytes(self.folder)):
            raise InputError(
                f"expected {readable(need)} free on the disk of {self.folder} for the activation "
                f"cache, found {readable(free)}; make room, set XDG_CACHE_HOME to a folder on "
                "another disk, or train without --cache-activations"
            )
        for done, k in enumerate(missing, 1):
            self._shard(k)
            log.info("activation cache: %d of %d missing shards", done, len(missing))

    def vectors(self, which: np.ndarray) -> Iterator[Float[Tensor, "vectors d_in"]]:
        """Yield the counted vectors of sequences, ascending, float32; a shard's share at a time."""
        for k in np.unique(which // self._shard_rows):
            x = self._shard(int(k))
            with self._disk_watch.running():
                mine = which[which // self._shard_rows == k]
                starts = self._first[mine] - self._first[self._edges[k]]
                counts = self.sequences.counts[mine]
                runs = [np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)]
                found = x[torch.from_numpy(np.concatenate(runs))].float().to(self.device)
            if len(found):
                yield found

    @cached_property
    def _paths(self) -> list[Path]:
        """A shard is named by a hash of its tokens."""
        paths = []
        for start, stop in pairwise(self._edges):
            ids, mask = self.sequences[start:stop]
            digest = sha256(repr(tuple(ids.shape)).encode())
            digest.update(ids.numpy().tobytes())
            digest.update(mask.numpy().tobytes())
            paths.append(self.folder / f"{digest.hexdigest()[:32]}.safetensors")
        return paths

    def _n_vectors(self, k: int) -> int:
        start, stop = self._edges[k : k + 2]
        return int(self._first[stop] - self._first[start])

    def _shard(self, k: int) -> Float[Tensor, "vectors d_in"]:
        """Return a shard, mapped into memory, checked or harvested first."""
        if k in self._open:
            return self._open[k]
        path = self._paths[k]
        if (x := self._checked(path, k)) is None:
            with self._alone():
                # Another run may have harvested it meanwhile.
                if (x := self._checked(path, k)) is None:
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
        with self._disk_watch.running():
            try:
                with safe_open(path, "pt") as file:
                    x, kept = file.get_tensor("x"), (file.metadata() or {}).get("sha256")
            except (SafetensorError, OSError) as error:
                reason = str(error)
            else:
                if x.shape == (self._n_vectors(k), self.d_in) and kept == _sha256(x):
                    # An earlier version wrote them without a check.
                    check_finite(x, layer=self.layer, site=self.site, dtype=self._dtype)
                    return x
                reason = "its checksum is another's"
        log.warning(
            "expected the activations that were written to %s, got damaged ones (%s); "
            "harvesting them again",
            path,
            reason,
        )
        path.unlink(missing_ok=True)
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within, no other run harvests for this folder."""
        from filelock import FileLock, Timeout

        held = FileLock(self.folder / ".lock")
        try:
            held.acquire(timeout=1)
        except Timeout:
            log.info("activation cache: another run is filling it; waiting for its shard")
            held.acquire()
        try:
            yield
        finally:
            held.release()

    def _write(self, path: Path, k: int) -> None:
        x = torch.empty(self._n_vectors(k), self.d_in)
        done = 0
        for part in super().vectors(np.arange(*self._edges[k : k + 2])):
            x[done : done + len(part)] = part.cpu()
            done += len(part)
        assert done == len(x)
        with self._disk_watch.running():
            narrow = x.to(self._dtype)
            x = narrow if torch.equal(narrow.float(), x) else x
            for left in self.folder.glob(f".{path.name}.*.tmp"):
                left.unlink()  # of a killed process: who writes holds the lock
            save = partial(save_file, {"x": x}, metadata={"sha256": _sha256(x)})
            replace_durably(path, save, n_bytes=x.numel() * x.element_size())


def _sha256(x: Tensor) -> str:
    # As bytes: numpy has no bfloat16.
    return sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
