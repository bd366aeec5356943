"""Files -> which SAEs they hold, by content and never by name. Nothing here imports torch."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsae_core.checkpoints.formats.containers import Contents, contents_of, read_object
from gsae_core.checkpoints.formats.libraries import (
    FORMATS,
    LIBRARIES,
    SIGNATURES,
    Format,
    FoundSAE,
    Signature,
    hook_point,
    mapping,
    widths,
)
from gsae_core.checkpoints.formats.refused import refusal
from gsae_core.errors import InputError
from gsae_core.files import not_permitted

MOST_FILES, DEEPEST = 10_000, 8
MOST_CONFIGS = 20

# Names that say what a file is and not which one it is.
GENERIC = {"ae", "sae", "params", "sae_weights", "model", "final", "autoencoder", "checkpoints"}


def detect(path: Path | str) -> FoundSAE:
    """Return the one SAE in a file or folder; InputError if there is none, or several."""
    found = find_saes(path)
    if len(found) > 1:
        names = ", ".join(sae.name for sae in found[:8])
        raise InputError(
            f"expected one SAE in {path}, found {len(found)} ({names}{', ...' * (len(found) > 8)});"
            " give the folder of one"
        )
    return found[0]


def find_saes(path: Path | str) -> list[FoundSAE]:
    """Return every SAE in a folder and the folders below, by path; a file gives its own.

    Files beside them that hold other tensors (statistics, optimisers, transcoders) are passed over.
    InputError if there is no SAE, with the names found and the nearest format, or if a file is
    damaged or made to do harm.
    """
    path = Path(path)
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"expected a folder or file with an SAE, found nothing at {path}")
    root, files = (path, _files(path)) if path.is_dir() else (path.parent, [path])
    found, others, taken = [], [], Counter[str]()
    for file in files:
        held = contents_of(file)
        sae = None if held is None else _recognised(file, held, root)
        if sae is not None:
            n = taken[sae.name] = taken[sae.name] + 1
            found.append(sae if n == 1 else replace(sae, name=f"{sae.name[:60]}-{n}"))
        elif held is not None:
            others.append((file, held))
    if found:
        return found
    if not others:
        came = "none" if path.is_dir() else f"{path.stat().st_size} bytes of something else"
        raise InputError(
            f"expected safetensors, npz or torch files in {path}, found {came}; give the folder "
            "that holds an SAE, its weights and its config, or copy damaged weights again"
        )
    named = (
        refusal(file, held.shapes, config)
        for file, held in others
        for config in ({}, *_configs(file).values())
    )
    raise next((InputError(said) for said in named if said), _unknown(*others[0]))


def _files(root: Path) -> Iterator[Path]:
    """Yield the regular files below a folder in order; links to folders are not followed."""
    n_seen = 0

    def refuse(error: OSError) -> None:
        raise InputError(not_permitted(error.filename)) from error

    for place, folders, names in os.walk(root, onerror=refuse):
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


def _unknown(path: Path, held: Contents) -> InputError:
    """Return the sentence that names what is there, and what the nearest format would need."""
    if held.kind == "bare pickle":
        return InputError(
            "expected a torch file as torch 1.6 or newer writes, found a bare pickle in "
            f"{path}, which could hold any program; save it again with torch.save, or as "
            "safetensors"
        )
    names = held.shapes.keys()
    near = max(SIGNATURES, key=lambda s: len(s.required & names) / len(s.required | names))
    listed = ", ".join(name[:60] for name in list(names)[:12]) + ", ..." * (len(names) > 12)
    missing = ", ".join(sorted(near.required - names))
    return InputError(
        f"expected an SAE of a known format, found tensors {listed or 'none'} in {path}; nearest "
        f"is {FORMATS[near.format]} {near.architecture}, which would need "
        f"{missing or 'its config file'}"
    )


def _configs(weights: Path) -> dict[Path, dict[str, Any]]:
    """Return the JSON objects beside a file, and above a `checkpoints` folder, by path.

    Those that are named after the file come first.
    """
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        jsons = sorted(
            folder.glob("*.json"), key=lambda p: (not p.stem.startswith(weights.stem), p)
        )
        for path in jsons[:MOST_CONFIGS]:
            # A broken file that no format needs breaks nothing; the one that is needed is named by
            # the format that misses it.
            with suppress(InputError, OSError):
                found[path] = read_object(path)
    return found


def _recognised(path: Path, held: Contents, root: Path) -> FoundSAE | None:
    configs = _configs(path)
    signature = _likeliest(path, held, configs)
    if signature is None:
        return None
    config_path = _marking(signature, path, configs)
    config = configs[config_path] if config_path else {}
    if refusal(path, held.shapes, config):
        return None
    format_, architecture = _refined(signature, config)
    d_in, d_sae = widths(held.shapes, config)
    return FoundSAE(
        name=_name(path, root),
        format=format_,
        architecture=architecture,
        weights=path,
        config=config_path,
        d_in=d_in,
        d_sae=d_sae,
        n_bytes=path.stat().st_size,
        place=hook_point(format_, config, path),
        # A pickle's other words are those of its configs, for all that is known.
        strange=() if held.kind == "pickle" else tuple(signature.strange(held.shapes)),
    )


def _marking(signature: Signature, weights: Path, configs: Mapping[Path, Any]) -> Path | None:
    """Return the config that says that the weights are this library's."""
    named = LIBRARIES[signature.format].config.replace("*", weights.stem)
    own = "*" in LIBRARIES[signature.format].config  # each file has a config of its own name
    for path, config in configs.items():
        if signature.marked_by(config) and (not own or path.name == named):
            return path
    return None


