"""SAELens' side, in its environment: reads ours with its loader, saves its own with its writer."""

import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

D_SAE = 512


@torch.no_grad()
def answers(sae, x):
    f = sae.encode(x)
    return {"f": f.contiguous(), "x_hat": sae.decode(f).contiguous()}


@torch.no_grad()
def random_sae(kind, config):
    sae = kind(config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Thresholds are positive; one of zero would be a plain ReLU.
        parameter.copy_(noise.abs() * 0.5 if name == "threshold" else parameter + 0.2 * noise)
    return sae


def main(folder):
    x = load_file(folder / "x.safetensors")["x"]
    for format_ in ("saelens", "jumprelu"):
        place = folder / "answers" / format_
        place.mkdir(parents=True)
        for path in sorted((folder / "ours" / format_).iterdir()):
            if path.is_dir():
                sae = SAE.load_from_disk(path)
                save_file(answers(sae, x), place / f"{path.name}.safetensors")
    common = {"d_in": x.shape[1], "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    kinds = {
        "gated": (GatedSAE, GatedSAEConfig(**common)),
        "standard": (StandardSAE, StandardSAEConfig(**common)),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig(**common)),
        "topk": (TopKSAE, TopKSAEConfig(**common, k=16)),
        "topk-by-norm": (TopKSAE, TopKSAEConfig(**common, k=16, rescale_acts_by_decoder_norm=True)),
        "uncentred": (JumpReLUSAE, JumpReLUSAEConfig(**common, apply_b_dec_to_input=False)),
        "uncentred-gated": (GatedSAE, GatedSAEConfig(**common, apply_b_dec_to_input=False)),
    }
    for name, (kind, config) in kinds.items():
        sae, place = random_sae(kind, config), folder / "theirs" / "saelens" / name
        place.mkdir(parents=True)
        sae.save_model(place)
        save_file(answers(sae, x), place.with_suffix(".safetensors"))
    print(f"sae-lens {sae_lens.__version__} on torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
