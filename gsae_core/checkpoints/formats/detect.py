"""Files -> which SAEs they hold, by content and never by name. Nothing here imports torch."""

import json
import math
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from gsae_core.checkpoints.formats.found import FORMATS, Format, Found, Shape, place_of
from gsae_core.errors import InputError
from gsae_core.files import readable

# What rebuilds a tensor, a dictionary that keeps its order, and a type in a saved config.
HARMLESS = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|collections OrderedDict"
    r"|torch (\w+Storage|device|float32|float64|float16|bfloat16|Size)"
)
STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8"}
UNREADABLE_CALLS = {"INST", "OBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def names_in(data: bytes, path: Path) -> list[str]:
    """Return every string in a pickle, each once, in order.

    Raises:
        InputError: if it is no pickle, or would call anything that makes no tensor.
    """
    names: dict[str, None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in STRINGS:
                names[str(argument)] = None
            elif opcode.name == "GLOBAL" and HARMLESS.fullmatch(str(argument)) is None:
                _refuse(str(argument).replace(" ", "."), path)
            elif opcode.name in UNREADABLE_CALLS:
                _refuse(opcode.name, path)
    except InputError:
        raise
    except Exception as error:
        # pickletools reads untrusted bytes with int(), decode() and struct: it raises what they do.
        raise InputError(
            f"expected a pickle of tensors in {path}, found a damaged one ({str(error)[:120]}); "
            "copy the file again"
        ) from None
    return list(names)


def _refuse(what: str, path: Path) -> None:
    raise InputError(
        f"expected a pickle of tensors and plain values in {path}, found one that calls "
        f"{what[:80]!r}; it was not run: do not trust this file, or save it again as safetensors"
    )


LARGEST_JSON = 16 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: if it is no JSON object, too large, or has a name twice.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise InputError(
            f"expected a config of at most {readable(LARGEST_JSON)} in {path}, found "
            f"{readable(size)}; is it another kind of file?"
        )
    return parse_object(path.read_bytes(), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the object that `data` is JSON of; `where` names it in a sentence."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise InputError(f"expected JSON in {where}, found brackets nested too deeply") from None
    except InputError as error:
        raise InputError(f"expected JSON with each name once in {where}, found {error}") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors.
        raise InputError(f"expected JSON in {where}, found something else ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object in {where}, found a {type(value).__name__}")
    return value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return found


Kind = Literal["safetensors", "npz", "pickle"]

LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
LARGEST_PICKLE = 64 * 2**20  # of data.pkl, which holds names and not numbers
MOST_ENTRIES = 4096

# Weights hardly compress. Zeros do, a thousandfold, so that small files are left alone.
LARGEST_RATIO, BELOW_SUSPICION = 100, 16 * 2**20

# What zipfile raises over bytes that are no zip; names that are no text are a ValueError.
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    EOFError,
    RuntimeError,
    ValueError,
)

SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}


class Held(NamedTuple):
    """The names in a file, with shapes where those can be told without torch."""

    kind: Kind
    shapes: dict[str, Shape | None]


def look(path: Path) -> Held | None:
    """Return what a file holds; None if it is no container of tensors.

    Raises:
        InputError: if it is one that is damaged, or made to do harm.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return _look_into_zip(path)
    if start[8:9] == b"{":
        return Held("safetensors", dict(safetensors_shapes(path)))
    return None


def is_bare_pickle(path: Path) -> bool:
    """Return whether a file is what torch wrote before version 1.6, or pickle itself."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def safetensors_shapes(path: Path) -> dict[str, Shape]:
    """Return names and shapes from a safetensors header, whose sizes agree with the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > min(size - 8, LARGEST_HEADER):
            raise InputError(
                f"expected a safetensors header within the {size} bytes of {path}, found one that "
                f"claims {n_header}; copy the file again"
            )
        header = parse_object(file.read(n_header), f"the header of {path}")
    header.pop("__metadata__", None)
    shapes = {name: _declared_shape(name, entry, path) for name, entry in header.items()}
    n_data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if n_data != size - 8 - n_header:
        raise InputError(
            f"expected {n_data} bytes of tensors in {path}, as its header says, found "
            f"{size - 8 - n_header}; copy the file again"
        )
    return shapes


def _declared_shape(name: str, entry: object, path: Path) -> Shape:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            whole = all(isinstance(n, int) and n >= 0 for n in shape)
            bits = SAFETENSORS_BITS.get(dtype)
            if whole and bits and math.prod(shape) * bits == 8 * (end - start):
                return tuple(shape)
    raise InputError(
        f"expected a type, a shape and as many bytes for {name!r} in the header of {path}, found "
        f"{str(entry)[:120]}"
    )


def _look_into_zip(path: Path) -> Held | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            if any(entry.filename.endswith(".npy") for entry in entries):
                return Held("npz", {e.filename[:-4]: _npy_shape(path, archive, e) for e in entries})
            for entry in entries:
                if PurePosixPath(entry.filename).name == "data.pkl":
                    return Held("pickle", dict.fromkeys(_pickled_names(path, archive, entry)))
    except InputError:
        raise
    except (*BROKEN_ZIP, OSError) as error:
        raise InputError(
            f"expected a whole zip archive in {path}, found a damaged one ({error}); copy the "
            "file again"
        ) from None
    return None


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuse archives that no library writes, by their directory alone."""
    names = [entry.filename for entry in entries]
    if len(names) > MOST_ENTRIES:
        raise InputError(f"expected an SAE's few tensors in {path}, found {len(names)} files")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"expected each name once in {path}, found {twice!r} twice")
    for name in names:
        if _leads_out(name):
            raise InputError(
                f"expected plain names in {path}, found {name!r}, which leads out of the archive; "
                "do not trust this file"
            )
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if sum(entry.compress_size for entry in entries) > size or (
        unpacked > max(BELOW_SUSPICION, LARGEST_RATIO * size)
    ):
        raise InputError(
            f"expected an archive whose content has about its size, found {readable(size)} that "
            f"claim to hold {readable(unpacked)} in {path}; do not trust this file"
        )


