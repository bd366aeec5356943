"""Every reader: the SAE computes what its own library computes, and says what was assumed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import pytest
import torch
from foreign_files import gated, relu, scaled, topk, transposed, weights
from safetensors.torch import save_file
from torch import Tensor

from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.checkpoints.formats.detect import detect, find_saes
from gsae_core.checkpoints.formats.libraries import FORMATS, HookPoint, layer_and_site
from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE

X = 2 * torch.randn(40, files.D_IN, generator=torch.Generator().manual_seed(9))


def agrees(path: Path, compute: files.Arithmetic, format_: str, *, place: Any = None) -> Any:
    """Check format, place, latents and reconstructions; return what was assumed."""
    found = detect(path)
    assert found.format == format_
    assert found.library == FORMATS[found.format]
    assert (found.d_in, found.d_sae) in ((files.D_IN, files.D_SAE), (None, None))
    if place is not None:
        assert (found.place.model, found.place.layer, found.place.site) == place
    sae, source = read_sae(path)
    f, x_hat = compute(X)
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X), x_hat, rtol=1e-5, atol=1e-5)
    files_read = [found.weights, *filter(None, [found.config])]
    assert [name for name, _ in source.files] == [file.name for file in files_read]
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for _, digest in source.files)
    return " ".join(source.assumed)


LENS_PLACE = ("gpt2-small", 4, "resid_pre")
LENS: dict[str, tuple[tuple[str, ...], Callable[..., files.Arithmetic]]] = {
    "standard": (("b_enc",), relu),
    "jumprelu": (("b_enc", "threshold"), relu),
    "gated": (("b_gate", "b_mag", "r_mag"), gated),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", LENS)
def test_sae_lens_of_both_ages(
    tmp_path: Path, architecture: str, centred: bool, legacy: bool
) -> None:
    names, arithmetic = LENS[architecture]
    w = weights(*names)
    folder = files.sae_lens(tmp_path, w, architecture, legacy=legacy, apply_b_dec_to_input=centred)
    compute = arithmetic(w, centred=centred)
    format_ = "sae_lens_legacy" if legacy else "sae_lens"
    said = agrees(folder, compute, format_, place=LENS_PLACE)
    assert ("b_dec @ W_enc is added" in said) is not centred


def test_topk_of_sae_lens_5_is_an_activation_function(tmp_path: Path) -> None:
    w = weights("b_enc")
    cfg = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "legacy": True}
    agrees(files.sae_lens(tmp_path, w, "standard", **cfg), topk(w, 2), "sae_lens_legacy")
    assert read_sae(tmp_path).source.sparsity == 2


def test_a_cfg_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    w = weights("b_enc")
    folder = files.sae_lens(tmp_path, w, "standard")
    cfg = folder / "cfg.json"
    cfg.write_text(cfg.read_text(encoding="utf-8"), encoding="utf-8-sig")
    agrees(folder, relu(w), "sae_lens")


@pytest.mark.parametrize("said", [True, "expected_average_only_in"])
def test_the_scale_beside_a_checkpoint_from_mid_run_is_folded(tmp_path: Path, said: Any) -> None:
    w = weights("b_gate", "b_mag", "r_mag")
    folder = files.sae_lens(tmp_path, w, "gated", normalize_activations=said)
    scaler = {"scaling_factor": 0.25, "has_whitening": False}
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    assumed = agrees(folder, scaled(gated(w), 0.25), "sae_lens")
    assert "its scale of 0.25 lay beside it in activation_scaler.json" in assumed


NORMED = {"layer_norm": files.layer_normed, "constant_norm_rescale": files.constant_normed}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("norm", list(NORMED))
@pytest.mark.parametrize("architecture", LENS)
def test_sae_lens_normalising_every_token(
    tmp_path: Path, architecture: str, norm: str, legacy: bool
) -> None:
    names, arithmetic = LENS[architecture]
    w = weights(*names)
    folder = files.sae_lens(tmp_path, w, architecture, legacy=legacy, normalize_activations=norm)
    # As the library leaves it beside a checkpoint from the middle of training.
    scaler = {"scaling_factor": None, "has_whitening": False}
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    compute = arithmetic(w)
    said = agrees(
        folder, NORMED[norm](compute), "sae_lens_legacy" if legacy else "sae_lens", place=LENS_PLACE
    )
    assert f"normalises each token itself ({norm})" in said


def test_the_copies_of_openai_s_topk_in_sae_lens_layout(tmp_path: Path) -> None:
    w = weights("b_enc")
    cfg = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "legacy": True}
    folder = files.sae_lens(tmp_path, w, "standard", normalize_activations="layer_norm", **cfg)
    agrees(folder, files.layer_normed(topk(w, 2)), "sae_lens_legacy")


def whitening(folder: Path, inverse_error: float = 0.0, **scaler: Any) -> list[Tensor]:
    """Write a whitening beside a checkpoint as SAELens does; return mean, matrix and inverse."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(files.D_IN, files.D_IN, generator=generator, dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    made = [mean, matrix, torch.linalg.inv(matrix) + inverse_error]
    names = ("mean", "matrix", "inverse_matrix")
    save_file(
        {n: t.contiguous() for n, t in zip(names, made, strict=True)},
        folder / "activation_whitening.safetensors",
    )
    said = {"scaling_factor": None, "has_whitening": True} | scaler
    (folder / "activation_scaler.json").write_text(json.dumps(said))
    return [each.float() for each in made]


