"""Language models to choose from: well-known ones as data, those on this machine, any other."""

import csv
import functools
import math
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gsae_core.config import Site
from gsae_core.errors import InputError
from gsae_core.files import read_json

ASSETS = Path(str(resources.files("gsae_core").joinpath("assets")))
BUNDLED = ASSETS / "stdlib-gpt2"
"""Folder of the model that ships with the package."""


class Family(NamedTuple):
    """Module names of one family; where none are given, Llama's."""

    blocks: str = "layers"
    """The list of blocks in the headless model; all others are relative to a block."""
    attn: str = "self_attn"
    mlp: str = "mlp"
    attn_proj: str = "self_attn.o_proj"
    mlp_proj: str = "mlp.down_proj"
    attn_out: str = "self_attn"
    """What is added to the residual stream: in Gemma 2 and 3 the norm after attention."""
    mlp_out: str = "mlp"


_LLAMA = Family()
_GPT2 = Family(
    blocks="h", attn="attn", attn_proj="attn.c_proj", mlp_proj="mlp.c_proj", attn_out="attn"
)
_NEOX = Family(
    attn="attention",
    attn_proj="attention.dense",
    mlp_proj="mlp.dense_4h_to_h",
    attn_out="attention",
)
_POST_NORM = Family(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
FAMILIES: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

# Encoders and encoder-decoders that people name; others are told when they are loaded.
_OTHERS = {"albert", "bart", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mt5"} | {
    "roberta",
    "t5",
    "whisper",
    "xlm-roberta",
}


LENS_MODELS: Mapping[str, str] = {
    **{
        f"{kind}-{n}l": f"NeelNanda/{title}_{n}L512W_C4_Code"
        for kind, title in (("gelu", "GELU"), ("solu", "SoLU"), ("attn-only", "Attn_Only"))
        for n in (1, 2, 3, 4)
    },
    **{
        f"solu-{n}l": f"NeelNanda/SoLU_{n}L{width}W_C4_Code"
        for n, width in ((6, 768), (8, 1024), (10, 1280), (12, 1536))
    },
    **{f"solu-{n}l-wiki": f"NeelNanda/SoLU_{n}L512W_Wiki_Finetune" for n in (1, 4)},
    **{
        f"solu-{n}l-pile": f"NeelNanda/SoLU_{n}L_v{version}_old"
        for n, version in ((1, 9), (2, 10), (4, 11), (6, 13), (8, 21), (10, 22), (12, 23))
    },
}
"""TransformerLens' own small models, in its own file format: name -> repository on the Hub."""


class ModelShape(NamedTuple):
    """What a model folder's config.json says of its size."""

    d_model: int
    d_mlp: int
    d_attn: int
    """Heads times head width."""
    n_layers: int

    def width(self, site: Site) -> int:
        """Return d_in of a site."""
        return {"mlp_hidden": self.d_mlp, "attn_z": self.d_attn}.get(site, self.d_model)


class ModelFacts(NamedTuple):
    """What is known of a model before it is loaded; None: not known."""

    name: str
    where: Literal["bundled", "folder", "cached", "hub"]
    family: str | None = None
    parameters: int | None = None
    shape: ModelShape | None = None
    gated: bool | None = None
    """Whether the Hub asks for a licence to be accepted; None also where that has changed."""


def model_folder(name: str) -> Path | None:
    """Return a local model's folder; None for a name on the Hub."""
    if name == "bundled":
        return BUNDLED
    folder = Path(os.path.expanduser(name))
    return folder if os.path.isfile(folder / "config.json") else None


def lens_repo(name: str) -> str | None:
    """Return the repository of one of `LENS_MODELS`, given its name or itself; else None."""
    return LENS_MODELS.get(name, name if name in LENS_MODELS.values() else None)


def _shape(config: dict[str, Any]) -> ModelShape | None:
    try:
        fields = config.get("text_config", config)

        def first(*names: str) -> Any:
            return next((value for name in names if (value := fields.get(name))), None)

        d_model = first("hidden_size", "n_embd", "d_model")
        n_layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        n_heads = first("num_attention_heads", "n_head", "num_heads", "n_heads") or 1
        d_mlp = first("intermediate_size", "n_inner", "ffn_dim") or 4 * d_model
        d_head = first("head_dim") or d_model // n_heads
    except (AttributeError, TypeError, ArithmeticError):
        return None
    numbers = (d_model, n_layers, n_heads, d_mlp, d_head)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return ModelShape(d_model, d_mlp, n_heads * d_head, n_layers)


@functools.cache
def known_models() -> dict[str, ModelFacts]:
    """Return the well-known models of the supported families by name."""
    found = {}
    for row in csv.DictReader((ASSETS / "models.csv").read_text(encoding="utf-8").splitlines()):
        n = {column: int(text) for column, text in row.items() if text.isdecimal()}
        shape = ModelShape(n["d_model"], n["d_mlp"], n["heads"] * n["head_dim"], n["layers"])
        gated = {"yes": True, "no": False}.get(row["gated"])
        facts = (row["family"], n["parameters"], shape, gated)
        found[row["name"]] = ModelFacts(row["name"], "hub", *facts)
    return found


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
            ends = (".safetensors", "pytorch_model.bin")
            weights = any(
                name.endswith("final.pth" if lens_repo(repo.repo_id) else ends) for name in names
            )
            if repo.repo_type == "model" and "config.json" in names and weights:
                found[repo.repo_id] = revision.snapshot_path
    return found


def choices(cached: Mapping[str, Path]) -> list[str]:
    """Return the names to offer: the bundled model, those that are here, the well-known ones."""
    return list(dict.fromkeys(["bundled", *cached, *known_models(), *LENS_MODELS]))


def model_facts(name: str, cached: Mapping[str, Path]) -> ModelFacts:
    """Return what is known of `bundled`, a local folder, or a name on the Hub."""
    of_lens = re.search(r"_(\d+)L512W_", lens_repo(name) or "")
    shape = ModelShape(512, 2048, 512, int(of_lens[1])) if of_lens else None
    known = known_models().get(name, ModelFacts(name, "hub", shape=shape))
    folder = model_folder(name) or cached.get(lens_repo(name) or name)
    if folder is None:
        return known
    try:
        config = read_json(folder / "config.json")
    except InputError:  # damaged; the job says so when it loads it
        config = {}
    where = "bundled" if name == "bundled" else "folder" if model_folder(name) else "cached"
    family = str(config["model_type"]) if "model_type" in config else None
    parameters = count_parameters(folder) or known.parameters
    shape = _shape(config) or known.shape
    return ModelFacts(name, where, family, parameters, shape, known.gated)


def count_parameters(folder: Path) -> int | None:
    """Return how many numbers the headers of safetensors files tell; None without such files."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "np") as file:
                total += sum(math.prod(file.get_slice(k).get_shape()) for k in file.offset_keys())
    except (OSError, SafetensorError):
        return None  # damaged, as above
    return total or None


def is_certain(family: str | None, site: str) -> bool:
    """Return whether models of a family have a site, as far as is known before they are loaded."""
    return family is None or family in FAMILIES or site in ("resid_pre", "resid_post")


def check_family(name: str, family: str | None) -> None:
    """Raise InputError if a model is known, before it is loaded, to predict no next token."""
    if family in _OTHERS:
        raise not_causal(name, family)


def not_causal(name: str, family: str) -> InputError:
    """Return that a model is an encoder, or reads text both ways."""
    return InputError(
        f"expected a causal language model, got {family!r} in {name!r}; choose a model that "
        "predicts the next token from those before it"
    )
