"""SAELens' side, in its environment: reads ours with its loader, saves its own with its writer.

Files of releases that it reads and does not write are written here as its loaders expect them, read
by those loaders, and answered by what they make of them.
"""

import json
import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor
from sae_lens.saes import sae as saelens_sae
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
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


def linear(sae, infix=""):
    """Return weights as `nn.Linear`s hold them."""
    return {
        f"encoder{infix}.weight": sae.W_enc.T.contiguous(),
        f"encoder{infix}.bias": sae.b_enc.data,
        f"decoder{infix}.weight": sae.W_dec.T.contiguous(),
        f"decoder{infix}.bias": sae.b_dec.data,
    }


def of_releases(place, common):
    """Write a file of each release's format; yield SAELens' name of one SAE of it, and its folder.

    The loaders ask for the files of the release, at its widths; both are given ours.
    """
    standard, jumprelu = (
        random_sae(kind, config(**common))
        for kind, config in ((StandardSAE, StandardSAEConfig), (JumpReLUSAE, JumpReLUSAEConfig))
    )
    d_in, stem = common["d_in"], "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096"
    stem += "_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
    hook = "blocks.15.hook_resid_post"
    r1 = ("llama_scope_r1_distill", "l15r_800m_slimpajama")
    state = {"W_enc": standard.W_enc.data, "W_dec": standard.W_dec.data}
    biases = {"b_enc": standard.b_enc.data, "b_dec": standard.b_dec.data}
    written = {
        ("qwen-scope-3-8b-base-w64k-l50", "layer7"): (
            "SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer7.sae.pt",
            {name: tensor.T.contiguous() for name, tensor in state.items()} | biases,
        ),
        ("goodfire-llama-3.1-8b-instruct", "layer_19"): (
            "goodfire/Llama-3.1-8B-Instruct-SAE-l19.pth",
            linear(standard, "_linear"),
        ),
        ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post"): (
            "deepseek/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
            linear(standard),
        ),
        ("gpt2-small-hook-z-kk", "blocks.5.hook_z"): (f"hook_z/{stem}.pt", state | biases),
        r1: (
            "Llama-Scope-R1-Distill/sae_weights.safetensors",
            linear(jumprelu)
            | {"log_jumprelu_threshold": jumprelu.threshold.log()}
            # What the registry has as a factor, the file has as the mean norm behind it.
            | {
                f"dataset_average_activation_norm.{side}": torch.tensor(
                    d_in**0.5 / get_norm_scaling_factor(*r1)
                )
                for side in ("in", "out")
            },
        ),
    }
    for (release, sae_id), (path, tensors) in written.items():
        file = place / path
        file.parent.mkdir(parents=True)
        save = save_file if file.suffix == ".safetensors" else torch.save
        save(tensors, file)
        config = {"act_name": "blocks.5.attn.hook_z", "act_size": d_in, "dict_size": D_SAE}
        if "hook_z" in path:
            file.with_name(f"{stem}_cfg.json").write_text(json.dumps(config))
        config = {"hook_point_in": hook, "hook_point_out": hook, "d_model": d_in}
        config |= {"expansion_factor": D_SAE // d_in, "norm_activation": "dataset-wise"}
        if release == r1[0]:
            file.with_name("config.json").write_text(json.dumps(config))
        yield release, sae_id, file.parent


def temporal(place, d_in):
    """Write a temporal SAE of random weights as its release does; return the library's of it."""
    sizes = {"n_heads": 4, "n_attn_layers": 2, "bottleneck_factor": 16, "kval_topk": 16}
    said = {"sae_diff_type": "topk", "tied_weights": False} | sizes
    sae = random_sae(TemporalSAE, TemporalSAEConfig(d_in=d_in, d_sae=D_SAE, **said))
    names = {"W_dec": "D", "W_enc": "E", "b_dec": "b"}
    state = {names.get(name, name): tensor for name, tensor in sae.state_dict().items()}
    place.mkdir(parents=True)
    save_file(state, place / "latest_ckpt.safetensors")
    said |= {"exp_factor": D_SAE / d_in, "scaling_factor": 0.5}
    conf = {"llm": {"dimin": d_in}, "sae": said, "data": {"dtype": "float32"}}
    (place / "conf.yaml").write_text(json.dumps(conf))  # which is YAML too
    return loaded("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", place)


def loaded(release, sae_id, folder, **widths):
    """Return what `SAE.from_pretrained` makes of a release whose files lie in a folder."""
    loaders.hf_hub_download = lambda repo_id=None, filename="", **_: folder / Path(filename).name
    saelens_sae.get_config_overrides = lambda *_: dict(widths)
    sae = SAE.from_pretrained(release, sae_id)
    sae.turn_off_forward_pass_hook_z_reshaping()  # ours has heads one after the other
    return sae


def main(folder):
    torch.manual_seed(0)  # SAELens initialises from the global generator
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
        if name != "topk":  # whose norms it does not fold
            sae.fold_W_dec_norm()
            folded = folder / "theirs" / "saelens folded" / name
            folded.parent.mkdir(exist_ok=True)
            folded.symlink_to(place)
            save_file(answers(sae, x), folded.with_suffix(".safetensors"))
    releases = folder / "theirs" / "releases"
    for release, sae_id, place in of_releases(releases, common):
        sae = loaded(release, sae_id, place, d_in=common["d_in"], d_sae=D_SAE)
        save_file(answers(sae, x), releases / f"{place.name}.safetensors")
    place = folder / "theirs" / "temporal" / "layer_12"
    sequences = x.unflatten(0, (4, -1))
    with torch.no_grad():
        sae = temporal(place, common["d_in"])
        answer = {"f": sae.encode(sequences), "x_hat": sae(sequences)}
    save_file(answer, place.with_suffix(".safetensors"))
    print(f"sae-lens {sae_lens.__version__} on torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