@pytest.mark.parametrize("inverse_error", [0.0, 0.1])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", LENS)
def test_whitening_beside_a_checkpoint_from_mid_run_is_folded(
    tmp_path: Path, architecture: str, centred: bool, inverse_error: float
) -> None:
    names, arithmetic = LENS[architecture]
    w = weights(*names)
    cfg = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": centred}
    folder = files.sae_lens(tmp_path, w, architecture, **cfg)
    map_ = whitening(folder, inverse_error)
    compute = arithmetic(w, centred=centred)
    said = agrees(folder, files.whitened(compute, *map_), "sae_lens")
    assert "the whitening in activation_whitening.safetensors is folded" in said
    assert read_sae(folder).sae.input_norm is None


def test_topk_competing_by_norm_counts_norms_before_whitening_is_undone(tmp_path: Path) -> None:
    w = weights("b_enc")
    norms = w["W_dec"].norm(dim=1)
    by_norm = w | {"W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms}
    by_norm["W_dec"] = w["W_dec"] / norms[:, None]
    cfg = {"normalize_activations": "covariance_whitening", "rescale_acts_by_decoder_norm": True}
    folder = files.sae_lens(tmp_path, w, "topk", k=2, **cfg)
    map_ = whitening(folder)
    agrees(folder, files.whitened(topk(by_norm, 2), *map_), "sae_lens")


def test_directions_that_whitening_made_of_unit_norm_are_free_in_activations(
    tmp_path: Path,
) -> None:
    w = weights("b_gate", "b_mag", "r_mag")
    w["W_dec"] = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    folder = files.sae_lens(tmp_path, w, "gated", normalize_activations="covariance_whitening")
    whitening(folder)
    assert read_sae(folder).sae.recipe == "A"


def test_factors_learnt_after_training_are_folded_into_directions(tmp_path: Path) -> None:
    w = weights("b_enc", "scaling_factor")
    cfg = {"finetuning_scaling_factor": True, "legacy": True}
    folder = files.sae_lens(tmp_path, w, "standard", **cfg)
    longer = w | {"W_dec": w["W_dec"] * w["scaling_factor"][:, None]}
    assert "learnt after training" in agrees(folder, relu(longer), "sae_lens_legacy")


def test_factors_of_one_are_nothing(tmp_path: Path) -> None:
    w = weights("b_enc") | {"scaling_factor": torch.ones(files.D_SAE)}
    agrees(files.sae_lens(tmp_path, w, "standard", legacy=True), relu(w), "sae_lens_legacy")


def dictionary(kind: str) -> tuple[dict[str, Any], str, files.Arithmetic, dict[str, Any]]:
    """Return a state dict, its class, its arithmetic, and more keys of its config."""
    w = weights("b_enc")
    linear = transposed(w) | {"encoder.bias": w["b_enc"]}
    counted = linear | {"b_dec": w["b_dec"], "k": torch.tensor(2)}
    match kind:
        case "gated":
            w = weights("b_gate", "b_mag", "r_mag")
            state = transposed(w) | {"decoder_bias": w["b_dec"], "r_mag": w["r_mag"]}
            state |= {"gate_bias": w["b_gate"], "mag_bias": w["b_mag"]}
            return state, "GatedAutoEncoder", gated(w), {"l1_penalty": 0.04}
        case "relu":
            return linear | {"bias": w["b_dec"]}, "AutoEncoder", relu(w), {}
        case "april":
            state = linear | {"decoder.bias": w["b_dec"]}
            return state, "AutoEncoderNew", relu(w, centred=False), {}
        case "jumprelu":
            w = weights("b_enc", "threshold")
            return dict(w), "JumpReluAutoEncoder", relu(w, centred=False), {}
        case "topk":
            state = counted | {"threshold": torch.tensor(-1.0)}
            return state, "AutoEncoderTopK", topk(w, 2), {}
        case "batchtopk":
            theta = torch.tensor(0.7)
            return (
                counted | {"threshold": theta},
                "BatchTopKSAE",
                relu(w | {"threshold": theta}),
                {},
            )
    w |= {"threshold": torch.tensor(0.7)}
    state = w | {"k": torch.tensor(2), "group_sizes": torch.tensor([2, 3])}
    return state, "MatryoshkaBatchTopKSAE", relu(w), {}


KINDS = ["gated", "relu", "april", "jumprelu", "topk", "batchtopk", "matryoshka"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mid_run", [False, True])
def test_dictionary_learning_in_both_shapes(tmp_path: Path, kind: str, mid_run: bool) -> None:
    state, dict_class, compute, more = dictionary(kind)
    if mid_run:
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        state = {"step": 9, "ae": state, "optimizer": optimizer, "norm_factor": 3.5, "config": {}}
    files.dictionary_learning(tmp_path, state, dict_class, **more)
    place = ("EleutherAI/pythia-70m-deduped", 8, "resid_post")
    assumed = agrees(tmp_path, compute, "dictionary_learning", place=place)
    assert "Takes raw activations" in assumed
    assert ("is a JumpReLU SAE with one threshold" in assumed) == (
        "batchtopk" in dict_class.lower()
    )
    assert read_sae(tmp_path).source.sparsity == {"gated": 0.04}.get(
        kind,
        2.0 if "k" in str(state.keys()) and kind in ("topk", "batchtopk", "matryoshka") else None,
    )


def test_a_layer_that_is_no_number_names_no_layer(tmp_path: Path) -> None:
    state, dict_class, compute, _ = dictionary("relu")
    name = "resid_post_layer_8("
    files.dictionary_learning(tmp_path, state, dict_class, layer="8(", submodule_name=name)
    place = ("EleutherAI/pythia-70m-deduped", None, None)
    agrees(tmp_path, compute, "dictionary_learning", place=place)


def test_a_threshold_that_was_never_set_lets_every_positive_latent_fire(tmp_path: Path) -> None:
    w = weights("b_enc")
    state = transposed(w) | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]}
    state |= {"k": torch.tensor(2), "threshold": torch.tensor(-1.0)}
    files.dictionary_learning(tmp_path, state, "BatchTopKSAE")
    assert "it was never set" in agrees(tmp_path, relu(w), "dictionary_learning")


