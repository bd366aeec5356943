"""The libraries whose SAEs can be read, one description each, and what a file says of its SAE.

Nothing here imports torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    "llama_scope_r1",
    "qwen_scope",
    "goodfire",
    "deepseek_r1",
    "hook_z",
]
Export = Literal["gsae_core", "saelens", "jumprelu", "dictionary_learning"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """What one library writes, and under which names."""

    title: str  # what a page calls it
    # A line an architecture, `NAME: TENSORS`; `?` ends one that may be missing, `.*` begins many.
    tensors: str = ""
    kinds: str = "safetensors pickle"  # containers it writes
    marker: str = ""  # keys of the config that tell it from another library with the same tensors
    only_marked: str = ""  # the architecture that is recognised only with that config
    # Pattern of the path without which it is not recognised: what says no more lies in the name.
    named: str = ""
    needed: str = ""  # what only the config says, without which an SAE cannot be read
    # Names on the Hub: of the weights, empty where that tells nothing, and of the config that
    # stands beside the weights of every SAE there. A `*` in the first makes each file an SAE of its
    # own, and one in the second stands for the name of the weights.
    weights: str = ""
    config: str = ""
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
        jumprelu: W_enc W_dec b_enc b_dec log_threshold
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
    "llama_scope_r1": Library(
        "Llama Scope R1",
        "jumprelu: encoder.weight encoder.bias decoder.weight decoder.bias log_jumprelu_threshold "
        "dataset_average_activation_norm.*",
        kinds="safetensors",
        marker="hook_point_in",
        needed="its hook point and its input normalisation",
        weights="sae_weights.safetensors",
        config="config.json",
    ),
    "qwen_scope": Library(
        "Qwen Scope",
        "topk: W_enc W_dec b_enc b_dec",
        kinds="pickle",
        named=r"(^|/)layer\d+\.sae\.pt$|SAE-Res-[^/]+-W\d+K-L0_\d+",
        weights="layer*.sae.pt",
    ),
    "goodfire": Library(
        "Goodfire",
        "relu: encoder_linear.weight encoder_linear.bias decoder_linear.weight decoder_linear.bias",
        weights="Llama-3.[13]-*B-Instruct-SAE-l*.pt*",
    ),
    "deepseek_r1": Library(
        "qresearch (DeepSeek R1)",
        "relu: encoder.weight encoder.bias decoder.weight decoder.bias",
        kinds="pickle",
        named=r"-SAE-l\d+\.pt$",
        weights="DeepSeek-R1-*-SAE-l*.pt",
    ),
    "hook_z": Library(
        "Attention SAEs (hook_z)",
        "relu: W_enc W_dec b_enc b_dec",
        kinds="pickle",
        marker="act_name dict_size",
        only_marked="relu",
        weights="*.pt",
        config="*_cfg.json",
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

    def strange(self, names: Iterable[str]) -> list[str]:
        """Return those of a file's names that the architecture has no use for, in their order."""
        begun = tuple(name[:-1] for name in self.known if name.endswith("*"))
        return [name for name in names if name not in self.known and not name.startswith(begun)]


def _signatures() -> Iterator[Signature]:
    for format_, library in LIBRARIES.items():
        for line in library.tensors.strip().splitlines():
            architecture, _, tensors = line.strip().partition(": ")
            names = tensors.split()
            required = frozenset(name for name in names if name[-1] not in "?*")
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
    strange: tuple[str, ...] = ()  # other tensors in the file, which its architecture does not read

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
# What its TransformerBridge calls the same places.
_HOOKS |= {"hook_in": "resid_pre", "hook_out": "resid_post"}
_HOOKS |= {"mlp.hook_out": "mlp_out", "attn.hook_out": "attn_out"}
_HOOKS |= {"attn.o.hook_in": "attn_z", "mlp.out.hook_in": "mlp_hidden"}
# Of modules' outputs in Hugging Face models, after the block's number.
_MODULES: dict[str, Site] = {
    "": "resid_post",
    ".input": "resid_pre",
    ".output": "resid_post",
    ".mlp": "mlp_out",
    ".self_attn": "attn_out",
    ".attn": "attn_out",
    ".attention": "attn_out",
    ".self_attn.o_proj.input": "attn_z",
    ".post_feedforward_layernorm.output": "mlp_out",
}
# What dictionary_learning's demo, and the suites trained with it, call a submodule.
_SUBMODULES: dict[str, Site] = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
_SUBMODULES |= dict(zip(SITES, SITES, strict=True))
# Names of folders and repositories of both Gemma Scopes.
_GEMMA: dict[str, Site] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}

