"""SAEs on disk, in SAELens 6's layout: `load_sae(folder)` and `save_sae(sae, folder)`.

`load_sae` also takes what other libraries wrote, and addresses on the Hub.

    folder/cfg.json                   architecture, widths, and `metadata`: where it came from
    folder/sae_weights.safetensors    its tensors, `W_gate` of a Gated SAE under the name `W_enc`

It takes raw activations, and says under `normalize_activations` if it normalises each token
itself. A `topk` config holds `k` as well. `threshold` of a `jumprelu` SAE is float32 in any file.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gsae_core.checkpoints.formats.build import SETTINGS
from gsae_core.checkpoints.formats.read import ARCHITECTURES, UNTIED, read_sae
from gsae_core.checkpoints.hub import local
from gsae_core.errors import InputError
from gsae_core.files import read_sae_cfg, replace_durably, sha256, write_json
from gsae_core.sae.architectures import GatedSAE, TopKSAE
from gsae_core.sae.base import SAE

WEIGHTS = "sae_weights.safetensors"

# The release whose layout this is. Below 6.0.0, or without it, SAELens reads another layout.
SAE_LENS_VERSION = "6.54.12"


def load_sae(folder: Path | str, *, fold_decoder_norms: bool = False) -> SAE:
    """Return the SAE in a folder or file, or at an address on the Hub, on the CPU in float32.

        load_sae("runs/first/saes/gated-0.2")
        load_sae("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82@main")

    `read_sae` returns it with a record of where it came from and what was assumed.

    Args:
        folder: ours, SAELens' or another library's (a file of one, too). Text under which nothing
            lies is an address on the Hub, `OWNER/NAME:PATH@REVISION`, whose path and revision may
            be left out. What is fetched stays in the Hugging Face cache (HF_HOME, HF_HUB_CACHE)
            and opens offline; private repositories take the token that huggingface_hub finds.
        fold_decoder_norms: whether latents are multiplied by the norms of their directions, as
            SAELens' `fold_W_dec_norm` and Neuronpedia have them; reconstructions are the same.

    Raises:
        InputError: if there is no SAE, or several; if a file is missing, damaged, or describes an
            SAE that this package has not; if the Hub refuses; if it is a TopK SAE and its norms to
            fold are not one.
    """
    place = local(folder)
    # Not of pathlib, which raises where a name is too long to be one.
    if any(os.path.exists(place / name) for name in ("cfg.json", WEIGHTS)):
        place = _weights_of(place)
    return read_sae(place, fold_decoder_norms=fold_decoder_norms).sae


def _weights_of(folder: Path) -> Path:
    """Return the weights in a folder of SAELens' layout; InputError says what it lacks.

    Readers do without a damaged config. Other libraries have a cfg.json too: theirs is theirs.
    """
    cfg = read_cfg(folder)
    needed = ["architecture", "d_in", "d_sae"]
    if not (folder / WEIGHTS).exists() and not set(needed) <= cfg.keys():
        return folder
    # SAELens 5 and older says where it hooks beside the widths, and not always the architecture.
    legacy = bool({"hook_name", "hook_point"} & cfg.keys())
    missing = [key for key in needed[legacy:] if key not in cfg]
    if missing:
        raise InputError(
            f"expected {', '.join(missing)} in {folder / 'cfg.json'}, found only "
            f"{', '.join(cfg) or 'an empty object'}"
        )
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"expected {WEIGHTS} beside cfg.json, found none in {folder}")
    return folder / WEIGHTS


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
        for name, tensor in file_tensors(sae).items()
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


def file_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return an SAE's tensors under the names that a file has."""
    if sae.W_dec.is_meta:
        raise InputError(
            "expected an SAE with numbers, got one on the meta device; load its weights first"
        )
    tensors = {
        ("W_enc" if name == "W_gate" else name): value.detach().cpu().contiguous()
        for name, value in sae.named_parameters()
    }
    if isinstance(sae, GatedSAE) and sae.tie == "none":
        # SAELens multiplies by exp(r_mag) always: zeros are a scale of one.
        tensors["r_mag"] = torch.zeros_like(tensors["b_mag"])
    return tensors


def read_cfg(folder: Path) -> dict[str, Any]:
    """Return an SAE folder's `cfg.json`; InputError if it is missing or damaged."""
    if not (folder / "cfg.json").is_file():
        raise InputError(
            f"expected an SAE folder with cfg.json and {WEIGHTS}, found no cfg.json in {folder}"
        )
    return read_sae_cfg(folder / "cfg.json")