def test_sae_bench_calls_a_bias_otherwise(tmp_path: Path) -> None:
    w = weights("b_gate", "b_mag", "r_mag")
    state = {("gate_bias" if k == "b_gate" else k): v for k, v in w.items()}
    save_file(state, tmp_path / "gated.safetensors")
    agrees(tmp_path, gated(w), "sae_bench")


@pytest.mark.parametrize("name", ["1024", "run_8", "ln_f2", "hook_mlp_out", "my-sae"])
def test_a_name_of_no_hook_tells_of_no_layer(name: str) -> None:
    assert layer_and_site(name) == (None, None)


def test_sparsify_writes_zero_latents_and_an_untransposed_decoder(tmp_path: Path) -> None:
    w = weights("b_enc")
    folder = tmp_path / "layers.10"
    folder.mkdir()
    state = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file(state | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    cfg = {"activation": "topk", "num_latents": 0, "k": 3, "d_in": 3, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    agrees(folder, topk(w, 3), "sparsify", place=(None, 10, "resid_post"))


RELEASE = "gemma-scope-2b-pt-mlp/layer_7/width_16k/average_l0_71/params.npz"


@pytest.mark.parametrize("spelled", ["W", "w"])
def test_gemma_scope_tells_its_place_by_its_path(tmp_path: Path, spelled: str) -> None:
    w = weights("b_enc", "threshold")
    written = {name.replace("W_", f"{spelled}_"): tensor for name, tensor in w.items()}
    path = files.npz(tmp_path / RELEASE, written)
    place = ("google/gemma-2-2b", 7, "mlp_out")
    assert "same function" in agrees(path, relu(w, centred=False), "gemma_scope", place=place)
    assert read_sae(path).source.l0 == 71


def test_an_embedding_sae_of_gemma_scope_is_scaled_by_the_root_of_its_width(
    tmp_path: Path,
) -> None:
    w = weights("b_enc", "threshold")
    path = files.npz(tmp_path / "embedding/width_4k/average_l0_6/params.npz", w)
    root = 3**0.5
    w |= {"W_enc": w["W_enc"] / root, "W_dec": w["W_dec"] * root}
    assert "sqrt(d_in)" in agrees(path, relu(w, centred=False), "gemma_scope")


def test_gemma_scope_2(tmp_path: Path) -> None:
    w = weights("b_enc", "threshold")
    save_file({k.lower(): t for k, t in w.items()}, tmp_path / "params.safetensors")
    cfg = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt"}
    cfg |= {"hf_hook_point_in": "model.layers.13.output", "hf_hook_point_out": None}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    place = ("google/gemma-3-1b-pt", 13, "resid_post")
    agrees(tmp_path, relu(w, centred=False), "gemma_scope_2", place=place)


def test_llama_scope_scales_to_the_root_of_its_width(tmp_path: Path) -> None:
    w = weights("b_enc")
    folder = tmp_path / "Llama3_1-8B-Base-L15R-8x" / "checkpoints"
    folder.mkdir(parents=True)
    state = transposed(w) | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    save_file(state, folder / "final.safetensors")
    config = {"hook_point_in": "blocks.15.hook_resid_post", "jump_relu_threshold": 0.5}
    config |= {"d_model": 3, "d_sae": 5, "dataset_average_activation_norm": {"in": 6.0, "out": 6.0}}
    (folder.parent / "hyperparams.json").write_text(json.dumps(config))
    compute = relu(w | {"threshold": torch.tensor(0.5)}, centred=False)
    place = ("meta-llama/Llama-3.1-8B", 15, "resid_post")
    agrees(folder.parent, scaled(compute, 3**0.5 / 6), "llama_scope", place=place)


QWEN_PLACE = ("Qwen/Qwen3-8B-Base", 7, "resid_post")


def test_qwen_scope_says_k_in_its_folder_s_name_and_holds_transposes(tmp_path: Path) -> None:
    w = weights("b_enc")
    path = files.qwen_scope(tmp_path, w, layer=7, k=2)
    said = agrees(path, topk(w, 2, centred=False), "qwen_scope", place=QWEN_PLACE)
    assert "below zero counts as none" in said
    assert read_sae(path.parent).source.sparsity == 2
    lost = path.rename(tmp_path / path.name)
    with pytest.raises(InputError, match="expected a folder named as the release's repository, su"):
        read_sae(lost)


@pytest.mark.parametrize("format_", ["goodfire", "deepseek_r1"])
def test_files_that_state_nothing_are_known_by_tensors_and_name(
    tmp_path: Path, format_: str
) -> None:
    w = weights("b_enc")
    path = {"goodfire": files.goodfire, "deepseek_r1": files.deepseek_r1}[format_](tmp_path, w)
    model = {
        "goodfire": "meta-llama/Llama-3.1-8B-Instruct",
        "deepseek_r1": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    }[format_]
    place = (model, 19, "resid_post")
    assert "SAELens' loader" in agrees(path, relu(w, centred=False), format_, place=place)


def test_an_sae_of_all_heads_has_the_config_of_its_own_name(tmp_path: Path) -> None:
    of_0, of_10 = weights("b_enc"), weights("b_enc", seed=1)
    files.hook_z(tmp_path, of_0, layer=0)
    path = files.hook_z(tmp_path, of_10, layer=10)
    said = agrees(path, relu(of_10), "hook_z", place=("gpt2-small", 10, "attn_z"))
    assert "one head after the other" in said
    assert [sae.place.layer for sae in find_saes(tmp_path)] == [0, 10]
    path.with_name(f"{path.stem}_cfg.json").unlink()
    with pytest.raises(InputError, match="expected an SAE of a known format"):
        read_sae(path)  # the other's config is not its own


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
def test_llama_scope_r1_has_a_threshold_a_latent_and_its_scale_among_its_tensors(
    tmp_path: Path, norm: str
) -> None:
    w = weights("b_enc", "threshold")
    root = tmp_path / "Llama-Scope-R1-Distill"
    config = {"norm_activation": norm, "sparsity_include_decoder_norm": True}
    folder = files.llama_scope_r1(root, w, mean_norm=6.0, **config)
    compute = relu(w, centred=False)
    compute = scaled(compute, 3**0.5 / 6) if norm == "dataset-wise" else compute
    place = ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 15, "resid_post")
    said = agrees(folder, compute, "llama_scope_r1", place=place)
    assert "left as they are, as SAELens' loader leaves them" in said


@pytest.mark.parametrize("norm", [None, *NORMED])
@pytest.mark.parametrize("architecture", LENS)
def test_norms_are_folded_into_latents_and_reconstructions_stay(
    tmp_path: Path, architecture: str, norm: str | None
) -> None:
    names, arithmetic = LENS[architecture]
    w = weights(*names)
    folder = files.sae_lens(tmp_path, w, architecture, normalize_activations=norm)
    compute = files.folded(arithmetic(w), w)
    f, x_hat = (NORMED[norm](compute) if norm else compute)(X)
    sae, source = read_sae(folder, fold_decoder_norms=True)
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(files.D_SAE))
    assert "as by SAELens' fold_W_dec_norm" in source.assumed[-1]
    torch.testing.assert_close(load_sae(folder, fold_decoder_norms=True).W_dec, sae.W_dec)
    assert not torch.equal(load_sae(folder).W_dec, sae.W_dec)


