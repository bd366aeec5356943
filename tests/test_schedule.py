"""Steps that a recipe leaves to the length of the run, and what a run is too short for."""

import math

import pytest
import torch

from gsae_core.analysis.results import settings
from gsae_core.app.train_form import notebook_cell
from gsae_core.config import RunConfig, Schedule, TrainConfig, TrainRecipe, shortfalls, sweep
from gsae_core.presets import preset, presets
from gsae_core.sae.architectures import GatedSAE
from gsae_core.training.optimizer import lr_factor, sparsity_factor
from gsae_core.training.trainer import train


def recipe(n_steps: int, **given: float | int) -> TrainRecipe:
    return TrainRecipe.model_validate({"n_tokens": n_steps, "batch_size": 1} | given)


def test_what_is_not_said_is_a_share_of_the_run() -> None:
    # README's command on 1 M tokens: 244 steps; 5 % is 12.2, a fifth 48.8, half of 48 is 24.
    assert TrainRecipe(n_tokens=1_000_000).schedule == Schedule(12, 12, 48, 24)
    assert TrainRecipe(n_tokens=1_000_000).lr_decay_fraction == 0.2


def test_long_runs_keep_the_papers_numbers() -> None:
    assert recipe(10**6).schedule == Schedule(1000, 5000, 25_000, 12_500)
    assert recipe(20_000).schedule == Schedule(1000, 1000, 4000, 2000)


def test_what_is_said_stays_and_what_is_dead_follows_the_revivals() -> None:
    given = recipe(1000, lr_warmup_steps=1000, sparsity_warmup_steps=0, revive_every=30)
    assert given.schedule == Schedule(1000, 0, 30, 15)
    # Without revivals a window is still needed to count the dead.
    assert recipe(1000, revive_every=0).schedule == Schedule(50, 50, 0, 100)
    assert recipe(3).schedule == Schedule(0, 0, 0, 1)


def test_a_recipe_is_saved_as_it_was_given_and_reads_the_same_again() -> None:
    short = TrainRecipe(n_tokens=1_000_000, lr_warmup_steps=7)
    assert short.model_dump()["lr_warmup_steps"] == 7
    assert short.model_dump()["revive_every"] is None
    again = TrainRecipe.model_validate_json(short.model_dump_json())
    assert again == short
    assert again.schedule == short.schedule


def test_a_config_of_an_earlier_version_means_what_it_meant() -> None:
    # All of its recipe stands in the file, the defaults of its day among them.
    written = {
        "n_tokens": 1_000_000,
        "lr_warmup_steps": 1000,
        "lr_decay_fraction": 0.0,
        "sparsity_warmup_steps": 0,
        "revive_every": 25_000,
        "revive_window": 12_500,
    }
    read = TrainRecipe.model_validate(written)
    assert read.schedule == Schedule(1000, 0, 25_000, 12_500)
    # The cosine from 0.1 to 1, at 243 of 1000 steps, and no decay.
    risen = 0.1 + 0.9 * (1 - math.cos(math.pi * 0.243)) / 2
    assert lr_factor(243, read) == pytest.approx(risen)
    assert sparsity_factor(0, read) == 1.0


def test_the_defaults_lack_nothing_at_any_length() -> None:
    for n_steps in (*range(1, 300), 1000, 19_999, 20_000, 244_140, 10**7):
        assert shortfalls(recipe(n_steps)) == [], n_steps


@pytest.mark.parametrize("n_steps", [21, 244, 1000])
def test_the_defaults_reach_the_peak_and_the_whole_of_lambda(n_steps: int) -> None:
    cfg = recipe(n_steps)
    assert max(lr_factor(step, cfg) for step in range(n_steps)) == 1.0
    assert sparsity_factor(n_steps - 1, cfg) == 1.0


@pytest.mark.parametrize("name", presets())
def test_the_presets_lack_nothing(name: str) -> None:
    assert shortfalls(preset(name).config().train) == []


