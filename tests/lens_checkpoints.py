"""A made-up repository in the layout of NeelNanda/GELU_1L512W_C4_Code, and its forward pass."""

import io
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 12,
    "d_mlp": 20,
    "d_head": 4,
    "n_heads": 2,
    "n_ctx": 16,
    "d_vocab": 40,
    "act_fn": "gelu",
    "attn_only": False,
    "normalization": "LN",
    "use_bfloat16_matmul": False,
}


def weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Return a random state dict under a HookedTransformer's names."""
    d, heads, d_head = (config[name] for name in ("d_model", "n_heads", "d_head"))
    shapes: dict[str, tuple[int, ...]] = {
        "embed.W_E": (config["d_vocab"], d),
        "pos_embed.W_pos": (config["n_ctx"], d),
        "ln_final.w": (d,),
        "ln_final.b": (d,),
        "unembed.W_U": (d, config["d_vocab"]),
        "unembed.b_U": (config["d_vocab"],),
    }
    for layer in range(config["n_layers"]):
        block = {f"attn.W_{name}": (heads, d, d_head) for name in "QKV"}
        block |= {f"attn.b_{name}": (heads, d_head) for name in "QKV"}
        block |= {"attn.W_O": (heads, d_head, d), "attn.b_O": (d,), "ln1.w": (d,), "ln1.b": (d,)}
        if not config["attn_only"]:
            block |= {"mlp.W_in": (d, config["d_mlp"]), "mlp.b_in": (config["d_mlp"],)}
            block |= {"mlp.W_out": (config["d_mlp"], d), "mlp.b_out": (d,)}
            block |= {"ln2.w": (d,), "ln2.b": (d,)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    draw = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    masks = {
        f"blocks.{layer}.attn.{name}": torch.ones(config["n_ctx"], config["n_ctx"]).tril().bool()
        if name == "mask"
        else torch.tensor(-1e5)
        for layer in range(config["n_layers"])
        for name in ("mask", "IGNORE")
    }
    return state | masks


def files(config: dict[str, Any], state: dict[str, Tensor], tokenizer: str) -> dict[str, bytes]:
    """Return the repository's files; a step in training lies there too, which nobody wants."""
    written = io.BytesIO()
    torch.save(state, written)
    return {
        "config.json": json.dumps(config | {"tokenizer_name": tokenizer}).encode(),
        "model_final.pth": written.getvalue(),
        "optimizer_final.pth": b"no weights",
        "checkpoints/model_1000.pth": b"no weights",
    }


def forward(state: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """Return sites and logits of a model of one layer, by the formulas."""

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.w"], state[f"{name}.b"])

    at = {name.removeprefix("blocks.0."): value for name, value in state.items()}
    seen = {"resid_pre": state["embed.W_E"][ids] + state["pos_embed.W_pos"][: ids.shape[1]]}
    x = norm(seen["resid_pre"], "blocks.0.ln1")
    q, k, v = (
        torch.einsum("bpd,hde->bhpe", x, at[f"attn.W_{n}"]) + at[f"attn.b_{n}"][:, None]
        for n in "QKV"
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(config["d_head"])
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    z = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    seen["attn_z"] = z.flatten(2)
    seen["attn_out"] = torch.einsum("bphe,hed->bpd", z, at["attn.W_O"]) + at["attn.b_O"]
    middle = seen["resid_pre"] + seen["attn_out"]
    hidden = norm(middle, "blocks.0.ln2") @ at["mlp.W_in"] + at["mlp.b_in"]
    seen["mlp_hidden"] = nn.functional.gelu(hidden)
    seen["mlp_out"] = seen["mlp_hidden"] @ at["mlp.W_out"] + at["mlp.b_out"]
    seen["resid_post"] = middle + seen["mlp_out"]
    last = norm(seen["resid_post"], "ln_final")
    seen["logits"] = last @ state["unembed.W_U"] + state["unembed.b_U"]
    return seen
