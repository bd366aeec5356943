"""The libraries whose SAEs can be read, one description each, and what a file says of its SAE.

Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gsae_core.config import SITES, Site, hook_name

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


@dataclass(frozen=True)
class Library:
    """What one library writes, and under which names."""

    title: str  # what a page calls it
    tensors: str = ""  # a line an architecture, `NAME: TENSORS`; `?` ends one that may be missing
    kinds: str = "safetensors pickle"  # containers it writes
    marker: str = ""  # keys of the config that tell it from another library with the same tensors
    only_marked: str = ""  # the architecture that is recognised only with that config
    needed: str = ""  # what only the config says, without which an SAE cannot be read
    weights: str = ""  # name of the weights on the Hub; empty where that tells nothing
    config: str = ""  # name of the config that stands beside the weights of every SAE there
    beside: tuple[str, ...] = ()  # fetched too where they are, as every JSON file is
    config_above: bool = False  # whether the config stands a folder higher


_SAE_LENS_NEEDED = "its architecture and its input normalisation"

LIBRARIES: dict[Format, Library] = {
    "gsae_core": Library("our own"),
    "sae_lens": Library(
        "SAELens 6",
        """
        gated: W_enc W_dec b_dec b_gate b_mag r_mag scaling_factor?
        gated_untied: W_enc W_mag W_dec b_dec b_gate b_mag
        standard: W_enc W_dec b_enc b_dec scaling_factor?
        jumprelu: W_enc W_dec b_enc b_dec threshold scaling_factor?
        """,
        kinds="safetensors",
        marker="d_in d_sae",
        needed=_SAE_LENS_NEEDED,
        weights="sae_weights.safetensors",
        config="cfg.json",
        beside=("activation_whitening.safetensors", "feature_stats.safetensors"),
    ),
    "sae_lens_legacy": Library("SAELens 5 or older", needed=_SAE_LENS_NEEDED),
    "dictionary_learning": Library(
        "dictionary_learning",
        """
        GatedAutoEncoder: encoder.weight decoder.weight decoder_bias gate_bias mag_bias r_mag
        AutoEncoder: encoder.weight encoder.bias decoder.weight bias
        AutoEncoderNew: encoder.weight encoder.bias decoder.weight decoder.bias
        BatchTopKSAE: encoder.weight encoder.bias decoder.weight b_dec k threshold?
        JumpReluAutoEncoder: W_enc W_dec b_enc b_dec threshold
        MatryoshkaBatchTopKSAE: W_enc W_dec b_enc b_dec k threshold group_sizes
        """,
        marker="trainer",
        weights="ae.pt",
        config="config.json",
    ),
    "sae_bench": Library(
        "SAEBench",
        """
        gated: W_enc W_dec b_dec gate_bias b_mag r_mag
        batch_topk: W_enc W_dec b_enc b_dec k threshold?
        """,
    ),
    "sparsify": Library(
        "sparsify",
        "topk: encoder.weight encoder.bias W_dec b_dec W_skip?",
        marker="d_in k",
        needed="its k",
        weights="sae.safetensors",
        config="cfg.json",
    ),
    "gemma_scope": Library(
        "Gemma Scope",
        """
        jumprelu: W_enc W_dec b_enc b_dec threshold scaling_factor?
        jumprelu: w_enc w_dec b_enc b_dec threshold scaling_factor?
        """,
        kinds="npz",
        weights="params.npz",
    ),
    "gemma_scope_2": Library(
        "Gemma Scope 2",
        "jump_relu: w_enc w_dec b_enc b_dec threshold affine_skip_connection?",
        kinds="safetensors",
        marker="architecture",
        weights="params.safetensors",
    ),
    "openai": Library(
        "OpenAI sparse_autoencoder",
        "ReLU or TopK: pre_bias encoder.weight latent_bias decoder.weight stats_last_nonzero? "
        "latents_activation_frequency? latents_mean_square? activation? activation_state_dict?",
    ),
    "batch_topk": Library(
        "BatchTopK",
        """
        vanilla or topk: W_enc W_dec b_enc b_dec
        jumprelu: W_enc W_dec b_enc b_dec jumprelu.log_threshold
        """,
        marker="sae_type",
        only_marked="vanilla or topk",
        needed="its sae_type",
        weights="sae.pt",
        config="config.json",
    ),
    "llama_scope": Library(
        "Llama Scope",
        "jumprelu: encoder.weight encoder.bias decoder.weight decoder.bias",
        kinds="safetensors",
        marker="hook_point_in",
        only_marked="jumprelu",
        needed="its threshold",
        weights="final.safetensors",
        config="hyperparams.json",
        config_above=True,
    ),
}

FORMATS: dict[Format, str] = {name: library.title for name, library in LIBRARIES.items()}
"""What a page calls each format that can be read."""

EXPORTS: dict[Export, str] = {
    "saelens": "SAELens 6, of the same architecture",
    "jumprelu": "SAELens 6, as the JumpReLU SAE that computes the same",
    "dictionary_learning": "dictionary_learning: ae.pt and config.json",
    "gsae_core": "our own, which SAELens 6 opens too",
}
"""What a page calls each format that can be written."""


class Signature(NamedTuple):
    """The tensors of one architecture of one library."""

    format: Format
    architecture: str
    required: frozenset[str]
    known: frozenset[str]  # the required ones, and those that may be there too

    def marked_by(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config says that it is this library's."""
        marker = LIBRARIES[self.format].marker.split()
        return bool(marker) and config.keys() >= set(marker)


