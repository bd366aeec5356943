"""SAE folders and resumable states: what is written comes back, and damage is named."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import perturb_
from refusals import refusal
from safetensors.torch import load_file, save_file

from gsae_core.checkpoints.checkpoint import load_sae, read_cfg, save_sae
from gsae_core.errors import InputError
from gsae_core.runs.work import train
from gsae_core.runs.work.train import load_state
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE, fold_scale_
from gsae_core.sae.base import SAE, check_width

X = torch.tensor([[3.0, 1.0], [-1.0, 2.0], [0.5, -0.5]])


def gated(**options: Any) -> GatedSAE:
    sae = GatedSAE(2, 3, **options)
    perturb_(sae)
    return sae


def relu() -> ReluSAE:
    sae = ReluSAE(2, 3)
    perturb_(sae)
    return sae


def jumprelu() -> JumpReluSAE:
    sae = JumpReluSAE(2, 3, init_threshold=0.5, bandwidth=0.25)
    perturb_(sae)
    return sae


def topk() -> TopKSAE:
    sae = TopKSAE(2, 3, k=2, k_aux=3)
    perturb_(sae)
    return sae


def sae_lens_forward(cfg: dict[str, Any], w: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    """SAELens 6's own arithmetic, from the description of its format."""
    xc = x - w["b_dec"] * cfg.get("apply_b_dec_to_input", True)
    if cfg["architecture"] != "gated":
        z = xc @ w["W_enc"] + w["b_enc"]
        f = torch.relu(z)
        if cfg["architecture"] == "jumprelu":
            f = f * (z > w["threshold"])
        if cfg["architecture"] == "topk":
            norms = w["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else 1
            kept = (z * norms).topk(cfg["k"])
            f = torch.zeros_like(z).scatter(-1, kept.indices, torch.relu(kept.values)) / norms
    else:
        gate = (xc @ w["W_enc"] + w["b_gate"] > 0).float()
        f = gate * torch.relu(xc @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    return f @ w["W_dec"] + w["b_dec"]


SAES = {
    "gated": gated,
    "one-scale": lambda: gated(tie="none"),
    "untied": lambda: gated(tie="untied", aux="off"),
    "relu": relu,
    "topk": topk,
    "jumprelu": jumprelu,
}


@pytest.mark.parametrize("make", SAES.values(), ids=SAES)
def test_an_sae_comes_back_with_the_same_bits_and_settings(tmp_path: Path, make: Any) -> None:
    sae = make()
    save_sae(sae, tmp_path / "sae", metadata={"hook_name": "blocks.2.hook_resid_post"})
    back = load_sae(tmp_path / "sae")
    assert type(back) is type(sae)
    assert back.recipe == "P"
    for name, value in sae.named_parameters():
        assert torch.equal(back.get_parameter(name), value)
    if isinstance(sae, GatedSAE) and isinstance(back, GatedSAE):
        assert (back.tie, back.aux, back.detach_b_dec) == (sae.tie, sae.aux, sae.detach_b_dec)
    if isinstance(back, TopKSAE):
        assert (back.k, back.k_aux) == (2, 3)
    if isinstance(back, JumpReluSAE):
        assert back.settings == {"init_threshold": 0.5, "bandwidth": 0.25, "threshold_unit": None}
    assert torch.equal(back(X), sae(X))


def test_a_half_precision_folder_keeps_thresholds_in_float32(tmp_path: Path) -> None:
    sae = jumprelu()
    save_sae(sae, tmp_path, metadata={}, dtype=torch.bfloat16)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert (weights["W_enc"].dtype, weights["threshold"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(load_sae(tmp_path).get_parameter("threshold"), sae.threshold)


def test_the_unit_of_thresholds_is_beside_them_and_folds_as_they_do(tmp_path: Path) -> None:
    sae = JumpReluSAE(2, 3)
    sae.measure_unit_(torch.tensor([[3.0, 4.0]]))  # 5 long
    fold_scale_(sae, 10.0)
    save_sae(sae, tmp_path, metadata={})
    metadata = read_cfg(tmp_path)["metadata"]
    assert (metadata["init_threshold"], metadata["bandwidth"]) == (0.1, 0.1)
    assert metadata["threshold_unit"] == 0.5
    back = load_sae(tmp_path)
    assert isinstance(back, JumpReluSAE)
    assert (back.start, back.eps) == pytest.approx((0.05, 0.05))
    assert back.threshold.tolist() == pytest.approx([0.05] * 3)


def test_a_folder_without_a_unit_has_its_bandwidth_in_raw_units(tmp_path: Path) -> None:
    # What earlier versions wrote; SAELens writes neither, and training measures the unit then.
    save_sae(jumprelu(), tmp_path, metadata={})
    path = tmp_path / "cfg.json"
    cfg = json.loads(path.read_text())
    for dropped, unit, eps in (("threshold_unit", 1.0, 0.25), ("bandwidth", None, 0.1)):
        del cfg["metadata"][dropped]
        path.write_text(json.dumps(cfg))
        back = load_sae(tmp_path)
        assert isinstance(back, JumpReluSAE)
        assert (back.threshold_unit, back.eps) == (unit, eps)
        assert torch.equal(back.threshold, jumprelu().threshold)


@pytest.mark.parametrize("make", [gated, lambda: gated(tie="none"), relu, jumprelu, topk])
def test_the_folder_means_the_same_in_sae_lens(tmp_path: Path, make: Any) -> None:
    sae = make()
    save_sae(sae, tmp_path, metadata={"model_name": "bundled", "prepend_bos": True})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    weights = load_file(tmp_path / "sae_weights.safetensors")
    own = {
        "gated": {"b_gate", "b_mag", "r_mag"},
        "relu": {"b_enc"},
        "jumprelu": {"b_enc", "threshold"},
        "topk": {"b_enc"},
    }
    assert set(weights) == {"W_enc", "W_dec", "b_dec"} | own[sae.architecture]
    assert tuple(weights["W_enc"].shape) == (2, 3)
    keys = """d_in d_sae dtype device apply_b_dec_to_input normalize_activations
        reshape_activations architecture metadata"""
    assert set(cfg) - {"k"} == set(keys.split())
    assert cfg.get("k") == (2 if isinstance(sae, TopKSAE) else None)
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (2, 3, "float32")
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["prepend_bos"] is True
    torch.testing.assert_close(sae_lens_forward(cfg, weights, X), sae(X))


def test_untied_paths_are_no_architecture_of_sae_lens_and_the_folder_says_so(
    tmp_path: Path,
) -> None:
    save_sae(gated(tie="untied"), tmp_path, metadata={})
    assert read_cfg(tmp_path)["architecture"] == "gated_untied"
    assert "W_mag" in load_file(tmp_path / "sae_weights.safetensors")


def plain_sae_lens_folder(folder: Path, sae: SAE, **cfg: Any) -> None:
    """What SAELens 6 writes: no word about recipes, no checksum."""
    tensors = {k.replace("W_gate", "W_enc"): v.detach() for k, v in sae.named_parameters()}
    save_file(tensors, folder / "sae_weights.safetensors")
    fields = {
        "architecture": "standard" if isinstance(sae, ReluSAE) else sae.architecture,
        "d_in": 2,
        "d_sae": 3,
        "dtype": "torch.float32",
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(fields | cfg))


@pytest.mark.parametrize("make", [gated, relu])
def test_a_folder_of_sae_lens_opens(tmp_path: Path, make: Any) -> None:
    sae = make()
    plain_sae_lens_folder(tmp_path, sae)
    back = load_sae(tmp_path)
    assert torch.equal(back(X), sae(X))
    assert back.recipe == "A"  # perturbed rows are not of unit norm


@pytest.mark.parametrize("make", [jumprelu, topk])
@pytest.mark.parametrize("rescaled", [False, True])
def test_the_comparison_set_opens_too(tmp_path: Path, make: Any, rescaled: bool) -> None:
    sae = make()
    plain_sae_lens_folder(tmp_path, sae, k=2, rescale_acts_by_decoder_norm=rescaled)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    back = load_sae(tmp_path)
    expected = sae_lens_forward(read_cfg(tmp_path), weights, X)
    torch.testing.assert_close(back(X), expected)
    assert type(back) is type(sae)
    assert back.recipe == "P"  # they have no other
    if rescaled and isinstance(sae, TopKSAE):
        torch.testing.assert_close(back.W_dec.norm(dim=1), torch.ones(3))


def test_a_threshold_of_zero_or_less_is_a_plain_relu(tmp_path: Path) -> None:
    # SAELens' own arithmetic is relu(z) where z > threshold; f would be negative without the relu.
    sae = jumprelu()
    plain_sae_lens_folder(tmp_path, sae)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["threshold"] = torch.tensor([-1.0, 0.0, 0.5])
    save_file(weights, tmp_path / "sae_weights.safetensors")
    back = load_sae(tmp_path)
    assert isinstance(back, JumpReluSAE)
    assert back.threshold.tolist() == [0, 0, 0.5]
    expected = sae_lens_forward(read_cfg(tmp_path), weights, X)
    torch.testing.assert_close(back(X), expected)


def test_unit_norms_without_a_recipe_are_the_papers(tmp_path: Path) -> None:
    plain_sae_lens_folder(tmp_path, GatedSAE(2, 3))
    assert load_sae(tmp_path).recipe == "P"


@pytest.mark.parametrize("make", [gated, relu, jumprelu, topk])
def test_uncentred_input_is_folded_into_the_biases(tmp_path: Path, make: Any) -> None:
    sae = make()
    plain_sae_lens_folder(tmp_path, sae, apply_b_dec_to_input=False, k=2)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    expected = sae_lens_forward(read_cfg(tmp_path), weights, X)
    torch.testing.assert_close(load_sae(tmp_path)(X), expected)


def test_a_saved_sae_takes_raw_activations(tmp_path: Path) -> None:
    # Trained on 4x; what is saved takes x, so its reconstructions are a quarter.
    sae = gated()
    trained = sae(4 * X)
    fold_scale_(sae, 4.0)
    save_sae(sae, tmp_path, metadata={"activation_scale": 4.0})
    torch.testing.assert_close(load_sae(tmp_path)(X), trained / 4)
    assert read_cfg(tmp_path)["metadata"]["activation_scale"] == 4.0


# Damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sae(gated(), tmp_path / "sae", metadata={})
    return tmp_path / "sae"


def sentence(folder: Path) -> str:
    return refusal(load_sae, folder)


def test_a_missing_config_is_told(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    assert sentence(folder) == (
        "expected an SAE folder with cfg.json and sae_weights.safetensors, found no cfg.json in "
        f"{folder}"
    )


def test_missing_weights_are_told(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()
    assert sentence(folder) == (
        f"expected sae_weights.safetensors beside cfg.json, found none in {folder}"
    )


def test_truncated_weights_are_told(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    size = path.stat().st_size
    assert sentence(folder).startswith(
        f"expected whole safetensors in {path}, found {size} bytes that are not ("
    )
    assert sentence(folder).endswith("); copy or train it again")


def test_one_changed_bit_is_told(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checksum = read_cfg(folder)["metadata"]["weights_sha256"]
    assert sentence(folder) == (
        f"expected the weights that {folder / 'cfg.json'} was written with (SHA-256 "
        f"{checksum[:12]}...), found others in {path}; copy or train it again"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"architecture": None, "d_sae": None},
            "expected architecture, d_sae in {cfg}, found only d_in, dtype, device, "
            "apply_b_dec_to_input, normalize_activations, reshape_activations, metadata",
        ),
        (
            {"architecture": "matching_pursuit"},
            "expected architecture to be one of 'gated', 'standard', 'jumprelu', 'topk', "
            "'gated_untied' in {cfg}, found 'matching_pursuit'; an SAE with another one computes "
            "what no SAE here can",
        ),
        (
            {"architecture": "jumprelu"},
            "expected tensors W_dec [3, 2], W_enc [2, 3], b_dec [2], b_enc [3], threshold [3] in "
            "{weights} for a jumprelu SAE, as its decoder asks, found W_dec [3, 2], W_enc [2, 3], "
            "b_dec [2], b_gate [3], b_mag [3], r_mag [3]",
        ),
        (
            {"d_sae": 4},
            "expected the weights that {cfg} was written with (SHA-256 {digest}...), found others "
            "in {weights}; copy or train it again",
        ),
        (
            {"normalize_activations": "expected_average_only_in"},
            "expected normalize_activations of none, expected_average_only_in, "
            "covariance_whitening, layer_norm, constant_norm_rescale for {weights}, and "
            "activation_scaler.json beside it to agree, found 'expected_average_only_in' and no "
            "activation_scaler.json; copy the whole checkpoint again, or export its folded form",
        ),
        ({"metadata": {"tie": "x"}}, "tie: expected 'r_mag', 'none' or 'untied', got 'x'"),
    ],
)
def test_a_config_that_does_not_fit_is_told(folder: Path, fields: Any, said: str) -> None:
    cfg = folder / "cfg.json"
    changed = read_cfg(folder) | fields
    digest = read_cfg(folder)["metadata"]["weights_sha256"][:12]
    cfg.write_text(json.dumps({name: v for name, v in changed.items() if v is not None}))
    weights = folder / "sae_weights.safetensors"
    assert sentence(folder) == said.format(cfg=cfg, weights=weights, digest=digest)


@pytest.mark.parametrize("k", [None, 0, 4, 1.5, "2"])
def test_a_k_that_no_topk_sae_has_is_told(folder: Path, k: Any) -> None:
    save_sae(topk(), folder, metadata={})
    cfg = folder / "cfg.json"
    cfg.write_text(json.dumps(read_cfg(folder) | {"k": k}))
    found = k if isinstance(k, int) else None
    assert sentence(folder) == (
        f"expected a k from 1 to d_sae=3 for the TopK SAE in {folder / 'sae_weights.safetensors'}, "
        f"found {found}"
    )


def test_a_config_that_is_no_json_is_told(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")
    assert sentence(folder).startswith(f"expected JSON in {folder / 'cfg.json'}, got something")


def test_a_scale_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    assert "found 'none' and activation_scaler.json with {" in sentence(folder)


def test_an_sae_of_another_width_is_told_with_both() -> None:
    sae = gated()
    check_width(sae, 2, name="mine", hook_name="blocks.2.hook_resid_post")
    assert refusal(check_width, sae, 256, name="mine", hook_name="blocks.2.hook_resid_post") == (
        "expected SAE 'mine' to take activations of width 256, as blocks.2.hook_resid_post has, "
        "got d_in=2; was it trained on another model or site?"
    )


# Resumable state


STATE = {
    "step": 3,
    "seconds": 1.5,
    "name": "a",
    "none": None,
    "saes": [{"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([1, 2])}],
}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    train.save_state(folder, state, n_bytes=40)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    back = load_state(tmp_path)
    assert {k: back[k] for k in ("step", "seconds", "name", "none")} == {
        k: STATE[k] for k in ("step", "seconds", "name", "none")
    }
    assert torch.equal(back["saes"][0]["w"], STATE["saes"][0]["w"])
    assert torch.equal(back["saes"][0]["n"], STATE["saes"][0]["n"])


def test_only_the_newest_state_is_kept(tmp_path: Path) -> None:
    for step in range(12):
        save_state(tmp_path, {"step": step})
    assert load_state(tmp_path) == {"step": 11}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("failing", ["save", "write_json"])
def test_a_full_disk_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_state(tmp_path, {"step": 1})

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.torch if failing == "save" else train, failing, full)
        with pytest.raises((InputError, OSError)) as caught:
            save_state(tmp_path, STATE)
        if failing == "save":
            assert str(caught.value).startswith("expected 40 bytes free for ")
            assert str(caught.value).endswith("; make room on the disk and resume the run")
    assert load_state(tmp_path) == {"step": 1}
    save_state(tmp_path, {"step": 2})
    assert load_state(tmp_path) == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 2  # what the failure left behind is gone


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".state-000001.pt.4242.tmp").write_bytes(b"half")
    save_state(tmp_path, {"step": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-000001.pt", "state.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: None,
    ],
)
def test_a_state_that_is_not_as_it_was_written_is_told(tmp_path: Path, damage: Any) -> None:
    save_state(tmp_path, STATE)
    (path,) = tmp_path.glob("*.pt")
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    said = (
        "expected the resumable state {} as it was written, found none or other content; "
        f"delete the folder {tmp_path} to train from step 0"
    )
    assert refusal(load_state, tmp_path) == said.format(path)
    for pointer in ("{}", '{"file": "..", "sha256": 3}', '{"file": "../x", "sha256": null}'):
        (tmp_path / "state.json").write_text(pointer)
        assert refusal(load_state, tmp_path).startswith(said.partition("{")[0])
