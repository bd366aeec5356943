"""What a feature's weights alone say of it, read from the files of an SAE without torch.

It is what is known of an SAE before its index is built. Columns have the names, and the meaning,
that `feature_table.COLUMNS` gives them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from gsae_core.errors import InputError
from gsae_core.store.runs import read_sae_cfg

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = "sae_weights.safetensors"


def weight_table(sae_folder: Path) -> "pd.DataFrame":
    """Return `theta`, `gain`, `b_gate`, `b_mag`, `decoder_norm`, `encoder_cosine` of each feature.

    Raises:
        InputError: if the SAE's files are not there or damaged.
    """
    import pandas as pd

    cfg = read_sae_cfg(sae_folder / "cfg.json")
    W = _tensors(sae_folder / WEIGHTS)
    norms = np.linalg.norm(W["W_dec"], axis=1)
    columns = {
        **_paths(cfg, W),
        "decoder_norm": norms,
        "encoder_cosine": _cosine(W["W_enc"], W["W_dec"], norms),
    }
    return pd.DataFrame(columns).rename_axis("feature")


def _paths(cfg: dict[str, Any], W: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what decides, and how strongly, by feature; NaN where an SAE has no such number."""
    none = np.full(len(W["W_dec"]), np.nan)
    found = {"theta": none, "gain": none, "b_gate": none, "b_mag": none}
    match cfg["architecture"]:
        case "gated":
            gain = np.exp(W["r_mag"])
            # `GatedSAE.jumprelu_threshold`, which tests hold this to.
            theta = np.maximum(W["b_mag"] - gain * W["b_gate"], 0.0)
            return {"theta": theta, "gain": gain, "b_gate": W["b_gate"], "b_mag": W["b_mag"]}
        case "gated_untied":
            return found | {"b_gate": W["b_gate"], "b_mag": W["b_mag"]}
        case "jumprelu":
            return found | {"theta": np.maximum(W["threshold"], 0.0)}
        case "standard":
            return found | {"theta": np.zeros(len(none))}
        case _:
            return found


def _cosine(
    W_enc: Float64[np.ndarray, "d_in d_sae"],
    W_dec: Float64[np.ndarray, "d_sae d_in"],
    norms: Float64[np.ndarray, " d_sae"],
) -> Float64[np.ndarray, " d_sae"]:
    lengths = np.linalg.norm(W_enc, axis=0) * norms
    return np.einsum("ij,ji->i", W_dec, W_enc) / np.where(lengths > 0, lengths, 1)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except FileNotFoundError:
        raise InputError(f"expected the weights of an SAE at {path}, found nothing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"expected whole safetensors in {path}, found something else ({error}); copy or train "
            "the SAE again"
        ) from None
    missing = {"W_enc", "W_dec"} - found.keys()
    if missing:
        raise InputError(f"expected {' and '.join(sorted(missing))} in {path}, found none")
    return {name: tensor.astype(np.float64) for name, tensor in found.items()}
