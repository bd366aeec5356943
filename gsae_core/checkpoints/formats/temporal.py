"""Files of a temporal SAE -> its features of sequences, as sae-lens 6.54.12 has them."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from gsae_core.checkpoints.formats.containers import contents_of, load_values
from gsae_core.checkpoints.formats.libraries import mapping
from gsae_core.checkpoints.formats.read import as_float32
from gsae_core.config import Config, validated
from gsae_core.errors import InputError
from gsae_core.sae.temporal import TemporalSAE

LARGEST = 2**16  # bytes of conf.yaml
NAMES = {"W_dec": "D", "W_enc": "E", "b_dec": "b"}  # ours, and the file's


class Settings(Config):
    """What `conf.yaml` says of the SAE, and is needed to compute it."""

    n_attn_layers: Annotated[int, Field(ge=0, le=100)]
    n_heads: PositiveInt
    bottleneck_factor: PositiveInt
    sae_diff_type: Literal["topk", "relu"]
    kval_topk: PositiveInt | None = None
    tied_weights: bool
    scaling_factor: PositiveFloat


def read_temporal(folder: Path | str) -> TemporalSAE:
    """Return the temporal SAE of a release's folder, on the CPU in float32.

        codes = read_temporal("temporalSAEs/gemma-2-2B/layer_12/temporal").encode(activations)

    Args:
        folder: with `conf.yaml` and `latest_ckpt.safetensors`.

    Raises:
        InputError: if a file is missing or damaged, or they do not describe one.
    """
    path, conf = Path(folder, "latest_ckpt.safetensors"), Path(folder, "conf.yaml")
    held = contents_of(path) if path.is_file() else None
    if held is None or not {"D", "b"} <= held.shapes.keys():
        raise InputError(
            f"expected the tensors D and b of a temporal SAE in {path}, found "
            f"{', '.join(list(held.shapes)[:8]) if held else 'no such file'}; give the folder that "
            "holds it and conf.yaml"
        )
    said, shape = _settings(conf), held.shapes["D"] or ()
    sae = _empty(said, *(shape if len(shape) == 2 else (0, 0)), path=path)
    values = as_float32(load_values(path, held.shapes), path)
    expected = {NAMES.get(name, name): list(t.shape) for name, t in sae.state_dict().items()}
    if said.tied_weights:
        del expected["E"]  # it reads along the directions it writes
    found = {name: list(tensor.shape) for name, tensor in values.items()}
    if expected != found:
        wrong = sorted(n for n in expected | found if expected.get(n) != found.get(n))[:3]
        listed = ", ".join(f"{n} {found.get(n, 'missing')}" for n in wrong)
        should = ", ".join(f"{n} {expected.get(n, 'missing')}" for n in wrong)
        raise InputError(
            f"expected {should} in {path}, as {conf} describes it, found {listed}; copy both again"
        )
    values.setdefault("E", values["D"].T)
    state = {name: values[NAMES.get(name, name)] for name in sae.state_dict()}
    sae.load_state_dict(state, assign=True)
    return sae.eval()


def _settings(conf: Path) -> Settings:
    """Return what a small YAML file says under `sae`."""
    import yaml

    if not conf.is_file() or conf.stat().st_size > LARGEST:
        raise InputError(f"expected a small conf.yaml beside the weights, found none at {conf}")
    try:
        said = yaml.safe_load(conf.read_text("utf-8", errors="replace"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise InputError(f"expected YAML in {conf}, found something else ({why})") from None
    values = mapping(said, "sae") if isinstance(said, dict) else {}
    # Lists and the like are left out: they may stand for more than memory holds.
    plain = {name: v for name, v in values.items() if isinstance(v, bool | int | float | str)}
    known = {name: plain[name] for name in Settings.model_fields if name in plain}
    return validated(Settings, known, {name: f"{name} in {conf}" for name in Settings.model_fields})


def _empty(said: Settings, d_sae: int, d_in: int, *, path: Path) -> TemporalSAE:
    """Return an SAE without numbers."""
    k = said.kval_topk if said.sae_diff_type == "topk" else None
    heads, bottleneck = said.n_heads, said.bottleneck_factor
    if d_sae % (heads * bottleneck) or (k or 0) > d_sae:
        raise InputError(
            f"expected at least kval_topk={k} latents, a multiple of n_heads x bottleneck_factor = "
            f"{heads} x {bottleneck}, in {path}, found {d_sae}"
        )
    sizes = {"n_layers": said.n_attn_layers, "n_heads": heads, "bottleneck": bottleneck}
    with torch.device("meta"):
        return TemporalSAE(d_in, d_sae, **sizes, k=k, scale=said.scaling_factor)
