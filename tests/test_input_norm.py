"""Inputs normalised token by token: by hand on the way in, undone wherever x is compared."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from examples import batch_stats, loss, numbers, perturb_, set_
from index_cases import D_IN, D_SAE, KINDS, built, some_sae
from refusals import refusal
from torch import Tensor

from gsae_core.analysis.features import collect
from gsae_core.analysis.fidelity import evaluating, fidelity, reconstruct
from gsae_core.analysis.prompt import analyse, effects, read_prompt
from gsae_core.analysis.steering import Intervention, Steering, scales_of
from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.checkpoints.formats.read import read_sae
from gsae_core.checkpoints.formats.write import parity, write_sae
from gsae_core.config import TrainConfig
from gsae_core.errors import InputError
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.ablations import pursue, rescale_and_shift
from gsae_core.sae.architectures import GatedSAE, ReluSAE, TopKSAE, fold_scale_
from gsae_core.sae.base import EPS, SAE, InputNorm, Normalised
from gsae_core.sae.losses import dense_step
from gsae_core.sae.metrics import Metrics
from gsae_core.sae.sparse.codes import encode_sparse
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training.trainer import Trainer

NORMS: tuple[InputNorm, ...] = get_args(InputNorm)
REFUSED = "expected an SAE that learns from activations as they are, got one that normalises"
PLACE: dict[str, Any] = {"layer": 1, "site": "resid_pre"}


def one(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def normed(kind: str, norm: InputNorm | None, d_in: int = 6, d_sae: int = 11) -> SAE:
    sae = some_sae(kind, d_in, d_sae)
    sae.input_norm = norm
    return sae.requires_grad_(False)


def in_the_plane(norm: InputNorm | None) -> ReluSAE:
    """Two latents that read u_1 and u_2 and write (1, 0) and (0, 2), about b_dec = (0, 1)."""
    sae = ReluSAE(2, 2).double()
    set_(sae, W_enc=[[1, 0], [0, 1]], b_enc=[0, 0], W_dec=[[1, 0], [0, 2]], b_dec=[0, 1])
    sae.input_norm = norm
    return sae


def normalised(x: Tensor, norm: InputNorm | None) -> Normalised:
    return normed("relu", norm, x.shape[-1]).normalised(x)


# By hand


def test_layer_norm_by_hand() -> None:
    # (1, 4, 7): mean 4, deviations (-3, 0, 3), variance (9 + 9) / 2 = 9, so u is 3 / 3.00001 times
    # (-1, 0, 1); what is undone is multiplied by 3 alone.
    seen = normalised(one([1, 4, 7]), "layer_norm")
    torch.testing.assert_close(seen.u, one([-1, 0, 1]) * 3 / 3.00001, rtol=1e-12, atol=0)
    assert torch.equal(seen.undo(one([2, 0, -1])), one([10, 4, 1]))
    assert torch.equal(seen.in_raw_units(one([2, 0, -1])), one([6, 0, -3]))


def test_a_constant_norm_by_hand() -> None:
    # |(3, 0, 4, 0)| = 5 and the root of the width is 2: divided by 2.5, it is 2 long.
    seen = normalised(one([3, 0, 4, 0]), "constant_norm_rescale")
    torch.testing.assert_close(seen.u, one([1.2, 0, 1.6, 0]))
    assert torch.equal(seen.undo(one([2, 0, 0, 1])), one([5, 0, 0, 2.5]))


def test_a_vector_of_zeros_stays_one_in_either() -> None:
    for norm in NORMS:
        seen = normalised(torch.zeros(2, 4), norm)
        assert torch.equal(seen.u, torch.zeros(2, 4))
        assert torch.equal(seen.undo(torch.ones(2, 4)), torch.zeros(2, 4))


def test_without_a_norm_nothing_is_touched() -> None:
    x = numbers(3, 4)
    seen = normalised(x, None)
    assert seen.u is x
    assert seen.undo(x) is x
    assert seen.in_raw_units(x) is x


def test_an_sae_in_the_plane_by_hand() -> None:
    # x = (6, 8): |x| = 10, root of the width sqrt 2, scale 10 / sqrt 2 = sqrt 50; u = x / sqrt 50.
    # xc = (u_1, u_2 - 1): f = (6 / sqrt 50, 8 / sqrt 50 - 1); u_hat = (f_1, 2 f_2 + 1).
    sae, root = in_the_plane("constant_norm_rescale"), 50**0.5
    f = sae.encode(one([6, 8]))
    torch.testing.assert_close(f, one([6 / root, 8 / root - 1]))
    torch.testing.assert_close(sae.decode(f), one([6 / root, 2 * (8 / root - 1) + 1]))
    # Undone: root times it, (6, 16 - root).
    torch.testing.assert_close(sae(one([6, 8])), one([6, 16 - root]))


# Everywhere


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_is_the_plain_one_on_u_and_undone(kind: str, norm: InputNorm) -> None:
    sae, plain = normed(kind, norm).double(), normed(kind, None).double()
    x = 3 * numbers(20, 6) + 1
    if norm == "layer_norm":
        mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        u = (x - mean) / (scale + EPS)
    else:
        mean, scale = 0, x.square().mean(1, keepdim=True).sqrt()
        u = x / scale
    f = plain.encode(u)
    assert 0 < (f > 0).double().mean() < 1
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), plain(u) * scale + mean)
    codes = encode_sparse(sae, x)
    dense = torch.zeros_like(f)
    dense[codes.rows(), codes.latent] = codes.magnitude
    torch.testing.assert_close(dense, f)
    torch.testing.assert_close(sae.decode(pursue(sae, x, k=2)), plain.decode(pursue(plain, u, k=2)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_compare_raw_activations(kind: str, norm: InputNorm) -> None:
    sae = normed(kind, norm).double()
    x = 3 * numbers(40, 6) + 1
    x_hat, stats = reconstruct(sae, x)
    measured = Metrics(stats)
    torch.testing.assert_close(x_hat, sae(x))
    residual = (x - sae(x)).square().sum()
    assert measured.fvu == pytest.approx(float(residual / (x - x.mean(0)).square().sum()))
    gamma = sae(x).square().sum() / (sae(x) * x).sum()
    assert measured.gamma == pytest.approx(float(gamma))
    # Latent by latent as the SAE sees it: the dense sums of the plain SAE on u.
    u, plain = sae.normalised(x).u, normed(kind, None).double()
    by_hand = Metrics(batch_stats(x=u, x_hat=plain(u), f=plain.encode(u), W_dec=sae.W_dec))
    torch.testing.assert_close(
        measured.gamma_per_feature, by_hand.gamma_per_feature, equal_nan=True
    )
    assert torch.equal(measured.firings, by_hand.firings)


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_is_that_of_the_model_reading_undone_reconstructions(
    norm: InputNorm, tiny_lm: LanguageModel
) -> None:
    rows = np.random.default_rng(0).integers(2, 40, size=(5, 9))
    rows[:, 0] = 0  # BOS: not counted
    sae = normed("gated", norm, tiny_lm.width("resid_pre"), 24)
    (result,) = fidelity(tiny_lm, [sae], SequenceSet(rows, (0,)), **PLACE, n_tokens=10**6)
    ids = torch.tensor(rows)

    def edit(x: Tensor) -> Tensor:
        return torch.where(ids[..., None] != 0, sae(x), x)

    log_q = tiny_lm.logits(ids, **PLACE, edit=edit)[:, 1:-1].double().log_softmax(-1)
    expected = -log_q.gather(-1, ids[:, 2:, None]).mean()
    assert result.fidelity.ce_sae == pytest.approx(float(expected), rel=1e-5)
    assert result.fidelity.ce_sae != pytest.approx(result.fidelity.ce_clean, rel=1e-3)


def test_the_identity_on_u_recovers_everything(tiny_lm: LanguageModel) -> None:
    rows, d_in = np.arange(2, 34).reshape(4, 8), tiny_lm.width("resid_pre")
    sae, eye = ReluSAE(d_in, 2 * d_in), torch.eye(d_in)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    for norm in NORMS:
        sae.input_norm = norm
        steps = evaluating(tiny_lm, [sae], SequenceSet(rows, ()), **PLACE, n_tokens=100)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            (result,) = end.value
        assert result.fidelity.loss_recovered == pytest.approx(1, abs=1e-3)
        assert result.metrics.fvu < 1e-6
        assert result.metrics.gamma == pytest.approx(1, abs=1e-3)


# The feature index


# Each architecture and each norm; the other pairs are slow.
QUICK = set(zip(KINDS, itertools.cycle(NORMS), strict=False))


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(KINDS, NORMS)
    ],
)
def test_an_index_has_what_fires_what_nearly_did_and_how_short_it_is(
    kind: str, norm: InputNorm, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    sae, plain = normed(kind, norm, D_IN, D_SAE), normed(kind, None, D_IN, D_SAE)
    index = built(tiny_lm, sae, tmp_path)
    ids = torch.tensor(np.array(index.array("ids")).astype(np.int64))
    x = tiny_lm.harvest(ids, layer=1, site="mlp_hidden")
    f, counted = sae.encode(x).flatten(0, 1), (ids != 0).flatten()
    np.testing.assert_array_equal(index.table["fired"], (f[counted] > 0).sum(0))
    np.testing.assert_allclose(index.table["max"], f[counted].amax(0), rtol=1e-4)
    margin, _ = collect.margins(plain, sae.normalised(x).u.flatten(0, 1))
    n_near = 0
    for latent in range(D_SAE):
        feature = index.feature(latent)
        fires = f[:, latent].numpy()[feature.positions]
        np.testing.assert_allclose(feature.values, fires, rtol=1e-4, atol=1e-6)
        places, margins = feature.near_misses
        lacks = margin[:, latent].numpy()[places]
        np.testing.assert_allclose(margins, lacks, rtol=1e-3, atol=1e-5)
        n_near += len(places)
    assert n_near > D_SAE
    measured = Metrics(reconstruct(sae, x.flatten(0, 1)[counted])[1])
    np.testing.assert_allclose(index.table["gamma"], measured.gamma_per_feature, rtol=1e-3)
    assert index.manifest.fvu == pytest.approx(measured.fvu, rel=1e-4)
    assert index.manifest.gamma == pytest.approx(measured.gamma, rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_how_far_a_latent_is_from_firing_is_measured_on_u(kind: str, norm: InputNorm) -> None:
    sae, x = normed(kind, norm), (3 * numbers(9, 6) + 1).float()
    margin, fires = collect.margins(sae, x)
    expected, fired = collect.margins(normed(kind, None), sae.normalised(x).u)
    torch.testing.assert_close(margin, expected)
    assert torch.equal(fires, fired)


# Steering


def test_moves_are_as_long_as_the_token_s_scale_says() -> None:
    # x = (6, 8), scale sqrt 50. Latent 1 writes (0, 2): 1.5 units of 2 are 6 along u's second axis.
    x, root = one([6, 8]), 50**0.5
    sae = in_the_plane("constant_norm_rescale")
    moved = Steering(sae, (Intervention(1, "add", 1.5, 2.0),))(x)
    torch.testing.assert_close(moved, one([6, 8 + 6 * root]))
    # f_1 = 6 / sqrt 50 wrote (f_1, 0) into u_hat, that is (6, 0) into x_hat.
    gone = Steering(sae, (Intervention(0, "ablate", 0, 1.0),))(x)
    torch.testing.assert_close(gone, one([0, 8]))
    # Without the error: f' = (1, f_2), u_hat' = (1, 16 / root - 1), times root.
    clamped = Steering(sae, (Intervention(0, "clamp", 1, 1.0),), keep_error=False)(x)
    torch.testing.assert_close(clamped, one([root, 16 - root]))


def test_layer_norm_s_mean_comes_back_where_the_error_goes() -> None:
    sae, x = normed("relu", "layer_norm").double(), 3 * numbers(5, 6) + 1
    latent = int(sae.encode(x).sum(0).argmax())
    f = sae.encode(x)
    f[:, latent] = 0
    expected = sae.decode(f) * x.std(1, keepdim=True) + x.mean(1, keepdim=True)
    push = (Intervention(latent, "ablate", 0, 1.0),)
    torch.testing.assert_close(Steering(sae, push, keep_error=False)(x), expected)
    torch.testing.assert_close(Steering(sae, push)(x), expected + x - sae(x))


@pytest.mark.parametrize("norm", NORMS)
def test_strength_zero_is_the_identity_bit_for_bit(norm: InputNorm) -> None:
    x = torch.tensor([[-0.0, 1e-45, 3.0, -7.5, 0.1, 2.0]])
    nothing = Steering(normed("gated", norm), (Intervention(2, "add", 0.0, 1.3),))
    assert nothing.is_identity
    assert nothing(x).numpy().tobytes() == x.numpy().tobytes()
    assert nothing.edit(torch.ones(1, dtype=torch.bool)) is None


def test_a_silent_feature_s_unit_says_whose_length_it_has() -> None:
    sae = in_the_plane("constant_norm_rescale")
    set_(sae, b_enc=[-100, -100])
    scales = scales_of(sae, 7 * numbers(9, 2), source="tokens of this prompt")
    # Nothing fires: typical is the length of every u, sqrt 2; latent 1's decoder norm is 2.
    assert scales.typical == pytest.approx(2**0.5)
    assert scales.unit(1).value == pytest.approx(2**0.5 / 2)
    ending = "; in activations, that length times each token's own scale"
    assert scales.unit(1).sentence.endswith(ending)
    sae.input_norm = None
    plain = scales_of(sae, 7 * numbers(9, 2), source="tokens of this prompt")
    assert not plain.unit(1).sentence.endswith(ending)


# A text


@pytest.mark.parametrize("norm", NORMS)
def test_effects_on_a_logit_are_the_derivative_through_the_undoing(
    norm: InputNorm, tiny_lm: LanguageModel
) -> None:
    sae = normed("gated", norm, tiny_lm.width("resid_pre"), 24)
    prompt = read_prompt(tiny_lm, "w1 w2 w3 w2 w9 w30")
    (seen,) = analyse(tiny_lm, [sae], prompt, **PLACE)
    slope = torch.randn(7, sae.d_in, generator=torch.Generator().manual_seed(0))
    x = tiny_lm.harvest(prompt.ids, **PLACE)[0]
    f = sae.encode(x).requires_grad_()
    (sae.normalised(x).undo(sae.decode(f)) * slope).sum().backward()
    assert f.grad is not None
    f, slopes = f.detach(), f.grad
    table = effects(seen, sae, slope)
    assert len(table) > 6
    rows: Any = table.itertuples()
    for row in rows:
        at: Any = (row.position, row.latent)
        assert row.activation == pytest.approx(float(f[at]), rel=1e-4)
        assert row.effect == pytest.approx(float(f[at] * slopes[at]), rel=1e-4, abs=1e-6)
    shares: Any = table.groupby("position")["share"].sum()
    np.testing.assert_allclose(shares, 1, atol=1e-4)


def test_a_plain_look_has_no_scale(tiny_lm: LanguageModel) -> None:
    sae = normed("gated", None, tiny_lm.width("resid_pre"), 24)
    (seen,) = analyse(tiny_lm, [sae], read_prompt(tiny_lm, "w1 w2"), **PLACE)
    assert seen.scale is None


# Files


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_sae_comes_back_normalising(kind: str, norm: InputNorm, tmp_path: Path) -> None:
    sae = normed(kind, norm)
    save_sae(sae, tmp_path, metadata={})
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == norm
    back = load_sae(tmp_path)
    assert back.input_norm == norm
    x = numbers(9, 6).float()
    torch.testing.assert_close(back(x), sae(x), rtol=1e-5, atol=1e-5)
    assert f"input_norm='{norm}'" in repr(back)


def test_a_plain_sae_is_saved_as_before(tmp_path: Path) -> None:
    save_sae(normed("relu", None), tmp_path, metadata={})
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == "none"
    assert load_sae(tmp_path).input_norm is None


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu", "topk"])
def test_export_keeps_it_or_is_refused(kind: str, norm: InputNorm, tmp_path: Path) -> None:
    sae = normed(kind, norm)
    formats = ["gsae_core", "saelens"] + ["jumprelu"] * (kind != "topk")
    for format_ in formats:
        written = write_sae(sae, tmp_path / format_, format=format_, metadata={})
        assert written.parity.largest < 1e-6
        assert written.parity.n_active > written.parity.n_tokens
        assert read_sae(tmp_path / format_).sae.input_norm == norm
    sentence = rf"got one that does so \({norm}\), which dictionary_learning cannot say"
    with pytest.raises(InputError, match=sentence):
        write_sae(sae, tmp_path / "dl", format="dictionary_learning", metadata={})
    assert not (tmp_path / "dl").exists()


def test_parity_sees_a_norm_that_was_lost() -> None:
    assert parity(normed("topk", "layer_norm"), normed("topk", "layer_norm")).largest < 1e-12
    assert parity(normed("topk", "layer_norm"), normed("topk", None)).largest > 0.1


# Training


def test_training_such_an_sae_is_refused() -> None:
    x = numbers(8, 6)
    for kind in KINDS:
        sae = normed(kind, "layer_norm").double().requires_grad_()
        by_hand: list[Any] = [manual_dense_step] if kind in ("gated", "relu") else []
        for step in (loss, dense_step, sparse_step, *by_hand):
            with pytest.raises(InputError, match=REFUSED):
                step(sae, x, sparsity_coeff=0.1)
        with pytest.raises(InputError, match=REFUSED):
            fold_scale_(sae, 2.0)
        with pytest.raises(InputError, match=REFUSED):
            Trainer([sae], TrainConfig(n_tokens=80, batch_size=8, sparsity=(0.1,)))


def test_rescaling_such_a_baseline_is_refused_in_the_same_sentence() -> None:
    baseline = ReluSAE(4, 7)
    baseline.input_norm = "layer_norm"
    assert refusal(rescale_and_shift, baseline) == (
        "expected an SAE that learns from activations as they are, got one that normalises every "
        "token (layer_norm); it can be evaluated, explored and steered, not trained or converted"
    )


def test_an_sae_made_here_normalises_nothing() -> None:
    for sae in (GatedSAE(4, 7), ReluSAE(4, 7), TopKSAE(4, 7, k=2)):
        perturb_(sae)
        assert sae.input_norm is None
        assert "input_norm" not in repr(sae)
        sae.check_trains()
