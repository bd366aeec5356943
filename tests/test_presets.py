"""The presets against the paper's numbers, typed from its tables and appendix D.1."""

import pytest
from refusals import refusal

from gsae_core.config import RunConfig, Site
from gsae_core.errors import extra_sentence
from gsae_core.lm.catalog import LENS_MODELS
from gsae_core.paper import paper_runs
from gsae_core.presets import preset, presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_json(name: str) -> None:
    config = preset(name).config()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.preset == name


def test_presets_are_listed_with_a_line_each_quick_first() -> None:
    listed = presets()
    names = ["quick", "gelu-1l", "pythia-2.8b", "gemma-7b", "gpt2-small", "gemma-2-2b"]
    assert list(listed) == names
    assert all(p.description and "\n" not in p.description for p in listed.values())


def test_quick_trains_both_architectures_on_a_million_activations() -> None:
    config = preset("quick").config()
    assert config.model.name == "bundled"
    assert config.train.n_tokens >= 1_000_000
    widths = {(spec.architecture, spec.d_sae) for spec in config.saes}
    assert widths == {("gated", 1024), ("relu", 1536)}
    assert len(config.saes) == 8


def test_quick_moves_to_another_layer_and_site() -> None:
    model = preset("quick").config(layer=1, site="mlp_out").model
    assert (model.layer, model.site) == (1, "mlp_out")


@pytest.mark.parametrize(
    ("name", "n_ctx", "n_steps"),
    [("gelu-1l", 128, 300_000), ("pythia-2.8b", 2048, 400_000), ("gemma-7b", 1024, 300_000)],
)
def test_the_papers_recipe(name: str, n_ctx: int, n_steps: int) -> None:
    config = preset(name).config()
    recipe = config.train
    assert config.data.n_ctx == n_ctx
    assert recipe.batch_size == 4096
    assert recipe.n_tokens == n_steps * 4096
    assert (recipe.beta1, recipe.beta2) == (0.0, 0.999)
    assert recipe.lr == 3e-4
    assert (recipe.lr_warmup_steps, recipe.lr_decay_fraction) == (1000, 0.0)
    assert recipe.sparsity_warmup_steps == 0
    assert config.activation_scale == "none"
    assert config.evaluation.n_tokens > 1_000_000
    assert {spec.recipe for spec in config.saes} == {"P"}


@pytest.mark.parametrize("name", ["gelu-1l", "pythia-2.8b", "gemma-7b"])
def test_resampling_happens_at_steps_25k_50k_75k_and_100k(name: str) -> None:
    recipe = preset(name).config().train
    n_steps = recipe.n_tokens // recipe.batch_size
    assert (recipe.revive_every, recipe.revive_window) == (25_000, 12_500)
    last = int(recipe.revive_until * n_steps)
    assert list(range(25_000, last + 1, 25_000)) == [25_000, 50_000, 75_000, 100_000]


def test_gelu_1l_is_the_mlp_hidden_layer_with_the_baseline_half_as_wide_again() -> None:
    config = preset("gelu-1l").config()
    assert (config.model.layer, config.model.site) == (0, "mlp_hidden")
    widths = {(spec.architecture, spec.d_sae) for spec in config.saes}
    assert widths == {("gated", 131_072), ("relu", 196_608)}
    # One learning rate for both (D.1.2), so one loss scale.
    assert {(spec.loss_norm, spec.lr) for spec in config.saes} == {("mean", None)}


def test_gelu_1l_says_what_its_model_needs() -> None:
    config, description = preset("gelu-1l").config(), preset("gelu-1l").description
    assert config.model.name == LENS_MODELS["gelu-1l"]
    assert extra_sentence("lens").rpartition("; ")[2] in description


def swept(d_sae: int, lr: float, *lambdas: float) -> set[tuple[float, int, float]]:
    return {(sparsity, d_sae, lr) for sparsity in lambdas}