def test_a_norm_is_folded_by_hand(tmp_path: Path) -> None:
    # d = (3, 4, 0) has length 5: f = 2 x is 10 x in the units of d / 5.
    w = {"W_enc": [[2.0], [0], [0]], "W_dec": [[3.0, 4, 0]], "b_enc": [0.5], "b_dec": [0.0, 0, 0]}
    state = {name: torch.tensor(value) for name, value in w.items()}
    folder = files.sae_lens(tmp_path, state | {"threshold": torch.tensor([3.0])}, "jumprelu")
    sae = read_sae(folder, fold_decoder_norms=True).sae
    assert sae.encode(torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])).tolist() == [[0.0], [22.5]]
    assert sae.state_dict()["threshold"].tolist() == [15.0]
    torch.testing.assert_close(sae.W_dec.data, torch.tensor([[0.6, 0.8, 0]]))


@pytest.mark.parametrize("tie", ["r_mag", "none", "untied"])
def test_a_gated_sae_of_ours_folds_norms_on_both_paths(tmp_path: Path, tie: Any) -> None:
    sae = GatedSAE(files.D_IN, files.D_SAE, tie=tie, seed=2)
    generator = torch.Generator().manual_seed(2)
    for parameter in sae.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    save_sae(sae, tmp_path, metadata={})
    folded = load_sae(tmp_path, fold_decoder_norms=True)
    f = sae.encode(X) * sae.W_dec.norm(dim=1)
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(folded.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(X), sae(X), rtol=1e-5, atol=1e-5)


