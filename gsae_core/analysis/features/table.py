"""A row per feature, and what stands beside it: histograms, neighbours, companions, vocabulary."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.files import (
    COLUMNS,
    N_BINS,
    N_NEIGHBOURS,
    TABLE,
    VOCABULARY,
    load_array,
)
from gsae_core.analysis.features.logit_effects import extremes, largest_in_rows, logit_map
from gsae_core.analysis.features.shards import allocate
from gsae_core.config import Site
from gsae_core.files import replace_durably
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.texts import pieces
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.threads import over_rows, spread

if TYPE_CHECKING:
    pass

N_TOP_TOKENS, N_LOGITS = 5, 10
LOGIT_TOKENS = 2**10
"""Tokens over which the final norm's derivative is averaged."""
COMPANION_STEPS = 2**29
"""Pairs of firings looked at to find companions: a second on one core; above, a share is."""
BLOCK = 256
QUANTILES = {"q50": 0.5, "q90": 0.9, "q99": 0.99}


class Facts(NamedTuple):
    """What was decided while describing."""

    companion_stride: int
    logit_tokens: int


def describe(
    data: Path,
    sae: SAE,
    model: LanguageModel,
    *,
    layer: int,
    site: Site,
    gate_open: Int64[np.ndarray, " d_sae"],
    toward: Float64[np.ndarray, " d_sae"],
) -> Facts:
    """Write the table and all that stands beside it to a folder with sorted codes.

    Args:
        gate_open, toward: of `index_sort.Totals`.
    """
    texts = pieces(model.tokenizer, range(min(model.d_vocab, len(model.tokenizer))))
    _write_json(data / VOCABULARY, texts)
    codes = {name: load_array(data, name) for name in ("offsets", "token", "value", "ids", "mask")}
    columns = _numbers(data, sae, codes, gate_open=gate_open, toward=toward)
    columns |= _top_tokens(codes, n_vocabulary=len(texts))
    ids = _sample(codes["ids"])
    del codes  # mapped, they count as this process's memory
    if model._bridge is None:
        effects = logit_map(model, ids.to(model.device), layer=layer, site=site)
        found = extremes(effects, sae.W_dec.detach(), k=N_LOGITS)
        arrays = [each.cpu().numpy() for each in found]
        names = ("top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits")
        columns |= {name: list(array) for name, array in zip(names, arrays, strict=True)}
        logit_tokens = effects.n_tokens
    else:
        names = ("top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits")
        columns |= {name: [np.empty(0)] * sae.d_sae for name in names}
        logit_tokens = 0
    _write_table(data / TABLE, columns)
    _write_neighbours(data, sae.W_dec.detach())
    return Facts(_write_companions(data, sae.d_sae), logit_tokens)


def _numbers(
    data: Path,
    sae: SAE,
    codes: dict[str, np.ndarray],
    *,
    gate_open: Int64[np.ndarray, " d_sae"],
    toward: Float64[np.ndarray, " d_sae"],
) -> dict[str, Any]:
    offsets, value, d_sae = np.array(codes["offsets"]), codes["value"], sae.d_sae
    fired, n_tokens = np.diff(offsets), int(codes["mask"].sum())
    sums, squares = np.zeros(d_sae), np.zeros(d_sae)
    histogram = allocate(data, "histogram", (d_sae, N_BINS), np.uint32)
    arrays = (offsets, value, sums, squares, histogram)
    over_rows(d_sae, lambda first, last: index_loops.describe(first, last, *arrays))
    alive = fired > 0
    top = np.zeros(d_sae, np.float32)
    top[alive] = value[offsets[:-1][alive]]
    weights = _weights(sae)
    power = squares * weights["decoder_norm"] ** 2
    aligned = power + toward
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / fired
        gamma = np.where(aligned == 0, np.nan, power / aligned)
    near = np.diff(load_array(data, "near_offsets"))
    return {
        "fired": fired,
        "n_tokens": np.full(d_sae, n_tokens),
        "density": fired / n_tokens,
        "gate_open": gate_open,
        "gate_density": gate_open / n_tokens,
        "max": top.astype(float),
        "mean": mean,
        **{name: quantile(offsets, value, q) for name, q in QUANTILES.items()},
        **{name: weights[name] for name in ("theta", "gain", "b_gate", "b_mag")},
        "gamma": gamma,
        **{name: weights[name] for name in ("decoder_norm", "encoder_cosine")},
        "near_misses": near,
    }


