"""Every writer: what is written is read back and computes the same, or is not there."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import perturb_, set_, worked_example
from safetensors.torch import load_file

from gsae_core.checkpoints.checkpoint import save_sae
from gsae_core.checkpoints.formats import write
from gsae_core.checkpoints.formats.detect import detect
from gsae_core.checkpoints.formats.libraries import EXPORTS
from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.checkpoints.formats.write import Parity, check_parity, parity, to_jumprelu, write_sae
from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE

METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_out", "sparsity": 0.25}


def make(kind: str) -> SAE:
    sae: SAE = {
        "gated": lambda: GatedSAE(4, 9),
        "one-scale": lambda: GatedSAE(4, 9, tie="none"),
        "untied": lambda: GatedSAE(4, 9, tie="untied"),
        "relu": lambda: ReluSAE(4, 9),
        "jumprelu": lambda: JumpReluSAE(4, 9, init_threshold=0.4, bandwidth=0.1),
        "topk": lambda: TopKSAE(4, 9, k=3),
    }[kind]()
    perturb_(sae)
    return sae


KINDS = ["gated", "one-scale", "relu", "jumprelu", "topk"]


# Of these one is refused, see below.
WRITTEN = [each for each in product(KINDS, EXPORTS) if each != ("topk", "jumprelu")]


@pytest.mark.parametrize(("kind", "format"), WRITTEN)
def test_what_is_written_computes_the_same_to_a_millionth(
    tmp_path: Path, kind: str, format: Any
) -> None:
    sae = make(kind)
    written = write_sae(sae, tmp_path / "out" / "sae", format=format, metadata=METADATA)
    assert written.parity.largest < 1e-6
    assert written.parity.n_active > written.parity.n_tokens  # not a comparison of silence
    assert written.parity.n_at_threshold == 0
    assert list(written.files) == sorted((tmp_path / "out" / "sae").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sae"]
    place = detect(tmp_path).place
    assert (place.model, place.layer, place.site) == ("gpt2", 3, "mlp_out")
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(5))
    back = read_sae(tmp_path).sae
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back(x), sae(x), rtol=1e-5, atol=1e-6)


def test_a_gated_sae_as_jumprelu_by_hand() -> None:
    # exp(r_mag) = (2, 1, 1); b_gate = (-1, -2, 0); b_mag = (0.5, 5, -3), so that
    # theta = max(0, b_mag - exp(r_mag) b_gate) = max(0, (0.5 + 2, 5 + 2, -3)) = (2.5, 7, 0).
    jump = to_jumprelu(worked_example())
    assert torch.allclose(jump.threshold, torch.tensor([2.5, 7.0, 0.0], dtype=torch.float64))
    assert jump.b_enc.tolist() == [0.5, 5, -3]
    assert torch.allclose(jump.W_enc, torch.tensor([[2.0, 0, 1], [0, 1, -1]]).double())
    # On x = (3, 1): z = (4.5, 6, -2), of which the first alone is above its threshold.
    f = jump.encode(torch.tensor([[3.0, 1.0]], dtype=torch.float64))
    assert torch.allclose(f, torch.tensor([[4.5, 0, 0]], dtype=torch.float64))


def test_the_file_of_a_jumprelu_export_holds_the_threshold_itself(tmp_path: Path) -> None:
    sae = make("gated")
    assert isinstance(sae, GatedSAE)
    write_sae(sae, tmp_path / "sae", format="jumprelu", metadata={})
    state = {name: p.detach().double() for name, p in sae.named_parameters()}
    theta = (state["b_mag"] - state["r_mag"].exp() * state["b_gate"]).clamp(min=0)
    assert 0 < int((theta == 0).sum()) < 9  # latents whose gate never binds, and others
    written = load_file(tmp_path / "sae" / "sae_weights.safetensors")["threshold"]
    torch.testing.assert_close(written, theta.float(), rtol=1.2e-7, atol=0)


def test_dictionary_learnings_config_names_class_and_place(tmp_path: Path) -> None:
    write_sae(make("gated"), tmp_path, format="dictionary_learning", metadata=METADATA)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "GatedAutoEncoder"
    assert (trainer["activation_dim"], trainer["dict_size"]) == (4, 9)
    assert (trainer["layer"], trainer["submodule_name"]) == (3, "mlp_out_layer_3")
    assert trainer["l1_penalty"] == 0.25
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert tuple(state["encoder.weight"].shape) == (9, 4)
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("format", ["saelens", "jumprelu", "dictionary_learning"])
def test_untied_paths_leave_in_our_own_format_alone(tmp_path: Path, format: Any) -> None:
    with pytest.raises(InputError, match=r"which no other library has; export it as gsae_core"):
        write_sae(make("untied"), tmp_path / "sae", format=format, metadata={})
    assert (
        write_sae(make("untied"), tmp_path / "sae", format="gsae_core", metadata={}).parity.largest
        == 0
    )


def test_topk_has_no_thresholds_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whose threshold depends on the token"):
        write_sae(make("topk"), tmp_path / "sae", format="jumprelu", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_nothing_there_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("work")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="expected a new or empty folder for the SAE"):
            write_sae(make("relu"), target, format="saelens", metadata={})
    assert (tmp_path / "mine").read_text() == "work"


def test_a_format_that_nobody_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a format of .*saelens.*, got 'onnx'"):
        write_sae(make("relu"), tmp_path / "sae", format="onnx", metadata={})


def test_files_that_compute_something_else_are_not_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = make("gated")
    perturb_(wrong, seed=8)
    monkeypatch.setattr(write, "save_sae", lambda sae, *a, **more: save_sae(wrong, *a, **more))
    with pytest.raises(InputError, match=r"within 1e-06, found latents within .*nothing was writt"):
        write_sae(make("gated"), tmp_path / "sae", format="saelens", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_is_no_number_is_no_parity() -> None:
    for wrong in (float("nan"), 2e-6):
        for found in (Parity(wrong, 0.0, 1, 1, 0), Parity(0.0, wrong, 1, 1, 0)):
            with pytest.raises(InputError, match="expected the written files to compute the same"):
                check_parity(found)
    check_parity(Parity(9e-7, 1e-6, 1, 1, 0))


def test_a_number_that_is_none_stays_so_in_a_comparison() -> None:
    sae, other = make("gated"), make("gated")
    with torch.no_grad():
        other.W_dec[4, 2] = torch.nan
    found = parity(sae, other)
    assert found.latents == 0
    assert math.isnan(found.reconstructions)


def test_a_comparison_sees_one_wrong_weight() -> None:
    sae, other = make("gated"), make("gated")
    with torch.no_grad():
        other.W_dec[4, 2] += 0.01
    found = parity(sae, other)
    assert found.latents == 0
    assert found.reconstructions > 1e-4


def test_a_latent_on_its_threshold_is_counted_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # z = x on both; theta is 1 in one and a hair more in the other: at x = 1 + 1e-9 they differ.
    sae, other = (JumpReluSAE(1, 1) for _ in range(2))
    for each, theta in ((sae, 1.0), (other, 1 + 1e-7)):
        set_(each, W_enc=[[1]], W_dec=[[1]], threshold=[1])
        each.double().get_parameter("threshold").data.fill_(theta)
    x = torch.tensor([[0.5], [1 + 1e-9], [2.0]], dtype=torch.float64)
    monkeypatch.setattr(write, "telling_activations", lambda *_: x)
    assert parity(sae, other) == Parity(0.0, 0.0, 3, 2, 1)
    assert "; 1 lie on their threshold" in parity(sae, other).sentence
