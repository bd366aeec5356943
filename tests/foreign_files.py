"""SAEs as other libraries write them, small: their files, and their own arithmetic."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE = 3, 5
Arithmetic = Callable[[Tensor], tuple[Tensor, Tensor]]


def weights(*names: str, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors in our layout; thresholds are positive."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    made = {
        name: torch.randn(shapes.get(name, (D_SAE,)), generator=generator)
        for name in ("W_enc", "W_dec", "b_dec", *names)
    }
    if "threshold" in made:
        made["threshold"] = made["threshold"].abs() * 0.5
    return made


def relu(w: dict[str, Tensor], *, centred: bool = True) -> Arithmetic:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - w["b_dec"] * centred) @ w["W_enc"] + w["b_enc"]
        f = torch.relu(z) * (z > w.get("threshold", torch.tensor(0.0)))
        return f, f @ w["W_dec"] + w["b_dec"]

    return compute


def topk(w: dict[str, Tensor], k: int, *, centred: bool = True) -> Arithmetic:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.relu((x - w["b_dec"] * centred) @ w["W_enc"] + w["b_enc"]).topk(k)
        f = torch.zeros(len(x), D_SAE).scatter(-1, kept.indices, kept.values)
        return f, f @ w["W_dec"] + w["b_dec"]

    return compute


def gated(w: dict[str, Tensor], *, centred: bool = True) -> Arithmetic:
    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x - w["b_dec"] * centred) @ w["W_enc"]
        f = (h + w["b_gate"] > 0) * torch.relu(h * w["r_mag"].exp() + w["b_mag"])
        return f, f @ w["W_dec"] + w["b_dec"]

    return compute


def scaled(compute: Arithmetic, s: float) -> Arithmetic:
    """Return the same for raw activations, where the file's was trained on `s` times them."""

    def raw(x: Tensor) -> tuple[Tensor, Tensor]:
        f, x_hat = compute(s * x)
        return f, x_hat / s

    return raw


def layer_normed(compute: Arithmetic) -> Arithmetic:
    """Return the same between layer norm and its undoing, as OpenAI, BatchTopK and SAELens do."""

    def raw(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x.mean(dim=-1, keepdim=True)
        std = ((x - mu).square().sum(-1, keepdim=True) / (D_IN - 1)).sqrt()
        f, u_hat = compute((x - mu) / (std + 1e-5))
        return f, u_hat * std + mu

    return raw


def constant_normed(compute: Arithmetic) -> Arithmetic:
    """Return the same where every token is first as long as the root of its width (SAELens)."""

    def raw(x: Tensor) -> tuple[Tensor, Tensor]:
        factor = D_IN**0.5 / x.square().sum(-1, keepdim=True).sqrt()
        f, u_hat = compute(factor * x)
        return f, u_hat / factor

    return raw


def whitened(compute: Arithmetic, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Arithmetic:
    """Return the same between SAELens' whitening and its undoing."""

    def raw(x: Tensor) -> tuple[Tensor, Tensor]:
        f, z_hat = compute((x - mean) @ matrix)
        return f, z_hat @ inverse + mean

    return raw


def sae_lens(folder: Path, w: dict[str, Tensor], architecture: str, **cfg: Any) -> Path:
    """Write SAELens' folder; its version is 6 unless `legacy`."""
    folder.mkdir(parents=True, exist_ok=True)
    legacy = cfg.pop("legacy", False)
    fields = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    place = {"hook_name": "blocks.4.hook_resid_pre", "model_name": "gpt2-small"}
    fields |= place if legacy else {"metadata": {"sae_lens_version": "6.54.12"} | place}
    (folder / "cfg.json").write_text(json.dumps(fields | cfg))
    save_file(w, folder / "sae_weights.safetensors")
    return folder


def transposed(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as `nn.Linear`s hold them."""
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
    }


def pickled(folder: Path, state: dict[str, Any], config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def dictionary_learning(folder: Path, state: dict[str, Any], dict_class: str, **more: Any) -> Path:
    trainer = {
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 8,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_8",
    }
    return pickled(folder, state, {"trainer": trainer | more, "buffer": {}})


def npz(path: Path, w: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in w.items()})
    return path


def folded(compute: Arithmetic, w: dict[str, Tensor]) -> Arithmetic:
    """Return the same with latents in the units of directions of length one."""

    def longer(x: Tensor) -> tuple[Tensor, Tensor]:
        f, x_hat = compute(x)
        return f * w["W_dec"].square().sum(1).sqrt(), x_hat

    return longer


def torch_file(path: Path, state: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def qwen_scope(root: Path, w: dict[str, Tensor], *, layer: int, k: int) -> Path:
    """Write a layer of a release; both matrices are transposes of SAELens'."""
    state = {name: t.T.contiguous() if name.startswith("W_") else t for name, t in w.items()}
    return torch_file(root / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{k}" / f"layer{layer}.sae.pt", state)


def goodfire(root: Path, w: dict[str, Tensor]) -> Path:
    state = {name.replace(".", "_linear."): t for name, t in transposed(w).items()}
    state |= {"encoder_linear.bias": w["b_enc"], "decoder_linear.bias": w["b_dec"]}
    return torch_file(root / "Llama-3.1-8B-Instruct-SAE-l19.pth", state)


def deepseek_r1(root: Path, w: dict[str, Tensor]) -> Path:
    state = transposed(w) | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    return torch_file(root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", state)


def hook_z(root: Path, w: dict[str, Tensor], *, layer: int) -> Path:
    """Write one of several files of a folder, and its config of the same name."""
    stem = f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03"
    config = {"act_name": f"blocks.{layer}.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE}
    config |= {"model_name": "gpt2-small", "l1_coeff": 1.8, "layer": layer, "site": "z"}
    path = torch_file(root / f"{stem}.pt", dict(w))
    (root / f"{stem}_cfg.json").write_text(json.dumps(config))
    return path


def llama_scope_r1(
    root: Path, w: dict[str, Tensor], *, mean_norm: float | None, **config: Any
) -> Path:
    """Write a layer of a release, as lm-saes does; `mean_norm` lies among its tensors."""
    folder = root / "800M-Slimpajama-0-OpenR1-Math-220k" / "L15R"
    folder.mkdir(parents=True, exist_ok=True)
    hook = "blocks.15.hook_resid_post"
    fields = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "top_k": 2}
    fields |= {"expansion_factor": D_SAE / D_IN, "act_fn": "jumprelu"}
    fields |= {"norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False}
    (folder / "config.json").write_text(json.dumps(fields | config))
    state = transposed(w) | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    state["log_jumprelu_threshold"] = w["threshold"].log()
    if mean_norm is not None:
        for side in ("in", "out"):
            state[f"dataset_average_activation_norm.{side}"] = torch.tensor(mean_norm)
    save_file(state, folder / "sae_weights.safetensors")
    return folder
