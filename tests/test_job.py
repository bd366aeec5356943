"""A run from config to files: units of lambda, memory asked first, what is written and said."""

import math
from collections.abc import Callable

import pytest
import torch
from examples import loss
from refusals import refusal
from tiny_runs import N_STEPS, finish

from gsae_core.checkpoints.checkpoint import load_sae, read_cfg, save_sae
from gsae_core.config import RunConfig, SAESpec, TrainRecipe
from gsae_core.errors import InputError
from gsae_core.lm.corpus import load_corpus
from gsae_core.lm.model import LanguageModel
from gsae_core.runs.jobs.worker import Worker
from gsae_core.runs.plan import cost
from gsae_core.runs.plan.cost import (
    COPIES_OF_LOGITS,
    check_memory,
    memory_parts,
    n_parameters,
    resolve_device,
)
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import evaluate_run, log_every
from gsae_core.sae.architectures import build_sae, fold_scale_
from gsae_core.text import Progress
from gsae_core.training.optimizer import sparsity_in_training_units


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
    for norm in ("mean", "mean_power"):
        one = spec(loss_norm=norm)
        got = sparsity_in_training_units(one, d_in=3, scale=0.5, mean_square_norm=4.0)
        assert got == (1.5, 3.0)


@pytest.mark.parametrize("architecture", ["gated", "relu", "jumprelu"])
def test_the_raw_lambda_gives_the_same_loss_up_to_the_scale_squared(architecture: str) -> None:
    scale = 0.25
    sae = build_sae(spec(architecture=architecture), 3).double()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = spec(architecture=architecture)
    got = sparsity_in_training_units(one, d_in=3, scale=scale, mean_square_norm=1.0)
    trained = loss(sae, scale * x, sparsity_coeff=got.coeff).total.item()
    fold_scale_(sae, scale)
    raw = loss(sae, x, sparsity_coeff=got.raw).total.item()
    assert math.isclose(trained, scale**2 * raw, rel_tol=1e-12)


def test_k_is_no_lambda_and_has_no_units() -> None:
    one = spec(architecture="topk", sparsity=1, loss_norm="mean_power")
    assert sparsity_in_training_units(one, d_in=3, scale=2.0, mean_square_norm=7.0) == (0, 0)


# Memory and device


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie": "none"},
        {"tie": "untied"},
        {"architecture": "relu"},
        {"architecture": "jumprelu"},
        {"architecture": "topk", "sparsity": 1},
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
    harvest = 2 * 100 * 3
    # A GPU's largest step: 8.2 matrices of the gated, 10 x 5. On cores: 3.5 of 512 rows, at least,
    # of the widest or of both.
    for n_cores, step in ((None, 410), (1, 3.5 * 512 * 5), (2, 3.5 * 512 * 7), (9, 3.5 * 512 * 7)):
        parts = memory_parts(config(5), lambda _: 3, chunk_vectors=100, n_cores=n_cores)
        assert sum(parts.values()) == 4 * (learnt + step + harvest)


def test_logits_of_the_end_to_end_loss_are_part_of_the_need() -> None:
    parts = [
        memory_parts(config(5), lambda _: 3, chunk_vectors=100, n_cores=None, n_logits=n)
        for n in (0, 1000)
    ]
    assert parts[1] == parts[0] | {"predictions": 4 * COPIES_OF_LOGITS * 1000}


def test_a_dictionary_too_wide_for_memory_is_told_with_need_and_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "free_memory", lambda device: 10 * 10**9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    check_memory(config(10**6), lambda _: 3, torch.device("cpu"), chunk_vectors=100)
    # 4 (4 x 9e9 + 3.5 x 512 x 1e9) = 7312 GB
    cfg = config(10**9)
    assert refusal(check_memory, cfg, lambda _: 3, torch.device("cpu"), chunk_vectors=100) == (
        "expected about 7312.0 GB of memory on cpu for 2 SAEs of up to 1000000000 latents, found "
        "10.0 GB free; lower the width, the batch size or the number of SAEs"
    )


