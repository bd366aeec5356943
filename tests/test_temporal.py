"""Temporal SAEs: their arithmetic, and the files of a release."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.checkpoints.formats.temporal import read_temporal
from gsae_core.errors import InputError
from gsae_core.sae.temporal import TemporalSAE

D_IN, D_SAE = 3, 8
SAE: dict[str, Any] = {
    **{"n_attn_layers": 2, "n_heads": 2, "bottleneck_factor": 2, "kval_topk": 3},
    **{"sae_diff_type": "topk", "tied_weights": False, "scaling_factor": 0.5, "exp_factor": 2.67},
}
SIZES: dict[str, int] = {"n_layers": 2, "n_heads": 2, "bottleneck": 2}


def state(*, tied: bool = False) -> dict[str, Tensor]:
    """Return random tensors under the names of a file."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in TemporalSAE(D_IN, D_SAE, **SIZES, k=3).named_parameters()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made = {"D": made.pop("W_dec"), "E": made.pop("W_enc"), "b": made.pop("b_dec")} | made
    return {name: t for name, t in made.items() if name != "E" or not tied}


def release(folder: Path, tensors: dict[str, Tensor], **said: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    conf = {"llm": {"dimin": D_IN}, "sae": SAE | said, "data": {"dtype": "float32"}}
    (folder / "conf.yaml").write_text(yaml.safe_dump(conf))
    save_file(tensors, folder / "latest_ckpt.safetensors")
    return folder


@pytest.fixture
def sequences() -> Tensor:
    return 4 * torch.randn(2, 6, D_IN, generator=torch.Generator().manual_seed(1))


def test_a_prediction_is_projected_and_the_rest_is_coded() -> None:
    # Attention says (1, 0) at every position, whatever it reads: the first direction. Of
    # s x - b = (2, 6) - (0, 2) = (2, 4) it explains (2, 0); (0, 4) / (4 x 2) is coded.
    sae = TemporalSAE(2, 2, n_layers=1, n_heads=1, bottleneck=1, k=1, scale=2.0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.attn_layers[0].c_proj.bias.copy_(torch.tensor([1.0, -1.0]))  # pyright: ignore
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([0.0, 2.0]))
    x = torch.tensor([[[1.0, 3.0]]])
    codes = sae.encode(x)
    torch.testing.assert_close(codes.predicted, torch.tensor([[[2.0, 0.0]]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codes.novel, torch.tensor([[[0.0, 0.5]]]))
    # ((2, 0.5) + (0, 2)) / 2
    torch.testing.assert_close(sae(x), torch.tensor([[[1.0, 1.25]]]), rtol=1e-5, atol=1e-5)


def test_a_position_hears_those_before_it_and_none_after(tmp_path: Path, sequences: Tensor) -> None:
    sae = read_temporal(release(tmp_path, state()))
    codes, changed = sae.encode(sequences), sequences.clone()
    changed[:, 3] += 1
    again = sae.encode(changed)
    assert torch.equal(codes.novel[:, :3], again.novel[:, :3])
    assert torch.equal(codes.predicted[:, :3], again.predicted[:, :3])
    assert not torch.equal(codes.predicted[:, 4:], again.predicted[:, 4:])
    assert bool(((codes.novel > 0).sum(-1) <= 3).all())
    torch.testing.assert_close(sae.encode(sequences[0]).novel, codes.novel[0])


def test_tied_weights_read_along_the_directions_they_write(
    tmp_path: Path, sequences: Tensor
) -> None:
    tied = state(tied=True)
    one = read_temporal(release(tmp_path / "a", tied, tied_weights=True, sae_diff_type="relu"))
    apart = tied | {"E": tied["D"].T.contiguous()}
    other = read_temporal(release(tmp_path / "b", apart, sae_diff_type="relu"))
    assert torch.equal(one(sequences), other(sequences))
    assert int((one.encode(sequences).novel > 0).sum(-1).max()) > 3  # relu keeps all


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"n_heads": 3}, "a multiple of n_heads x bottleneck_factor = 3 x 2, in .*, found 8"),
        ({"kval_topk": 9}, "expected at least kval_topk=9 latents, .*, found 8"),
        ({"n_heads": "many"}, "n_heads in .*conf.yaml: expected a valid integer, .*got 'many'"),
        ({"sae_diff_type": "tanh"}, "sae_diff_type in .*conf.yaml: expected 'topk' or 'relu'"),
        ({"scaling_factor": [1.0]}, "scaling_factor in .*conf.yaml: field required"),
        ({"tied_weights": True}, r"expected E missing in .*, found E \[3, 8\]; copy both again"),
        (
            {"n_attn_layers": 1},
            r"expected attn_layers.1.c_proj.bias missing.* found attn_layers.1.c",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, said: Any, sentence: str) -> None:
    folder = release(tmp_path, state(), **said)
    with pytest.raises(InputError, match=sentence):
        read_temporal(folder)


def test_files_that_are_not_there_or_hold_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the tensors D and b .*, found no such file"):
        read_temporal(tmp_path)
    release(tmp_path, {"W": torch.zeros(2)})
    with pytest.raises(InputError, match=r"expected the tensors D and b .*, found W; give the fol"):
        read_temporal(tmp_path)
    release(tmp_path, state() | {"D": torch.zeros(3)})
    with pytest.raises(InputError, match=r"expected at least kval_topk=3 latents, .*, found 0"):
        read_temporal(tmp_path)
    conf = release(tmp_path, state()) / "conf.yaml"
    conf.write_text("a: [")
    with pytest.raises(InputError, match=r"expected YAML in .*conf.yaml, found something else"):
        read_temporal(tmp_path)
    conf.unlink()
    with pytest.raises(InputError, match=r"expected a small conf.yaml beside the weights"):
        read_temporal(tmp_path)


def test_it_is_no_sae_of_one_activation_and_the_sentence_says_where_it_is_read(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"found a temporal SAE, .*formats.temporal.read_temporal"):
        read_sae(release(tmp_path, state()))