# Owners of the models that releases name without them.
_RELEASED = {"Qwen": "Qwen", "Llama": "meta-llama", "DeepSeek": "deepseek-ai"}

_MODEL_KEYS = ("model_name", "lm_name")
_HOOK_KEYS = (
    "hook_name",
    "hook_point",
    "hook_point_in",
    "hf_hook_point_in",
    "submodule_name",
    "act_name",
)


def hook_point(format_: Format, config: dict[str, Any], weights: Path) -> HookPoint:
    """Return the hook that an SAE's config tells of, and of some libraries its path."""
    fields = config | mapping(config, "metadata") | mapping(config, "trainer")
    model, hook = first_text(fields, _MODEL_KEYS), first_text(fields, _HOOK_KEYS)
    layer, site = fields.get("layer"), None
    path = weights.absolute().as_posix()
    match format_:
        case "sparsify":
            hook = text_of(weights.parent.name)
        case "llama_scope" if "Llama3_1-8B" in path:
            model = "meta-llama/Llama-3.1-8B"
        case "llama_scope_r1" if "Llama-Scope-R1-Distill" in path:
            model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
        case "qwen_scope" | "goodfire" | "deepseek_r1":
            # `SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer0.sae.pt`; `Llama-...-Instruct-SAE-l19.pth`.
            if named := re.search(r"(?:SAE-Res-([^/]+)-W\d+K|([^/]+)-SAE-l\d+\.pth?$)", path):
                name = str(named[1] or named[2])
                owner = _RELEASED.get(re.split(r"[-\d]", name)[0])
                model = f"{owner}/{name}" if owner else name
            stated = re.search(r"(?:layer|-SAE-l)(\d{1,4})\.", weights.name)
            hook = hook_name(int(stated[1]), "resid_post") if stated else None
        case "gemma_scope" | "gemma_scope_2":
            # `gemma-scope-2b-pt-res/layer_20/...`; a Hub cache writes the repository's / as --.
            if release := re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", path):
                model = f"gemma-2-{release[1]}{'-it' * (release[2] == 'it')}"
                site = _GEMMA[release[3]]
            elif place := re.search(r"(res|mlp|att)(id_post|_out|n_out)", path):
                site = _GEMMA[place[1]]
            model = model if model is None or "/" in model else f"google/{model}"
            stated = re.search(r"layer_(\d{1,4})", path)
            layer = int(stated[1]) if stated else None
    if hook is not None:
        told = layer_and_site(hook.replace("{layer}", str(fields.get("hook_point_layer"))))
        layer, site = layer if told[0] is None else told[0], told[1]
        head = fields.get("hook_head_index", fields.get("hook_point_head_index"))
        if head is not None:
            site, hook = None, f"{hook}, head {head} alone"  # No site of ours is that narrow.
        if mapping(config, "buffer").get("io") == "in":
            site, hook = None, f"{hook}, what goes in"  # dictionary_learning's word
    known = isinstance(layer, int) and layer >= 0
    return HookPoint(model, layer if known else None, site, hook)


def layer_and_site(hook: str) -> tuple[int | None, Site | None]:
    """Return layer and site of a TransformerLens hook, a module, or e.g. `resid_post_layer_8`."""
    for pattern, sites in (
        (r"blocks\.(?P<layer>\d{1,4})\.(?P<site>.+)", _HOOKS),
        (r"(.*?\.)?(layers|h)[._](?P<layer>\d{1,4})(?P<site>.*)", _MODULES),
        # Its own words alone: a folder called 1024 or run_8 tells of no layer.
        (rf"(?P<site>{'|'.join(_SUBMODULES)})(_layer)?_?(?P<layer>\d{{1,4}})?", _SUBMODULES),
    ):
        if found := re.fullmatch(pattern, hook):
            return int(found["layer"]) if found["layer"] else None, sites.get(found["site"])
    return None, None


def first_text(fields: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the text under the first of some keys that has any."""
    return next(filter(None, (text_of(fields.get(key)) for key in keys)), None)


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


# TransformerLens and older configs leave the owner out.
_OWNERS = {"pythia": "EleutherAI", "gpt2": "openai-community", "gemma": "google"}


def hub_name(model: str) -> str:
    """Return the Hub's name of a model that TransformerLens calls by a shorter one."""
    owner = _OWNERS.get(model.partition("-")[0])
    return model if "/" in model or owner is None else f"{owner}/{model.removesuffix('-small')}"