@pytest.mark.parametrize(
    ("name", "layer", "site", "baseline", "gated"),
    [
        (
            "gemma-7b",  # Tables 1 and 3
            20,
            "resid_post",
            swept(196_608, 7.5e-4, 1.2e-4, 1e-4, 9e-5, 3e-5, 4e-5, 2e-5, 1.5e-5, 1e-5)
            | swept(196_608, 1e-3, 3e-5, 7e-5, 5e-5),
            swept(131_072, 3e-4, 1e-3, 9e-4, 8e-4, 7e-4, 5e-4, 3e-4, 2e-4, 1e-4),
        ),
        (
            "pythia-2.8b",  # of two widths
            16,
            "resid_post",
            swept(49_152, 1e-3, 2e-5, 1e-5, 1.5e-5) | swept(196_608, 1e-3, 3e-5, 5e-5, 8e-6),
            swept(32_768, 3e-4, 3e-3, 6e-3, 2e-3) | swept(131_072, 3e-4, 2.5e-3, 4.5e-3, 1.5e-3),
        ),
        (
            "pythia-2.8b",  # Tables 6 and 8
            4,
            "mlp_out",
            swept(196_608, 1e-3, 3.5e-5, 1e-5, 2e-5),
            swept(131_072, 3e-4, 6e-4, 4e-4, 8e-4),
        ),
    ],
)
def test_a_sweep_is_that_of_the_papers_tables(
    name: str, layer: int, site: Site, baseline: set[tuple], gated: set[tuple]
) -> None:
    saes = preset(name).config(layer=layer, site=site).saes
    found = {kind: set[tuple]() for kind in ("relu", "gated")}
    for spec in saes:
        found[spec.architecture].add((spec.sparsity, spec.d_sae, spec.lr or 0))
    assert found == {"relu": baseline, "gated": gated}


@pytest.mark.parametrize("name", ["pythia-2.8b", "gemma-7b"])
def test_only_these_baselines_divide_by_the_mean_power(name: str) -> None:
    norms = {(spec.architecture, spec.loss_norm) for spec in preset(name).config().saes}
    assert norms == {("gated", "mean"), ("relu", "mean_power")}


@pytest.mark.parametrize(
    ("name", "layers"), [("pythia-2.8b", (4, 12, 16, 20, 28)), ("gemma-7b", (6, 13, 20, 27))]
)
def test_every_published_place_has_a_config_with_both_architectures(
    name: str, layers: tuple[int, ...]
) -> None:
    sites = ("resid_post", "mlp_out", "attn_z")
    assert set(preset(name).choices) == {(layer, site) for layer in layers for site in sites}
    for layer, site in preset(name).choices:
        saes = preset(name).config(layer=layer, site=site).saes
        assert {spec.architecture for spec in saes} == {"gated", "relu"}


def test_the_table_of_results_is_complete_and_says_what_the_paper_prints() -> None:
    runs = paper_runs()
    assert len(runs) == 283
    first, last = runs[0], runs[-1]
    # Tables 1 and 8: the first and the last row.
    assert first[:7] == ("gemma-7b", "resid_post", 6, "relu", 196_608, 1e-3, 3e-5)
    assert first[7:] == (18.1, 95.28, 16.8, 0.982)
    assert last[:7] == ("pythia-2.8b", "resid_post", 28, "gated", 32_768, 3e-4, 0.004)
    assert last[7:] == (61.2, 97.9, 35.93, 1.005)


def test_our_own_presets_are_in_the_units_their_lambdas_come_in() -> None:
    for name in ("gpt2-small", "gemma-2-2b"):
        config = preset(name).config()
        assert config.activation_scale == "unit"
        gated = [spec.sparsity for spec in config.saes if spec.architecture == "gated"]
        assert gated == [0.012, 0.018, 0.024, 0.04, 0.06, 0.08]
        relu = [spec.sparsity for spec in config.saes if spec.architecture == "relu"]
        assert relu == [0.012, 0.015, 0.02, 0.03, 0.04, 0.06]


def test_an_unknown_preset_names_the_known_ones() -> None:
    assert refusal(preset, "slow") == (
        "expected a preset among quick, gelu-1l, pythia-2.8b, gemma-7b, gpt2-small, gemma-2-2b, "
        "got 'slow'"
    )


def test_a_place_without_published_runs_is_refused() -> None:
    assert refusal(preset("gemma-7b").config, layer=5) == (
        "expected layer 6, 13, 20 or 27 and site attn_z, mlp_out or resid_post for preset "
        "'gemma-7b', got layer 5 and site 'resid_post'; for another place give --model, --width, "
        "--sparsity and --tokens instead of a preset"
    )
