"""Vectors in files of any program: a folder of shards, mapped into memory; without torch.

    FOLDER/  *.safetensors  *.npy  *.parquet     shards: vectors in rows, read in the order of their
                                                 names, numbers in them as numbers
             captions.txt  .jsonl  .csv  .tsv  .parquet      optional, a row for each vector
             about.json                          of activations of a language model: which

| shard | vectors | captions and images |
|---|---|---|
| `.safetensors` | tensor `x`, or the only 2-D one of floats; `ids`: the tokens | the file beside |
| `.npy` | a 2-D array | the file beside |
| `.parquet` | a column of lists (`VECTORS`), or the only one | `TEXTS`, `image`; or beside |

Floats of 16, 32 or 64 bits or bfloat16, which reach the SAEs as float32. An image is a path in the
folder, or its bytes, bare or as `datasets` keeps them. Parquet is unpacked once, into the cache.

What `harvest` writes has `splits` in about.json, its shards named after them, and the texts of the
token ids in vocabulary.json.
"""

import base64
import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import BaseModel, Field

from gsae_core.config import NO_MODEL, DataConfig, ModelConfig, Site, validated
from gsae_core.errors import InputError, expecting, extra
from gsae_core.files import parse_json, read_checked, read_json, replace_durably
from gsae_core.machine import cache_folder

SUFFIXES = (".safetensors", ".npy", ".parquet")
VECTORS = ("x", "activations", "embedding", "embeddings")
TEXTS = ("text", "texts", "caption", "captions")
IMAGE = "image"
ABOUT, VOCABULARY = "about.json", "vocabulary.json"
# safetensors' names of floats; bfloat16, which NumPy lacks, is the upper half of a float32.
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
PART_BYTES = 2**26  # of vectors in memory at once
END_BYTES = 2**16  # of the beginning and the end of a shard that its digest holds
LONGEST = 300  # characters of a caption
# Of a picture: bytes in its file and in its row group, pixels, and the side of what is shown.
PICTURE_BYTES, GROUP_BYTES, PIXELS, SIDE = 2**25, 2**28, 2**26, 96
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Shard(NamedTuple):
    """The vectors of a file, mapped."""

    path: Path
    x: np.ndarray
    """(n, d_in)."""
    is_bfloat16: bool = False
    """Whether `x` holds the bits of bfloat16, as uint16."""
    ids: np.ndarray | None = None
    """Token ids of the sequences they are of, (sequences, n_ctx)."""

    def rows(self, at: np.ndarray | slice) -> Float32[np.ndarray, "rows d_in"]:
        """Return some vectors; InputError if one is not finite."""
        x = self.x[at]
        with np.errstate(over="ignore"):  # an infinity is told below
            x = (x.astype("<u4") << 16).view("<f4") if self.is_bfloat16 else x.astype(np.float32)
        if not (finite := np.isfinite(x).all(1)).all():
            row = np.arange(len(self.x))[at][~finite][0]
            raise InputError(
                f"expected finite vectors in {self.path}, got infinite or NaN entries in row {row} "
                f"and {len(x) - int(finite.sum()) - 1} others of those read: leave them out"
            )
        return x


