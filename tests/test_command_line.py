"""argv -> a run: what flags change, and the sentence for every mistake tyro can find."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from refusals import refusal

from gsae_core.cli.arguments import Train, command_line, parse, run_config
from gsae_core.cli.main import COMMANDS
from gsae_core.config import DataConfig, EvalConfig, ModelConfig, RunConfig, SAESpec, TrainRecipe
from gsae_core.presets import preset


def config(words: str) -> RunConfig:
    """Return the run that `train` with these words describes."""
    flags = parse(["train", *shlex.split(words)], COMMANDS)
    assert isinstance(flags, Train)
    return run_config(flags)


def refused(words: str) -> str:
    return refusal(lambda: run_config(parse(shlex.split(words), COMMANDS)))


def shapes(run: RunConfig) -> list[tuple[str, int]]:
    return [(spec.name, spec.d_sae) for spec in run.saes]


def test_flags_alone_make_a_run_over_the_configs_defaults() -> None:
    run = config(
        "--model gpt2 --layer 5 --site mlp_out --arch gated relu --sparsity 0.02 0.05 "
        "--width 2048 --tokens 2_000_000 --data book.txt --seed 3 --device cpu"
    )
    assert run.model == ModelConfig(name="gpt2", layer=5, site="mlp_out")
    assert run.data == DataConfig(source="book.txt")
    assert run.train == TrainRecipe(n_tokens=2_000_000)
    assert shapes(run) == [
        ("gated-0.02", 2048),
        ("gated-0.05", 2048),
        ("relu-0.02", 3072),
        ("relu-0.05", 3072),
    ]
    assert (run.seed, {spec.seed for spec in run.saes}, run.device) == (3, {3}, "cpu")


def test_every_setting_of_the_configs_has_a_flag() -> None:
    flags = {field.name for field in dataclasses.fields(Train)}
    kinds = (ModelConfig, DataConfig, TrainRecipe, EvalConfig, SAESpec, RunConfig)
    settings = {name for kind in kinds for name in kind.model_fields}
    called = {"name": "model", "source": "data", "n_tokens": "tokens", "d_sae": "width"}
    called |= {"architecture": "arch", "replace": "eval_replace"}
    # Parts of a run, what `import` alone sets, and how a file of an earlier version is read.
    settings -= {"saes", "train", "evaluation", "imported", "reading"}
    # What `finetune` and `extend` set.
    settings -= {"start", "finetuned", "loss", "extended", "threshold_lr"}
    assert {called.get(name, name) for name in settings} <= flags


def test_a_preset_is_the_run_when_no_flag_changes_it() -> None:
    assert config("--preset quick") == preset("quick").config()


def test_flags_win_over_a_preset() -> None:
    run = config(
        "--preset quick --layer 1 --lr 0.01 --eval-tokens 99 --bos never --n-ctx 64 "
        "--text-column body --dtype bfloat16 --activation-scale none --recipe B"
    )
    quick = preset("quick").config()
    assert run.model == ModelConfig(layer=1, dtype="bfloat16")
    assert (run.data.bos, run.data.n_ctx, run.data.text_column) == ("never", 64, "body")
    assert run.train == quick.train.model_copy(update={"lr": 0.01})
    assert run.evaluation.n_tokens == 99
    assert run.activation_scale == "none"
    assert {spec.recipe for spec in run.saes} == {"B"}
    assert shapes(run) == shapes(quick)


def test_new_lambdas_keep_what_else_a_preset_says_of_each_architecture() -> None:
    run = config("--preset pythia-2.8b --layer 4 --sparsity 1e-3 2e-3")
    got = [(s.name, s.d_sae, s.lr, s.loss_norm) for s in run.saes]
    # Residual stream of Pythia-2.8B, arXiv:2404.16014v2, Tables 6 and 8.
    assert got == [
        ("relu-0.001", 49_152, 1e-3, "mean_power"),
        ("relu-0.002", 49_152, 1e-3, "mean_power"),
        ("gated-0.001", 32_768, 3e-4, "mean"),
        ("gated-0.002", 32_768, 3e-4, "mean"),
    ]


def test_several_layers_and_sites_are_a_sweep_like_sparsity() -> None:
    run = config(
        "--layer 2 3 2 --site resid_post mlp_out --arch gated --sparsity 0.1 --width 64 "
        "--tokens 9000"
    )
    assert [(spec.name, spec.layer, spec.site) for spec in run.saes] == [
        ("gated-0.1-l2-resid_post", 2, "resid_post"),
        ("gated-0.1-l2-mlp_out", 2, "mlp_out"),
        ("gated-0.1-l3-resid_post", 3, "resid_post"),
        ("gated-0.1-l3-mlp_out", 3, "mlp_out"),
    ]
    assert (run.model.layer, run.model.site) == (2, "resid_post")
    assert len(run.places) == 4


def test_each_place_of_a_papers_set_up_has_the_sweep_it_has_alone() -> None:
    run = config("--preset pythia-2.8b --layer 4 12")
    for layer in (4, 12):
        alone = config(f"--preset pythia-2.8b --layer {layer}")
        there = [spec for spec in run.saes if spec.layer == layer]
        assert [spec.sparsity for spec in there] == [spec.sparsity for spec in alone.saes]
        assert there[0].name == f"{alone.saes[0].name}-l{layer}-resid_post"
    said = refused("train --preset pythia-2.8b --layer 4 5")
    assert "got layer 5 and site 'resid_post'; for another place" in said


@pytest.fixture
def two_places(tmp_path: Path) -> Path:
    first = config("--layer 2 3 --arch gated --sparsity 0.1 --width 64 --tokens 9000")
    path = tmp_path / "config.json"
    path.write_text(first.model_dump_json())
    assert config(f"--config {path}") == first
    return path


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--sparsity 0.3", ["gated-0.3-l2-resid_post", "gated-0.3-l3-resid_post"]),
        ("--site mlp_out", ["gated-0.1-l2-mlp_out", "gated-0.1-l3-mlp_out"]),
        ("--layer 3 1", ["gated-0.1-l3-resid_post", "gated-0.1-l1-resid_post"]),
        ("--layer 3", ["gated-0.1"]),
    ],
)
def test_a_config_of_several_places_is_changed_by_flags(
    two_places: Path, flags: str, names: list[str]
) -> None:
    run = config(f"--config {two_places} {flags}")
    assert [spec.name for spec in run.saes] == names
    assert run.place(run.saes[0]) == (run.model.layer, run.model.site)
    if len(names) == 1:
        assert (run.saes[0].layer, run.saes[0].site, run.model.layer) == (None, None, 3)


def test_sae_names_of_a_config_of_several_places_are_kept(two_places: Path) -> None:
    path = two_places
    path.write_text(path.read_text().replace("gated-0.1-l3-resid_post", "late"))
    names = [spec.name for spec in config(f"--config {path} --seed 1").saes]
    assert names == ["gated-0.1-l2-resid_post", "late"]


def test_a_cache_is_asked_for_by_a_flag_and_kept_from_a_config_file(tmp_path: Path) -> None:
    assert not config("--preset quick").cache_activations
    cached = config("--preset quick --cache-activations")
    assert cached.cache_activations
    (tmp_path / "config.json").write_text(cached.model_dump_json())
    assert config(f"--config {tmp_path / 'config.json'}").cache_activations


def test_arch_picks_from_a_presets_sweep() -> None:
    quick = preset("quick").config()
    assert config("--preset quick --arch relu").saes == quick.saes[4:]


def test_each_architecture_reads_its_own_sparsity() -> None:
    run = config(
        "--arch gated relu jumprelu topk --sparsity 0.1 0.2 --jumprelu-sparsity 0.003 --k 16 32 16 "
        "--width 64 --tokens 9000 --bandwidth 0.01 --init-threshold 0.02 --k-aux 8"
    )
    assert [(spec.name, spec.d_sae, spec.sparsity) for spec in run.saes] == [
        ("gated-0.1", 64, 0.1),
        ("gated-0.2", 64, 0.2),
        ("relu-0.1", 96, 0.1),
        ("relu-0.2", 96, 0.2),
        ("jumprelu-0.003", 64, 0.003),
        ("topk-16", 64, 16),
        ("topk-32", 64, 32),
    ]
    jumprelu, topk = run.saes[4], run.saes[6]
    assert (jumprelu.bandwidth, jumprelu.init_threshold, topk.k_aux) == (0.01, 0.02, 8)


def test_jumprelu_reads_the_lambdas_of_all_where_it_has_none_of_its_own() -> None:
    run = config("--arch jumprelu --sparsity 0.002 --width 64 --tokens 9000")
    assert shapes(run) == [("jumprelu-0.002", 64)]


def test_topk_alone_needs_no_lambda() -> None:
    assert shapes(config("--arch topk --k 4 --width 64 --tokens 9000")) == [("topk-4", 64)]


def test_architectures_a_preset_lacks_are_as_wide_as_its_gated_ones() -> None:
    run = config("--preset quick --arch gated jumprelu topk --jumprelu-sparsity 0.01 --k 8")
    gated = [spec for spec in preset("quick").config().saes if spec.architecture == "gated"]
    assert run.saes[:-2] == tuple(gated)
    assert shapes(run)[-2:] == [("jumprelu-0.01", 1024), ("topk-8", 1024)]


def test_a_config_with_every_architecture_is_a_start_as_it_stands(tmp_path: Path) -> None:
    words = "--arch relu jumprelu topk --sparsity 0.1 --k 4 --width 64 --tokens 9000"
    (tmp_path / "config.json").write_text(config(words).model_dump_json())
    again = config(f"--config {tmp_path / 'config.json'} --sparsity 0.2")
    assert shapes(again) == [("relu-0.2", 96), ("jumprelu-0.2", 64), ("topk-4", 64)]


def test_lr_overrules_the_learning_rates_of_single_saes() -> None:
    run = config("--preset gemma-7b --lr 1e-4")
    assert run.train.lr == 1e-4
    assert {spec.lr for spec in run.saes} == {None}


def test_width_is_the_gated_one() -> None:
    assert shapes(config("--preset quick --sparsity 0.1 --width 10")) == [
        ("gated-0.1", 10),
        ("relu-0.1", 15),
    ]


def test_equal_width_takes_the_gated_width() -> None:
    assert {d_sae for _, d_sae in shapes(config("--preset quick --equal-width"))} == {1024}
    only = config("--preset quick --sparsity 0.1 --width 10 --equal-width")
    assert shapes(only) == [("gated-0.1", 10), ("relu-0.1", 10)]


def test_a_config_file_is_a_start_too(tmp_path: Path) -> None:
    saved = config("--arch gated --sparsity 0.1 --width 10 --tokens 5000 --batch-size 8")
    (tmp_path / "config.json").write_text(saved.model_dump_json())
    assert config(f"--config {tmp_path}/config.json") == saved
    more = config(f"--config {tmp_path}/config.json --arch gated relu --tokens 6000")
    # The baseline that the file lacks is made after its Gated SAE, half as wide again.
    assert shapes(more) == [("gated-0.1", 10), ("relu-0.1", 15)]
    assert more.train.n_tokens == 6000


def test_the_command_line_a_page_shows_describes_the_same_run() -> None:
    words = (
        "--preset quick --layer 1 --site attn_z --arch relu --sparsity 0.3 --width 64 "
        "--tokens 50000 --equal-width --device cpu --seed 2 --lr 0.002"
    )
    flags = parse(["train", *shlex.split(words)], COMMANDS)
    assert isinstance(flags, Train)
    shown = shlex.split(command_line(flags))
    assert shown[:4] == ["python", "-m", "gsae_core", "train"]
    assert parse(shown[3:], COMMANDS) == flags


def test_the_other_commands_are_functions_that_have_their_flags() -> None:
    command = parse(["evaluate", "runs/a", "--tokens", "1_000"], COMMANDS)
    assert command.func is COMMANDS["evaluate"]
    given = {name: value for name, value in command.keywords.items() if value}
    assert given == {"run": Path("runs/a"), "tokens": 1000}
    assert command.keywords["replace"] is None


def test_help_comes_from_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "--help"], COMMANDS)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ModelConfig.model_fields["layer"].description == "Block number, from 0."
    assert "--layer INT [INT ...] Block number, from 0; several, like several sites," in shown
    assert "{None" not in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "",
            f"expected a command, one of {', '.join(COMMANDS)}, got none; see "
            "python -m gsae_core --help",
        ),
        ("tain", f"expected a command, one of {', '.join(COMMANDS)}, got 'tain'"),
        (
            "train --sparcity 0.1",
            "expected a flag of train, got '--sparcity'; did you mean --sparsity?",
        ),
        (
            "train --xyz 1",
            "expected a flag of train, got '--xyz'; see python -m gsae_core train --help",
        ),
        (
            "train quick",
            "expected a flag of train, got 'quick'; see python -m gsae_core train --help",
        ),
        (
            "resume a b",
            "expected a flag of resume, got 'b'; see python -m gsae_core resume --help",
        ),
        ("resume", "expected RUN after resume, got none"),
        ("resume --fast", "expected RUN after resume, got '--fast'"),
        ("train --preset", "--preset: expected NAME, got none"),
        ("train --layer two", "--layer: expected whole numbers, got 'two'"),
        ("train --layer", "--layer: expected one value or several, got none"),
        ("train --sparsity --width 8", "--sparsity: expected one value or several, got none"),
        (
            "train --site resid",
            "--site: expected one of resid_pre, resid_post, mlp_hidden, "
            "mlp_out, attn_z, attn_out, got 'resid'",
        ),
        ("train --lr=fast", "--lr: expected a number, got 'fast'"),
        ("train --n_ctx x --layer 1", "--n-ctx: expected a whole number, got 'x'"),
        ("train --sparsity 0.1 lots", "--sparsity: expected numbers, got '0.1 lots'"),
        (
            "train --arch gated tanh",
            "--arch: expected one of gated, relu, jumprelu, topk, got 'tanh'",
        ),
        (
            "train --arch topk --width 8 --tokens 9000",
            "expected --k, got none; or start from a set-up: python -m gsae_core train "
            "--preset quick",
        ),
        (
            "train --arch gated topk --width 8 --tokens 9000 --k 2",
            "expected --sparsity, got none; or start from a set-up: python -m gsae_core train "
            "--preset quick",
        ),
        (
            "train --preset quick --arch topk",
            "expected --k for topk, got none; what sets the sparsity of gated and relu in the "
            "set-up means another thing there",
        ),
        (
            "train --preset quick --arch jumprelu",
            "expected --sparsity for jumprelu, got none; what sets the sparsity of gated and relu "
            "in the set-up means another thing there",
        ),
        (
            "train --preset quick --k 2",
            "--k: expected topk among the architectures, got gated, relu; name it after --arch, "
            "or leave --k out",
        ),
        (
            "train --preset quick --jumprelu-sparsity 0.1",
            "--jumprelu-sparsity: expected jumprelu among the architectures, got gated, relu; "
            "name it after --arch, or leave --jumprelu-sparsity out",
        ),
        (
            "train --preset quick --arch topk --k 2 --sparsity 0.1",
            "--sparsity: expected gated or relu among the architectures, got topk; name it after "
            "--arch, or leave --sparsity out",
        ),
        (
            "train --preset quick --arch topk --k 4 2000",
            "--k: expected a k of at most d_sae=1024, got 2000",
        ),
        ("train --preset quick --arch topk --k 2.5", "--k: expected whole numbers, got '2.5'"),
        ("train --preset quick --arch topk --k 0", "--k: expected a number greater than 0, got 0"),
        (
            "train --preset quick --arch jumprelu --jumprelu-sparsity -1",
            "--jumprelu-sparsity: expected a number greater than 0, got -1.0",
        ),
        (
            "train --preset quick --arch jumprelu --sparsity 1 --bandwidth 0",
            "--bandwidth: expected a number greater than 0, got 0.0",
        ),
        (
            "train --site mlp",
            "--site: expected one of resid_pre, resid_post, mlp_hidden, mlp_out, attn_z, "
            "attn_out, got 'mlp'",
        ),
        (
            "train",
            "expected --sparsity, got none; or start from a set-up: python -m gsae_core train "
            "--preset quick",
        ),
        (
            "train --sparsity 1 --width 8",
            "expected --tokens, got none; or start from a set-up: python -m gsae_core train "
            "--preset quick",
        ),
        (
            "train --preset slow",
            "expected a preset among quick, gelu-1l, pythia-2.8b, gemma-7b, gpt2-small, "
            "gemma-2-2b, got 'slow'",
        ),
        (
            "train --preset quick --config a.json",
            "expected --preset or --config, got both (quick and a.json); leave one out",
        ),
        ("train --config nowhere", "expected a config file, found nothing at nowhere"),
        (
            "train --preset pythia-2.8b --equal-width",
            "--equal-width: expected Gated SAEs of one width to take it from, got 32768, 131072; "
            "give --width",
        ),
        (
            "train --preset quick --tokens 5",
            "--tokens: expected n_tokens of at least one batch (2048), got 5",
        ),
        (
            "train --preset quick --layer -1",
            "--layer: expected a number greater than or equal to 0, got -1",
        ),
        (
            "train --preset quick --held-out 1",
            "--held-out: expected a number less than 1, got 1.0",
        ),
        *(
            (
                f"train --preset quick --{flag} {came}",
                f"--{flag}: expected a number greater than 0, got {said}",
            )
            for flag, came, said in [
                ("sparsity", "-0.1", "-0.1"),
                ("sparsity", "0", "0.0"),
                ("width", "-8", "-8"),
                ("width", "0", "0"),
                ("tokens", "-1", "-1"),
                ("tokens", "0", "0"),
                ("lr", "-1e-3", "-0.001"),
                ("lr", "0", "0.0"),
                ("batch-size", "0", "0"),
                ("n-ctx", "0", "0"),
                ("eval-tokens", "0", "0"),
            ]
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(words: str, sentence: str) -> None:
    assert refused(words) == sentence


def test_the_help_of_flags_is_the_same_where_python_itself_dedents_docstrings() -> None:
    def command(flag: str) -> None: ...

    parsed = []
    for indent in ("    ", ""):  # Python 3.11 and 3.12; 3.13 and newer
        command.__doc__ = f"Work.\n\n{indent}Args:\n{indent}    flag: One,\n{indent}        two."
        parse(["work", "--flag", "x"], {"work": command})
        parsed.append(command.__doc__)
    assert parsed == ["Work.\n\nArgs:\n    flag: One, two."] * 2