def _leads_out(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.anchor) or ".." in {*posix.parts, *windows.parts}


def _npy_shape(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Shape:
    with archive.open(entry) as file:
        return npy_header(path, entry, file)[0]


def npy_header(
    path: Path, entry: zipfile.ZipInfo, file: IO[bytes] | zipfile.ZipExtFile
) -> tuple[Shape, bool, np.dtype]:
    """Return shape, whether columns come first, and type, which agree with the entry's size."""
    try:
        version = np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, columns_first, dtype = read[version[0]](file)  # pyright: ignore[reportArgumentType]
    except (ValueError, EOFError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(
            f"expected a numpy array in {entry.filename!r} of {path}, found something else "
            f"({str(error)[:120]})"
        ) from None
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InputError(
            f"expected numbers in {entry.filename!r} of {path}, found type {dtype}, which can "
            "hold code"
        )
    claimed = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or claimed != entry.file_size - file.tell():
        raise InputError(
            f"expected {entry.file_size - file.tell()} bytes in {entry.filename!r} of {path}, as "
            f"its archive says, found a shape {list(shape)} of {claimed}"
        )
    return shape, columns_first, dtype


def _pickled_names(path: Path, archive: zipfile.ZipFile, pickle: zipfile.ZipInfo) -> list[str]:
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"expected tensors stored as they are, as torch.save does, found "
                f"{entry.filename!r} compressed in {path}; do not trust this file"
            )
    if pickle.file_size > LARGEST_PICKLE:
        raise InputError(
            f"expected names alone in the pickle of {path}, found {readable(pickle.file_size)}"
        )
    return names_in(archive.read(pickle), path)


TORCH: frozenset[Kind] = frozenset({"safetensors", "pickle"})
SAFE: frozenset[Kind] = frozenset({"safetensors"})


class Signature(NamedTuple):
    """One architecture of one library."""

    format: Format
    architecture: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    kinds: frozenset[Kind] = TORCH
    marker: frozenset[str] = frozenset()
    """Names in the config beside it that tell this library from another with the same tensors."""

    marked: bool = False
    """Whether it is recognised only with that config."""


def _signature(format_: Format, architecture: str, required: str, **options: Any) -> Signature:
    sets = {name: frozenset(options.pop(name, "").split()) for name in ("optional", "marker")}
    return Signature(format_, architecture, frozenset(required.split()), **sets, **options)


_ENCODER_DECODER = "W_enc W_dec b_enc b_dec"
_LENS = {"kinds": SAFE, "marker": "d_in d_sae"}
_DL = {"marker": "trainer"}

SIGNATURES = (
    _signature(
        "sae_lens",
        "gated",
        "W_enc W_dec b_dec b_gate b_mag r_mag",
        optional="scaling_factor",
        **_LENS,
    ),
    _signature("sae_lens", "gated_untied", "W_enc W_mag W_dec b_dec b_gate b_mag", **_LENS),
    _signature("sae_lens", "standard", _ENCODER_DECODER, optional="scaling_factor", **_LENS),
    _signature(
        "sae_lens", "jumprelu", f"{_ENCODER_DECODER} threshold", optional="scaling_factor", **_LENS
    ),
    _signature(
        "dictionary_learning",
        "GatedAutoEncoder",
        "encoder.weight decoder.weight decoder_bias gate_bias mag_bias r_mag",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "AutoEncoder",
        "encoder.weight encoder.bias decoder.weight bias",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "AutoEncoderNew",
        "encoder.weight encoder.bias decoder.weight decoder.bias",
        **_DL,
    ),
    _signature(
        "dictionary_learning",
        "BatchTopKSAE",
        "encoder.weight encoder.bias decoder.weight b_dec k",
        optional="threshold",
        **_DL,
    ),
    _signature(
        "dictionary_learning", "JumpReluAutoEncoder", f"{_ENCODER_DECODER} threshold", **_DL
    ),
    _signature(
        "dictionary_learning",
        "MatryoshkaBatchTopKSAE",
        f"{_ENCODER_DECODER} k threshold group_sizes",
        **_DL,
    ),
    _signature("sae_bench", "gated", "W_enc W_dec b_dec gate_bias b_mag r_mag"),
    _signature("sae_bench", "batch_topk", f"{_ENCODER_DECODER} k", optional="threshold"),
    _signature(
        "sparsify",
        "topk",
        "encoder.weight encoder.bias W_dec b_dec",
        optional="W_skip",
        marker="d_in k",
    ),
    _signature(
        "gemma_scope",
        "jumprelu",
        f"{_ENCODER_DECODER} threshold",
        optional="scaling_factor",
        kinds=frozenset({"npz"}),
    ),
    _signature(
        "gemma_scope",
        "jumprelu",
        "w_enc w_dec b_enc b_dec threshold",
        optional="scaling_factor",
        kinds=frozenset({"npz"}),
    ),
    _signature(
        "gemma_scope_2",
        "jump_relu",
        "w_enc w_dec b_enc b_dec threshold",
        optional="affine_skip_connection",
        kinds=SAFE,
        marker="architecture",
    ),
    _signature(
        "openai",
        "ReLU or TopK",
        "pre_bias encoder.weight latent_bias decoder.weight",
        optional="stats_last_nonzero latents_activation_frequency latents_mean_square "
        "activation activation_state_dict",
    ),
    _signature("batch_topk", "vanilla or topk", _ENCODER_DECODER, marker="sae_type", marked=True),
    _signature(
        "batch_topk", "jumprelu", f"{_ENCODER_DECODER} jumprelu.log_threshold", marker="sae_type"
    ),
    _signature(
        "llama_scope",
        "jumprelu",
        "encoder.weight encoder.bias decoder.weight decoder.bias",
        kinds=SAFE,
        marker="hook_point_in",
        marked=True,
    ),
)


def matches(held: Held, configs: Iterable[Mapping[str, Any]]) -> list[Signature]:
    """Return the signatures that a file's names fit, the likeliest first.

    A pickle also holds the words of its configs, so any names may come beside the required ones;
    elsewhere a name that the format does not know makes it another format.
    """
    names, configs = frozenset(held.shapes), list(configs)

    def fits(signature: Signature) -> bool:
        if held.kind not in signature.kinds or not signature.required <= names:
            return False
        if signature.marked and not _is_marked(signature, configs):
            return False
        return held.kind == "pickle" or names <= signature.required | signature.optional

    found = [signature for signature in SIGNATURES if fits(signature)]
    return sorted(found, key=lambda s: (_is_marked(s, configs), len(s.required)), reverse=True)


def _is_marked(signature: Signature, configs: list[Mapping[str, Any]]) -> bool:
    return bool(signature.marker) and any(signature.marker <= config.keys() for config in configs)


def nearest(names: Iterable[str]) -> tuple[str, list[str]]:
    """Return the format that shares most names with a file, for people, and what is missing."""
    names = frozenset(names)

    def likeness(signature: Signature) -> float:
        return len(signature.required & names) / len(signature.required | names)

    best = max(SIGNATURES, key=likeness)
    return f"{FORMATS[best.format]} {best.architecture}", sorted(best.required - names)


MOST_FILES, DEEPEST = 10_000, 8
MOST_CONFIGS = 20

# Names that say what a file is and not which one it is.
GENERIC = {"ae", "sae", "params", "sae_weights", "model", "final", "autoencoder", "checkpoints"}


def detect(path: Path | str) -> Found:
    """Return the one SAE in a file or folder.

    Raises:
        InputError: if there is none (with the names found and the nearest known format), there are
            several, or a file is damaged or made to do harm.
    """
    path = Path(path)
    if path.is_file():
        return _recognised(path, _looked_into(path), path.parent)
    found = find_saes(path)
    if len(found) > 1:
        names = ", ".join(sae.name for sae in found[:8])
        raise InputError(
            f"expected one SAE in {path}, found {len(found)} ({names}{', ...' * (len(found) > 8)});"
            " give the folder of one, or its name"
        )
    return found[0]


def find_saes(path: Path | str) -> list[Found]:
    """Return every SAE in a folder and the folders below, by path; a file gives its own.

    Files beside them that hold other tensors (statistics, optimisers) are passed over.

    Raises:
        InputError: if there is no SAE (with what was found instead) or a file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return [detect(path)]
    if not path.is_dir():
        raise InputError(f"expected a folder or file with an SAE, found nothing at {path}")
    found, others = [], []
    for file in _files(path):
        held = look(file)
        if held is None:
            if file.suffix in (".pt", ".pth", ".bin", ".ckpt") and is_bare_pickle(file):
                others.append((file, None))
            continue
        if matches(held, _configs(file).values()):
            found.append(_recognised(file, held, path))
        else:
            others.append((file, held))
    if found:
        return _named_apart(found)
    if not others:
        raise InputError(
            f"expected safetensors, npz or torch files in {path}, found none; give the folder that "
            "holds an SAE"
        )
    file, held = others[0]
    raise _unknown(file, held) if held is not None else _bare(file)


def _files(root: Path) -> Iterator[Path]:
    """Yield the regular files below a folder in order; links to folders are not followed."""
    n_seen = 0
    for place, folders, names in os.walk(root):
        depth = len(Path(place).relative_to(root).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < DEEPEST else []
        for name in sorted(names):
            n_seen += 1
            if n_seen > MOST_FILES:
                raise InputError(
                    f"expected a folder of SAEs, found more than {MOST_FILES} files in {root}; "
                    "give the folder of one SAE"
                )
            file = Path(place, name)
            if not name.startswith(".") and file.is_file() and file.stat().st_size > 16:
                yield file


def _looked_into(path: Path) -> Held:
    held = look(path)
    if held is not None:
        return held
    if is_bare_pickle(path):
        raise _bare(path)
    raise InputError(
        f"expected a safetensors, npz or torch file, found something else in {path}; if it is a "
        "config, give the folder that holds it and its weights"
    )


def _bare(path: Path) -> InputError:
    return InputError(
        f"expected a torch file as torch 1.6 or newer writes, found a bare pickle in {path}, which "
        "could hold any program; save it again with torch.save, or as safetensors"
    )


def _unknown(path: Path, held: Held) -> InputError:
    names = [name[:60] for name in held.shapes]
    near, missing = nearest(names)
    listed = ", ".join(names[:12]) + ", ..." * (len(names) > 12)
    return InputError(
        f"expected an SAE of a known format, found tensors {listed or 'none'} in {path}; nearest "
        f"is {near}, which would need {', '.join(missing) or 'its config file'}"
    )


def _configs(weights: Path) -> dict[Path, dict[str, Any]]:
    """Return the JSON objects beside a file, and above a `checkpoints` folder."""
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json"))[:MOST_CONFIGS]:
            # A broken file that no format needs breaks nothing; the one that is needed is named by
            # the format that misses it.
            try:
                found[path] = read_object(path)
            except (InputError, OSError):
                continue
    return found


def _recognised(path: Path, held: Held, root: Path) -> Found:
    configs = _configs(path)
    found = matches(held, configs.values())
    if not found:
        raise _unknown(path, held)
    signature = found[0]
    config_path, config = _config_of(signature, configs)
    format_, architecture = _refined(signature, config)
    d_in, d_sae = _widths(held, config)
    return Found(
        name=_name(path, root),
        format=format_,
        architecture=architecture,
        weights=path,
        config=config_path,
        keys=held.shapes,
        d_in=d_in,
        d_sae=d_sae,
        n_bytes=path.stat().st_size,
        place=place_of(format_, config, path),
    )


def _config_of(
    signature: Signature, configs: dict[Path, dict[str, Any]]
) -> tuple[Path | None, dict[str, Any]]:
    for path, config in configs.items():
        if signature.marker and signature.marker <= config.keys():
            return path, config
    return None, {}


def _refined(signature: Signature, config: dict[str, Any]) -> tuple[Format, str]:
    """Return format and architecture as the config states them, where it does."""
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    match signature.format:
        case "sae_lens":
            version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
            architecture = str(config.get("architecture", signature.architecture))
            if {"recipe", "weights_sha256"} <= metadata.keys():
                return "gsae_core", architecture
            legacy = re.match(r"([6-9]|\d\d)\.", str(version)) is None
            return "sae_lens_legacy" if legacy else "sae_lens", architecture
        case "dictionary_learning":
            trainer = config.get("trainer")
            said = trainer.get("dict_class") if isinstance(trainer, dict) else None
            return "dictionary_learning", str(said or signature.architecture)
        case "batch_topk":
            return "batch_topk", str(config.get("sae_type", signature.architecture))
    return signature.format, signature.architecture


def _widths(held: Held, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return d_in and d_sae by the shapes, else by what the config calls them."""
    for name, order in (("W_dec", 1), ("w_dec", 1), ("decoder.weight", -1), ("encoder.weight", 1)):
        shape = held.shapes.get(name)
        if shape is not None and len(shape) == 2:
            d_sae, d_in = shape[::order]
            return d_in, d_sae
    trainer = config.get("trainer")
    said = config | (trainer if isinstance(trainer, dict) else {})
    d_in = next((said[k] for k in ("d_in", "activation_dim", "act_size") if k in said), None)
    d_sae = next((said[k] for k in ("d_sae", "dict_size") if k in said), None)
    return (d_in if isinstance(d_in, int) else None, d_sae if isinstance(d_sae, int) else None)


def _name(path: Path, root: Path) -> str:
    """Return a plain name out of the path below `root`: `trainer_0/ae.pt` -> `trainer_0`."""
    parts = [*path.parent.relative_to(root).parts, path.stem]
    telling = [part for part in parts if part not in GENERIC] or [path.absolute().parent.name]
    return plain_name("-".join(telling[-3:]))


def plain_name(text: str) -> str:
    """Return text as a name that a folder and a run's SAE can have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return plain[-64:].lstrip("-._") or "sae"


def _named_apart(found: list[Found]) -> list[Found]:
    taken: dict[str, int] = {}
    apart = []
    for sae in found:
        n = taken[sae.name] = taken.get(sae.name, 0) + 1
        apart.append(sae if n == 1 else replace(sae, name=f"{sae.name[:60]}-{n}"))
    return apart


def config_of(found: Found, *, needed: str = "") -> dict[str, Any]:
    """Return the config that describes an SAE; empty where it has none.

    Args:
        found: the SAE.
        needed: what only the config says, if it cannot be read without; empty if it can.

    Raises:
        InputError: if it is needed and missing, with the reason if a file beside it is broken.
    """
    if found.config is not None:
        return read_object(found.config)
    if needed:
        for path in sorted(found.weights.parent.glob("*.json"))[:MOST_CONFIGS]:
            read_object(path)
        raise InputError(
            f"expected a config beside {found.weights}, as {found.library} writes, found none that "
            f"says {needed}; copy it too"
        )
    return {}
