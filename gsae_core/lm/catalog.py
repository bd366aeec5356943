"""Language models to choose from: well-known ones as data, those on this machine, any other."""

import csv
import functools
import json
import math
import struct
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from gsae_core.config import Site
from gsae_core.errors import InputError


class ModelShape(NamedTuple):
    """What a model folder's config.json says of its size."""

    d_model: int
    d_mlp: int
    d_attn: int
    """Heads times head width: what attn_z holds."""
    n_layers: int

    def width(self, site: Site) -> int:
        """Return how wide the activations at a site are."""
        return {"mlp_hidden": self.d_mlp, "attn_z": self.d_attn}.get(site, self.d_model)


def model_folder(name: str) -> Path | None:
    """Return the folder of the bundled model or of a local one; None for a name on the Hub."""
    if name == "bundled":
        return Path(str(resources.files("gsae_core").joinpath("assets/stdlib-gpt2")))
    try:
        folder = Path(name).expanduser()
        return folder if (folder / "config.json").is_file() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of a user there is not
        return None


def model_shape(name: str) -> ModelShape | None:
    """Return the shape of the bundled model or of a local folder; None for a name on the Hub."""
    folder = model_folder(name)
    return None if folder is None else read_shape(folder / "config.json")


def read_shape(path: Path) -> ModelShape | None:
    """Return the shape that a Hugging Face config.json gives; None where it gives none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        fields = fields.get("text_config", fields)
        d_model = fields.get("hidden_size") or fields.get("n_embd")
        n_layers = fields.get("num_hidden_layers") or fields.get("n_layer")
        n_heads = fields.get("num_attention_heads") or fields.get("n_head") or 1
        d_mlp = fields.get("intermediate_size") or fields.get("n_inner") or 4 * d_model
        d_head = fields.get("head_dim") or d_model // n_heads
    except (ValueError, AttributeError, TypeError):  # no JSON, or JSON of another kind
        return None
    numbers = (d_model, n_layers, n_heads, d_mlp, d_head)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return ModelShape(d_model=d_model, d_mlp=d_mlp, d_attn=n_heads * d_head, n_layers=n_layers)


Where = Literal["bundled", "folder", "cached", "hub"]


class KnownModel(NamedTuple):
    """A row of assets/models.csv."""

    name: str
    family: str
    """The `model_type` of its config.json."""
    parameters: int
    shape: ModelShape
    gated: bool | None
    """Whether the Hub asks for a licence to be accepted; None where that has changed over time."""


class ModelFacts(NamedTuple):
    """What is known of a model before it is loaded; None: not known."""

    name: str
    where: Where
    family: str | None
    parameters: int | None
    shape: ModelShape | None
    gated: bool | None


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """Return the well-known models of the supported families by name."""
    text = resources.files("gsae_core").joinpath("assets/models.csv").read_text(encoding="utf-8")
    return {row["name"]: _known(row) for row in csv.DictReader(text.splitlines())}


def _known(row: dict[str, str]) -> KnownModel:
    shape = ModelShape(
        d_model=int(row["d_model"]),
        d_mlp=int(row["d_mlp"]),
        d_attn=int(row["heads"]) * int(row["head_dim"]),
        n_layers=int(row["layers"]),
    )
    gated = {"yes": True, "no": False}.get(row["gated"])
    return KnownModel(row["name"], row["family"], int(row["parameters"]), shape, gated)


def families() -> tuple[str, ...]:
    """Return the `model_type`s of the models that can be trained on."""
    return tuple(dict.fromkeys(model.family for model in known_models().values()))


def cached_models() -> dict[str, Path]:
    """Return the models whose config and weights lie in the Hub's cache, each with its folder."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    found = {}
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda r: r.last_modified):
            names = {file.file_name for file in revision.files}
            if repo.repo_type == "model" and "config.json" in names and _has_weights(names):
                found[repo.repo_id] = revision.snapshot_path
    return found


def _has_weights(names: set[str]) -> bool:
    return any(name.endswith((".safetensors", "pytorch_model.bin")) for name in names)


def choices(cached: Mapping[str, Path]) -> list[str]:
    """Return the names to offer: the bundled model, those that are here, the well-known ones."""
    return list(dict.fromkeys(["bundled", *cached, *known_models()]))


def model_facts(name: str, cached: Mapping[str, Path]) -> ModelFacts:
    """Return what is known of the model that `name` stands for.

    Args:
        name: `bundled`, a local folder, or a name on the Hub.
        cached: as `cached_models` returns them.
    """
    known = known_models().get(name)
    gated = None if known is None else known.gated
    folder = model_folder(name)
    where: Where = "bundled" if name == "bundled" else "folder"
    if folder is None and name in cached:
        folder, where = cached[name], "cached"
    if folder is not None:
        shape = read_shape(folder / "config.json")
        parameters = count_parameters(folder) or (known and known.parameters)
        return ModelFacts(name, where, _family(folder), parameters, shape, gated)
    if known is not None:
        return ModelFacts(name, "hub", known.family, known.parameters, known.shape, gated)
    return ModelFacts(name, "hub", None, None, None, None)


def _family(folder: Path) -> str | None:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        return str(fields["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def count_parameters(folder: Path) -> int | None:
    """Return how many numbers a folder's safetensors files hold; None without such files.

    Only their headers are read: 8 bytes with the length of a JSON object of names and shapes.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        total = sum(_numbers_in(file) for file in files)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return None  # damaged; the job says so when it loads it
    return total or None


def _numbers_in(file: Path) -> int:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError("expected a header inside the file")
        header = json.loads(opened.read(length))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def check_family(facts: ModelFacts) -> None:
    """Check that a model is of a family that can be trained on, as far as that is known.

    Raises:
        InputError: if it is of another.
    """
    if facts.family is not None and facts.family not in families():
        raise InputError(
            f"--model: expected a model of a supported family ({', '.join(families())}), got "
            f"{facts.family!r}; choose another"
        )