def _signatures() -> Iterator[Signature]:
    for format_, library in LIBRARIES.items():
        for line in library.tensors.strip().splitlines():
            architecture, _, tensors = line.strip().partition(": ")
            names = tensors.split()
            required = frozenset(name for name in names if not name.endswith("?"))
            known = frozenset(name.rstrip("?") for name in names)
            yield Signature(format_, architecture, required, known)


SIGNATURES = tuple(_signatures())


@dataclass(frozen=True)
class HookPoint:
    """Which activations of which language model an SAE is for, as far as its files say."""

    model: str | None = None  # name on the Hub, or as the files spell it
    layer: int | None = None
    site: Site | None = None
    hook_name: str | None = None  # the site as the files spell it


@dataclass(frozen=True)
class FoundSAE:
    """An SAE in a folder or file, recognised by its tensors' names and its config; not read yet."""

    name: str  # made from where it lies; it can be a folder's
    format: Format
    architecture: str  # in the words of its own library, such as `BatchTopKSAE` or `standard`
    weights: Path
    config: Path | None  # the JSON file that describes it; None where there is none
    d_in: int | None
    d_sae: int | None  # None where neither shapes nor the config say
    n_bytes: int  # of the weights
    place: HookPoint

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
    architecture: str  # as its own library calls it
    place: HookPoint
    files: tuple[tuple[str, str], ...]  # name and SHA-256 of each file it was read from
    assumed: tuple[str, ...]  # sentences: what the files do not say, and every conversion
    sparsity: float | None = None  # lambda in its library's units, k of TopK; None: not said
    l0: float | None = None  # latents per token that its files claim; None: not said


# TransformerLens' name of each site, after the block's number.
_HOOKS: dict[str, Site] = {hook_name(0, site).removeprefix("blocks.0."): site for site in SITES}
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
_SUBMODULES: dict[str, Site] = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
_SUBMODULES |= dict(zip(SITES, SITES, strict=True))
_GEMMA_3: dict[str, Site] = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}
_GEMMA_2: dict[str, Site] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def hook_point(format_: Format, config: dict[str, Any], weights: Path) -> HookPoint:
    """Return the hook that an SAE's config and path tell of."""
    path = weights.absolute().as_posix()
    match format_:
        case "gsae_core" | "sae_lens" | "sae_lens_legacy":
            return _transformer_lens(config | mapping(config, "metadata"))
        case "dictionary_learning":
            return _dictionary_learning(mapping(config, "trainer"))
        case "sparsify":
            return _module(weights.parent.name, model=None)
        case "gemma_scope":
            return _gemma_scope(path)
        case "gemma_scope_2":
            return _gemma_scope_2(config, path)
        case "batch_topk":
            return _transformer_lens(config | {"hook_name": config.get("hook_point")})
        case "llama_scope":
            model = "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in path else None
            hook = config.get("hook_point_in")
            return _transformer_lens({"model_name": model, "hook_name": hook})
        case _:
            return HookPoint()