class StoredVectors:
    """The vectors of a folder, numbered from 0 through all shards.

    Attributes:
        about: what about.json says of the language model; empty without one.
        edges: number of the first vector of each shard, and of all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.about: dict[str, Any] = _about(folder)
        self.shards: list[Shard] = [_shard(path) for path in _paths(folder, self.about)]
        first = self.shards[0]
        for other in self.shards:
            if other.x.shape[1] != first.x.shape[1]:
                raise InputError(
                    f"expected vectors of one width in {folder}, got {first.x.shape[1]} in "
                    f"{first.path.name} and {other.x.shape[1]} in {other.path.name}"
                )
        self.d_in: int = first.x.shape[1]
        self.edges: list[int] = [0, *accumulate(len(shard.x) for shard in self.shards)]

    def __len__(self) -> int:
        return self.edges[-1]

    def split(self, name: str) -> list[int] | None:
        """Return which shards a split of a harvested folder has; None of any other folder."""
        if "splits" not in self.about:
            return None
        return [k for k, shard in enumerate(self.shards) if shard.path.name.startswith(f"{name}-")]

    @cached_property
    def digest(self) -> str:
        """A hash of the names, the sizes, the beginnings and the ends of all shards."""
        digest = sha256()
        for path in (shard.path for shard in self.shards):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in (0, max(0, size - END_BYTES)):
                    file.seek(start)
                    digest.update(file.read(END_BYTES))
        return digest.hexdigest()

    def rows(self, numbers: Int64[np.ndarray, " n"]) -> Iterator[Float32[np.ndarray, "rows d_in"]]:
        """Yield vectors by ascending number, a part at a time."""
        size = max(1, PART_BYTES // (4 * self.d_in))
        ends = np.searchsorted(numbers, self.edges)
        for k, shard in enumerate(self.shards):
            own = numbers[ends[k] : ends[k + 1]] - self.edges[k]
            for start in range(0, len(own), size):
                yield shard.rows(own[start : start + size])

    # Captions and images

    @cached_property
    def _tables(self) -> tuple[list["_Table"], list[int]]:
        """Return the tables beside the vectors, and the number of the first vector of each."""
        beside = [p for p in sorted(self.folder.iterdir()) if p.stem.lower() == "captions"]
        if len(beside) > 1:
            names = ", ".join(path.name for path in beside)
            raise InputError(f"expected captions of {self.folder} in one file, got {names}")
        if beside:
            table = _Table(beside[0])
            if table.n != len(self):
                raise InputError(
                    f"expected a row for each of the {len(self):,} vectors in {beside[0]}, got "
                    f"{table.n:,}"
                )
            if not (table.text or table.image):
                raise InputError(
                    f"expected a column {', '.join(TEXTS)} or {IMAGE} in {beside[0]}, got "
                    f"{', '.join(table.columns) or 'none'}"
                )
            return [table], [0]
        if self.shards[0].path.suffix.lower() != ".parquet":
            return [], []
        return [_Table(shard.path) for shard in self.shards], self.edges[:-1]

    @property
    def has_captions(self) -> bool:
        """Whether anything is said of the vectors."""
        return bool(self._tables[0])

    def captions(self, numbers: Int64[np.ndarray, " n"]) -> list[str]:
        """Return what is said of vectors by ascending number: a caption, or else file and row."""
        tables, starts = self._tables
        ends = np.searchsorted(numbers, [*starts, len(self)]).tolist()
        said: list[str] = [] if tables else [""] * len(numbers)
        for table, start, first, last in zip(tables, starts, ends, ends[1:], strict=False):
            said += table.texts(numbers[first:last] - start)
        at = np.searchsorted(self.edges, numbers, side="right") - 1
        return [
            text or f"{self.shards[k].path.name} row {number - self.edges[k]}"
            for text, k, number in zip(said, at.tolist(), numbers.tolist(), strict=True)
        ]

    def thumbnail(self, number: int) -> str | None:
        """Return the picture of a vector as a small one in a `data:` address; None without one.

        Nothing outside the folder is read. Pictures that are damaged or large are none.
        """
        tables, starts = self._tables
        k = bisect_right(starts, number) - 1
        cell = tables[k].image_of(number - starts[k]) if tables and tables[k].image else None
        if isinstance(cell, dict):  # as `datasets` writes one
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            cell = self._file_inside(cell)
        return _small_picture(cell) if isinstance(cell, bytes) else None

    def _file_inside(self, name: str) -> bytes | None:
        """Return what a file of the folder holds; None of any other place, and of a large one."""
        with suppress(OSError, ValueError):
            path, root = (self.folder / name).resolve(), self.folder.resolve()
            if path.is_relative_to(root) and path.stat().st_size <= PICTURE_BYTES:
                return path.read_bytes()
        return None


def open_vectors(folder: Path | str) -> StoredVectors:
    """Return the vectors in a folder; of every file no more than its head is read.

    Raises:
        InputError: says which file is none that can be read, and what it should be.
    """
    path = Path(os.path.expanduser(folder)).absolute()
    if not path.is_dir():
        raise InputError(f"expected a folder of vectors, found none at {path}; check the path")
    return StoredVectors(path)


def described(folder: Path | str) -> tuple[ModelConfig, DataConfig | None]:
    """Return of which language model and text the vectors in a folder are, as far as it says."""
    about = _about(Path(os.path.expanduser(folder)))
    if not about:
        return ModelConfig(name=NO_MODEL), None
    names = {"model": "name", **{name: name for name in ("revision", "layer", "site", "dtype")}}
    fields = {field: about[name] for name, field in names.items() if name in about}
    data = about.get("data")
    return validated(ModelConfig, fields), None if data is None else validated(DataConfig, data)


class _Split(BaseModel):
    n_shards: int = Field(gt=0)


class _Splits(BaseModel):
    train: _Split
    held_out: _Split


class _About(BaseModel):
    """What about.json holds of activations of a language model."""

    model: str
    layer: int = Field(ge=0)
    site: Site
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    numerics: str = "raw"
    revision: str | None = None
    data: DataConfig | None = None


class _Harvested(_About):
    splits: _Splits
    text: str
    n_ctx: int = Field(gt=0)
    bos: bool
    special: list[int]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    about = read_json(path) if path.is_file() else {}
    # Another program's may be called so, too.
    if not {"model", "layer", "site"} <= set(about):
        return {}
    schema = _Harvested if "splits" in about else _About
    return read_checked(path, schema, what="what harvest says of a folder")


def _paths(folder: Path, about: dict[str, Any]) -> list[Path]:
    """Return a folder's shards in order; refuse more than one kind, none, or an unfinished set."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
    ]
    found = [path for path in found if path.stem.lower() != "captions"]
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) != 1:
        raise InputError(
            f"expected shards of one kind ({', '.join(SUFFIXES)}) in {folder}, got "
            f"{' and '.join(kinds) or 'none'}"
        )
    for split, size in about.get("splits", {}).items():
        n = sum(path.name.startswith(f"{split}-") for path in found)
        if n != size["n_shards"]:
            raise InputError(
                f"expected {size['n_shards']} shards {split}-* in {folder}, found {n}: the harvest "
                "was interrupted, or they were copied in part; give its command again"
            )
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which x2 comes before x10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _shard(path: Path) -> Shard:
    readers = {".safetensors": _safetensors, ".npy": _npy, ".parquet": _parquet}
    try:
        shard = readers[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"expected vectors in {path}, got: {error.strerror or error}") from None
    if not shard.x.size:
        raise InputError(f"expected vectors in {path}, got an array of shape {shard.x.shape}")
    return shard


