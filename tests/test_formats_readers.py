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

from gsae_core.checkpoints.formats.detect import detect, find_saes
from gsae_core.checkpoints.formats.libraries import FORMATS, layer_and_site
from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.errors import InputError

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


W = weights("b_enc", "threshold")
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
        (lens("temporal"), "expected architecture to be one of 'gated', 'standard', 'jumprelu'"),
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
            "expected a decoder with an axis of latents",
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
