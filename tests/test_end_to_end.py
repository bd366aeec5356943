"""The end-to-end loss: KL through the language model, its gradients, batches of whole sequences."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from examples import numbers, perturb_
from refusals import refusal
from torch import Tensor

from gsae_core.analysis.fidelity import fidelity
from gsae_core.config import Architecture, DataConfig, SAESpec, Site
from gsae_core.lm.corpus import SequenceSet, load_corpus
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel, Splice, load_model
from gsae_core.lm.taps import hooked
from gsae_core.runs.work.sequences import SequenceStream
from gsae_core.sae.architectures import build_sae, fold_scale_
from gsae_core.sae.base import SAE
from gsae_core.sae.losses import loss_of
from gsae_core.training import TrainConfig, Trainer
from gsae_core.training.end_to_end import (
    Divergence,
    SequenceBatch,
    end_to_end_step,
    kl_divergence,
)

SITES = get_args(Site)


def test_kl_of_a_fair_coin_from_a_loaded_one() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3); twice the same row.
    clean = torch.zeros(2, 2, dtype=torch.float64)
    spliced = torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(float(kl_divergence(clean, spliced)), math.log(4 / 3))
    assert float(kl_divergence(spliced, spliced + 7)) == pytest.approx(0, abs=1e-15)


# The loss: a "language model" whose KL is sum c x_hat^2 / rows, with a slope that is known


def small_sae(architecture: Architecture) -> SAE:
    sparsity = 2 if architecture == "topk" else 0.1
    spec = SAESpec(name="a", architecture=architecture, d_sae=5, sparsity=sparsity)
    sae = build_sae(spec, 3).double()
    perturb_(sae)
    return sae


def bowl(x_hat: Tensor) -> Tensor:
    return (torch.tensor([1.0, 2.0, 3.0], dtype=x_hat.dtype) * x_hat**2).sum() / len(x_hat)


def downhill(x_hat: Tensor) -> Divergence:
    leaf = x_hat.clone().requires_grad_()
    kl = bowl(leaf)
    return Divergence(kl.detach(), torch.autograd.grad(kl, leaf)[0])


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_gradients_are_those_of_the_loss_as_it_is_written(architecture: Architecture) -> None:
    sae, x = small_sae(architecture), numbers(7, 3)
    result = end_to_end_step(sae, SequenceBatch(x, downhill), sparsity_coeff=0.3)
    found = {name: p.grad for name, p in sae.named_parameters()}

    out = loss_of(sae, x, sparsity_coeff=0.3)
    error, sparsity, auxiliary = out.loss
    kl = bowl(out.x_hat)
    alpha = (error / kl).detach()
    loss = (error + alpha * kl) / 2 + sparsity + auxiliary
    names = [name for name, _ in sae.named_parameters()]
    slopes = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    for name, expected in zip(names, slopes, strict=True):
        torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(result.kl, kl.detach())
    # Both halves alike: the value is that of the usual loss.
    torch.testing.assert_close(result.loss.total, loss.detach())


def test_a_perfect_reconstruction_has_no_downstream_slope() -> None:
    sae, x = small_sae("relu"), numbers(4, 3)

    def flat(x_hat: Tensor) -> Divergence:
        return Divergence(x_hat.new_zeros(()), torch.full_like(x_hat, 1e9))

    end_to_end_step(sae, SequenceBatch(x, flat), sparsity_coeff=0.0)
    found = [p.grad for p in sae.parameters()]
    expected = torch.autograd.grad(
        loss_of(sae, x, sparsity_coeff=0.0).loss.reconstruction / 2, list(sae.parameters())
    )
    torch.testing.assert_close(found, list(expected))


def test_a_trainer_learns_from_sequences_and_reports_their_kl() -> None:
    sae = small_sae("gated").float()
    cfg = TrainConfig(n_tokens=16, batch_size=8, lr=1e-3, sparsity=[0.1])
    trainer = Trainer([sae], cfg)
    x = numbers(7, 3).float()  # not batch_size rows: sequences are not cut
    before = sae.W_dec.detach().clone()
    report = trainer.step(SequenceBatch(x, downhill))
    assert float(report.saes[0].kl) > 0  # pyright: ignore[reportArgumentType]
    assert not torch.equal(sae.W_dec, before)
    assert trainer.step(numbers(8, 3).float()).saes[0].kl is None


# Through the language model


@pytest.fixture(scope="module")
def lm(tiny_lm_folder: Path) -> LanguageModel:
    """Weights that no other test shares, and that ask for no gradient."""
    model = load_model(str(tiny_lm_folder))
    model.hf.requires_grad_(False)
    return model


IDS = torch.tensor([[0, 5, 9, 2, 7], [0, 3, 3, 8, 30]])


def drift(clean: Tensor, logits: Tensor) -> Tensor:
    return kl_divergence(clean.flatten(0, 1), logits.flatten(0, 1))


@pytest.mark.parametrize("site", SITES)
def test_the_slope_is_that_of_a_whole_pass(lm: LanguageModel, site: Site) -> None:
    splice = Splice(lm, IDS, layer=1, site=site)
    read = splice.x + 0.3 * numbers(*splice.x.shape).float()
    value, slope = splice.slope(read, lambda logits: drift(splice.logits, logits))

    leaf = read.clone().requires_grad_()
    with hooked(lm._tap(1, site), lambda _: leaf):
        whole = drift(splice.logits, lm.hf(input_ids=IDS).logits)
    (expected,) = torch.autograd.grad(whole, leaf)
    torch.testing.assert_close(value, whole.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
    assert float(slope.abs().max()) > 1e-3


def test_the_slope_is_what_a_small_step_does(lm: LanguageModel) -> None:
    splice = Splice(lm, IDS, layer=0, site="mlp_out")
    read = splice.x + numbers(*splice.x.shape).float()
    step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(17), 2 * 5 * 12).view_as(read).float()

    def value(x: Tensor) -> float:
        return float(drift(splice.logits.double(), splice.run(x).double()))

    _, slope = splice.slope(read, lambda logits: drift(splice.logits, logits))
    measured = (value(read + step) - value(read - step)) / 2e-2
    assert float(slope.flatten()[17]) == pytest.approx(measured, rel=2e-2)


def test_weights_that_ask_for_gradients_get_none(tiny_lm_folder: Path) -> None:
    model = load_model(str(tiny_lm_folder))
    splice = Splice(model, IDS, layer=0, site="resid_post")
    splice.slope(splice.x, lambda logits: drift(splice.logits, logits))
    assert all(weight.grad is None for weight in model.hf.parameters())


# Batches of whole sequences


@pytest.fixture(scope="module")
def text(lm: LanguageModel, words: Path) -> SequenceSet:
    data = DataConfig(source=str(words), held_out=0.2)
    return load_corpus(data, lm.tokenizer, n_tokens=600, model_n_ctx=16).train


def stream(lm: LanguageModel, text: SequenceSet, **options: int) -> SequenceStream:
    usual = {"batch_size": 40, "seed": 3, "n_batches": 20}
    harvest = Harvest(lm, text, layer=1, site="resid_pre")
    return SequenceStream(harvest, model=lm, scale="unit", **usual | options)


def test_an_epoch_has_every_sequence_once_and_each_batch_about_its_size(
    lm: LanguageModel, text: SequenceSet
) -> None:
    found = stream(lm, text)
    n = -(-found.tokens_per_epoch // 40)  # batches that an epoch touches
    batches = [found.sequences_of(i) for i in range(n)]
    seen = np.concatenate(batches)
    first = seen[: len(text)]
    assert sorted(first) == list(range(len(text)))
    assert (first == found._order(0)).all()
    sizes = [int(text.counts[which].sum()) for which in batches]
    assert all(abs(size - 40) < 16 for size in sizes)
    # Whatever is asked for before it, and whatever the length of the run:
    later = stream(lm, text, n_batches=9)
    assert (later.sequences_of(7) == batches[7]).all()


def test_a_batch_shorter_than_a_sequence_is_refused(lm: LanguageModel, text: SequenceSet) -> None:
    assert refusal(lambda: stream(lm, text, batch_size=15)) == (
        "expected a batch of at least one sequence (16 tokens) for loss kl, got 15; "
        "raise the batch size"
    )


@pytest.mark.usefixtures("one_thread")
def test_kl_in_training_is_the_kl_of_the_evaluation(
    lm: LanguageModel, text: SequenceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stream(lm, text)
    monkeypatch.setattr("gsae_core.runs.work.sequences.LOGITS_CPU", 2 * 16 * 40)  # two at a time
    (batch,), which = found.batch_of_each(2), found.sequences_of(2)
    sae = build_sae(SAESpec(name="a", architecture="gated", d_sae=24, sparsity=0.1), 12)
    perturb_(sae)
    with torch.no_grad():
        drifted = batch.divergence(sae(batch.x))
    fold_scale_(sae, found.scale)
    set_ = SequenceSet(text[which].ids.numpy(), (0,))
    (measured,) = fidelity(lm, [sae], set_, layer=1, site="resid_pre", n_tokens=10_000)
    assert float(drifted.kl) == pytest.approx(measured.fidelity.kl, rel=1e-4)
    assert drifted.slope.shape == batch.x.shape