def test_a_device_this_machine_has_not_is_told() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "toaster"):
        said = refusal(resolve_device, name)
        assert said.startswith("expected a device of this machine (auto, cpu")
        assert said.endswith(f"), got {name!r}")


# A whole run


@pytest.fixture(scope="module")
def trained(tiny_trained: tuple[Run, list[Progress]]) -> Run:
    return tiny_trained[0]


def test_progress_tells_each_stage_in_turn(tiny_trained: tuple[Run, list[Progress]]) -> None:
    told = tiny_trained[1]
    stages = list(dict.fromkeys(progress.stage for progress in told))
    assert stages == ["loading", "training", "evaluating", "finished"]
    training = [p for p in told if p.stage == "training"]
    assert [p.done for p in training] == list(range(N_STEPS + 1))
    assert {p.total for p in training} == {N_STEPS}
    (*_, last) = [p for p in told if p.stage == "evaluating"]
    assert last.done == last.total == 100


def test_a_finished_run_holds_all_that_was_promised(trained: Run) -> None:
    run = trained
    assert (run.status.state, run.status.step, run.status.error) == ("finished", N_STEPS, None)
    rows = run.metrics()
    assert [row["sae"] for row in rows] == ["gated", "relu"] * N_STEPS
    promised = """step tokens seconds seconds_lm seconds_sae sae loss reconstruction
        sparsity_loss auxiliary l0 fvu gamma gamma_gate dead_gate dead_magnitude lr
        sparsity_coeff"""
    assert list(rows[0]) == promised.split()
    parts = rows[0]["reconstruction"] + rows[0]["sparsity_loss"] + rows[0]["auxiliary"]
    assert math.isclose(rows[0]["loss"], parts, rel_tol=1e-6)
    assert (rows[-1]["step"], rows[-1]["tokens"]) == (N_STEPS, 16 * N_STEPS)
    # The model's and the SAEs' seconds are parts of all seconds; files and logs take the rest.
    assert 0 < rows[-1]["seconds_lm"] + rows[-1]["seconds_sae"] <= rows[-1]["seconds"] + 0.002
    stages = [e["event"] for e in run.events() if e["event"] not in ("set up", "sae stopped")]
    assert stages == ["created", "loading", "training", "evaluating", "finished"]
    assert (run.status.stage, run.status.done, run.status.total) == ("evaluating", 100, 100)
    assert [row["name"] for row in run.evals()] == ["gated", "relu"]
    table = run.feature_stats("gated")
    assert len(table) == 24
    row = run.evals()[0]
    assert math.isclose(float(table["density"].to_numpy().sum()), row["l0"])
    assert row["alive_fraction"] == (table["fired"] > 0).mean()