def layer_and_site(hook: str) -> tuple[int | None, Site | None]:
    """Return layer and site of a TransformerLens hook name, where ours has them."""
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", hook)
    return (int(found[1]), _HOOKS.get(found[2])) if found else (None, None)


def mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside a config; empty where there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def widths(
    shapes: Mapping[str, Shape | None], config: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """Return d_in and d_sae by the shapes, else by what the config calls them."""
    for name, order in (("W_dec", 1), ("w_dec", 1), ("decoder.weight", -1), ("encoder.weight", 1)):
        shape = shapes.get(name)
        if shape is not None and len(shape) == 2:
            d_sae, d_in = shape[::order]
            return d_in, d_sae
    fields = {**config, **mapping(config, "trainer")}
    d_in = next((fields[k] for k in ("d_in", "activation_dim", "act_size") if k in fields), None)
    d_sae = next((fields[k] for k in ("d_sae", "dict_size") if k in fields), None)
    return (d_in if isinstance(d_in, int) else None, d_sae if isinstance(d_sae, int) else None)


def text_of(value: object) -> str | None:
    """Return text of a file, cut to 200 characters; None for anything else and for none."""
    return value[:200] if isinstance(value, str) and value else None


def _transformer_lens(fields: dict[str, Any]) -> HookPoint:
    hook = text_of(fields.get("hook_name")) or text_of(fields.get("hook_point"))
    model = text_of(fields.get("model_name"))
    if hook is None:
        return HookPoint(model=model)
    layer, site = layer_and_site(hook.replace("{layer}", str(fields.get("hook_point_layer"))))
    # One head of many: no site of ours is that narrow.
    head = fields.get("hook_head_index", fields.get("hook_point_head_index"))
    return HookPoint(model, layer, site if head is None else None, hook)


def _dictionary_learning(trainer: dict[str, Any]) -> HookPoint:
    hook, layer = text_of(trainer.get("submodule_name")), trainer.get("layer")
    # The demo, and the suites trained with it, write e.g. resid_post_layer_8.
    ending = "" if layer is None else rf"(_layer)?_?{re.escape(str(layer))}$"
    return HookPoint(
        model=text_of(trainer.get("lm_name")),
        layer=layer if isinstance(layer, int) and layer >= 0 else None,
        site=_SUBMODULES.get(re.sub(ending, "", hook or "")),
        hook_name=hook,
    )


def _module(name: str, *, model: str | None) -> HookPoint:
    found = re.search(r"(?:^|\.)(?:layers|h)[._](\d{1,4})(.*)$", name)
    if found is None:
        return HookPoint(model=model, hook_name=text_of(name))
    return HookPoint(model, int(found[1]), _MODULES.get(found[2]), name)


def _layer_in(path: str) -> int | None:
    found = re.search(r"layer_(\d{1,4})", path)
    return int(found[1]) if found else None


def _gemma_scope(path: str) -> HookPoint:
    """Read `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`."""
    # A Hub cache writes the repository's / as --.
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", path)
    if release is None:
        return HookPoint(layer=_layer_in(path))
    tuned = "-it" if release[2] == "it" else ""
    return HookPoint(f"google/gemma-2-{release[1]}{tuned}", _layer_in(path), _GEMMA_2[release[3]])


def _gemma_scope_2(config: dict[str, Any], path: str) -> HookPoint:
    model = text_of(config.get("model_name"))
    if model is not None and "/" not in model:
        model = f"google/{model}"
    hook = text_of(config.get("hf_hook_point_in"))
    if hook is not None:
        return _module(hook.removeprefix("model."), model=model)
    sites: list[Site | None] = [site for part, site in _GEMMA_3.items() if part in path]
    return HookPoint(model, _layer_in(path), [*sites, None][0])


# TransformerLens and older configs leave the owner out.
_OWNERS = {"pythia": "EleutherAI", "gpt2": "openai-community", "gemma": "google"}


def hub_name(model: str) -> str:
    """Return the Hub's name of a model that TransformerLens calls by a shorter one."""
    owner = _OWNERS.get(model.partition("-")[0])
    return model if "/" in model or owner is None else f"{owner}/{model.removesuffix('-small')}"
