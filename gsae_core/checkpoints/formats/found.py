"""What is known of an SAE in somebody's files: before it is read, and with it afterwards.

Nothing here imports torch.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gsae_core.config import SITES, Site

Format = Literal[
    "gsae_core",
    "sae_lens",
    "sae_lens_legacy",
    "dictionary_learning",
    "sae_bench",
    "sparsify",
    "gemma_scope",
    "gemma_scope_2",
    "openai",
    "batch_topk",
    "llama_scope",
]
Export = Literal["gsae_core", "saelens", "jumprelu", "dictionary_learning"]
Shape = tuple[int, ...]

FORMATS: dict[Format, str] = {
    "gsae_core": "our own",
    "sae_lens": "SAELens 6",
    "sae_lens_legacy": "SAELens 5 or older",
    "dictionary_learning": "dictionary_learning",
    "sae_bench": "SAEBench",
    "sparsify": "sparsify",
    "gemma_scope": "Gemma Scope",
    "gemma_scope_2": "Gemma Scope 2",
    "openai": "OpenAI sparse_autoencoder",
    "batch_topk": "BatchTopK",
    "llama_scope": "Llama Scope",
}
"""What a page calls each format that can be read."""

EXPORTS: dict[Export, str] = {
    "saelens": "SAELens 6, of the same architecture",
    "jumprelu": "SAELens 6, as the JumpReLU SAE that computes the same",
    "dictionary_learning": "dictionary_learning: ae.pt and config.json",
    "gsae_core": "our own, which SAELens 6 opens too",
}
"""What a page calls each format that can be written."""


@dataclass(frozen=True)
class Place:
    """Where in which language model an SAE belongs, as far as its files say; None where not."""

    model: str | None = None
    """Name on the Hub, or as the files spell it."""

    layer: int | None = None
    site: Site | None = None
    hook_name: str | None = None
    """The site as the files spell it."""


@dataclass(frozen=True)
class Found:
    """An SAE in a folder or file, recognised by its tensors' names and its config; not read yet."""

    name: str
    """A name for it that can be a folder's, made from where it lies."""

    format: Format
    architecture: str
    """In the words of its own library, such as `BatchTopKSAE` or `standard`."""

    weights: Path
    config: Path | None
    """The JSON file that describes it; None where the format has none, or it is missing."""

    keys: Mapping[str, Shape | None]
    """Tensors and their shapes. A pickle tells names alone before torch reads it."""

    d_in: int | None
    d_sae: int | None
    """None where neither shapes nor the config say."""

    n_bytes: int
    """Of the weights, on disk."""

    place: Place

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights, and the config if there is one."""
        return (self.weights,) if self.config is None else (self.weights, self.config)

    @property
    def library(self) -> str:
        """What a page calls the format."""
        return FORMATS[self.format]


@dataclass(frozen=True)
class Provenance:
    """Where an SAE came from, and what was assumed to make it ours; kept in its `cfg.json`."""

    format: Format
    library: str
    architecture: str
    """As its own library calls it."""

    place: Place
    files: tuple[tuple[str, str], ...]
    """Name and SHA-256 of each file it was read from."""

    assumed: tuple[str, ...]
    """Sentences: what the files do not say, and every conversion that was made."""

    sparsity: float | None = None
    """lambda it was trained with, in its own library's units (k of a TopK SAE); None: not said."""

    l0: float | None = None
    """Latents per token that its files claim; None: not said."""

    def as_metadata(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


# Of TransformerLens; `hook_mlp_out` and its like are ours but for the prefix.
_HOOKS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "mlp.hook_post": "mlp_hidden",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
}
# Of modules' outputs in Hugging Face models, after the block's number.
_MODULES: dict[str, Site] = {
    "": "resid_post",
    ".output": "resid_post",
    ".mlp": "mlp_out",
    ".self_attn": "attn_out",
    ".attn": "attn_out",
    ".attention": "attn_out",
    ".self_attn.o_proj.input": "attn_z",
    ".post_feedforward_layernorm.output": "mlp_out",
}
_SUBMODULES: dict[str, Site] = {
    "resid": "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
}
_GEMMA_3: dict[str, Site] = {
    "resid_post": "resid_post",
    "attn_out": "attn_z",
    "mlp_out": "mlp_out",
}
_GEMMA_2: dict[str, Site] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def place_of(format_: Format, config: dict[str, Any], weights: Path) -> Place:
    """Return the place that an SAE's config and path tell of."""
    match format_:
        case "gsae_core" | "sae_lens" | "sae_lens_legacy":
            metadata = config.get("metadata")
            said = config | (metadata if isinstance(metadata, dict) else {})
            return _lens(said)
        case "dictionary_learning":
            return _dictionary_learning(config)
        case "sparsify":
            return _module(weights.parent.name, model=None)
        case "gemma_scope":
            return _gemma_scope(weights)
        case "gemma_scope_2":
            return _gemma_scope_2(config, weights)
        case "batch_topk":
            return _lens(config | {"hook_name": config.get("hook_point")})
        case "llama_scope":
            model = "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in str(weights) else None
            return _lens({"model_name": model, "hook_name": config.get("hook_point_in")})
        case _:
            return Place()


