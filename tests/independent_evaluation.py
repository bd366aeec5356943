"""Evaluate a run a second time, with nothing of gsae_core: Hugging Face hooks and float64 numpy.

    python tests/independent_evaluation.py RUN

reads the run's config.json, its SAEs' cfg.json and sae_weights.safetensors, and the sequences that
were measured (evaluated_tokens.safetensors); it computes L0, FVU, gamma and the three losses by
their definitions, prints them beside those of evals.json, and exits 1 if one differs by more than a
millionth. Loss recovered and the increase of the loss are differences of those three.

L0 counts decisions: a latent within float32 rounding of its threshold may fire there and not here.
None of 84 million did in the bundled example, and one of 17 million in a JumpReLU SAE: 3.6e-7.

It takes float32 language models of the GPT-2, GPT-NeoX and Llama kinds, and SAEs that do not
normalise tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

BUNDLED = Path(__file__).resolve().parents[1] / "gsae_core" / "assets" / "stdlib-gpt2"
NUMBERS = ("l0", "fvu", "gamma", "ce_clean", "ce_zero", "ce_sae")
TOLERANCE = 1e-6
ROWS = 8

# Blocks; and in a block the attention, its last product, the MLP and its last product.
KINDS = {
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "llama": ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
}
LIKE_LLAMA = ("llama", "mistral", "gemma", "qwen2", "qwen3")

Array = np.ndarray[Any, np.dtype[Any]]


class Difference(NamedTuple):
    """One number of one SAE, by the run and by this script."""

    sae: str
    number: str
    run: float
    here: float

    @property
    def relative(self) -> float:
        return abs(self.run - self.here) / max(abs(self.here), 1e-300)


def measure(folder: Path) -> list[Difference]:
    """Return every number of every SAE in a run's evals.json beside this script's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "evals.json").read_text(encoding="utf-8"))["saes"]
    tokens = load_file(folder / "evaluated_tokens.safetensors")
    model = load_model(config["model"])
    found = []
    for row in rows:
        here = evaluate(
            model,
            sae_of(folder / "saes" / row["name"]),
            ids=tokens["ids"].astype(np.int64),
            counted=tokens["counted"],
            layer=config["model"]["layer"],
            site=config["model"]["site"],
            everywhere=row["replaced"] == "all",
        )
        found += [Difference(row["name"], name, row[name], here[name]) for name in NUMBERS]
    return found


def load_model(config: dict[str, Any]) -> Any:
    if config["dtype"] != "float32":
        raise SystemExit(f"expected a float32 language model, got {config['dtype']}")
    source = str(BUNDLED) if config["name"] == "bundled" else config["name"]
    return AutoModelForCausalLM.from_pretrained(
        source, revision=config["revision"] or "main", dtype=torch.float32
    ).eval()


def sae_of(folder: Path) -> Callable[[Array], tuple[Array, Array]]:
    """Return a function from activations to latents and reconstructions, all in float64."""
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "sae_weights.safetensors").items()}
    if cfg["normalize_activations"] != "none" or not cfg["apply_b_dec_to_input"]:
        raise SystemExit(f"expected an SAE that takes raw activations less b_dec in {folder}")

    def encode(x: Array) -> Array:
        pre = (x - w["b_dec"]) @ w["W_enc"]
        if cfg["architecture"] in ("gated", "gated_untied"):
            mag = (x - w["b_dec"]) @ w["W_mag"] if "W_mag" in w else pre * np.exp(w["r_mag"])
            return (pre + w["b_gate"] > 0) * np.maximum(mag + w["b_mag"], 0)
        z = pre + w["b_enc"]
        if cfg["architecture"] == "jumprelu":
            return (z > w["threshold"]) * np.maximum(z, 0)
        if cfg["architecture"] == "topk":
            kept = np.argpartition(-z, cfg["k"] - 1, axis=1)[:, : cfg["k"]]
            only = np.zeros_like(z)
            np.put_along_axis(only, kept, np.take_along_axis(z, kept, 1), 1)
            return np.maximum(only, 0)
        return np.maximum(z, 0)

    def both(x: Array) -> tuple[Array, Array]:
        f = encode(x)
        return f, f @ w["W_dec"] + w["b_dec"]

    return both