def test_a_saved_sae_reads_raw_activations_and_says_how_it_came_about(
    trained: Run, tiny_lm: LanguageModel
) -> None:
    run = trained
    metadata = read_cfg(run.sae_folder("gated"))["metadata"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_pre"
    assert metadata["n_tokens"] == 16 * N_STEPS
    assert metadata["sparsity_coeff"] == 0.3
    assert metadata["sparsity_coeff_raw"] == 0.3 / metadata["activation_scale"]
    # E|s x|^2 = 1 over the whole training text, up to what 1200 tokens of a sample can say.
    corpus = load_corpus(run.config.data, tiny_lm.tokenizer, n_tokens=None, model_n_ctx=16)
    ids, mask = corpus.train[:]
    x = tiny_lm.harvest(ids, layer=1, site="resid_pre")[mask]
    power = (metadata["activation_scale"] * x).square().sum(1).mean().item()
    assert math.isclose(power, 1, rel_tol=0.1)
    sae = load_sae(run.sae_folder("gated"))
    fvu = ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert math.isclose(fvu, run.evals()[0]["fvu"], rel_tol=0.3)


def test_evaluating_again_finds_the_same_and_fewer_tokens_when_asked(trained: Run) -> None:
    before = trained.evals()
    assert [p.stage for p in evaluate_run(trained)][-1] == "finished"
    assert trained.evals() == before
    list(evaluate_run(trained, n_tokens=30))
    assert trained.evals()[0]["n_tokens"] < before[0]["n_tokens"]
    list(evaluate_run(trained))


WILD = SAESpec(name="wild", architecture="relu", d_sae=20, sparsity=0.3, lr=1e30)


def test_an_sae_that_diverges_is_kept_and_marked_and_the_others_are_evaluated(
    new_run: Callable[..., Run],
) -> None:
    tame = SAESpec(name="tame", architecture="gated", d_sae=24, sparsity=0.3)
    run = new_run(saes=(WILD, tame))
    finish(run)
    assert run.status.state == "finished"
    assert [row["name"] for row in run.evals()] == ["tame"]
    why = read_cfg(run.sae_folder("wild"))["metadata"]["stopped"]
    assert why.startswith("step ")
    stopped = [event for event in run.events() if event["event"] == "sae stopped"]
    assert [(event["sae"], event["why"]) for event in stopped] == [("wild", why)]
    assert all(p.isfinite().all() for p in load_sae(run.sae_folder("wild")).parameters())
    assert max(row["step"] for row in run.metrics() if row["sae"] == "wild") < N_STEPS


def test_a_run_whose_every_sae_diverges_fails_with_the_first_cause(
    new_run: Callable[..., Run],
) -> None:
    run = new_run(saes=(WILD,))
    said = refusal(finish, run)
    assert said.startswith(
        "expected an SAE that learns to the end, got none: wild stopped at step "
    )
    assert said.endswith("; lower the learning rate and start a new run")
    assert run.status.error == said


def test_a_disk_too_small_for_the_states_is_told_before_training(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.runs.work.setup.free_bytes", lambda path: 2_000)
    # gated: 2 x 12 x 24 + 3 x 24 + 12 = 660;  relu: 2 x 12 x 20 + 20 + 12 = 512
    # two states of weights and two moments in float32: 2 x 4 x 3 x 1172 = 28 kB
    assert refusal(finish, run) == (
        f"expected about 28.1 kB free on the disk of {run.folder} for the resumable state and the "
        "one it replaces, found 2.0 kB; make room and resume the run"
    )


def test_a_run_without_saes_or_with_some_of_another_width_cannot_be_evaluated(run: Run) -> None:
    with pytest.raises(InputError, match="expected the weights of 'gated', found none in"):
        list(evaluate_run(run))
    for spec in run.config.saes:
        save_sae(build_sae(spec, 7), run.sae_folder(spec.name), metadata={"stopped": None})
    with pytest.raises(InputError, match="expected SAE 'gated' to take activations of width 12"):
        list(evaluate_run(run))


def test_a_run_in_training_is_not_evaluated(run: Run) -> None:
    with Worker(run), pytest.raises(InputError) as caught:
        list(evaluate_run(run))
    assert str(caught.value) == (
        "expected a run that no process is training, got run; wait until it has finished"
    )


MEMORY = (
    "expected more memory than the device has left; lower the batch size, the width or the number "
    "of SAEs ({})"
)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (RuntimeError("can't allocate memory"), MEMORY),
        (RuntimeError("a bolt came loose"), "RuntimeError: {}; see log.txt"),
    ],
)
def test_memory_that_runs_out_and_what_is_unforeseen_fail_the_run_with_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, sentence: str
) -> None:
    def fail(run: Run, **_: object) -> None:
        raise error

    monkeypatch.setattr("gsae_core.runs.work.train.set_up", fail)
    with pytest.raises((InputError, RuntimeError)):
        finish(run)
    assert (run.status.state, run.status.error) == ("failed", sentence.format(error))
    assert ("Traceback" in "\n".join(run.log_tail())) == (sentence != MEMORY)


def test_long_runs_log_about_three_hundred_points() -> None:
    for n_steps in (1, 30, 449, 450, 1000, 12_345, 400_000):
        n_points = n_steps // log_every(n_steps)
        assert n_points == n_steps if n_steps < 450 else 200 <= n_points <= 450
