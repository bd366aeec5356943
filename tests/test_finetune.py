"""Fine-tuning: a new run goes on from the weights of another's SAEs, by either loss."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import numbers, perturb_
from refusals import mistake, refusal
from tiny_runs import finish, leave_at, outcome, tiny_config

from gsae_core.cli.main import main
from gsae_core.config import DataConfig, EvalConfig, SAESpec, TrainRecipe, load_config
from gsae_core.runs.run import Run
from gsae_core.runs.work import setup
from gsae_core.runs.work.finetune import create_finetuned, finetuned_config, unit_norm_
from gsae_core.runs.work.imports import import_saes
from gsae_core.runs.work.publish import make_card
from gsae_core.sae.architectures import build_sae

NAMES = ["gated", "relu", "jumprelu", "topk"]
MEASURED = ("l0", "fvu", "gamma", "ce_sae", "kl", "alive_fraction")
STILL = 1e-30
"""A learning rate that moves nothing."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, words: Path) -> Run:
    """A finished run of each architecture; the ReLU SAE's recipe leaves norms free."""
    saes = [
        SAESpec(name="gated", architecture="gated", d_sae=24, sparsity=0.2),
        SAESpec(name="relu", architecture="relu", d_sae=20, sparsity=0.2, recipe="A"),
        SAESpec(name="jumprelu", architecture="jumprelu", d_sae=24, sparsity=0.01),
        SAESpec(name="topk", architecture="topk", d_sae=24, sparsity=4),
    ]
    recipe = TrainRecipe(n_tokens=320, batch_size=16, lr=1e-2, revive_every=10, revive_window=5)
    fields: dict[str, Any] = {
        "saes": tuple(saes),
        "train": recipe,
        "evaluation": EvalConfig(n_tokens=300),
        "checkpoint_minutes": 60.0,
    }
    config = tiny_config(tiny_lm_folder, words, **fields)
    run = Run.create(tmp_path_factory.mktemp("begun") / "run", config)
    finish(run)
    return run


def finetuned(run: Run, out: Path, **options: Any) -> Run:
    made = create_finetuned(run, out, finetuned_config(run, NAMES, **options))
    finish(made)
    return made


def measured(run: Run) -> dict[str, list[float]]:
    return {row["name"]: [row[key] for key in MEASURED] for row in run.evals()}


def test_before_the_first_step_it_is_what_the_other_run_left(begun: Run, tmp_path: Path) -> None:
    # The scale is measured on other sequences, as another seed orders them: it is no power of two.
    still = finetuned(begun, tmp_path / "still", recipe={"lr": STILL}, n_tokens=16, seed=5)
    found, expected = measured(still), measured(begun)
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-4), name
    scales = {run.sae_cfg("gated")["metadata"]["activation_scale"] for run in (begun, still)}
    assert len(scales) == 2


def test_the_config_says_where_it_came_from_and_the_run_needs_nothing_else(
    begun: Run, tmp_path: Path
) -> None:
    copy = Run.open(shutil.copytree(begun.folder, tmp_path / "old"))
    config = finetuned_config(copy, ["topk", "gated"], n_tokens=160)
    made = create_finetuned(copy, tmp_path / "new", config)
    shutil.rmtree(copy.folder)
    leave_at(made, 7)
    finish(Run.open(made.folder))
    written = json.loads((made.folder / "config.json").read_text())
    assert written["finetuned"] == "old"
    assert [spec["start"] for spec in written["saes"]] == ["start/topk", "start/gated"]
    assert load_config(made.folder / "config.json") == config
    assert {row["name"] for row in made.evals()} == {"topk", "gated"}
    assert [e["run"] for e in made.events() if e["event"] == "fine-tuned"] == ["old", "old"]