def test_topk_folds_norms_that_latents_compete_by_and_refuses_others(tmp_path: Path) -> None:
    w = weights("b_enc")
    by_norm = files.sae_lens(tmp_path / "a", w, "topk", k=2, rescale_acts_by_decoder_norm=True)
    read = [read_sae(by_norm, fold_decoder_norms=fold).sae for fold in (False, True)]
    torch.testing.assert_close(read[0].encode(X), read[1].encode(X))
    plain = files.sae_lens(tmp_path / "b", w, "topk", k=2)
    with pytest.raises(InputError, match="expected decoder norms of one, or latents that compete "):
        read_sae(plain, fold_decoder_norms=True)


def test_a_checkpoint_with_the_logarithm_of_its_thresholds(tmp_path: Path) -> None:
    w = weights("b_enc", "threshold")
    logs = {name: t for name, t in w.items() if name != "threshold"}
    logs["log_threshold"] = w["threshold"].log()
    folder = files.sae_lens(tmp_path, logs, "jumprelu")
    agrees(folder, relu(w), "sae_lens", place=LENS_PLACE)


def test_a_tensor_that_the_architecture_does_not_read_is_named_and_left_out(
    tmp_path: Path,
) -> None:
    w = weights("b_enc")
    folder = files.sae_lens(tmp_path, w | {"act_freq": torch.zeros(files.D_SAE)}, "standard")
    said = agrees(folder, relu(w), "sae_lens", place=LENS_PLACE)
    assert "Left out, for a standard SAE of SAELens reads no such tensors: act_freq." in said


def test_weights_in_eight_bits_are_read(tmp_path: Path) -> None:
    w = {name: t.to(torch.float8_e4m3fn) for name, t in weights("b_enc").items()}
    exact = {name: t.float() for name, t in w.items()}
    assert "float8_e4m3fn" in agrees(
        files.sae_lens(tmp_path, w, "standard"), relu(exact), "sae_lens"
    )
    pickle = files.torch_file(
        tmp_path / "x" / "ae.pt", transposed(w) | {"encoder.bias": w["b_enc"]}
    )
    state = torch.load(pickle, weights_only=True) | {"bias": w["b_dec"]}
    agrees(files.torch_file(pickle, state), relu(exact), "dictionary_learning")


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("model.layers.12", (12, "resid_post")),
        ("transformer.h.3", (3, "resid_post")),
        ("model.language_model.layers.3.input", (3, "resid_pre")),
        ("blocks.4.hook_out", (4, "resid_post")),
        ("blocks.4.mlp.hook_out", (4, "mlp_out")),
        ("blocks.4.attn.o.hook_in", (4, "attn_z")),
    ],
)
def test_hooks_of_hugging_face_and_of_bridges_are_places(hook: str, place: Any) -> None:
    assert layer_and_site(hook) == place


def test_dictionary_learning_on_a_hook_of_transformer_lens(tmp_path: Path) -> None:
    state, dict_class, compute, _ = dictionary("relu")
    name = "blocks.0.hook_resid_post"
    folder = files.dictionary_learning(tmp_path, state, dict_class, submodule_name=name)
    place = ("EleutherAI/pythia-70m-deduped", 0, "resid_post")
    agrees(folder, compute, "dictionary_learning", place=place)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in"}}))
    assert detect(folder).place.site is None
    assert detect(folder).place.hook_name == "blocks.0.hook_resid_post, what goes in"


def test_one_head_alone_is_no_place_of_ours_and_is_said_to_be_one(tmp_path: Path) -> None:
    place = {"hook_name": "blocks.4.attn.hook_z", "hook_head_index": 3}
    cfg = {"metadata": {"sae_lens_version": "6.54.12"} | place}
    found = detect(files.sae_lens(tmp_path, weights("b_enc"), "standard", **cfg))
    assert found.place == HookPoint(None, 4, None, "blocks.4.attn.hook_z, head 3 alone")