def _safetensors(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    # Opening it refuses what lies outside of it.
    with expecting("safetensors", path, SafetensorError), safe_open(path, "np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (t.get_dtype(), tuple(t.get_shape())) for name, t in tensors.items()}
    fits = [name for name, (kind, shape) in found.items() if kind in FLOATS and len(shape) == 2]
    name = "x" if "x" in fits else fits[0] if len(fits) == 1 and "x" not in found else None
    if name is None:
        listed = ", ".join(f"{name} ({kind} {shape})" for name, (kind, shape) in found.items())
        raise InputError(
            f"expected floats of two dimensions, vectors in rows, in tensor x of {path} or in one "
            f"alone, got {listed or 'no tensors'}"
        )
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

    def mapped(name: str, kind: str) -> np.ndarray:
        shape, start = found[name][1], 8 + size + header[name]["data_offsets"][0]
        # Nothing cannot be mapped.
        empty = 0 in shape
        return np.empty(shape, kind) if empty else np.memmap(path, kind, "r", start, shape)

    kind, ids = found[name][0], found.get("ids")
    has_ids = ids is not None and ids[0] == "I32" and len(ids[1]) == 2
    return Shard(
        path, mapped(name, FLOATS[kind]), kind == "BF16", mapped("ids", "<i4") if has_ids else None
    )


def _npy(path: Path) -> Shard:
    with expecting("a NumPy array", path, ValueError, EOFError):
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind != "f" or x.itemsize > 8:
        came = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else "an archive"
        raise InputError(
            f"expected floats of two dimensions, vectors in rows, in {path}, got {came}; NumPy has "
            "no bfloat16: save it as safetensors"
        )
    return Shard(path, x)


def _parquet(path: Path) -> Shard:
    """Return the vectors of a Parquet file, unpacked into a file of the cache that is mapped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stat = path.stat()
    with expecting("Parquet", path, pa.ArrowException), pq.ParquetFile(path) as file:
        name = _list_column(path, file.schema_arrow)
        if not file.metadata.num_rows:
            return Shard(path, np.empty((0, 0)))
        key = sha256(repr((str(path), stat.st_size, stat.st_mtime_ns, name)).encode())
        unpacked = cache_folder("vectors") / f"{key.hexdigest()[:32]}.npy"
        if not unpacked.is_file():
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(
                unpacked, lambda to: _unpack(path, file, name, to), n_bytes=stat.st_size
            )
    return _npy(unpacked)._replace(path=path)


def _list_column(path: Path, schema: Any) -> str:
    import pyarrow as pa

    kinds = pa.types

    def fits(kind: Any) -> bool:
        is_list = kinds.is_list(kind) or kinds.is_large_list(kind)
        return (is_list or kinds.is_fixed_size_list(kind)) and kinds.is_floating(kind.value_type)

    found = [field.name for field in schema if fits(field.type)]
    named = [name for name in VECTORS if name in found]
    if not named and len(found) != 1:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(
            f"expected a column of lists of floats called {', '.join(VECTORS)} in {path}, or one "
            f"alone, got {listed}"
        )
    return (named or found)[0]


def _unpack(path: Path, file: Any, name: str, to: Path) -> None:
    """Write a column of lists as a `.npy` file."""
    done, width = 0, 0
    with to.open("wb") as out:
        for batch in file.iter_batches(batch_size=2**12, columns=[name]):
            lists = batch.column(0)
            lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
            width = width or int(lengths[0])
            if (lengths != width).any() or width < 1:
                row = int(np.argmax(lengths != width))
                raise InputError(
                    f"expected lists of one length in column {name} of {path}, got {lengths[row]} "
                    f"numbers in row {done + row} and {width} in the first (-1: null)"
                )
            x = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            if not done:
                shape = (file.metadata.num_rows, width)
                head = {"descr": x.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, head)
            out.write(np.ascontiguousarray(x).tobytes())
            done += len(x)


# --- Captions and pictures


class _Table:
    """Rows beside vectors: a column of texts, one of images, or both."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path: Path = path
        try:
            # Parquet stays on the disk: pictures may be in it.
            self._read = None if path.suffix.lower() == ".parquet" else _table(path)
            head = pq.read_metadata(path) if self._read is None else self._read
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"expected captions in {path}, got: {error}") from None
        self.n: int = head.num_rows
        self.columns: list[str] = list(
            head.schema.names if self._read else pq.read_schema(path).names
        )
        self.text: str | None = next((name for name in TEXTS if name in self.columns), None)
        self.image: str | None = IMAGE if IMAGE in self.columns else None

    def texts(self, rows: Int64[np.ndarray, " n"]) -> list[str]:
        """Return the captions of rows, empty where there is none."""
        import pyarrow.parquet as pq

        if self.text is None:
            return [""] * len(rows)
        if self._read is None:
            column = pq.read_table(self.path, columns=[self.text]).column(0)
        else:
            column = self._read.column(self.text)
        return [*map(_caption, column.take(rows).to_pylist())]

    def image_of(self, row: int) -> Any:
        """Return a cell of the column of images; None in a group of rows that is too large."""
        if self._read is not None:
            return self._read.column(IMAGE)[row].as_py()
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path, memory_map=True) as file:
            groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
            edges = [0, *accumulate(group.num_rows for group in groups)]
            k = bisect_right(edges, row) - 1
            columns = (groups[k].column(i) for i in range(groups[k].num_columns))
            sizes = (
                c.total_uncompressed_size for c in columns if c.path_in_schema.startswith(IMAGE)
            )
            if sum(sizes) > GROUP_BYTES:
                return None
            return file.read_row_group(k, columns=[IMAGE]).column(0)[row - edges[k]].as_py()


