"""Files -> which SAEs they hold, by content and never by name. Nothing here imports torch."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsae_core.checkpoints.formats.containers import (
    Contents,
    contents_of,
    is_bare_pickle,
    read_object,
)
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
from gsae_core.errors import InputError

MOST_FILES, DEEPEST = 10_000, 8
MOST_CONFIGS = 20

# Names that say what a file is and not which one it is.
GENERIC = {"ae", "sae", "params", "sae_weights", "model", "final", "autoencoder", "checkpoints"}


def detect(path: Path | str) -> FoundSAE:
    """Return the one SAE in a file or folder.

    Raises:
        InputError: if there is none (with the names found and the nearest known format), there are
            several, or a file is damaged or made to do harm.
    """
    path = Path(path)
    if path.is_file():
        held = contents_of(path)
        if held is None and is_bare_pickle(path):
            raise _bare(path)
        if held is None:
            raise InputError(
                f"expected a safetensors, npz or torch file, found something else in {path}; if it "
                "is a config, give the folder that holds it and its weights"
            )
        return _recognised(path, held, path.parent)
    found = find_saes(path)
    if len(found) > 1:
        names = ", ".join(sae.name for sae in found[:8])
        raise InputError(
            f"expected one SAE in {path}, found {len(found)} ({names}{', ...' * (len(found) > 8)});"
            " give the folder of one, or its name"
        )
    return found[0]


def find_saes(path: Path | str) -> list[FoundSAE]:
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
        held = contents_of(file)
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


def _bare(path: Path) -> InputError:
    return InputError(
        f"expected a torch file as torch 1.6 or newer writes, found a bare pickle in {path}, which "
        "could hold any program; save it again with torch.save, or as safetensors"
    )


def _unknown(path: Path, held: Contents) -> InputError:
    """Return the sentence that names what is there, and what the nearest format would need."""

    def likeness(signature: Signature) -> float:
        return len(signature.required & names) / len(signature.required | names)

    names = frozenset(name[:60] for name in held.shapes)
    near = max(SIGNATURES, key=likeness)
    shown = list(held.shapes)[:12]
    listed = ", ".join(name[:60] for name in shown) + ", ..." * (len(names) > 12)
    missing = ", ".join(sorted(near.required - names))
    return InputError(
        f"expected an SAE of a known format, found tensors {listed or 'none'} in {path}; nearest "
        f"is {FORMATS[near.format]} {near.architecture}, which would need "
        f"{missing or 'its config file'}"
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


def _recognised(path: Path, held: Contents, root: Path) -> FoundSAE:
    configs = _configs(path)
    found = matches(held, configs.values())
    if not found:
        raise _unknown(path, held)
    signature = found[0]
    marked = (each for each in configs.items() if signature.marked_by(each[1]))
    config_path, config = next(marked, (None, {}))
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
    )


def _refined(signature: Signature, config: dict[str, Any]) -> tuple[Format, str]:
    """Return format and architecture as the config states them, where it does."""
    metadata = mapping(config, "metadata")
    match signature.format:
        case "sae_lens":
            version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
            architecture = str(config.get("architecture", signature.architecture))
            if {"recipe", "weights_sha256"} <= metadata.keys():
                return "gsae_core", architecture
            legacy = re.match(r"([6-9]|\d\d)\.", str(version)) is None
            return "sae_lens_legacy" if legacy else "sae_lens", architecture
        case "dictionary_learning":
            dict_class = mapping(config, "trainer").get("dict_class")
            return "dictionary_learning", str(dict_class or signature.architecture)
        case "batch_topk":
            return "batch_topk", str(config.get("sae_type", signature.architecture))
    return signature.format, signature.architecture


def _name(path: Path, root: Path) -> str:
    """Return a plain name out of the path below `root`: `trainer_0/ae.pt` -> `trainer_0`."""
    parts = [*path.parent.relative_to(root).parts, path.stem]
    telling = [part for part in parts if part not in GENERIC] or [path.absolute().parent.name]
    return plain_name("-".join(telling[-3:]))


def plain_name(text: str) -> str:
    """Return text as a name that a folder and a run's SAE can have."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return plain[-64:].lstrip("-._") or "sae"


def _named_apart(found: list[FoundSAE]) -> list[FoundSAE]:
    taken: dict[str, int] = {}
    apart = []
    for sae in found:
        n = taken[sae.name] = taken.get(sae.name, 0) + 1
        apart.append(sae if n == 1 else replace(sae, name=f"{sae.name[:60]}-{n}"))
    return apart


def config_of(found: FoundSAE) -> dict[str, Any]:
    """Return the config that describes an SAE; empty where it has none and needs none.

    Raises:
        InputError: if it is needed and missing, with the reason if a file beside it is broken.
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


def matches(held: Contents, configs: Iterable[Mapping[str, Any]]) -> list[Signature]:
    """Return the signatures that a file's names fit, the likeliest first.

    A pickle also holds the words of its configs, so any names may come beside the required ones;
    elsewhere a name that the format does not know makes it another format.
    """
    names, configs = frozenset(held.shapes), list(configs)

    def marked(signature: Signature) -> bool:
        return any(signature.marked_by(config) for config in configs)

    def fits(signature: Signature) -> bool:
        library = LIBRARIES[signature.format]
        if held.kind not in library.kinds.split() or not signature.required <= names:
            return False
        if signature.architecture == library.only_marked and not marked(signature):
            return False
        return held.kind == "pickle" or names <= signature.known

    found = [signature for signature in SIGNATURES if fits(signature)]
    return sorted(found, key=lambda s: (marked(s), len(s.required)), reverse=True)