def test_its_card_says_what_it_was_fine_tuned_from(begun: Run) -> None:
    made = dataclasses.replace(
        begun, config=finetuned_config(begun, NAMES, n_tokens=480, loss="kl")
    )
    lines = make_card(made, ["gated"], "owner/name")["README.md"].splitlines()
    assert "- fine-tuned from the SAEs of a run called `run`, end-to-end" in lines


def test_a_run_from_random_weights_has_the_config_it_had(begun: Run) -> None:
    written = (begun.folder / "config.json").read_text()
    assert not {"start", "finetuned", "loss"} & {*json.loads(written)}
    assert "start" not in json.loads(written)["saes"][0]


def test_what_is_not_said_is_the_runs_and_lambda_is_whole_from_the_first_step(begun: Run) -> None:
    train, old = finetuned_config(begun, ["gated"], n_tokens=999).train, begun.config.train
    assert (train.batch_size, train.lr, train.beta2) == (old.batch_size, old.lr, old.beta2)
    assert (train.n_tokens, train.sparsity_warmup_steps, train.lr_warmup_steps) == (999, 0, None)
    assert (train.revive_every, train.revive_window) == (10, 5)
    # 13 steps, no revival after 0.7 x 13 = 9.1: what would come after 10 does not.
    assert finetuned_config(begun, ["gated"], n_tokens=208).train.revive_every == 0
    changed = finetuned_config(
        begun, ["gated", "topk"], n_tokens=64, sparsity=[0.7, 3], recipe={"lr": 0.5}
    )
    assert [spec.sparsity for spec in changed.saes] == [0.7, 3]
    assert changed.train.lr == 0.5
    # Thresholds go on as they did last: 20 steps and 20 more, 1 over 40 of them.
    fields = {"n_tokens": 2 * old.n_tokens, "extended": (old.n_tokens,)}
    longer = begun.config.model_copy(update={"train": old.model_copy(update=fields)})
    run = dataclasses.replace(begun, config=longer)
    assert finetuned_config(run, ["gated"], n_tokens=64).train.threshold_lr == 1 / 40


def test_end_to_end_whole_sequences_are_read_from_the_model(begun: Run) -> None:
    kept = {"max_norm_ratio": 10.0, "cache_activations": True}
    run = dataclasses.replace(begun, config=begun.config.model_copy(update=kept))
    config = finetuned_config(run, ["gated"], n_tokens=64)
    assert (config.max_norm_ratio, config.cache_activations) == (10, True)
    config = finetuned_config(run, ["gated"], n_tokens=64, loss="kl")
    assert (config.max_norm_ratio, config.cache_activations) == (None, False)


@pytest.mark.slow
def test_it_learns_other_text(begun: Run, tmp_path: Path) -> None:
    # Of 38 words the new text has six.
    text = tmp_path / "other.txt"
    text.write_text(" ".join(f"w{i * i % 6}" for i in range(3000)))
    options: dict[str, Any] = {"data": {"source": str(text)}, "n_tokens": 800}
    still = measured(finetuned(begun, tmp_path / "still", recipe={"lr": STILL}, **options))
    learnt = measured(finetuned(begun, tmp_path / "learnt", **options))
    for name in NAMES:
        assert learnt[name][1] < 0.9 * still[name][1], name


