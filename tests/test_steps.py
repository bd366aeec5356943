"""Which way a step is computed, and what is remembered of this machine's speed."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import set_

from gsae_core.machine import known, processor, remembered
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.sae.topk import TopKSAE
from gsae_core.training import step_choice
from gsae_core.training.step_choice import (
    CROSSOVER,
    HIGHEST,
    Stepper,
    _active,
    choose_step,
    crossover,
)

GATED = GatedSAE(3, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gsae_core"


def test_the_step_is_chosen_by_the_share_of_open_gates() -> None:
    def chosen(density: float | None, *, sae: SAE = GATED, screened: bool = False) -> object:
        return choose_step(sae=sae, density=density, crossover=0.2, screened=screened)

    assert chosen(None) is manual_dense_step
    assert chosen(0.2) is manual_dense_step
    assert chosen(0.19) is sparse_step
    assert chosen(0.3, screened=True) is manual_dense_step
    assert chosen(0.3, sae=TopKSAE(3, 5, k=2)) is dense_step  # by hand for an L1 term alone
    step = chosen(0.1, screened=True)
    assert getattr(step, "func", None) is sparse_step
    assert getattr(step, "keywords", None) == {"screened": True}


@pytest.mark.parametrize(
    "sae",
    [
        GatedSAE(3, 5).bfloat16(),
        JumpReluSAE(3, 5).bfloat16(),
        TopKSAE(3, 5, k=2).bfloat16(),
        GatedSAE(3, 5, tie="untied"),
    ],
)
def test_what_the_fast_steps_do_not_know_takes_autograds(
    sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_choice, "choose_step", None)  # not to be asked
    sae = copy.deepcopy(sae)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(sae.W_dec)
    dead = torch.zeros(5, dtype=torch.bool)
    stepper = Stepper(sae, crossover=0.2, screened=False)
    attempt = stepper.attempt(x, sparsity_coeff=0.1, density=0.01, dead=dead)
    assert sae.W_dec.grad is not None
    assert not attempt.overflowed
    opened = attempt.result.stats.gate_open
    expected = attempt.result.stats.fired if opened is None else opened
    assert int(attempt.n_open) >= int(expected.sum())


@pytest.mark.parametrize(
    "sae", [GatedSAE(3, 5), ReluSAE(3, 5), JumpReluSAE(3, 5), TopKSAE(3, 5, k=1)]
)
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_every_architecture_takes_the_way_its_last_density_says(
    sae: SAE, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = isinstance(sae, GatedSAE | ReluSAE)
    way = "sparse_step" if density < 0.3 else "manual_dense_step" if by_hand else "dense_step"
    taken = []

    def record(*args: Any, **settings: Any) -> StepResult:
        taken.append(way)
        return dense_step(*args, **settings)

    monkeypatch.setattr(step_choice, way, record)
    stepper = Stepper(copy.deepcopy(sae), crossover=0.3, screened=False)
    x, dead = torch.ones(4, 3), torch.zeros(5, dtype=torch.bool)
    stepper.attempt(x, sparsity_coeff=0.1, density=density, dead=dead)
    assert taken == [way]


def test_only_a_topk_sae_knows_its_density_before_its_first_step() -> None:
    assert first_way(TopKSAE(3, 10, k=2)) == "sparse"
    assert first_way(TopKSAE(3, 10, k=4)) == "dense"
    assert first_way(JumpReluSAE(3, 10)) == "dense"
    assert first_way(GatedSAE(3, 10)) == "dense"


def first_way(sae: SAE) -> str:
    ways = {"sparse_step": "sparse", "manual_dense_step": "dense", "dense_step": "dense"}
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for way, name in ways.items():

            def record(*args: Any, name: str = name, **settings: Any) -> StepResult:
                taken.append(name)
                return dense_step(*args, **settings)

            patch.setattr(step_choice, way, record)
        stepper = Stepper(sae, crossover=0.3, screened=False)
        dead = torch.zeros(sae.d_sae, dtype=torch.bool)
        stepper.attempt(torch.ones(4, 3), sparsity_coeff=0.1, density=None, dead=dead)
    return taken[0]


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_the_window_of_a_jumprelu_sae_and_the_dead_of_a_topk_sae_count_as_work(
    density: float,
) -> None:
    # z = 1, 1, 1 on both inputs; theta = 2 with a window from 0.5: nothing fires, all is near.
    # The largest latent and the two dead ones: 3 entries an input, one of them twice.
    jumprelu = JumpReluSAE(1, 3, init_threshold=2.0, bandwidth=3.0)
    topk = TopKSAE(1, 3, k=1, k_aux=5)
    dead = torch.tensor([True, False, True])
    for sae, fired in ((jumprelu, 0), (topk, 2)):
        set_(sae, W_enc=[[0, 0, 0]], b_enc=[1, 1, 1])
        stepper = Stepper(sae, crossover=0.3, screened=False)
        attempt = stepper.attempt(torch.ones(2, 1), sparsity_coeff=0.1, density=density, dead=dead)
        assert int(attempt.n_open) == 6
        assert int(attempt.result.stats.fired.sum()) == fired


def test_float64_is_not_screened() -> None:
    sae = GatedSAE(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stepper = Stepper(sae, crossover=0.2, screened=True)
    dead = torch.zeros(5, dtype=torch.bool)
    attempt = stepper.attempt(x, sparsity_coeff=0.1, density=0.01, dead=dead)
    assert attempt.result.n_candidates is None


def test_a_crossover_is_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(sae: GatedSAE | ReluSAE, rows: int, *, screened: bool) -> float:
        measured.append((type(sae), rows, screened))
        return 0.25

    monkeypatch.setattr(step_choice, "_meeting_point", measure)
    monkeypatch.setattr(step_choice, "WORTH_MEASURING", 0)
    gated, relu = GatedSAE(3, 5), ReluSAE(3, 5)
    assert crossover(gated, 64, screened=False, measure=False) == CROSSOVER
    assert crossover(gated, 64, screened=False, measure=True) == 0.25
    assert crossover(gated, 64, screened=False, measure=True) == 0.25
    assert crossover(gated, 64, screened=False, measure=False) == 0.25
    assert crossover(gated, 64, screened=True, measure=True) == 0.25
    assert crossover(relu, 10_000, screened=False, measure=True) == 0.25
    assert measured == [(GatedSAE, 64, False), (GatedSAE, 64, True), (ReluSAE, 512, False)]
    half = TopKSAE(3, 5, k=1).to(torch.bfloat16)  # its steps are dense ones: nothing to measure
    assert crossover(half, 64, screened=False, measure=True) == CROSSOVER
    untied = GatedSAE(3, 5, tie="untied")
    assert crossover(untied, 64, screened=False, measure=True) == CROSSOVER


def test_small_shapes_are_not_worth_a_measurement(cache: Path) -> None:
    assert crossover(GatedSAE(3, 5), 64, screened=False, measure=True) == CROSSOVER
    assert not cache.exists()


def test_a_measured_crossover_is_a_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_choice, "WORTH_MEASURING", 0)
    for sae in (GatedSAE(8, 300), ReluSAE(8, 300), JumpReluSAE(8, 300), TopKSAE(8, 300, k=5)):
        assert 0 <= crossover(sae, 64, screened=False, measure=True) <= HIGHEST


@pytest.mark.parametrize(
    "sae", [GatedSAE(8, 300), ReluSAE(8, 300), JumpReluSAE(8, 300), TopKSAE(8, 300, k=5)]
)
def test_what_a_crossover_is_measured_with_has_the_density_it_is_to_have(sae: SAE) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    made = _active(sae, x, 0.08)
    if isinstance(made, JumpReluSAE):
        # What lies in the window below a threshold is worked on as well.
        active = (made.pre_activations(x) > made.threshold - made.eps / 2).float().mean()
    else:
        active = (made.encode(x) > 0).float().mean()
    assert float(active) == pytest.approx(0.08, abs=1e-3)


def test_what_cannot_be_read_is_measured_again(cache: Path) -> None:
    assert remembered("speeds", ("a", 1), lambda: 2.5) == 2.5
    (path,) = (cache / "speeds").glob("*.json")
    assert json.loads(path.read_text()) == {"number": 2.5, "key": "('a', 1)"}
    path.write_text('{"numb')
    assert known("speeds", ("a", 1)) is None
    assert remembered("speeds", ("a", 1), lambda: 3.0) == 3
    path.write_text('{"number": true}')
    assert known("speeds", ("a", 1)) is None


def test_without_a_place_to_keep_it_a_number_is_measured_in_every_run(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where a folder should be")
    assert remembered("speeds", "key", lambda: 7.0) == 7
    assert "measured again in every run" in caplog.text


def test_the_processor_is_the_one_of_the_systems_list(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Frobnicator 9000\n")
    assert processor(listing) == "Frobnicator 9000"
    assert processor(tmp_path / "none") != "Frobnicator 9000"
    assert os.linesep not in processor()