def hook_place(hook: str) -> tuple[int | None, Site | None]:
    """Return layer and site of a TransformerLens hook name, where ours has them."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", hook)
    if found is None:
        return None, None
    return int(found[1]), _HOOKS.get(found[2])


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


def _lens(said: dict[str, Any]) -> Place:
    hook = _text(said.get("hook_name")) or _text(said.get("hook_point"))
    model = _text(said.get("model_name"))
    if hook is None:
        return Place(model=model)
    layer, site = hook_place(hook.replace("{layer}", str(said.get("hook_point_layer"))))
    # One head of many: no site of ours is that narrow.
    head = said.get("hook_head_index", said.get("hook_point_head_index"))
    return Place(model, layer, site if head is None else None, hook)


def _dictionary_learning(config: dict[str, Any]) -> Place:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        return Place()
    name, layer = _text(trainer.get("submodule_name")), trainer.get("layer")
    if name is not None and layer is not None:
        # The demo, and the suites trained with it, write e.g. resid_post_layer_8.
        name = re.sub(rf"(_layer)?_?{layer}$", "", name)
    ours: dict[str, Site] = dict(zip(SITES, SITES, strict=True))
    sites = ours | _SUBMODULES
    return Place(
        model=_text(trainer.get("lm_name")),
        layer=layer if isinstance(layer, int) and layer >= 0 else None,
        site=sites.get(name or ""),
        hook_name=_text(trainer.get("submodule_name")),
    )


def _module(name: str, *, model: str | None) -> Place:
    found = re.search(r"(?:^|\.)(?:layers|h)[._](\d{1,4})(.*)$", name)
    if found is None:
        return Place(model=model, hook_name=_text(name))
    return Place(model, int(found[1]), _MODULES.get(found[2]), name)


def _gemma_scope(weights: Path) -> Place:
    """Read `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`."""
    path = weights.absolute().as_posix()
    layer = re.search(r"layer_(\d{1,4})", path)
    # A Hub cache writes the repository's / as --.
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", path)
    number = int(layer[1]) if layer else None
    if release is None:
        return Place(layer=number)
    tuned = "-it" if release[2] == "it" else ""
    return Place(f"google/gemma-2-{release[1]}{tuned}", number, _GEMMA_2[release[3]])


def _gemma_scope_2(config: dict[str, Any], weights: Path) -> Place:
    model = _text(config.get("model_name"))
    if model is not None and "/" not in model:
        model = f"google/{model}"
    hook = _text(config.get("hf_hook_point_in"))
    if hook is not None:
        return _module(hook.removeprefix("model."), model=model)
    path = weights.absolute().as_posix()
    layer = re.search(r"layer_(\d{1,4})", path)
    sites: list[Site] = [site for part, site in _GEMMA_3.items() if part in path]
    return Place(model, int(layer[1]) if layer else None, sites[0] if sites else None)


def claimed_l0(weights: Path) -> float | None:
    """Return the L0 that a Gemma Scope path states, e.g. `average_l0_71`."""
    found = re.search(r"average_l0_(\d{1,6})", weights.as_posix())
    return float(found[1]) if found else None


# TransformerLens and older configs leave the owner out.
_OWNERS = {"pythia": "EleutherAI", "gpt2": "openai-community", "gemma": "google"}


def hub_name(model: str) -> str:
    """Return the Hub's name of a model that TransformerLens calls by a shorter one."""
    owner = _OWNERS.get(model.partition("-")[0])
    return model if "/" in model or owner is None else f"{owner}/{model.removesuffix('-small')}"