def openai_state(w: dict[str, Tensor]) -> dict[str, Any]:
    state = transposed(w) | {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"]}
    return state | {"stats_last_nonzero": torch.zeros(files.D_SAE, dtype=torch.int64)}


def test_a_relu_autoencoder_of_openai(tmp_path: Path) -> None:
    w = weights("b_enc")
    files.pickled(tmp_path, openai_state(w) | {"activation": "ReLU"}, None)
    assert "normalises for TopK alone" in agrees(tmp_path, relu(w), "openai")


def test_a_topk_autoencoder_of_openai_by_its_own_arithmetic(tmp_path: Path) -> None:
    w = weights("b_enc")
    settings = {"k": 2, "postact_fn": "ReLU"}
    state = openai_state(w) | {"activation": "TopK", "activation_state_dict": settings}
    files.pickled(tmp_path, state, None)

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x.mean(dim=-1, keepdim=True)
        std = (x - mu).std(dim=-1, keepdim=True)
        u = (x - mu) / (std + 1e-5)
        z = torch.nn.functional.linear(u - w["b_dec"], state["encoder.weight"], w["b_enc"])
        largest = z.topk(2, dim=-1)
        f = torch.zeros_like(z).scatter_(-1, largest.indices, largest.values.relu())
        x_hat = torch.nn.functional.linear(f, state["decoder.weight"]) + w["b_dec"]
        return f, x_hat * std + mu

    said = agrees(tmp_path, compute, "openai")
    assert "normalises each token itself (layer_norm)" in said
    assert "normalises for TopK, and for TopK alone" in said
    sae, source = read_sae(tmp_path)
    assert (sae.input_norm, source.sparsity) == ("layer_norm", 2)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("kind", ["vanilla", "topk", "jumprelu"])
def test_the_batch_topk_repository(tmp_path: Path, kind: str, unit_norm: bool) -> None:
    w = weights("b_enc")
    config = {"sae_type": kind, "top_k": 2, "model_name": "gpt2-small"}
    config |= {"input_unit_norm": unit_norm}
    config |= {"hook_point": "blocks.8.hook_resid_pre"}
    compute: files.Arithmetic = relu(w)
    state = dict(w)
    if kind == "topk":
        compute = topk(w | {"b_enc": torch.zeros(files.D_SAE)}, 2)
    if kind == "jumprelu":
        theta = weights("threshold")["threshold"]
        state["jumprelu.log_threshold"] = theta.log()
        compute = relu(w | {"threshold": theta}, centred=False)
    files.pickled(tmp_path, state, config)
    compute = files.layer_normed(compute) if unit_norm else compute
    agrees(tmp_path, compute, "batch_topk", place=("gpt2-small", 8, "resid_pre"))


@pytest.mark.parametrize(("dtype", "said"), [("float64", "rounded"), ("bfloat16", "exactly")])
def test_numbers_become_float32_and_the_source_says_so(
    tmp_path: Path, dtype: str, said: str
) -> None:
    w = {k: t.to(getattr(torch, dtype)) for k, t in weights("b_enc").items()}
    source = read_sae(files.sae_lens(tmp_path, w, "standard")).source
    assert any(dtype in sentence and said in sentence for sentence in source.assumed)


def test_several_saes_are_told_apart_by_name(tmp_path: Path) -> None:
    for i in range(2):
        state, dict_class, _, more = dictionary("gated")
        files.dictionary_learning(tmp_path / f"trainer_{i}", state, dict_class, **more)
    (tmp_path / "notes.txt").write_text("nothing to see, and longer than that")
    assert [sae.name for sae in find_saes(tmp_path)] == ["trainer_0", "trainer_1"]
    with pytest.raises(InputError, match=r"expected one SAE in .*, found 2 \(trainer_0, trainer_1"):
        read_sae(tmp_path)
    assert read_sae(tmp_path / "trainer_1").sae.d_sae == files.D_SAE


def test_transcoders_beside_saes_are_passed_over(tmp_path: Path) -> None:
    for folder, more in (("resid_post", {}), ("transcoder_all", {"hf_hook_point_out": "x"})):
        (tmp_path / folder).mkdir()
        tensors(GEMMA, architecture="jump_relu", **more)(tmp_path / folder)
    assert [sae.name for sae in find_saes(tmp_path)] == ["resid_post-x"]
    with pytest.raises(InputError, match="found a transcoder, which writes other activations"):
        find_saes(tmp_path / "transcoder_all")


def test_a_table_with_a_brace_where_safetensors_have_theirs_is_no_weights(tmp_path: Path) -> None:
    # After its four letters a Parquet file has bytes of any value.
    (tmp_path / "features.parquet").write_bytes(b"PAR1" + b"\x15\x04\x15\x10" + b"{" * 20)
    with pytest.raises(
        InputError, match=r"expected safetensors, npz or torch files in .*, found n"
    ):
        find_saes(tmp_path)


Writer = Callable[[Path], Any]


def lens(architecture: str = "standard", *names: str, **cfg: Any) -> Writer:
    return lambda folder: files.sae_lens(
        folder, weights(*(names or ("b_enc",))), architecture, **cfg
    )


def unit_gated(**cfg: Any) -> Writer:
    w = weights("b_gate", "b_mag", "r_mag")
    w["W_dec"] = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    return lambda folder: files.sae_lens(folder, w, "gated", legacy=True, **cfg)


def tensors(w: dict[str, Tensor], **config: Any) -> Writer:
    def write(folder: Path) -> None:
        save_file({k: t.clone().contiguous() for k, t in w.items()}, folder / "x.safetensors")
        if config:
            (folder / "cfg.json").write_text(json.dumps(config))

    return write


def batch_topk(**config: Any) -> Writer:
    return lambda folder: files.pickled(folder, weights("b_enc"), config)


def openai_topk(**settings: Any) -> dict[str, Any]:
    return openai_state(W) | {"activation": "TopK", "activation_state_dict": settings}


def named(path: Path) -> Path:
    """Say in circuit-tracer's `config.yaml` what lies beside; return the folder."""
    path.write_text('model_name: "Qwen/Qwen3-4B"\nmodel_kind: "transcoder_set"\n')
    return path.parent


W = weights("b_enc", "threshold")
TEMPORAL = {"D": W["W_dec"], "b": W["b_dec"], "attn_layers.0.k_ctx.weight": W["W_dec"]}
SPARSIFY = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"]}
SPARSIFY |= {"b_dec": W["b_dec"]}
GEMMA = {name.lower(): tensor for name, tensor in W.items()}
COUNTED = transposed(W) | {"encoder.bias": W["b_enc"], "b_dec": W["b_dec"], "k": torch.tensor(2)}
COUNTED |= {"threshold": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (unit_gated(), "multiplied r_mag by the norms and lost them"),
        (
            lens(normalize_activations="batch_norm"),
            "expected normalize_activations of none, .* found 'batch_norm'",
        ),
        (
            lens(normalize_activations=["none"]),
            r"expected normalize_activations of none, .* found \"\['none'\]\"",
        ),
        (
            lens(normalize_activations="covariance_whitening"),
            "expected normalize_activations of .* 'covariance_whitening' and no activation_scaler",
        ),
        (lens(normalize_activations="expected_average_only_in"), "and no activation_scaler.json"),
        (lens("temporal"), "found a temporal SAE, whose attention layers read the positions bef"),
        (lens("matching"), "expected architecture to be one of 'gated', 'standard', 'jumprelu'"),
        (lens(activation_fn_str="tanh-relu"), "expected activation_fn_str to be one of 'relu'"),
        (lens("topk"), "expected a k from 1 to d_sae=5 for the TopK SAE in .*, found None"),
        (lens("gated"), r"expected tensors W_dec .* b_gate \[5\].* gated SAE, .* found W_dec \["),
        (lens("standard", "b_enc", "scaling_factor"), "expected finetuning_scaling_factor to be"),
        (tensors(weights("b_enc")), "expected a config beside .*, as SAELens .* architecture"),
        (
            tensors(W | {"W_enc": W["W_dec"]}, d_in=3, d_sae=5, architecture="jumprelu"),
            r"expected tensors .*, W_enc \[3, 5\], .* found .*, W_enc \[5, 3\],",
        ),
        (tensors(SPARSIFY, d_in=3, k=2, transcode=True), "found a transcoder, which writes other"),
        (tensors(SPARSIFY, d_in=3, k=2, signed=True), "latents of at least zero in .* signed ones"),
        (tensors(SPARSIFY, d_in=3, k=2, activation="groupmax"), "expected activation to be one of"),
        (tensors(SPARSIFY), "expected a config beside .*, as sparsify writes, .* says its k"),
        (
            tensors(GEMMA | {"affine_skip_connection": torch.ones(3, 3)}),
            "found a transcoder, which writes other activations than it reads",
        ),
        (
            tensors(GEMMA | {"w_dec": torch.ones(5, 2, 3)}),
            r"expected a decoder with an axis of latents .* \[5, 2, 3\], as crosscoders and cr",
        ),
        (lens("jumprelu_skip_transcoder"), "found a transcoder, which writes other activations"),
        (
            lens(metadata={"hook_name": "blocks.1.ln2.hook_in", "hook_name_out": "hook_mlp_out"}),
            "found a transcoder, which writes other activations",
        ),
        (
            tensors(TEMPORAL, llm={"dimin": 3}),
            "found a temporal SAE, whose attention layers read the positions before each",
        ),
        (
            tensors({"W_enc_3": W["W_enc"].T, "b_enc_3": W["b_enc"], "b_dec_3": W["b_dec"]}),
            r"found a cross-layer transcoder \(CLT\), which reads one layer and writes those above",
        ),
        (
            lambda folder: tensors(weights("b_enc"))(named(folder / "config.yaml")),
            "found a transcoder, which writes other activations",
        ),
        (
            lambda folder: files.npz(
                folder / "gemma-scope-2b-pt-transcoders/layer_7/width_16k/params.npz", W
            ),
            "found a transcoder, which writes other activations",
        ),
        (
            lambda folder: files.pickled(
                folder, dict(COUNTED), {"trainer": {"dict_class": "CrossCoder"}}
            ),
            "found a crosscoder, which reads and writes several layers at once",
        ),
        (
            lambda folder: files.pickled(
                folder, dict(COUNTED), {"trainer": {}, "buffer": {"io": "in_and_out"}}
            ),
            "found a transcoder, which writes other activations",
        ),
        (lens(apply_b_dec_to_input="no"), "expected apply_b_dec_to_input to be one of True, False"),
        (lens(rescale_acts_by_decoder_norm="x"), "expected rescale_acts_by_decoder_norm to be one"),
        (lens(reshape_activations=3), "expected reshape_activations to be one of 'none', 'hook_z'"),
        (lens("topk", k=10**4000), "expected a k from 1 to d_sae=5 .* found 1000"),
        (
            lambda folder: files.llama_scope_r1(folder, W, mean_norm=None),
            "expected the mean norm of activations, one number above 0, as dataset_average_activa",
        ),
        (
            lambda folder: files.llama_scope_r1(folder, W, mean_norm=1.0, norm_activation="token"),
            "expected norm_activation to be one of 'dataset-wise', 'inference' .* found 'token'",
        ),
        (
            lambda folder: files.llama_scope_r1(folder, W, mean_norm=1.0, hook_point_out="x"),
            "found a transcoder, which writes other activations",
        ),
        (tensors(GEMMA, architecture="relu"), "expected architecture to be one of 'jump_relu'"),
        (
            lambda folder: files.npz(folder / "x.npz", W | {"scaling_factor": W["threshold"]}),
            "expected finetuning_scaling_factor to be true",
        ),
        (
            lambda folder: files.pickled(folder, openai_state(W) | {"activation": "TopK"}, None),
            "expected a k from 1 to d_sae=5 for the TopK SAE in .*, found None",
        ),
        (
            lambda folder: files.pickled(folder, openai_topk(k=2, postact_fn="Identity"), None),
            "expected postact_fn to be one of 'ReLU' in .*, found 'Identity'",
        ),
        (
            lambda folder: files.pickled(folder, openai_state(W) | {"activation": "Tanh"}, None),
            "expected the activation ReLU or TopK in .* found 'Tanh'",
        ),
        (batch_topk(sae_type="batchtopk"), "whose latents depend on the batch they are in"),
        (batch_topk(sae_type="jumprelu"), "expected jumprelu.log_threshold in"),
        (batch_topk(sae_type="other"), "expected sae_type to be one of 'vanilla', 'topk'"),
        (
            lambda folder: files.pickled(folder, dict(COUNTED), None),
            r"expected a config.json beside .* that says TopK or BatchTopK",
        ),
        (
            tensors({"W_E": W["W_enc"], "b_dec": W["b_dec"]}),
            "found tensors W_E, b_dec .* nearest is",
        ),
        (
            tensors(
                {
                    "W_enc": W["b_enc"],
                    "W_dec": W["b_enc"],
                    "b_enc": W["b_enc"],
                    "b_dec": W["b_enc"],
                },
                d_in=3,
                d_sae=5,
            ),
            "expected a decoder with an axis of latents",
        ),
        (lambda folder: None, "expected safetensors, npz or torch files in .*, found none"),
        (lambda folder: folder.rmdir(), "expected a folder or file with an SAE, found nothing at"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(
    tmp_path: Path, write: Writer, sentence: str
) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    write(folder)
    with pytest.raises(InputError, match=sentence) as refused:
        read_sae(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (Path("x" * 300), "expected a folder or file with an SAE, found nothing at x"),
        ("x" * 300, "expected a folder or file with an SAE, found nothing at 'x"),
        ("/proc/self/mem", r"expected a file that can be read at /proc/self/mem, got an error \(I"),
    ],
)
def test_names_and_files_that_the_system_refuses_are_sentences(
    path: Path | str, sentence: str
) -> None:
    if str(path).startswith("/proc") and not Path(path).exists():
        pytest.skip("no /proc on this system")
    for load in (load_sae, read_sae):
        with pytest.raises(InputError, match=sentence):
            load(path)


def test_a_whitening_that_is_lost_broken_or_another_s_is_refused(tmp_path: Path) -> None:
    folder = files.sae_lens(
        tmp_path, weights("b_enc"), "standard", normalize_activations="covariance_whitening"
    )
    whitening(folder, scaling_factor=2.0)
    with pytest.raises(
        InputError, match=r"'covariance_whitening' and activation_scaler.json with .*: 2.0, "
    ):
        read_sae(folder)
    whitening(folder)
    path = folder / "activation_whitening.safetensors"
    save_file({"mean": torch.ones(3), "matrix": torch.ones(2, 2)}, path)
    sentence = r"expected mean, matrix and inverse_matrix for 3 activations in .*, found matrix "
    with pytest.raises(InputError, match=sentence + r"\[2, 2\], mean \[3\]; copy the whole"):
        read_sae(folder)
    save_file({n: torch.full(s, torch.nan) for n, s in WHITENING_SHAPES.items()}, path)
    with pytest.raises(InputError, match="expected finite numbers in"):
        read_sae(folder)
    path.write_bytes(b"not tensors at all, and long")
    with pytest.raises(InputError, match=r"found none; copy the whole checkpoint again"):
        read_sae(folder)


WHITENING_SHAPES = {"mean": (3,), "matrix": (3, 3), "inverse_matrix": (3, 3)}


@pytest.mark.parametrize("write", [unit_gated(normalize_sae_decoder=True)])
def test_a_gated_file_trained_at_unit_norm_is_no_folded_one(tmp_path: Path, write: Writer) -> None:
    assert read_sae(write(tmp_path)).sae.recipe == "P"


def test_an_unknown_file_names_what_the_nearest_format_would_need(tmp_path: Path) -> None:
    save_file({"W_enc": W["W_enc"], "W_dec": W["W_dec"], "b_x": W["b_dec"]}, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"nearest is SAELens 6 standard, which would need b_dec"):
        detect(tmp_path)


def test_a_config_alone_is_no_weights(tmp_path: Path) -> None:
    folder = files.sae_lens(tmp_path, weights("b_enc"), "standard")
    with pytest.raises(InputError, match="give the folder that holds an SAE, its weights"):
        detect(folder / "cfg.json")


def test_the_weights_file_itself_will_do_and_its_name_says_nothing(tmp_path: Path) -> None:
    folder = files.sae_lens(tmp_path / "mine", w := weights("b_enc"), "standard")
    (folder / "sae_weights.safetensors").rename(folder / "whatever.dat")
    agrees(folder / "whatever.dat", relu(w), "sae_lens")
