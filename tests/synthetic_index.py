"""Feature indices with made-up firings, written in a second at any width: for pages and queries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gsae_core.analysis.features.files import N_BINS, N_NEIGHBOURS, SCHEMA_VERSION, weights_sha256
from gsae_core.config import SAESpec
from gsae_core.runs.run import Run

N_CTX, N_ROWS, D_IN = 16, 64, 8
"""Tokens of a sequence, sequences, and width of the activations."""
DEAD = 3
"""The latent that never fires."""
THETA = 1.0


def write_weights(run: Run, spec: SAESpec, *, seed: int = 0) -> None:
    """Write an SAE with random weights as `save_sae` does; theta is 1 where it is gated."""
    from safetensors.numpy import save_file

    rng, folder = np.random.default_rng(seed), run.sae_folder(spec.name)
    folder.mkdir(parents=True, exist_ok=True)
    W_dec = rng.normal(size=(spec.d_sae, D_IN)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    zeros = np.zeros(spec.d_sae, np.float32)
    tensors = {"W_enc": W_dec.T.copy(), "W_dec": W_dec, "b_dec": np.zeros(D_IN, np.float32)}
    if spec.architecture == "gated":
        # theta = b_mag - exp(r_mag) b_gate = 0.5 + 0.5.
        tensors |= {"b_gate": zeros - 0.5, "b_mag": zeros + 0.5, "r_mag": zeros}
    else:
        tensors |= {"b_enc": zeros}
    save_file(tensors, folder / "sae_weights.safetensors")
    kind = "gated" if spec.architecture == "gated" else "standard"
    cfg = {"architecture": kind, "d_in": D_IN, "d_sae": spec.d_sae}
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")


def write_index(
    run: Run, spec: SAESpec, *, vocabulary: list[str] | None = None, seed: int = 0
) -> Path:
    """Write an index of an SAE: latent i fires on about 1 + i % 40 tokens, on none if it is 3.

    Args:
        vocabulary: what the tokens stand for; None: `w0` to `w39`.
    """
    if not (run.sae_folder(spec.name) / "cfg.json").is_file():
        write_weights(run, spec, seed=seed)
    words = vocabulary or [f"w{i}" for i in range(40)]
    folder = run.folder / "features" / spec.name
    data = folder / "data-0"
    data.mkdir(parents=True)
    arrays = _arrays(spec, len(words), seed)
    for name, array in arrays.items():
        np.save(data / f"{name}.npy", array)
    (data / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
    _table(spec, arrays, len(words)).to_parquet(data / "features.parquet", index=False)
    manifest = _manifest(run, spec, arrays) | {
        "files": {file.name: file.stat().st_size for file in data.iterdir()}
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _arrays(spec: SAESpec, n_words: int, seed: int) -> dict[str, np.ndarray]:
    rng, d_sae = np.random.default_rng(seed), spec.d_sae
    n_places = N_ROWS * N_CTX
    ids = np.random.default_rng(0).integers(0, n_words, (N_ROWS, N_CTX)).astype(np.uint16)
    mask = np.ones((N_ROWS, N_CTX), bool)
    mask[:, 0] = False
    counted = np.flatnonzero(mask)
    fired = 1 + np.arange(d_sae) % 40
    fired[DEAD] = 0
    # A latent's tokens are evenly spread from a random one on, so that none comes twice.
    latent = np.repeat(np.arange(d_sae), fired)
    offsets = np.concatenate([[0], np.cumsum(fired)])
    nth = np.arange(len(latent)) - offsets[latent]
    start, stride = rng.integers(0, len(counted), d_sae), len(counted) // 41
    token = counted[(start[latent] + nth * stride) % len(counted)].astype(np.uint32)
    value = (THETA + 4.0 / (1 + nth)).astype(np.float32)
    if spec.architecture != "gated":
        value -= np.float32(THETA)
    by_place = np.argsort(token, kind="stable")
    top = np.where(fired > 0, value[np.minimum(offsets[:-1], len(value) - 1)], 0)
    bins = np.minimum((value / top[latent] * N_BINS).astype(int), N_BINS - 1)
    histogram = np.zeros((d_sae, N_BINS), np.uint32)
    np.add.at(histogram, (latent, bins), 1)
    others = (np.arange(d_sae)[:, None] + np.arange(1, N_NEIGHBOURS + 1)) % d_sae
    decoder = rng.normal(size=(d_sae, D_IN)).astype(np.float32)
    near = np.arange(d_sae + 1, dtype=np.int64) * 2
    return {
        "offsets": offsets.astype(np.int64),
        "token": token,
        "value": value,
        "near_offsets": near,
        "near_token": rng.choice(counted, 2 * d_sae).astype(np.uint32),
        "near_margin": np.tile(np.array([-0.01, -0.02], np.float32), d_sae),
        "row_offsets": np.concatenate([[0], np.cumsum(np.bincount(token, minlength=n_places))]),
        "latent": latent[by_place].astype(np.uint16 if d_sae <= 2**16 else np.uint32),
        "ids": ids,
        "mask": mask,
        "histogram": histogram,
        "neighbours": others.astype(np.uint32),
        "neighbour_cosines": np.tile(np.linspace(0.9, 0.1, N_NEIGHBOURS), (d_sae, 1)).astype("f4"),
        "companions": others.astype(np.uint32),
        "companion_counts": (fired[:, None] * fired[others] > 0).astype(np.uint32),
        "decoder": decoder,
    }


def _table(spec: SAESpec, arrays: dict[str, np.ndarray], n_words: int) -> pd.DataFrame:
    fired, d_sae = np.diff(arrays["offsets"]), spec.d_sae
    n_tokens, alive = int(arrays["mask"].sum()), np.diff(arrays["offsets"]) > 0
    gated = spec.architecture == "gated"
    top = np.where(alive, THETA * gated + 4.0, 0.0)
    none, nothing = np.full(d_sae, np.nan), np.full(d_sae, 0.0)
    numbers = np.arange(d_sae)
    tokens = [[i % n_words, (i + 1) % n_words] if fired[i] else [] for i in numbers]
    logits = [[i % n_words, (i + 2) % n_words] for i in numbers]
    return pd.DataFrame(
        {
            "fired": fired,
            "n_tokens": np.full(d_sae, n_tokens),
            "density": fired / n_tokens,
            "gate_open": fired + 1 * gated,
            "gate_density": (fired + 1 * gated) / n_tokens,
            "max": top,
            **{name: np.where(alive, top / 2, np.nan) for name in ("mean", "q50", "q90", "q99")},
            "theta": nothing + THETA * gated,
            "gain": none if not gated else nothing + 1,
            "b_gate": none if not gated else nothing - 0.5,
            "b_mag": none if not gated else nothing + 0.5,
            "gamma": np.where(alive, 0.7 + 0.3 * (numbers % 10) / 9, np.nan),
            "decoder_norm": nothing + 1,
            "encoder_cosine": nothing + 0.5,
            "near_misses": np.full(d_sae, 2),
            "top_tokens": tokens,
            "top_token_shares": [[0.6, 0.3] if row else [] for row in tokens],
            "top_logit_tokens": logits,
            "top_logits": [[0.5, 0.25]] * d_sae,
            "bottom_logit_tokens": logits,
            "bottom_logits": [[-0.5, -0.25]] * d_sae,
        }
    )


def _manifest(run: Run, spec: SAESpec, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    n_tokens = int(arrays["mask"].sum())
    place = run.config.model
    return {
        "schema_version": SCHEMA_VERSION,
        "sae": spec.name,
        "architecture": spec.architecture,
        "d_in": D_IN,
        "d_sae": spec.d_sae,
        "weights_sha256": weights_sha256(run.sae_folder(spec.name)),
        "model": place.name,
        "layer": place.layer,
        "site": place.site,
        "text": "made-up words",
        "n_ctx": N_CTX,
        "splits": [{"name": "held_out", "n_sequences": N_ROWS, "n_tokens": n_tokens}],
        "tokens_sha256": "0" * 64,
        "n_tokens_asked": n_tokens,
        "n_tokens": n_tokens,
        "n_entries": len(arrays["token"]),
        "n_near": len(arrays["near_token"]),
        "l0": 5.0,
        "fvu": 0.3,
        "gamma": 0.9,
        "logit_tokens": 100,
        "made": 1.0,
        "seconds": 1.0,
        "versions": {},
        "data": "data-0",
    }
