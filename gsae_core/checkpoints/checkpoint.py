"""SAEs on disk, in SAELens 6's layout: `load_sae(folder)` and `save_sae(sae, folder)`.

    folder/cfg.json                   architecture, widths, and `metadata`: where it came from
    folder/sae_weights.safetensors    its tensors, `W_gate` of a Gated SAE under the name `W_enc`

It takes raw activations, and says under `normalize_activations` if it normalises each token
itself. A `topk` config holds `k` as well. `threshold` of a `jumprelu` SAE is float32 in any file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsae_core.config import Architecture, Recipe
from gsae_core.errors import InputError
from gsae_core.files import read_sae_cfg, replace_durably, sha256, write_json
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, InputNorm, SinglePathSAE

WEIGHTS = "sae_weights.safetensors"

# The release whose layout this is. Below 6.0.0, or without it, SAELens reads another layout.
SAE_LENS_VERSION = "6.54.12"

# What SAELens' loader cannot build; our own reader takes it.
UNTIED = "gated_untied"
ARCHITECTURES: dict[str, Architecture] = {
    "gated": "gated",
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    UNTIED: "gated",
}

SETTINGS: dict[Architecture, tuple[str, ...]] = {
    "gated": ("tie", "aux", "detach_b_dec"),
    "relu": (),
    "jumprelu": ("init_threshold", "bandwidth", "threshold_unit"),
    "topk": ("k_aux",),
}
"""What SAELens has no key for, and training would go on with."""

FORBIDDEN_SIBLING = "activation_scaler.json"


def load_sae(folder: Path | str) -> SAE:
    """Return the SAE in a folder, ours or SAELens 6's, on the CPU in float32.

    InputError if a file is missing, damaged, or describes an SAE that this package has not.
    """
    folder = Path(folder)
    cfg = read_cfg(folder)
    _check_cfg(folder, cfg)
    tensors = _read_weights(folder, cfg)
    metadata = cfg.get("metadata") or {}
    if cfg["architecture"] == UNTIED:
        metadata |= {"tie": "untied"}
    sae = empty_sae(
        ARCHITECTURES[cfg["architecture"]],
        cfg["d_in"],
        cfg["d_sae"],
        recipe=metadata.get("recipe") or recipe_of(tensors.get("W_dec", torch.eye(1))),
        k=cfg.get("k"),
        settings=metadata,
    )
    expected, found = _shapes(_tensors(sae)), _shapes(tensors)
    if expected != found:
        raise InputError(
            f"expected tensors {expected} in {folder / WEIGHTS}, as its cfg.json says, "
            f"found {found}"
        )
    fill_(sae, tensors)
    normalisation = cfg.get("normalize_activations", "none")
    sae.input_norm = None if normalisation == "none" else normalisation
    if not cfg.get("apply_b_dec_to_input", True):
        shift_input_(sae, sae.b_dec)
    if isinstance(sae, TopKSAE) and cfg.get("rescale_acts_by_decoder_norm"):
        take_norms_into_encoder_(sae)
    return sae


def save_sae(
    sae: SAE, folder: Path, *, metadata: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write an SAE that takes raw activations; SAELens 6 opens the folder unchanged.

    Args:
        folder: `cfg.json` and `sae_weights.safetensors` in it are replaced, each whole.
        metadata: SAELens reads `model_name`, `hook_name`, `dataset_path`, `context_size` and
            `prepend_bos` there.
        dtype: of the tensors in the file; None takes the SAE's.

    Raises:
        InputError: if the disk is full or the folder cannot be written.
    """
    dtype = dtype or sae.W_dec.dtype
    name = next(name for name, ours in ARCHITECTURES.items() if ours == sae.architecture)
    if isinstance(sae, GatedSAE) and sae.tie == "untied":
        name = UNTIED
    tensors = {
        name: tensor.to(torch.float32 if name == "threshold" else dtype)
        for name, tensor in _tensors(sae).items()
    }
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    replace_durably(folder / WEIGHTS, lambda path: save_file(tensors, path), n_bytes=n_bytes)
    write_json(
        folder / "cfg.json",
        {
            "architecture": name,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": str(dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": sae.input_norm or "none",
            "reshape_activations": "none",
            **({"k": sae.k} if isinstance(sae, TopKSAE) else {}),
            "metadata": {"sae_lens_version": SAE_LENS_VERSION, "recipe": sae.recipe}
            | {setting: getattr(sae, setting) for setting in SETTINGS[sae.architecture]}
            | metadata
            # Weights and config are two files; this says that they belong together, and whole.
            | {"weights_sha256": sha256(folder / WEIGHTS)},
        },
    )


def _tensors(sae: SAE) -> dict[str, Tensor]:
    """Return an SAE's tensors under the names that a file has."""
    tensors = {
        ("W_enc" if name == "W_gate" else name): value.detach().cpu().contiguous()
        for name, value in sae.named_parameters()
    }
    if isinstance(sae, GatedSAE) and sae.tie == "none":
        # SAELens multiplies by exp(r_mag) always: zeros are a scale of one.
        tensors["r_mag"] = torch.zeros_like(tensors["b_mag"])
    return tensors