def test_the_presets_of_ours_say_the_whole_of_their_schedule() -> None:
    train = preset("gpt2-small").config().train
    assert train.schedule == Schedule(1000, 5000, 25_000, 12_500)
    assert train.lr_decay_fraction == 0.0
    train = preset("gemma-2-2b").config().train
    assert train.schedule == Schedule(1000, 5000, 25_000, 12_500)
    assert train.lr_decay_fraction == 0.2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"lr_warmup_steps": 244},
            "all 244 steps lie within the learning-rate warm-up of 244, so the learning rate never "
            "reaches its peak; shorten the warm-up or train longer",
        ),
        (
            # 244 - 0.2 * 244 = 195.2
            {"lr_warmup_steps": 196},
            "the learning rate warms up over 196 steps and falls over the last 49 of 244, so it "
            "never reaches its peak; shorten the warm-up or the decay",
        ),
        (
            # Revivals after steps 40, 80, 120 and 160: 0.7 * 244 = 170.8.
            {"lr_warmup_steps": 40, "revive_every": 40, "lr_decay_fraction": 0.0},
            "each revival of dead features begins a warm-up of 40 steps; with one every 40 until "
            "step 160 of 244, what is revived may never learn at the peak learning rate; shorten "
            "the warm-up, revive less often or end revivals earlier",
        ),
        (
            {"lr_warmup_steps": 30, "revive_until": 1.0},  # 48, 96, 144, 192, 240
            "each revival of dead features begins a warm-up of 30 steps; with one every 48 until "
            "step 240 of 244 and a decay over the last 49, what is revived may never learn at the "
            "peak learning rate; shorten the warm-up, revive less often or end revivals earlier",
        ),
        (
            {"sparsity_warmup_steps": 244},  # at the last step 243 / 244 of it
            "lambda rises over 244 steps and there are 244, so it never reaches what was asked "
            "for; shorten its warm-up or train longer",
        ),
        (
            {"revive_every": 25_000},
            "no dead feature is revived: a feature is dead after 12,500 steps in which it did not "
            "fire, and revivals come every 25,000 steps, none after step 170 of 244; call features "
            "dead sooner, revive more often or train longer",
        ),
        (
            {"revive_window": 145},  # revivals after 48, 96 and 144
            "no dead feature is revived: a feature is dead after 145 steps in which it did not "
            "fire, and revivals come every 48 steps, none after step 170 of 244; call features "
            "dead sooner, revive more often or train longer",
        ),
    ],
)
def test_what_a_run_is_too_short_for_is_said(given: dict[str, float | int], sentence: str) -> None:
    assert shortfalls(recipe(244, **given)) == [sentence]


@pytest.mark.parametrize(
    "given",
    [
        {"lr_warmup_steps": 195},
        {"lr_warmup_steps": 39, "revive_every": 40, "revive_until": 0.6},
        {"sparsity_warmup_steps": 243},
        {"revive_window": 144},
        {"revive_every": 0},
        {"revive_until": 0.0},
    ],
)
def test_one_step_less_and_nothing_is_said(given: dict[str, float | int]) -> None:
    revives = {} if {"revive_every", "revive_window"} & set(given) else {"revive_every": 0}
    assert shortfalls(recipe(244, **revives | given)) == []


def test_the_sentence_about_the_peak_is_right_of_every_step() -> None:
    for warmup in range(60):
        cfg = recipe(50, lr_warmup_steps=warmup, revive_every=0)
        reached = any(lr_factor(step, cfg) == 1.0 for step in range(50))
        assert reached != bool(shortfalls(cfg)), warmup


def test_a_notebook_cell_leaves_the_schedule_to_the_run_too() -> None:
    config = RunConfig(saes=sweep(["gated"], [0.1], 8), train=TrainRecipe(n_tokens=1_000_000))
    names: dict[str, object] = {}
    cell = notebook_cell(config)
    assert "lr_warmup_steps" not in cell
    exec(cell.partition("\nrun = ")[0], names)
    assert names["config"] == config


def test_a_short_run_without_a_word_about_its_schedule_ends_trained() -> None:
    # Eight directions, two at a time. A warm-up of 1000 steps leaves FVU at 0.51 and gamma at 1.31.
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q

    def batches() -> list[torch.Tensor]:
        on = torch.rand(100, 256, 8, generator=generator) < 0.25
        return list((on * torch.rand(100, 256, 8, generator=generator)) @ atoms)

    cfg = TrainConfig(n_tokens=100 * 256, batch_size=256, lr=3e-3, sparsity=(0.02,))
    *_, last = train([GatedSAE(8, 16)], batches(), cfg)
    assert last.saes[0].fvu < 0.1
    assert last.saes[0].gamma == pytest.approx(1.0, abs=0.05)


def test_settings_side_by_side_show_the_steps() -> None:
    config = RunConfig(saes=sweep(["gated"], [0.1], 8), train=TrainRecipe(n_tokens=1_000_000))
    shown = settings(config, config.saes[0])
    assert shown["train.lr_warmup_steps"] == "12"
    assert shown["train.revive_window"] == "24"
    imported = config.model_copy(update={"imported": "SAELens 6"})
    assert settings(imported, config.saes[0])["train.revive_every"] == "default"