def evaluate(
    model: Any,
    sae: Callable[[Array], tuple[Array, Array]],
    *,
    ids: Array,
    counted: Array,
    layer: int,
    site: str,
    everywhere: bool,
) -> dict[str, float]:
    """Return the numbers of one SAE.

    Args:
        ids: token ids (sequences, positions).
        counted: False at BOS, separators and padding, same shape.
        everywhere: replace every position by its reconstruction, not only those that count.
    """
    fired = n = error = power = hat = along = 0.0
    x_sum: Any = 0.0
    clean, zero, spliced = [], [], []
    for start in range(0, len(ids), ROWS):
        batch, mask = ids[start : start + ROWS], counted[start : start + ROWS]
        x, logits = read(model, batch, layer, site)
        clean.append(losses(logits, batch, mask))
        f, x_hat = sae(x[mask])
        n, fired = n + len(f), fired + np.count_nonzero(f > 0)
        error += np.sum((x[mask] - x_hat) ** 2)
        hat, along = hat + np.sum(x_hat**2), along + np.sum(x[mask] * x_hat)
        power, x_sum = power + np.sum(x[mask] ** 2), x_sum + x[mask].sum(0)
        new = x.copy()
        new[mask] = x_hat
        if everywhere:
            new[~mask] = sae(x[~mask])[1]
        spliced.append(losses(read(model, batch, layer, site, new)[1], batch, mask))
        zero.append(losses(read(model, batch, layer, site, 0 * x)[1], batch, mask))
    ce_clean, ce_zero, ce_sae = (
        float(np.concatenate(parts).mean()) for parts in (clean, zero, spliced)
    )
    return {
        "l0": float(fired / n),
        "fvu": float(error / (power - np.sum(x_sum**2) / n)),
        "gamma": float(hat / along),
        "ce_clean": ce_clean,
        "ce_zero": ce_zero,
        "ce_sae": ce_sae,
    }


def losses(logits: Array, ids: Array, counted: Array) -> Array:
    """Return -log p of each token that counts and follows one that counts."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return -picked[counted[:, :-1] & counted[:, 1:]]


def read(
    model: Any, ids: Array, layer: int, site: str, new: Array | None = None
) -> tuple[Array, Array]:
    """Return the site's activations and the logits, having put `new` in the site's place."""
    seen: list[Array] = []

    def see(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.double().numpy())
        return x if new is None else torch.from_numpy(new).to(x)

    with torch.no_grad(), hooked(model, layer, site, see):
        logits = model(torch.from_numpy(ids), use_cache=False).logits
    return seen[0], logits.double().numpy()


@contextmanager
def hooked(
    model: Any, layer: int, site: str, see: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    kind = model.config.model_type
    if kind not in KINDS and kind not in LIKE_LLAMA:
        raise SystemExit(f"expected a model like {', '.join((*KINDS, *LIKE_LLAMA))}, got {kind}")
    blocks, attn, attn_last, mlp, mlp_last = KINDS["llama" if kind in LIKE_LLAMA else kind]
    block = model.get_submodule(blocks)[layer]
    name, before = {
        "resid_pre": ("", True),
        "resid_post": ("", False),
        "mlp_hidden": (mlp_last, True),
        "mlp_out": (mlp, False),
        "attn_z": (attn_last, True),
        "attn_out": (attn, False),
    }[site]
    module = block.get_submodule(name)

    def on_input(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (see(args[0]), *args[1:])

    def on_output(_: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (see(output[0]), *output[1:])
        return see(output)

    if before:
        handle = module.register_forward_pre_hook(on_input)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    found = measure(parser.parse_args(argv).run)
    width = max(len(each.sae) for each in found)
    print(f"{'SAE':<{width}}  number          {'evals.json':>14}  {'here':>14}  difference")
    for sae, number, run, here in found:
        relative = Difference(sae, number, run, here).relative
        print(f"{sae:<{width}}  {number:<14}  {run:14.9f}  {here:14.9f}  {relative:.1e}")
    worst = max(found, key=lambda each: each.relative)
    print(
        f"largest relative difference {worst.relative:.1e}, {worst.number} of {worst.sae}; "
        f"at most {TOLERANCE:.0e} is wanted"
    )
    return 0 if worst.relative <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