@pytest.mark.slow
def test_end_to_end_the_predictions_drift_less(begun: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": {"lr": 3e-3}, "n_tokens": 1600}
    by_error = measured(finetuned(begun, tmp_path / "mse", **options))
    end_to_end = finetuned(begun, tmp_path / "kl", loss="kl", **options)
    by_kl = measured(end_to_end)
    for name in NAMES:
        assert by_kl[name][4] < by_error[name][4], name
        assert by_kl[name][4] < measured(begun)[name][4], name
    logged = [row["kl"] for row in end_to_end.metrics() if row["sae"] == "gated"]
    assert len(logged) == 100
    assert sum(logged[-10:]) < sum(logged[:10])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_end_to_end_and_interrupted_it_ends_with_the_same_bits(begun: Run, tmp_path: Path) -> None:
    config = finetuned_config(begun, ["gated"], n_tokens=192, loss="kl")
    whole = create_finetuned(begun, tmp_path / "whole", config)
    finish(whole)
    parts = create_finetuned(begun, tmp_path / "parts", config)
    for step in (4, 9):
        leave_at(parts, step)
    finish(parts)
    assert outcome(parts) == outcome(whole)


# SAEs of other libraries


@pytest.fixture
def imported(begun: Run, tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of SAEs that `begun` wrote, as if another library had: it knows no lambda."""

    def make(*names: str, change: Callable[[dict[str, Any]], Any] = lambda cfg: None) -> Run:
        source = tmp_path / "source"
        for name in names:
            shutil.copytree(begun.folder / "saes" / name, source / name)
            path = source / name / "cfg.json"
            cfg = json.loads(path.read_text())
            about = ("model_name", "hook_name", "sae_lens_version")
            cfg["metadata"] = {key: cfg["metadata"][key] for key in about}
            change(cfg)
            path.write_text(json.dumps(cfg))
        run, _ = import_saes(source, tmp_path / "imported", data=begun.config.data.source)
        return run

    return make


@pytest.mark.slow
def test_saes_of_other_libraries_go_on(imported: Callable[..., Run], tmp_path: Path) -> None:
    run = imported("jumprelu", "topk")
    config = finetuned_config(
        run, ["jumprelu", "topk"], n_tokens=640, sparsity=[0.02, 4], recipe={"batch_size": 16}
    )
    assert config.imported is None
    assert config.activation_scale == "unit"
    assert config.train.revive_every == 0
    made = create_finetuned(run, tmp_path / "tuned", config)
    finish(made)
    assert [row["n_tokens"] > 0 for row in made.evals()] == [True, True]
    # Windows around thresholds are a tenth of the activations' length, in units of x.
    cfg = made.sae_cfg("jumprelu")["metadata"]
    assert cfg["threshold_unit"] == pytest.approx(1 / cfg["activation_scale"], rel=1e-6)


def test_a_lambda_of_another_library_is_not_taken_for_ours(imported: Callable[..., Run]) -> None:
    run = imported("gated", "topk")
    assert finetuned_config(run, ["topk"], n_tokens=8192).saes[0].sparsity == 4
    assert refusal(lambda: finetuned_config(run, ["gated"], n_tokens=8192)) == (
        "expected --sparsity for 'gated', got none; another library's means another thing here: "
        "ours weighs the sum of latents, or of a JumpReLU SAE their number, against squared error "
        "summed over d_in at E|x|^2 = 1"
    )


def test_chats_that_an_import_is_evaluated_on_are_trained_on_as_chats(
    imported: Callable[..., Run],
) -> None:
    run = imported("topk")
    data = run.config.data.model_copy(update={"chat": True})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"data": data}))
    found = finetuned_config(run, n_tokens=8192).data
    assert found == DataConfig(source=data.source, chat=True)


def test_one_that_normalises_tokens_is_refused(imported: Callable[..., Run]) -> None:
    run = imported("relu", change=lambda cfg: cfg.update(normalize_activations="layer_norm"))
    assert refusal(lambda: finetuned_config(run, n_tokens=8192, sparsity=[0.1])) == (
        "expected an SAE that learns from activations as they are, got one that normalises every "
        "token (layer_norm); it can be evaluated, explored and steered, not trained or converted"
    )


def test_norms_of_directions_move_into_the_latents() -> None:
    sae = build_sae(SAESpec(name="a", architecture="jumprelu", d_sae=5, sparsity=1), 3).double()
    perturb_(sae)
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[1] *= 7
    x = numbers(9, 3)
    before = sae(x)
    assert bool((sae.encode(x)[:, 3] > 0).any())
    unit_norm_(sae, "a")
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert not bool((sae.encode(x)[:, 3] > 0).any())


def test_a_topk_sae_whose_norms_decide_is_refused() -> None:
    sae = build_sae(SAESpec(name="a", architecture="topk", d_sae=3, sparsity=1), 2)
    with torch.no_grad():
        sae.W_dec.mul_(torch.tensor([[0.5], [1.0], [2.0]]))
    assert refusal(unit_norm_, sae, "a") == (
        "expected directions of norm one in 'a', got some from 0.5 to 2: a TopK SAE's latents "
        "compete by size, and others would win were norms folded into them"
    )


def test_without_a_language_model_there_is_no_end_to_end_loss(begun: Run) -> None:
    config = begun.config.model_copy(update={"activations": "vectors"})
    run = dataclasses.replace(begun, config=config)
    assert refusal(lambda: finetuned_config(run, ["gated"], n_tokens=320, loss="kl")) == (
        "expected loss mse and no other text for SAEs of run, which learnt vectors of a folder, "
        "got loss kl: there is no language model"
    )
    with_text = {"n_tokens": 320, "data": {"source": "text.txt"}}
    assert "got data: there" in refusal(lambda: finetuned_config(run, ["gated"], **with_text))


def test_memory_for_logits_is_asked_for(
    begun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(setup, "check_memory", lambda *_, **sizes: asked.append(sizes))
    for loss in ("mse", "kl"):
        config = finetuned_config(
            begun, ["gated"], n_tokens=320, loss=loss, recipe={"batch_size": 48}
        )
        setup.set_up(create_finetuned(begun, tmp_path / loss, config))
    # Three sequences of 16 tokens in a batch of 48, and 40 words.
    assert [sizes["n_logits"] for sizes in asked] == [0, 3 * 16 * 40]


# The command


def test_the_command_trains_evaluates_and_prints(
    begun: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(begun.folder), "--sae", "gated", "--tokens", "320", "--loss", "kl"]
    assert main([*words, "--batch-size", "32", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert f"run {tmp_path / 'new'}" in out
    assert "gated" in out
    assert Run.open(tmp_path / "new").status.step == 10
    assert main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("run")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("--sae gated", "expected --tokens with how many activations to train on, got none"),
        (
            "--tokens 320",
            "expected --sae with some of this run's SAEs (gated, relu, jumprelu, topk)",
        ),
        (
            "--sae other --tokens 320",
            "expected one of this run's SAEs (gated, relu, jumprelu, topk), got 'other'",
        ),
        (
            "--sae gated relu topk --sparsity 0.1 0.2 --tokens 320",
            "expected one sparsity, or one for each of 3 SAEs, got 2",
        ),
        (
            "--sae topk --sparsity 0.5 --tokens 320",
            "--sparsity: expected a whole number of latents, the k of a TopK SAE, got 0.5",
        ),
        (
            "--sae gated --tokens 3",
            "--tokens: expected n_tokens of at least one batch (16), got 3",
        ),
        (
            "--sae gated --tokens 320 --chat",
            "expected a tokenizer with a chat template for --chat, got one without",
        ),
        (
            "--sae gated --tokens 320 --loss kl --batch-size 8",
            "expected a batch of at least one sequence (16 tokens) for loss kl, got 8; "
            "raise the batch size",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(
    begun: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, sentence: str
) -> None:
    out = tmp_path / "new"
    words = ["finetune", str(begun.folder), *asked.split(), "--out", str(out)]
    assert mistake(words, capsys).startswith(sentence)
    assert not out.exists()


def test_its_config_begins_no_run_from_random_weights(
    begun: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finetuned_config(begun, ["gated"], n_tokens=320)
    made = create_finetuned(begun, tmp_path / "new", config)
    path = made.folder / "config.json"
    asked = ["train", "--config", str(path), "--out", str(tmp_path / "again")]
    assert mistake(asked, capsys) == (
        f"expected the config of a run that began with random weights in {path}, got one "
        "fine-tuned from run; train on with finetune"
    )
