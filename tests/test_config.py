"""Configs: a JSON round trip, and a mistake as one sentence that names the field."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from refusals import refusal

from gsae_core.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SAESpec,
    TrainConfig,
    hook_name,
    load_config,
    sweep,
    validated,
)
from gsae_core.errors import InputError

SAE = {"name": "a", "architecture": "gated", "d_sae": 8, "sparsity": 0.1}
RUN = {"saes": [SAE], "train": {"n_tokens": 64, "batch_size": 16}}


def sentence(kind: type, fields: dict[str, Any]) -> str:
    return refusal(validated, kind, fields)


def test_a_run_survives_json(tmp_path: Path) -> None:
    config = validated(RunConfig, RUN)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert load_config(tmp_path / "config.json") == config


def test_a_run_that_is_called_like_a_value_that_is_left_out_survives_json(tmp_path: Path) -> None:
    config = validated(RunConfig, RUN | {"activations": "mse", "finetuned": "mse"})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert load_config(tmp_path / "config.json") == config


def test_a_config_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    config = validated(RunConfig, RUN)
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8-sig")
    assert load_config(tmp_path / "config.json") == config


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().layer = 3


def test_every_setting_explains_itself() -> None:
    for kind in (ModelConfig, DataConfig, SAESpec, TrainConfig, RunConfig):
        plain = {"model", "data", "saes", "train", "evaluation"}
        for name, field in kind.model_fields.items():
            assert field.description or name in plain, f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("resid_pre", "blocks.3.hook_resid_pre"),
        ("resid_post", "blocks.3.hook_resid_post"),
        ("mlp_hidden", "blocks.3.mlp.hook_post"),
        ("mlp_out", "blocks.3.hook_mlp_out"),
        ("attn_z", "blocks.3.attn.hook_z"),
        ("attn_out", "blocks.3.hook_attn_out"),
    ],
)
def test_sites_have_transformer_lens_names(site: Any, name: str) -> None:
    assert hook_name(3, site) == name
    assert ModelConfig(layer=3, site=site).hook_name == name


def test_a_sweep_is_the_product_with_baselines_half_as_wide_again() -> None:
    specs = sweep(["gated", "relu"], [0.1, 0.2, 0.1], 10)
    assert [(s.name, s.d_sae, s.sparsity) for s in specs] == [
        ("gated-0.1", 10, 0.1),
        ("gated-0.2", 10, 0.2),
        ("relu-0.1", 15, 0.1),
        ("relu-0.2", 15, 0.2),
    ]


def test_a_sweeps_topk_saes_have_a_k_each_and_the_gated_width() -> None:
    specs = sweep(["jumprelu"], [0.1, 0.2], 10) + sweep(["topk"], [4, 8, 4], 10)
    assert [(s.name, s.d_sae, s.sparsity) for s in specs] == [
        ("jumprelu-0.1", 10, 0.1),
        ("jumprelu-0.2", 10, 0.2),
        ("topk-4", 10, 4),
        ("topk-8", 10, 8),
    ]


def test_a_sweep_passes_common_settings_on() -> None:
    assert sweep(["gated"], [0.1], 10, recipe="B", seed=7)[0].recipe == "B"


def test_one_lambda_serves_all_in_a_train_config() -> None:
    assert TrainConfig(n_tokens=8, batch_size=4, sparsity=0.1).sparsity == (0.1,)  # pyright: ignore


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (SAESpec, SAE | {"sparsity": 0}, "sparsity: expected a number greater than 0, got 0"),
        (SAESpec, SAE | {"sparsity": -1.5}, "sparsity: expected a number greater than 0, got -1.5"),
        (SAESpec, SAE | {"d_sae": 0}, "d_sae: expected a number greater than 0, got 0"),
        (
            SAESpec,
            SAE | {"architecture": "tanh"},
            "architecture: expected 'gated', 'relu', 'jumprelu' or 'topk', got 'tanh'",
        ),
        (
            SAESpec,
            SAE | {"architecture": "topk"},
            "sparsity: expected a whole number of latents, the k of a TopK SAE, got 0.1",
        ),
        (
            SAESpec,
            SAE | {"architecture": "topk", "sparsity": 9},
            "sparsity: expected a k of at most d_sae=8, got 9",
        ),
        (
            SAESpec,
            SAE | {"architecture": "topk", "sparsity": 0},
            "sparsity: expected a number greater than 0, got 0",
        ),
        (SAESpec, SAE | {"bandwidth": 0}, "bandwidth: expected a number greater than 0, got 0"),
        (SAESpec, SAE | {"k_aux": 0}, "k_aux: expected a number greater than 0, got 0"),
        (ModelConfig, {"layer": -1}, "layer: expected a number greater than or equal to 0, got -1"),
        (DataConfig, {"held_out": 1.0}, "held_out: expected a number less than 1, got 1.0"),
        (
            ModelConfig,
            {"site": "mlp"},
            "site: expected 'resid_pre', 'resid_post', 'mlp_hidden', 'mlp_out', 'attn_z' or "
            "'attn_out', got 'mlp'",
        ),
        (
            ModelConfig,
            {"block": 1},
            "block: no such setting; ModelConfig has name, revision, layer, site, dtype",
        ),
        (RunConfig, {"train": RUN["train"]}, "saes: field required"),
        (
            RunConfig,
            RUN | {"saes": [SAE, SAE]},
            "RunConfig: expected a different name for each SAE, got 'a' twice",
        ),
        (
            RunConfig,
            RUN | {"train": {"n_tokens": 15, "batch_size": 16}},
            "train: expected n_tokens of at least one batch (16), got 15",
        ),
        (
            RunConfig,
            RUN | {"saes": [SAE | {"sparsity": float("nan")}]},
            "saes.0.sparsity: expected a finite number, got nan",
        ),
    ],
)
def test_a_mistake_is_one_sentence(kind: type, fields: dict[str, Any], expected: str) -> None:
    assert sentence(kind, fields) == expected


def test_a_mistake_is_named_as_the_caller_calls_it() -> None:
    with pytest.raises(InputError, match=r"^--width: expected a number greater than 0, got 0$"):
        validated(SAESpec, SAE | {"d_sae": 0}, {"d_sae": "--width"})


def test_thresholds_of_a_file_without_a_unit_are_in_training_units(tmp_path: Path) -> None:
    # As configs were before there was a unit: every SAE had both settings, whatever it was.
    saes = [
        SAE | {"name": kind, "architecture": kind, "init_threshold": 0.001, "bandwidth": 0.002}
        for kind in ("gated", "jumprelu")
    ]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RUN | {"saes": saes}))
    gated, jumprelu = load_config(path).saes
    assert (gated.init_threshold, gated.bandwidth, gated.threshold_unit) == (0.1, 0.1, None)
    assert (jumprelu.init_threshold, jumprelu.bandwidth) == (0.001, 0.002)
    assert jumprelu.threshold_unit == 1.0
    # A file that says which unit is believed, also where it says that it is to be measured.
    path.write_text(load_config(path).model_dump_json())
    assert load_config(path).saes[1].threshold_unit == 1.0
    measured = jumprelu.model_copy(update={"threshold_unit": None})
    path.write_text(json.dumps(RUN | {"saes": [measured.model_dump()]}))
    assert load_config(path).saes == (measured,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "expected JSON in {path}, got something else: Expecting property name"),
        ("[1]", "expected a JSON object in {path}, got list"),
        (json.dumps(RUN | {"speed": 1}), "speed: no such setting; RunConfig has model, data, saes"),
    ],
)
def test_a_config_file_that_is_none_says_why(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert refusal(load_config, path).startswith(expected.format(path=path))


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"^expected a config file, found nothing at {tmp_path}/c$"
    ):
        load_config(tmp_path / "c")


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"^expected a file to read at {tmp_path}, got: Is a directory$"
    ):
        load_config(tmp_path)
