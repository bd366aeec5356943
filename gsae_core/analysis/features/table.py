"""A row per feature, and what stands beside it: histograms, neighbours, companions, vocabulary."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.files import (
    COLUMNS,
    N_BINS,
    N_NEIGHBOURS,
    TABLE,
    VOCABULARY,
    allocate,
    evenly,
    load_array,
)
from gsae_core.analysis.features.logit_effects import (
    extremes,
    has_logit_map,
    largest_in_rows,
    logit_map,
)
from gsae_core.config import Site
from gsae_core.files import replace_durably
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.threads import over_rows, spread

N_TOP_TOKENS, N_LOGITS = 5, 10
LOGIT_TOKENS = 2**10  # over which the final norm's derivative is averaged
# Pairs of firings looked at to find companions, a second on one core; of more, a share is.
COMPANION_STEPS = 2**29
BLOCK = 256  # features whose cosines with all are held at once
QUANTILES = {"q50": 0.5, "q90": 0.9, "q99": 0.99}


def describe(
    data: Path,
    sae: SAE,
    model: LanguageModel | None,
    totals: Mapping[str, np.ndarray],
    *,
    texts: list[str],
    layer: int,
    site: Site,
) -> dict[str, int]:
    """Write the table and what stands beside it; return `companion_stride` and `logit_tokens`.

    Args:
        model: None where there is none, and no logit effects.
        texts: `lm.texts.raw_texts` of every token id.

    `totals` holds `gate_open` and `toward` of `collect.Collected`, of all tokens.
    """
    import pandas as pd

    vocabulary = json.dumps(texts).encode()
    replace_durably(
        data / VOCABULARY, lambda to: to.write_bytes(vocabulary), n_bytes=len(vocabulary)
    )
    codes = {name: load_array(data, name) for name in ("offsets", "token", "value", "ids", "mask")}
    columns = _numbers(data, sae, codes, totals) | _top_tokens(codes)
    ids = codes["ids"]
    sample = ids[evenly(min(len(ids), max(1, LOGIT_TOKENS // ids.shape[1])), len(ids))]
    del codes, ids  # mapped, they count as this process's memory
    n_averaged, effects = 0, [[np.empty(0)] * sae.d_sae] * 4
    if model is not None and has_logit_map(model):
        tokens = torch.from_numpy(sample.astype(np.int64)).to(model.device)
        found = logit_map(model, tokens, layer=layer, site=site)
        n_averaged, most = found.n_tokens, extremes(found, sae.W_dec.detach(), k=N_LOGITS)
        effects = [list(each.cpu().numpy()) for each in most]
    names = ("top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits")
    columns |= dict(zip(names, effects, strict=True))
    frame = pd.DataFrame({name: columns[name] for name in COLUMNS})
    n_bytes = int(frame.memory_usage(index=False).sum())
    replace_durably(data / TABLE, lambda to: frame.to_parquet(to, index=False), n_bytes=n_bytes)
    _write_neighbours(data, sae.W_dec.detach())
    stride = _write_companions(data, sae.d_sae)
    return {"companion_stride": stride, "logit_tokens": n_averaged}


def _numbers(
    data: Path, sae: SAE, codes: dict[str, np.ndarray], totals: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    offsets, value, d_sae = np.array(codes["offsets"]), codes["value"], sae.d_sae
    fired, n_tokens = np.diff(offsets), int(codes["mask"].sum())
    sums, squares = np.zeros(d_sae), np.zeros(d_sae)
    histogram = allocate(data, "histogram", (d_sae, N_BINS), np.uint32)
    arrays = (offsets, value, sums, squares, histogram)
    over_rows(d_sae, lambda first, last: index_loops.describe(first, last, *arrays))
    top = np.zeros(d_sae)
    top[fired > 0] = value[offsets[:-1][fired > 0]]
    weights = weight_columns(sae)
    power = squares * weights["decoder_norm"] ** 2
    aligned = power + totals["toward"]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / fired
        gamma = np.where(aligned == 0, np.nan, power / aligned)
    return weights | {
        "fired": fired,
        "n_tokens": np.full(d_sae, n_tokens),
        "density": fired / n_tokens,
        "gate_open": totals["gate_open"],
        "gate_density": totals["gate_open"] / n_tokens,
        "max": top,
        "mean": mean,
        **{name: quantile(offsets, value, q) for name, q in QUANTILES.items()},
        "gamma": gamma,
        "near_misses": np.diff(load_array(data, "near_offsets")),
    }


def quantile(
    offsets: Int64[np.ndarray, " ends"], value: Float[np.ndarray, " nnz"], q: float
) -> Float64[np.ndarray, " d_sae"]:
    """Return each feature's quantile over its firings, linear between two, as NumPy's; else NaN."""
    fired = np.diff(offsets)
    out, alive = np.full(len(fired), np.nan), fired > 0
    # Counted from the strong end, where a feature's slice begins.
    at = (1 - q) * (fired[alive] - 1)
    lower = np.floor(at).astype(np.int64)
    start, last = offsets[:-1][alive], fired[alive] - 1
    strong = value[start + lower].astype(float)
    weak = value[start + np.minimum(lower + 1, last)].astype(float)
    out[alive] = strong + (weak - strong) * (at - lower)
    return out


@torch.no_grad()
def weight_columns(sae: SAE) -> dict[str, Float64[np.ndarray, " d_sae"]]:
    """Return the columns of `files.COLUMNS` that the weights alone tell; NaN: no such number."""
    none = torch.full((sae.d_sae,), torch.nan)
    found = {"theta": none, "gain": none, "b_gate": none, "b_mag": none}
    match sae:
        case GatedSAE():
            found |= {"b_gate": sae.b_gate, "b_mag": sae.b_mag}
            if sae.W_mag is None:
                found["theta"] = sae.jumprelu_threshold()
                found["gain"] = torch.ones_like(none) if sae.r_mag is None else sae.r_mag.exp()
        case ReluSAE():
            found["theta"] = torch.zeros_like(none)
        case JumpReluSAE():
            found["theta"] = sae.threshold
    W_enc = sae.get_parameter("W_gate" if isinstance(sae, GatedSAE) else "W_enc")
    found["decoder_norm"] = sae.W_dec.norm(dim=1)
    found["encoder_cosine"] = F.cosine_similarity(W_enc.T, sae.W_dec, dim=1)
    return {name: tensor.double().cpu().numpy() for name, tensor in found.items()}


def _top_tokens(codes: dict[str, np.ndarray]) -> dict[str, Any]:
    offsets, ids = np.array(codes["offsets"]), np.array(codes["ids"]).reshape(-1)
    d_sae, n_ids = len(offsets) - 1, int(ids.max()) + 1
    tokens, shares = np.full((d_sae, N_TOP_TOKENS), -1), np.zeros((d_sae, N_TOP_TOKENS))
    arrays = (offsets, codes["token"], codes["value"], ids, n_ids, tokens, shares)
    over_rows(d_sae, lambda first, last: index_loops.top_tokens(first, last, *arrays))
    return {
        "top_tokens": [row[row >= 0] for row in tokens],
        "top_token_shares": [share[row >= 0] for row, share in zip(tokens, shares, strict=True)],
    }


def _write_companions(data: Path, d_sae: int) -> int:
    """Write who fires with whom; return on every how many-th token that was counted."""
    names = ("offsets", "token", "row_offsets", "latent")
    offsets, token, row_offsets, latent = (load_array(data, name) for name in names)
    per_token, fired = np.diff(row_offsets).astype(float), np.diff(offsets).astype(float)
    stride = max(1, int(np.ceil((per_token**2).sum() / COMPANION_STEPS)))
    if stride > 1:
        counted = (token[first:end] % stride == 0 for first, end in pairwise(offsets.tolist()))
        fired = np.array([np.count_nonzero(each) for each in counted], float)
    who = np.full((d_sae, N_NEIGHBOURS), -1)
    both = np.zeros((d_sae, N_NEIGHBOURS), np.int64)
    arrays = (offsets, token, row_offsets, latent, fired, stride, who, both)
    over_rows(d_sae, lambda first, last: index_loops.companions(first, last, *arrays))
    own = np.arange(d_sae)[:, None]
    allocate(data, "companions", who.shape, np.uint32)[:] = np.where(who < 0, own, who)
    allocate(data, "companion_counts", both.shape, np.uint32)[:] = both
    return stride


@torch.no_grad()
def _write_neighbours(data: Path, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    d_sae = len(W_dec)
    k = min(N_NEIGHBOURS, d_sae - 1)
    unit = F.normalize(W_dec.float(), dim=1)
    # A feature stands for none in its own list.
    who = np.repeat(np.arange(d_sae)[:, None], N_NEIGHBOURS, axis=1)
    cosines = np.ones((d_sae, N_NEIGHBOURS), np.float32)

    def fill(i: int) -> None:
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        found = largest_in_rows(unit[rows] @ unit.T, k, own=rows.start)
        who[rows, :k], cosines[rows, :k] = (each.cpu().numpy() for each in found)

    if k:
        spread(fill, -(-d_sae // BLOCK), on=unit.device)
    allocate(data, "neighbours", who.shape, np.uint32)[:] = who
    allocate(data, "neighbour_cosines", cosines.shape, np.float32)[:] = cosines
    allocate(data, "decoder", tuple(W_dec.shape), np.float32)[:] = W_dec.float().cpu().numpy()
