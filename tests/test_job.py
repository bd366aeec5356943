"""A run from config to files: units of lambda, memory asked first, what is written and said."""

import math

import pytest
import torch

from gsae_core.config import RunConfig, SAESpec, TrainRecipe
from gsae_core.errors import InputError
from gsae_core.sae.architectures import build_sae, fold_scale_
from gsae_core.sae.losses import loss
from gsae_core.training import memory
from gsae_core.training.memory import check_memory, n_parameters, resolve_device, training_bytes
from gsae_core.training.units import sparsity_in_training_units


def spec(**fields: object) -> SAESpec:
    return SAESpec.model_validate(
        {"name": "a", "architecture": "gated", "d_sae": 5, "sparsity": 0.5} | fields
    )


# Units of lambda


@pytest.mark.parametrize(
    ("loss_norm", "coeff"),
    [
        ("sum", 0.5),
        ("mean", 0.5 * 3),  # times d_in
        ("mean_power", 0.5 * 3 * 2**2 * 7),  # times d_in E|s x|^2 = 3 x 4 x 7
    ],
)
def test_lambda_is_brought_to_the_summed_error_of_equation_8(loss_norm: str, coeff: float) -> None:
    got = sparsity_in_training_units(
        spec(loss_norm=loss_norm), d_in=3, scale=2.0, mean_square_norm=7.0
    )
    assert got.coeff == coeff
    assert got.raw == coeff / 2


def test_in_unit_activations_the_papers_two_norms_agree() -> None:
    # E|x|^2 = 4, so s = 1/2 makes it 1, and dividing by it once more changes nothing.
    by_mean = sparsity_in_training_units(
        spec(loss_norm="mean"), d_in=3, scale=0.5, mean_square_norm=4.0
    )
    by_power = sparsity_in_training_units(
        spec(loss_norm="mean_power"), d_in=3, scale=0.5, mean_square_norm=4.0
    )
    assert by_mean == by_power == (1.5, 3.0)


@pytest.mark.parametrize("architecture", ["gated", "relu"])
def test_the_raw_lambda_gives_the_same_loss_up_to_the_scale_squared(architecture: str) -> None:
    scale = 0.25
    sae = build_sae(spec(architecture=architecture), 3).double()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = sparsity_in_training_units(spec(), d_in=3, scale=scale, mean_square_norm=1.0)
    trained = loss(sae, scale * x, sparsity_coeff=got.coeff).total.item()
    fold_scale_(sae, scale)
    raw = loss(sae, x, sparsity_coeff=got.raw).total.item()
    assert math.isclose(trained, scale**2 * raw, rel_tol=1e-12)


# Memory and device


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie": "none"},
        {"tie": "untied"},
        {"architecture": "relu"},
    ],
)
def test_parameters_are_counted_as_the_sae_has_them(fields: dict[str, object]) -> None:
    sae = build_sae(spec(**fields), 3)
    assert n_parameters(spec(**fields), 3) == sum(p.numel() for p in sae.parameters())


def config(d_sae: int) -> RunConfig:
    return RunConfig(
        saes=(spec(d_sae=d_sae), spec(name="b", architecture="relu", d_sae=2)),
        train=TrainRecipe(n_tokens=100, batch_size=10),
    )


def test_the_need_of_memory_is_a_sum_one_can_redo() -> None:
    # gated: 2 x 3 x 5 + 3 x 5 + 3 = 48;  relu: 2 x 3 x 2 + 2 + 3 = 17
    learnt = 4 * (48 + 17)
    step = 6 * 10 * 5
    harvest = 2 * 100 * 3
    assert training_bytes(config(5), 3, chunk_vectors=100) == 4 * (learnt + step + harvest)


def test_a_dictionary_too_wide_for_memory_is_told_with_need_and_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 8 * 10**9)
    check_memory(config(10**6), 3, torch.device("cpu"), chunk_vectors=100)
    with pytest.raises(InputError) as caught:
        check_memory(config(10**9), 3, torch.device("cpu"), chunk_vectors=100)
    # 4 (4 x 9e9 + 6 x 10 x 1e9) = 384 GB
    assert str(caught.value) == (
        "expected about 384.0 GB of memory on cpu for 2 SAEs of up to 1000000000 latents, found "
        "8.0 GB free; lower the width, the batch size or the number of SAEs"
    )


def test_a_device_this_machine_has_not_is_told() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(InputError) as caught:
            resolve_device(name)
        assert str(caught.value).startswith("expected a device of this machine (auto, cpu")
        assert str(caught.value).endswith(f"), got {name!r}")
