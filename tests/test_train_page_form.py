"""The Train form as values: what a set-up shows, the flags it means, the same run everywhere."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from gsae_core.app.train_form import (
    FIELDS,
    KNOBS,
    LABELS,
    Base,
    at_place,
    corrected,
    covers,
    log_spaced,
    notebook_cell,
    shown,
    to_flags,
    whole,
)
from gsae_core.cli.arguments import Train, command_line, parse, run_config
from gsae_core.cli.main import COMMANDS
from gsae_core.config import (
    NO_MODEL,
    DataConfig,
    ModelConfig,
    RunConfig,
    SAESpec,
    TrainRecipe,
    sweep,
)
from gsae_core.errors import InputError
from gsae_core.files import write_json
from gsae_core.presets import preset, presets

HOSTILE = "a'b\"\n\\{x}\0 </script> $(rm) EvalConfig("


def started_from(name: str) -> Base:
    return Base(preset(name).config(), Train(preset=name))


def from_terminal(flags: Train) -> RunConfig:
    """Return the run of the command line that a page shows, read as a shell reads it."""
    command = shlex.split(command_line(flags))
    assert command[:3] == ["python", "-m", "gsae_core"]
    read = parse(command[3:], COMMANDS)
    assert isinstance(read, Train)
    return run_config(read)


def from_notebook(config: RunConfig) -> RunConfig:
    """Return the config that the notebook cell makes, its training left out."""
    code, _, training = notebook_cell(config).partition("\nrun = Run.create(")
    assert "train_run(run)" in training
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["config"]


def test_every_flag_of_train_is_on_the_form_with_a_label() -> None:
    known = {field.name for field in dataclasses.fields(Train)}
    drawn = {*FIELDS, *KNOBS, "arch", "width", "equal_width"}
    assert known - drawn == {"preset", "config", "out"}
    assert drawn <= LABELS.keys()


@pytest.mark.parametrize("name", list(presets()))
def test_an_untouched_set_up_is_its_name_and_nothing_more(name: str) -> None:
    base = started_from(name)
    flags = to_flags(shown(base.config), base)
    assert flags == Train(preset=name)
    assert run_config(flags) == base.config


@pytest.mark.parametrize("name", list(presets()))
def test_terminal_and_notebook_make_the_same_run(name: str) -> None:
    base = started_from(name)
    values = shown(base.config) | {"tokens": "3 M", "seed": "7", "lr": "1.2345678901e-3"}
    flags = to_flags(values, base)
    config = run_config(flags)
    assert config.train.n_tokens == 3_000_000
    assert config.train.lr == 1.2345678901e-3
    assert from_terminal(flags) == config
    assert from_notebook(config) == config


def test_every_field_of_the_form_reaches_the_run_by_all_three_ways() -> None:
    base = started_from("quick")
    changed = {
        "model": "my models/a b",
        "revision": "v1",
        "layer": 3,
        "more_layers": [1],
        "site": "attn_z",
        "more_sites": ["resid_post", "attn_z"],
        "dtype": "bfloat16",
        "data": "texts/*; rm -rf ~",
        "text_column": "body",
        "split": "test",
        "chat": True,
        "separator": "---",
        "n_ctx": "64",
        "bos": "never",
        "held_out": "0.1",
        "arch": ["gated", "relu", "jumprelu", "topk"],
        "width": 768,
        "equal_width": True,
        "sparsity": "0.123456789 0.5",
        "jumprelu_sparsity": "0.002",
        "k": "8 16",
        "recipe": "B",
        "tie": "none",
        "aux": "unfrozen",
        "detach_b_dec": True,
        "loss_norm": "mean",
        "init_threshold": "0.01",
        "bandwidth": "0.02",
        "threshold_unit": "3.5",
        "k_aux": "32",
        "tokens": "2e6",
        "batch_size": "1,024",
        "lr": "1e-3",
        "beta1": "0.9",
        "beta2": "0.99",
        "lr_warmup_steps": "5",
        "lr_decay_fraction": "0.3",
        "sparsity_warmup_steps": "6",
        "revive_every": "50",
        "revive_window": "25",
        "revive_until": "0.5",
        "eval_tokens": "4096",
        "eval_replace": "all",
        "activation_scale": "none",
        "max_norm_ratio": "12.5",
        "seed": "3",
        "device": "cpu",
        "checkpoint_minutes": "1.5",
        "start": "sparse",
        "screened": True,
        "cache_activations": True,
        "track": "trackio",
        "activations": "",  # in whose place all of these are
    }
    assert changed.keys() == shown(base.config).keys()
    flags = to_flags(changed, base)
    unsaid = {f.name for f in dataclasses.fields(flags) if getattr(flags, f.name) == f.default}
    assert unsaid == {"config", "out", "activations"}
    config = run_config(flags)
    widths = {spec.architecture: spec.d_sae for spec in config.saes}
    assert widths == {"gated": 768, "relu": 768, "jumprelu": 768, "topk": 768}
    assert from_terminal(flags) == config
    assert from_notebook(config) == config


def test_a_folder_of_vectors_takes_the_place_of_model_and_text(tmp_path: Path) -> None:
    base = started_from("quick")
    values = shown(base.config) | {"activations": str(tmp_path), "model": "gpt2", "held_out": "0.1"}
    flags = to_flags(values | {"data": "x.txt", "layer": 5}, base)
    assert flags == Train(preset="quick", activations=str(tmp_path), held_out=0.1)
    config = run_config(flags)
    assert (config.model.name, config.data.source) == (NO_MODEL, str(tmp_path))
    assert from_terminal(flags) == config
    assert from_notebook(config) == config
    # And of a run on such a folder.
    again = Base(config, Train(config=Path("x")))
    assert to_flags(shown(config), again) == again.flags


def test_a_sweep_at_several_places_shows_each_lambda_once() -> None:
    flags = Train(preset="quick", layer=(1, 2), site=("resid_post", "mlp_out"), sparsity=(0.1, 0.3))
    base = Base(run_config(flags), Train(config=Path("x")))
    assert len(base.config.saes) == 16
    assert shown(base.config)["sparsity"] == "0.1 0.3"
    assert to_flags(shown(base.config), base) == base.flags


def test_a_repeated_run_is_that_run(tmp_path: Path) -> None:
    # Two widths, two learning rates: no product of flags makes these, the run's own file does.
    saes = (
        SAESpec(name="a", architecture="gated", d_sae=6, sparsity=0.1, lr=1e-3),
        SAESpec(name="b", architecture="gated", d_sae=9, sparsity=0.3, detach_b_dec=True),
    )
    config = RunConfig(saes=saes, train=TrainRecipe(n_tokens=10_000, batch_size=100))
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    base = Base(config, Train(config=tmp_path / "config.json"))
    flags = to_flags(shown(config), base)
    assert from_terminal(flags) == config
    assert from_notebook(config) == config
    seeded = run_config(to_flags(shown(config) | {"seed": "5"}, base))
    assert [spec.d_sae for spec in seeded.saes] == [6, 9]
    assert seeded.seed == 5
    assert to_flags(shown(seeded) | {"seed": "0"}, Base(seeded, Train(config=Path("x")))).seed == 0


def test_hostile_names_stay_text_in_the_notebook_cell() -> None:
    config = RunConfig(
        model=ModelConfig(name=HOSTILE),
        data=DataConfig(source=HOSTILE),
        saes=sweep(["gated"], [0.1], 8),
        train=TrainRecipe(n_tokens=4096),
    )
    assert from_notebook(config) == config


def test_a_papers_set_up_at_another_of_its_places_has_the_lambdas_found_there() -> None:
    base = started_from("pythia-2.8b")
    there = at_place(base, 4, "mlp_out")
    assert there.config == preset("pythia-2.8b").config(layer=4, site="mlp_out")
    flags = to_flags(shown(there.config), base)
    assert flags == Train(preset="pythia-2.8b", layer=(4,), site=("mlp_out",))


def test_a_place_the_set_up_lacks_keeps_its_settings_and_drops_its_name() -> None:
    base = started_from("pythia-2.8b")
    assert not covers(base, 4, "mlp_hidden")
    assert at_place(base, 4, "mlp_hidden") == base
    flags = to_flags(shown(base.config) | {"layer": 4, "site": "mlp_hidden"}, base)
    config = run_config(flags)
    assert config.preset is None
    assert config.model.name == "EleutherAI/pythia-2.8b"
    assert config.train == base.config.train
    assert config.data == base.config.data
    assert from_terminal(flags) == config


def test_an_emptied_field_goes_back_to_its_default() -> None:
    # --text-column has no word for "none": the set-up's has to be left behind as a whole.
    base = started_from("gpt2-small")
    assert base.config.data.text_column == "text"
    flags = to_flags(shown(base.config) | {"text_column": ""}, base)
    assert flags.preset is None
    config = run_config(flags)
    assert config.data.text_column is None
    assert config.train == base.config.train


def test_a_switch_of_an_earlier_run_can_be_turned_off() -> None:
    config = preset("quick").config().model_copy(update={"cache_activations": True})
    base = Base(config, Train(config=Path("unused")))
    flags = to_flags(shown(config) | {"cache_activations": False}, base)
    assert run_config(flags).cache_activations is False
    assert run_config(flags).train == config.train


def test_a_baseline_can_be_given_the_others_width_and_its_own_again() -> None:
    base = started_from("quick")
    wide = to_flags(shown(base.config) | {"equal_width": True}, base)
    assert {spec.d_sae for spec in run_config(wide).saes} == {1024}
    equal = Base(run_config(wide), Train(config=Path("unused")))
    narrow = to_flags(shown(equal.config) | {"equal_width": False}, equal)
    assert (narrow.width, narrow.equal_width) == (1024, False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arch": []}, "Architectures: expected a value, got none"),
        ({"width": None}, "Width: expected a value, got none"),
        ({"model": " "}, "Model: expected a value, got none"),
        ({"data": ""}, "Data: expected a value, got none"),
        ({"lr": "1 2"}, "Learning rate: expected a number, like 0.1, got '1 2'"),
        ({"arch": ["topk"], "k": "1.5"}, "k: expected a whole number, like 2_000_000, got '1.5'"),
        ({"arch": ["topk"], "k": "inf"}, "k: expected a whole number, like 2_000_000, got 'inf'"),
        (
            {"arch": ["gated", "jumprelu"]},
            "λ of JumpReLU: expected a number, like 0.1, got ''",
        ),
    ],
)
def test_a_field_that_cannot_be_read_is_named(change: dict[str, Any], sentence: str) -> None:
    base = started_from("quick")
    assert refusal(to_flags, shown(base.config) | change, base) == sentence


def test_log_spaced_values_have_equal_ratios() -> None:
    assert log_spaced(0.1, 100, 4) == [0.1, 1, 10, 100]
    assert log_spaced(0.1, 1, 3) == [0.1, 0.316, 1]  # sqrt(0.1) = 0.3162


@pytest.mark.parametrize("low", [0, 2])
def test_impossible_spacings_are_refused(low: int) -> None:
    sentence = f"expected two numbers above 0, the smaller first, got {low} and 1"
    assert refusal(log_spaced, low, 1, 3) == sentence


def test_values_of_the_address_that_were_not_taken_are_named() -> None:
    asked = {"layer": ["99"], "site": ["attn_z"], "arch": ["gated", "magic"], "run": ["x"]}
    values = {"layer": 2, "site": "attn_z", "arch": ["gated"], "width": 8}
    assert corrected(asked, values) == [
        "Layer: 99 is not a choice here; showing 2",
        "Architectures: gated, magic is not a choice here; showing gated",
    ]


@pytest.mark.parametrize(
    ("typed", "number"),
    [("2e6", 2_000_000), ("2_000", 2000), ("1,048,576", 1_048_576), ("1.5 B", 1_500_000_000)],
)
def test_a_whole_number_may_be_typed_as_people_do(typed: str, number: int) -> None:
    assert whole(typed, "Tokens") == number


@pytest.mark.parametrize("typed", ["M", "", "1.5", "nan", "inf", "1.2345678 k"])
def test_what_is_no_whole_number_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match="Tokens: expected a whole number, like 2_000_000, got"):
        whole(typed, "Tokens")
