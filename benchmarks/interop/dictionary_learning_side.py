"""dictionary_learning's side, in its environment: its classes read ours and save their own."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file

D_SAE, K = 512, 16


@torch.no_grad()
def answers(sae, x):
    f = sae.encode(x)
    return {"f": f.contiguous(), "x_hat": sae.decode(f).contiguous()}


@torch.no_grad()
def random_sae(sae):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise.abs() * 0.5 if name == "threshold" else parameter + 0.2 * noise)
    if isinstance(sae, BatchTopKSAE):
        sae.threshold.fill_(1.5)
    return sae


def save(sae, place, *, mid_run=False):
    """Save as its trainers do: `ae.pt`, or in mid-run as its backups do, and `config.json`."""
    place.mkdir(parents=True)
    state = sae.state_dict()
    optimizer = torch.optim.Adam(sae.parameters())
    backup = {"step": 7, "ae": state, "optimizer": optimizer.state_dict(), "norm_factor": 2.0}
    torch.save(backup | {"config": {"dict_class": "x"}} if mid_run else state, place / "ae.pt")
    trainer = {
        "dict_class": type(sae).__name__,
        "activation_dim": sae.activation_dim,
        "dict_size": sae.dict_size,
        "layer": 3,
        "lm_name": "gpt2",
        "submodule_name": "resid_post_layer_3",
    }
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


def main(folder):
    x = load_file(folder / "x.safetensors")["x"]
    place = folder / "answers" / "dictionary_learning"
    place.mkdir(parents=True)
    for path in sorted((folder / "ours" / "dictionary_learning").iterdir()):
        if not path.is_dir():
            continue
        if path.name == "relu":
            # load_dictionary would rescale its decoder to unit norm first.
            sae = AutoEncoder.from_pretrained(path / "ae.pt", normalize_decoder=False)
        else:
            sae, _ = load_dictionary(str(path), "cpu")
        save_file(answers(sae, x), place / f"{path.name}.safetensors")
    d_in = x.shape[1]
    kinds = {
        "gated": GatedAutoEncoder(d_in, D_SAE),
        "gated-mid-run": GatedAutoEncoder(d_in, D_SAE),
        "standard": AutoEncoder(d_in, D_SAE),
        "jumprelu": JumpReluAutoEncoder(d_in, D_SAE),
        "batch-topk": BatchTopKSAE(d_in, D_SAE, K),
        "topk": AutoEncoderTopK(d_in, D_SAE, K),
    }
    for name, sae in kinds.items():
        sae, saved = random_sae(sae), folder / "theirs" / "dictionary_learning" / name
        save(sae, saved, mid_run=name == "gated-mid-run")
        save_file(answers(sae, x), saved.with_suffix(".safetensors"))
    version = importlib.metadata.version("dictionary-learning")
    print(f"dictionary-learning {version} on torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