def _table(path: Path) -> Any:
    """Return the table in a file of captions of text, JSON lines, CSV or TSV."""
    import pyarrow as pa
    from pyarrow import csv

    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        parse = csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True)
        return csv.read_csv(path, parse_options=parse)
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{kind or 'a name'} without rows; .txt, .jsonl, .csv, .tsv or .parquet")
    lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
    if kind == ".txt":
        return pa.table({"caption": lines})
    read = [parse_json(line) for line in lines]
    rows = [dict(row) if isinstance(row, dict) else {"text": row} for row in read]

    def cells(name: str) -> list[str | None]:
        found = [row.get(name) for row in rows]
        if name == IMAGE:
            return [cell if isinstance(cell, str) else None for cell in found]
        return [*map(_caption, found)]

    return pa.table({name: cells(name) for name in dict.fromkeys(chain(*rows))})


def _caption(value: Any) -> str:
    """Return a caption on one line; the first of several."""
    if isinstance(value, list):
        value = next(iter(value), None)
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


@lru_cache(maxsize=512)
def _small_picture(data: bytes) -> str | None:
    """Return a picture as a small JPEG in a `data:` address; None for what is none, or too large.

    Made anew by Pillow, without which there is none: nothing of the file itself reaches a browser.
    """
    try:
        with extra("app"):
            from PIL import Image
    except InputError:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            if picture.width * picture.height > PIXELS:
                return None
            picture.thumbnail((SIDE, SIDE))
            made = io.BytesIO()
            picture.convert("RGB").save(made, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}"
