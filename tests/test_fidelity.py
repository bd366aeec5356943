"""Fidelity: exact at both ends, equal to loops written out, and to published numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from examples import batch_stats
from families import tiny
from refusals import refusal
from torch import Tensor

from gsae_core.analysis.fidelity import (
    Evaluation,
    Fidelity,
    evaluating,
    fidelity,
    reconstruct,
)
from gsae_core.config import SITES, Positions, Site
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.metrics import Metrics
from gsae_core.threads import on_one_core

ROWS = np.random.default_rng(0).integers(2, 40, size=(5, 9))
ROWS[:, 0] = 0  # BOS: not counted
ROWS[1, 4] = 0  # a separator inside a sequence
SEQUENCES = SequenceSet(ROWS, (0,))
# Four sequences have 8 counted positions, the one with the separator 7. Predictions lack the last
# position of each and, around the separator, both the one before it and its own.
N_TOKENS, N_PREDICTIONS = 4 * 8 + 7, 4 * 7 + 5


def identity(d_in: int) -> ReluSAE:
    """x = relu(x) - relu(-x), exactly."""
    sae = ReluSAE(d_in, 2 * d_in)
    eye = torch.eye(d_in)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    return sae


def gated_identity(d_in: int) -> GatedSAE:
    sae = GatedSAE(d_in, 2 * d_in)
    sae.W_gate.data, sae.W_dec.data = identity(d_in).W_enc.data, identity(d_in).W_dec.data
    return sae


def always_zero(d_in: int) -> ReluSAE:
    sae = ReluSAE(d_in, 3)
    sae.b_enc.data.fill_(-1e9)
    return sae


def measure(
    model: LanguageModel,
    *saes: Any,
    site: Site = "resid_post",
    layer: int = 0,
    replace: Positions = "counted",
) -> Any:
    place: dict[str, Any] = {"layer": layer, "site": site}
    return fidelity(model, saes, SEQUENCES, **place, n_tokens=10**6, replace=replace)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("replace", ["counted", "all"])
def test_the_identity_recovers_one_and_zero_at_every_position_nothing(
    replace: Positions, site: Site, tiny_lm: LanguageModel
) -> None:
    d_in = tiny_lm.width(site)
    same, gated, zero = measure(
        tiny_lm,
        identity(d_in),
        gated_identity(d_in),
        always_zero(d_in),
        site=site,
        replace=replace,
    )
    for deciles in (same.norms.deciles(), gated.norms.deciles()):
        assert [d.ratio for d in deciles] == pytest.approx([1] * 10)
    assert same.norms.sums[0].sum() == N_TOKENS
    for result in (same.fidelity, gated.fidelity):
        assert result.loss_recovered == 1
        assert result.ce_sae == result.ce_clean
        assert result.kl == 0
    assert zero.fidelity.ce_zero != zero.fidelity.ce_clean
    if replace == "all":
        assert zero.fidelity.loss_recovered == 0
        assert zero.fidelity.ce_sae == zero.fidelity.ce_zero
    else:
        # BOS and the separator still hold what the clean model put there.
        assert zero.fidelity.ce_sae != zero.fidelity.ce_zero


def test_the_published_losses_give_the_published_percentages() -> None:
    # One row of arXiv:2404.16014v2's table for Gemma-7B's residual stream at layer 6 (Appendix B).
    share = Fidelity(2.5426, 3.1847, 16.1549, 0.0, 1).loss_recovered
    assert round(100 * share, 2) == 95.28
    # (1 - 3) / (1 - 2) = 2 and (3 - 4) / (3 - 2) = -1: never clipped.
    assert Fidelity(2.0, 3.0, 1.0, 0.0, 1).loss_recovered == 2
    assert Fidelity(2.0, 4.0, 3.0, 0.0, 1).loss_recovered == -1


def test_nothing_to_recover_is_not_a_number() -> None:
    assert math.isnan(Fidelity(2.0, 3.0, 2.0, 0.0, 1).loss_recovered)
    assert math.isnan(Fidelity(2.0, 3.0, 2 + 1e-7, 0.0, 1).loss_recovered)


def by_hand(
    model: LanguageModel,
    sae: Any,
    layer: int,
    site: Site,
    *,
    rows: np.ndarray = ROWS,
    special: tuple[int, ...] = (0,),
    replace: Positions = "counted",
) -> tuple[float, float, float, float, int]:
    """Return ce_clean, ce_sae, ce_zero, KL and n by loops in float64 over whole forward passes."""
    sums, n = [0.0] * 4, 0
    for row in rows:
        ids = torch.tensor(row)[None]
        read = torch.tensor([replace == "all" or i not in special for i in row])[None, :, None]

        def edit(x: Tensor, read: Tensor = read) -> Tensor:
            return torch.where(read, sae(x), x)

        place: dict[str, Any] = {"layer": layer, "site": site}
        clean, spliced, zeroed = (
            logits[0].double().log_softmax(-1)
            for logits in (
                model.logits(ids),
                model.logits(ids, **place, edit=edit),
                model.logits(ids, **place, edit=torch.zeros_like),
            )
        )
        for t in range(len(row) - 1):
            if row[t] in special or row[t + 1] in special:
                continue
            n += 1
            for place_, log_q in enumerate((clean, spliced, zeroed)):
                sums[place_] -= float(log_q[t, row[t + 1]])
            sums[3] += sum(
                math.exp(float(clean[t, v])) * float(clean[t, v] - spliced[t, v]) for v in range(40)
            )
    ce_clean, ce_sae, ce_zero, kl = (s / n for s in sums)
    return ce_clean, ce_sae, ce_zero, kl, n


@pytest.mark.parametrize(("layer", "site"), [(0, "resid_post"), (1, "mlp_hidden"), (1, "attn_z")])
@pytest.mark.parametrize("replace", ["counted", "all"])
def test_losses_equal_loops_over_whole_forward_passes(
    replace: Positions, layer: int, site: Site, tiny_lm: LanguageModel
) -> None:
    sae = GatedSAE(tiny_lm.width(site), 30)
    (result,) = measure(tiny_lm, sae, layer=layer, site=site, replace=replace)
    ours = result.fidelity
    *wanted, n = by_hand(tiny_lm, sae, layer, site, replace=replace)
    assert [ours.ce_clean, ours.ce_sae, ours.ce_zero, ours.kl] == pytest.approx(wanted, rel=1e-5)
    assert ours.n_tokens == n == N_PREDICTIONS
    assert ours.kl > 1e-3


@pytest.mark.parametrize("replace", ["counted", "all"])
def test_padding_is_zeroed_and_replaced_as_bos_is(
    replace: Positions, tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis import fidelity as module

    # Padding (1) before what counts, where it is read; after it; and a sequence of nothing else.
    rows = np.array([[1, 1, 0, 5, 6, 7, 8, 9, 10], [0, 9, 8, 7, 6, 1, 1, 1, 1], [1] * 9])
    # One sequence at a time, so that padding fills a batch.
    monkeypatch.setattr(module, "LOGITS_CPU", 1)
    sae = GatedSAE(12, 30)
    (result,) = fidelity(
        tiny_lm,
        [sae],
        SequenceSet(rows, (0, 1)),
        layer=0,
        site="resid_post",
        n_tokens=10**6,
        replace=replace,
    )
    ours = result.fidelity
    *wanted, n = by_hand(tiny_lm, sae, 0, "resid_post", rows=rows, special=(0, 1), replace=replace)
    assert [ours.ce_clean, ours.ce_sae, ours.ce_zero, ours.kl] == pytest.approx(wanted, rel=1e-5)
    assert ours.n_tokens == n == 5 + 3
    assert result.metrics.n_tokens == 6 + 4


def test_where_reconstructions_are_read_changes_no_metric_of_the_sae(
    tiny_lm: LanguageModel,
) -> None:
    sae = GatedSAE(12, 30)
    (kept,), (replaced,) = measure(tiny_lm, sae), measure(tiny_lm, sae, replace="all")
    assert kept.metrics.n_tokens == replaced.metrics.n_tokens == N_TOKENS
    assert kept.metrics.l0 == replaced.metrics.l0
    assert kept.metrics.fvu == replaced.metrics.fvu
    assert kept.metrics.gamma == replaced.metrics.gamma
    assert kept.norms.deciles() == replaced.norms.deciles()
    assert kept.fidelity.ce_zero == replaced.fidelity.ce_zero
    assert kept.fidelity.ce_sae != replaced.fidelity.ce_sae


def test_divergence_is_the_one_of_the_definition() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; both tokens count.
    from gsae_core.analysis.fidelity import Reference

    ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    q = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    reference = Reference(p, ids, mask)
    ce, kl = reference.compare(q)
    assert reference.losses.tolist() == pytest.approx([math.log(2)])
    assert ce.tolist() == pytest.approx([math.log(4 / 3)])
    assert kl.tolist() == pytest.approx([math.log(4 / 3) / 2], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize(
    ("layer", "site"), [(0, "resid_pre"), (0, "resid_post"), (1, "resid_post")]
)
def test_zeros_under_a_final_norm_without_bias_leave_the_uniform_guess(
    layer: int, site: Site, family: str, tiny_tokenizer: Any
) -> None:
    model = load_model(tiny(family), tokenizer=tiny_tokenizer)
    (result,) = measure(model, always_zero(12), layer=layer, site=site)
    # RMSNorm(0) = 0 and no block adds to it, so every logit is 0: ln(vocabulary), as Gemma's
    # ln 256000 = 12.453. With BOS left in place, blocks after the site would still read it.
    assert result.fidelity.ce_zero == pytest.approx(math.log(40), rel=1e-7)


def test_zeros_under_a_final_norm_with_bias_leave_what_the_bias_says(
    tiny_lm: LanguageModel,
) -> None:
    (result,) = measure(tiny_lm, always_zero(12), layer=1)
    # LayerNorm(0) = bias, the same logits everywhere.
    weights = tiny_lm.hf.state_dict()
    log_q = (weights["lm_head.weight"] @ weights["transformer.ln_f.bias"]).double().log_softmax(0)
    targets = [row[t + 1] for row in ROWS for t in range(8) if row[t] != 0 and row[t + 1] != 0]
    wanted = -sum(float(log_q[t]) for t in targets) / len(targets)
    assert result.fidelity.ce_zero == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted - math.log(40)) > 1e-3


def test_special_positions_are_shown_to_no_sae(tiny_lm: LanguageModel) -> None:
    # What an SAE is shown is what is replaced; the loops of `by_hand` hold the rest in place.
    seen: list[Tensor] = []

    class Spy(ReluSAE):
        def check_width(self, x: Tensor) -> None:
            seen.append(x)

    measure(tiny_lm, Spy(12, 5))
    ids = torch.from_numpy(ROWS)
    x = on_one_core(lambda: tiny_lm.harvest(ids, layer=0, site="resid_post"))
    assert torch.equal(torch.cat(seen), x[torch.from_numpy(ROWS) != 0])


@pytest.mark.parametrize("kind", ["r_mag", "untied", "relu"])
def test_metrics_are_those_of_the_dense_definition(kind: Any, tiny_lm: LanguageModel) -> None:
    sae = ReluSAE(12, 30, seed=3) if kind == "relu" else GatedSAE(12, 30, tie=kind, seed=3)
    for i, (_, parameter) in enumerate(sae.named_parameters()):
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(i)
        )
    x = tiny_lm.harvest(torch.from_numpy(ROWS), layer=0, site="resid_post")
    x = x[torch.from_numpy(ROWS) != 0]
    pi_gate = x_hat_gate = None
    with torch.no_grad():
        f = sae.encode(x)
        if isinstance(sae, GatedSAE):
            pi_gate = sae.pre_activations(x).pi_gate
            x_hat_gate = sae.decode(pi_gate.relu())
        x_hat = sae.decode(f)
        stats = batch_stats(
            x=x, x_hat=x_hat, x_hat_gate=x_hat_gate, f=f, pi_gate=pi_gate, W_dec=sae.W_dec
        )
    wanted, (result,) = Metrics(stats), measure(tiny_lm, sae)
    ours = result.metrics
    assert ours.n_tokens == N_TOKENS
    for name in ("l0", "fvu", "cosine", "gamma", "gamma_gate", "alive_fraction"):
        number = pytest.approx(getattr(wanted, name), rel=1e-5, nan_ok=kind == "relu")
        assert getattr(ours, name) == number, name
    assert torch.equal(ours.firings, wanted.firings)
    assert ours.sums is not None
    assert torch.equal(ours.sums.opened, stats.opened)
    torch.testing.assert_close(
        ours.gamma_per_feature, wanted.gamma_per_feature, rtol=1e-3, atol=1e-4, equal_nan=True
    )
    torch.testing.assert_close(reconstruct(sae, x)[0], x_hat)


def test_each_sae_is_measured_as_if_alone(tiny_lm: LanguageModel) -> None:
    saes = [GatedSAE(12, 30, seed=1), ReluSAE(12, 20, seed=2)]
    together: list[Evaluation] = measure(tiny_lm, *saes)
    for sae, result in zip(saes, together, strict=True):
        (alone,) = measure(tiny_lm, sae)
        assert result.fidelity == alone.fidelity
        assert result.metrics.fvu == alone.metrics.fvu


def test_sequences_are_taken_whole_until_enough_tokens_are_counted(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis import fidelity as module

    sae = GatedSAE(12, 30)

    def run(n_tokens: int) -> tuple[list[int], Evaluation]:
        place: Any = {"layer": 0, "site": "resid_post"}
        steps, done = evaluating(tiny_lm, [sae], SEQUENCES, **place, n_tokens=n_tokens), []
        while True:
            try:
                done.append(next(steps).done)
            except StopIteration as end:
                return done, end.value[0]

    # 8 tokens in the first sequence, 7 in the second: the ninth token takes both.
    assert [run(n)[1].metrics.n_tokens for n in (1, 8, 9, 15, 16)] == [8, 8, 15, 15, 23]
    whole = run(10**6)[1]
    # Two sequences at a time instead of all five: the same sums, and progress after each.
    monkeypatch.setattr(module, "LOGITS_CPU", 2 * 9 * 40)
    done, batched = run(10**6)
    assert done == [15, 31, N_TOKENS]
    assert batched.fidelity == pytest.approx(whole.fidelity, rel=1e-6)
    assert run(16)[0] == [15, 16]


def test_nothing_to_predict_is_an_error(tiny_lm: LanguageModel) -> None:
    alternating = SequenceSet(np.array([[0, 5, 0, 7]]), (0,))
    said = refusal(
        fidelity, tiny_lm, [identity(12)], alternating, layer=0, site="resid_post", n_tokens=10
    )
    assert said == (
        "expected sequences with two counted tokens in a row, got none to predict; "
        "give more text or a longer context"
    )


def test_an_sae_of_another_width_is_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="expected activations of width d_in=7"):
        measure(tiny_lm, GatedSAE(7, 30))