def empty_sae(
    architecture: Architecture,
    d_in: int,
    d_sae: int,
    *,
    recipe: Recipe,
    k: int | None,
    settings: Mapping[str, Any],
) -> SAE:
    """Return an SAE to be filled, with the `SETTINGS` that it was trained with."""
    own = {name: settings[name] for name in SETTINGS[architecture] if name in settings}
    match architecture:
        case "relu":
            return ReluSAE(d_in, d_sae, recipe=recipe)
        case "jumprelu":
            if "bandwidth" in own:
                # Earlier versions wrote both in the units of x, and had no unit.
                own.setdefault("threshold_unit", 1.0)
            return JumpReluSAE(d_in, d_sae, **own)
        case "topk":
            assert k is not None  # callers have checked it
            return TopKSAE(d_in, d_sae, k=k, **own)
        case "gated":
            return GatedSAE(d_in, d_sae, recipe=recipe, **own)


def recipe_of(W_dec: Tensor) -> Recipe:
    """Return how to go on training an SAE whose file does not say: its norms tell."""
    return "P" if (W_dec.norm(dim=1) - 1).abs().max() < 1e-4 else "A"


def fill_(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors, under its names, into an SAE."""
    state = dict(tensors)
    if isinstance(sae, GatedSAE):
        state["W_gate"] = state.pop("W_enc")
        if sae.tie == "none":
            del state["r_mag"]
    if isinstance(sae, JumpReluSAE):
        # SAELens takes relu(z) where z > threshold, so one below zero does what zero does.
        state["threshold"] = state["threshold"].clamp(min=0)
    sae.load_state_dict(state)


def read_cfg(folder: Path) -> dict[str, Any]:
    """Return an SAE folder's `cfg.json`; InputError if it is missing or damaged."""
    if not (folder / "cfg.json").is_file():
        raise InputError(
            f"expected an SAE folder with cfg.json and {WEIGHTS}, found no cfg.json in {folder}"
        )
    return read_sae_cfg(folder / "cfg.json")


def _check_cfg(folder: Path, cfg: dict[str, Any]) -> None:
    missing = [key for key in ("architecture", "d_in", "d_sae") if key not in cfg]
    if missing:
        raise InputError(
            f"expected {', '.join(missing)} in {folder / 'cfg.json'}, found only "
            f"{', '.join(cfg) or 'an empty object'}"
        )
    if cfg["architecture"] not in ARCHITECTURES:
        *known, last = ARCHITECTURES
        raise InputError(
            f"expected architecture {', '.join(known)} or {last} in "
            f"{folder / 'cfg.json'}, got {cfg['architecture']!r}"
        )
    normalisation = cfg.get("normalize_activations", "none")
    if normalisation not in ("none", *get_args(InputNorm)) or (folder / FORBIDDEN_SIBLING).exists():
        raise InputError(
            f"expected an SAE that takes raw activations, got one in {folder} whose input "
            f"normalisation is not folded into its weights (normalize_activations "
            f"{normalisation!r}); save its final, folded form"
        )
    k, d_sae = cfg.get("k"), cfg["d_sae"]
    if cfg["architecture"] == "topk" and not (isinstance(k, int) and 1 <= k <= d_sae):
        raise InputError(
            f"expected a k from 1 to d_sae={d_sae} in {folder / 'cfg.json'}, as a topk SAE has, "
            f"got {k!r}"
        )


def _read_weights(folder: Path, cfg: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"expected {WEIGHTS} beside cfg.json, found none in {folder}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"expected whole safetensors in {path}, found {path.stat().st_size} bytes that are "
            f"not ({error}); copy or train it again"
        ) from None
    expected = (cfg.get("metadata") or {}).get("weights_sha256")
    if expected is not None and sha256(path) != expected:
        raise InputError(
            f"expected the weights that {folder / 'cfg.json'} was written with (SHA-256 "
            f"{expected[:12]}...), found others in {path}; copy or train it again"
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors))


@torch.no_grad()
def shift_input_(sae: SAE, by: Float[Tensor, " d_in"]) -> None:
    """Make the encoder read its input plus `by`, in place: biases take up by @ W.

    By b_dec, an SAE that was written for uncentred input is right for `x - b_dec`, as
    x @ W + b = (x - b_dec) @ W + (b + b_dec @ W).
    """
    if isinstance(sae, SinglePathSAE):
        sae.b_enc.add_(by @ sae.W_enc)
        return
    assert isinstance(sae, GatedSAE)
    shift = by @ sae.W_gate
    sae.b_gate.add_(shift)
    if sae.W_mag is not None:
        sae.b_mag.add_(by @ sae.W_mag)
    else:
        sae.b_mag.add_(shift if sae.r_mag is None else shift * sae.r_mag.exp())


@torch.no_grad()
def take_norms_into_encoder_(sae: TopKSAE) -> None:
    """Make a TopK SAE whose latents compete by |f_i d_i| one with unit directions, in place.

    SAELens can rank and report latents times the norms of their directions; with directions of
    length one the same is the plain rule.
    """
    norms = sae.W_dec.norm(dim=1)
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
    sae.W_dec.div_(norms[:, None])