def quantile(
    offsets: Int64[np.ndarray, " ends"], value: Float32[np.ndarray, " nnz"], q: float
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
def _weights(sae: SAE) -> dict[str, Float64[np.ndarray, " d_sae"]]:
    """Return what a feature's row says of its weights alone."""
    none = torch.full((sae.d_sae,), torch.nan)
    found = {"theta": none, "gain": none, "b_gate": none, "b_mag": none}
    match sae:
        case GatedSAE():
            found |= {"b_gate": sae.b_gate, "b_mag": sae.b_mag}
            if sae.W_mag is None:
                found["theta"] = sae.jumprelu_threshold()
                found["gain"] = torch.ones_like(none) if sae.r_mag is None else sae.r_mag.exp()
            W_enc = sae.W_gate
        case ReluSAE():
            found["theta"], W_enc = torch.zeros_like(none), sae.W_enc
        case JumpReluSAE():
            found["theta"], W_enc = sae.threshold, sae.W_enc
        case _:
            W_enc = sae.get_parameter("W_enc")
    found["decoder_norm"] = sae.W_dec.norm(dim=1)
    found["encoder_cosine"] = F.cosine_similarity(W_enc.T, sae.W_dec, dim=1)
    return {name: tensor.double().cpu().numpy() for name, tensor in found.items()}


def _top_tokens(codes: dict[str, np.ndarray], *, n_vocabulary: int) -> dict[str, Any]:
    offsets, d_sae = np.array(codes["offsets"]), len(codes["offsets"]) - 1
    tokens = np.full((d_sae, N_TOP_TOKENS), -1)
    shares = np.zeros((d_sae, N_TOP_TOKENS))
    ids = np.array(codes["ids"]).reshape(-1)
    n_vocabulary = max(n_vocabulary, int(ids.max()) + 1)
    arrays = (offsets, codes["token"], codes["value"], ids, n_vocabulary, tokens, shares)
    over_rows(d_sae, lambda first, last: index_loops.top_tokens(first, last, *arrays))
    return {
        "top_tokens": [row[row >= 0] for row in tokens],
        "top_token_shares": [share[row >= 0] for row, share in zip(tokens, shares, strict=True)],
    }


def _write_companions(data: Path, d_sae: int) -> int:
    """Write who fires with whom; return on every how many-th place that was counted."""
    names = ("offsets", "token", "row_offsets", "latent")
    offsets, token, row_offsets, latent = (load_array(data, name) for name in names)
    per_place = np.diff(row_offsets).astype(float)
    stride = max(1, int(np.ceil((per_place**2).sum() / COMPANION_STEPS)))
    looked_at = np.arange(0, len(per_place), stride)
    fired = np.zeros(d_sae)  # float64, as the loop divides
    for part in np.array_split(looked_at, max(1, len(looked_at) // 2**16)):
        fired += np.bincount(_latents_at(row_offsets, latent, part), minlength=d_sae)
    who = np.full((d_sae, N_NEIGHBOURS), -1)
    both = np.zeros((d_sae, N_NEIGHBOURS), np.int64)
    arrays = (offsets, token, row_offsets, latent, fired, stride, who, both)
    over_rows(d_sae, lambda first, last: index_loops.companions(first, last, *arrays))
    own = np.arange(d_sae)[:, None]
    allocate(data, "companions", who.shape, np.uint32)[:] = np.where(who < 0, own, who)
    allocate(data, "companion_counts", both.shape, np.uint32)[:] = both
    return stride


def _latents_at(row_offsets: np.ndarray, latent: np.ndarray, places: np.ndarray) -> np.ndarray:
    if len(places) > 1 and places[1] == places[0] + 1:
        return latent[row_offsets[places[0]] : row_offsets[places[-1] + 1]]
    rows = [latent[row_offsets[place] : row_offsets[place + 1]] for place in places.tolist()]
    return np.concatenate(rows) if rows else latent[:0]


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
        n_blocks = -(-d_sae // BLOCK)
        spread(fill, n_blocks) if unit.is_cpu else [fill(i) for i in range(n_blocks)]
    allocate(data, "neighbours", who.shape, np.uint32)[:] = who
    allocate(data, "neighbour_cosines", cosines.shape, np.float32)[:] = cosines
    allocate(data, "decoder", tuple(W_dec.shape), np.float32)[:] = W_dec.float().cpu().numpy()


def _sample(ids: np.ndarray) -> Int64[Tensor, "rows pos"]:
    """Return sequences spread evenly, of about `LOGIT_TOKENS` tokens."""
    n = min(len(ids), max(1, LOGIT_TOKENS // ids.shape[1]))
    which = np.unique(np.linspace(0, len(ids) - 1, n).round().astype(np.int64))
    return torch.from_numpy(ids[which].astype(np.int64))


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    import pandas as pd

    frame: pd.DataFrame = pd.DataFrame({name: columns[name] for name in COLUMNS})
    n_bytes = int(frame.memory_usage(index=False).sum())
    replace_durably(path, lambda to: frame.to_parquet(to, index=False), n_bytes=n_bytes)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value)

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    replace_durably(path, write, n_bytes=len(text))