def _likeliest(path: Path, held: Contents, configs: Mapping[Path, Any]) -> Signature | None:
    """Return the signature that a file's names fit, the likeliest of several.

    A pickle also holds the words of its configs, so any names may come beside the required ones.
    Elsewhere a name that the format does not know makes it another format, but for SAELens', whose
    config says which tensors its architecture has.
    """
    names = frozenset(held.shapes)
    fitting: dict[Signature, tuple[bool, bool, bool, int]] = {}
    for signature in SIGNATURES:
        library = LIBRARIES[signature.format]
        marked = _marking(signature, path, configs) is not None
        exact = held.kind == "pickle" or not signature.strange(names)
        told = exact and signature.architecture != library.only_marked
        if (
            held.kind in library.kinds.split()
            and signature.required <= names
            and (told or (marked and (exact or signature.format == "sae_lens")))
            and re.search(library.named, path.absolute().as_posix())
        ):
            named = bool(library.named)
            fitting[signature] = (marked, exact, named, len(signature.required))
    return max(fitting, key=fitting.__getitem__, default=None)


def _refined(signature: Signature, config: dict[str, Any]) -> tuple[Format, str]:
    """Return format and architecture as the config states them, where it does."""
    format_, architecture = signature.format, signature.architecture
    match format_:
        case "sae_lens":
            metadata = mapping(config, "metadata")
            version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
            if {"recipe", "weights_sha256"} <= metadata.keys():
                format_ = "gsae_core"
            elif re.match(r"([6-9]|\d\d)\.", str(version)) is None:
                format_ = "sae_lens_legacy"
            architecture = config.get("architecture", architecture)
        case "dictionary_learning":
            architecture = mapping(config, "trainer").get("dict_class") or architecture
        case "batch_topk":
            architecture = config.get("sae_type", architecture)
    return format_, str(architecture)


def _name(path: Path, root: Path) -> str:
    """Return a name that a folder can have: `trainer_0/ae.pt` below `root` -> `trainer_0`."""
    parts = [*path.parent.relative_to(root).parts, path.stem]
    telling = [part for part in parts if part not in GENERIC] or [path.absolute().parent.name]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(telling[-3:])).strip("-._")
    return plain[-64:].lstrip("-._") or "sae"


def config_of(found: FoundSAE) -> dict[str, Any]:
    """Return the config that describes an SAE; empty where it has none and needs none.

    InputError if it is needed and missing, with the reason if a file beside it is broken.
    """
    if found.config is not None:
        return read_object(found.config)
    if needed := LIBRARIES[found.format].needed:
        for path in sorted(found.weights.parent.glob("*.json"))[:MOST_CONFIGS]:
            read_object(path)
        raise InputError(
            f"expected a config beside {found.weights}, as {found.library} writes, found none that "
            f"says {needed}; copy it too"
        )
    return {}
