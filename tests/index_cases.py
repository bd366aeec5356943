"""Small SAEs on the tiny model, their indices, and the same numbers computed densely."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsae_core.analysis.features.build import Part, build_index
from gsae_core.analysis.features.index import FeatureIndex, open_index
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE

D_IN, D_SAE = 20, 30
KINDS = ("gated", "untied", "relu", "jumprelu", "topk")


def some_sae(kind: str, d_in: int = D_IN, d_sae: int = D_SAE) -> SAE:
    """Return an SAE with random weights whose latents fire on some tokens; latent 3 is dead."""
    saes: dict[str, Any] = {
        "gated": lambda: GatedSAE(d_in, d_sae),
        "untied": lambda: GatedSAE(d_in, d_sae, tie="untied"),
        "relu": lambda: ReluSAE(d_in, d_sae),
        "jumprelu": lambda: JumpReluSAE(d_in, d_sae, init_threshold=0.3),
        "topk": lambda: TopKSAE(d_in, d_sae, k=4),
    }
    torch.manual_seed(1)
    sae = saes[kind]()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "threshold":
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name in ("b_gate", "b_mag", "b_enc"):
            if hasattr(sae, name):
                getattr(sae, name).sub_(0.3)[3] = -100.0
    return sae


def some_parts(n_rows: int = 40, *, seed: int = 0) -> list[Part]:
    """Return random sequences of 16 tokens that start with the special token 0, in two splits."""
    rows = np.random.default_rng(seed).integers(2, 40, (n_rows, 16))
    rows[:, 0] = 0
    held_out = SequenceSet(rows[: n_rows // 4].astype(np.uint16), (0,))
    train = SequenceSet(rows[n_rows // 4 :].astype(np.uint16), (0,))
    return [Part("held_out", held_out, len(held_out)), Part("train", train, len(train))]


def built(
    model: LanguageModel, sae: SAE, folder: Path, parts: list[Part] | None = None, **named: Any
) -> FeatureIndex:
    """Build an index at mlp_hidden of layer 1 and open it."""
    place: dict[str, Any] = {"layer": 1, "site": "mlp_hidden", "name": "small", "text": "words"}
    place["weights_sha256"] = "0" * 64
    for _ in build_index(model, sae, parts or some_parts(), folder, **place | named):
        pass
    return open_index(folder)


class Dense(NamedTuple):
    """All activations of all counted tokens, without any shortcut."""

    x: Tensor
    f: Tensor
    """(tokens, d_sae)."""
    places: np.ndarray
    """(tokens,)."""
    ids: np.ndarray
    """(tokens,)."""


def dense(model: LanguageModel, sae: SAE, parts: list[Part] | None = None) -> Dense:
    """Return what an index of these parts is of."""
    batches = [part.sequences[: part.n] for part in parts or some_parts()]
    ids = torch.cat([batch.ids for batch in batches])
    mask = torch.cat([batch.mask for batch in batches])
    x = model.harvest(ids, layer=1, site="mlp_hidden")[mask]
    places = mask.flatten().nonzero().squeeze(1).numpy()
    return Dense(x, sae.encode(x).detach(), places, ids[mask].numpy())
