"""Our side: SAEs for the peers to read; then what they say of ours beside what we say of theirs.

ours/<format>/<name>/              what we export; answers lie in ours/<format>/<name>.safetensors
theirs/<library>/<name>/           what a library saved; its own answers lie beside it
answers/<format>/<name>.safetensors  what a library says of ours
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.checkpoints.formats.temporal import read_temporal
from gsae_core.checkpoints.formats.write import write_sae
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.text import aligned

D_IN, D_SAE, TOKENS = 64, 512, 256
LARGEST = 1e-6

EXPORTS = {
    "saelens": ("gated", "relu", "jumprelu", "topk"),
    "jumprelu": ("gated",),
    "dictionary_learning": ("gated", "relu", "jumprelu", "topk"),
}


def make(name: str) -> SAE:
    sae: SAE = {
        "gated": lambda: GatedSAE(D_IN, D_SAE),
        "relu": lambda: ReluSAE(D_IN, D_SAE),
        "jumprelu": lambda: JumpReluSAE(D_IN, D_SAE, init_threshold=0.5, bandwidth=0.1),
        "topk": lambda: TopKSAE(D_IN, D_SAE, k=16),
    }[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            # Far from the start: no bias is zero, no two matrices are transposes of each other.
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if isinstance(sae, JumpReluSAE):
            sae.threshold.abs_()
    return sae


@torch.no_grad()
def answers(sae: SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    f = sae.encode(x)
    return {"f": f.contiguous(), "x_hat": sae.decode(f).contiguous()}


def write(folder: Path) -> None:
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, folder / "x.safetensors")
    metadata = {
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "dataset_path": "none",
        "context_size": 128,
        "prepend_bos": True,
        "stopped": None,
    }
    for format_, names in EXPORTS.items():
        for name in names:
            sae, place = make(name), folder / "ours" / format_ / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_sae(sae, place, format=format_, metadata=metadata)  # pyright: ignore
            save_file(answers(sae, x), place.with_suffix(".safetensors"))


def compare(folder: Path) -> int:
    x = load_file(folder / "x.safetensors")["x"]
    rows, worst = [], 0.0
    for path in sorted((folder / "answers").glob("*/*.safetensors")):
        mine = load_file(folder / "ours" / path.parent.name / path.name)
        rows.append([f"ours -> {path.parent.name}", path.stem, *differences(mine, load_file(path))])
    for path in sorted((folder / "theirs").glob("*/*.safetensors")):
        if path.parent.name == "temporal":
            sae, sequences = read_temporal(path.with_suffix("")), x.unflatten(0, (4, -1))
            with torch.no_grad():
                mine = {"f": sae.encode(sequences).novel, "x_hat": sae(sequences)}
            rows.append(["temporal -> ours", path.stem, *differences(load_file(path), mine)])
            continue
        fold = path.parent.name.endswith("folded")
        mine = answers(read_sae(path.with_suffix(""), fold_decoder_norms=fold).sae, x)
        rows.append([f"{path.parent.name} -> ours", path.stem, *differences(load_file(path), mine)])
    worst = max(max(float(row[2]), float(row[3])) for row in rows)
    head = ["direction", "SAE", "latents", "reconstructions", "same support", "L0"]
    print("\n".join(aligned([head, *rows])))
    print(f"{len(rows)} comparisons; largest difference {worst:.1e}, allowed {LARGEST:g}")
    return 0 if worst <= LARGEST else 1


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    def relative(name: str) -> str:
        return f"{float((a[name] - b[name]).abs().max() / a[name].abs().max()):.1e}"

    fires = a["f"] > 0
    same = "yes" if bool((fires == (b["f"] > 0)).all()) else "no"
    return [relative("f"), relative("x_hat"), same, f"{float(fires.sum(-1).float().mean()):.1f}"]


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    sys.exit(write(folder) if command == "write" else compare(folder))
