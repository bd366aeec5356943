"""The feature index equals what a dense pass over all tokens computes, for every kind of SAE."""

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import batch_stats
from index_cases import D_SAE, KINDS, Dense, built, dense, some_parts, some_sae

from gsae_core.analysis.features.collect import margins
from gsae_core.analysis.features.files import NEAR_KEPT
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.metrics import Metrics

# 40 rows of 15 counted tokens.
N_TOKENS = 600


class Case:
    """An SAE, its index and the dense truth."""

    def __init__(self, sae: SAE, index: FeatureIndex, truth: Dense) -> None:
        self.sae, self.index, self.truth = sae, index, truth

    def fired(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places latent `i` fires on and its values, strongest first."""
        f = self.truth.f[:, i].numpy()
        rows = np.flatnonzero(f > 0)
        rows = rows[np.lexsort((rows, -f[rows]))]
        return self.truth.places[rows], f[rows]


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest, tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    sae = some_sae(request.param)
    index = built(tiny_lm, sae, tmp_path_factory.mktemp(request.param))
    return Case(sae, index, dense(tiny_lm, sae))


def test_every_activation_is_kept_strongest_first(case: Case) -> None:
    assert case.index.n_tokens == N_TOKENS
    for i in range(D_SAE):
        places, values = case.fired(i)
        feature = case.index.feature(i)
        np.testing.assert_allclose(feature.values, values, rtol=1e-5, atol=1e-6)
        assert sorted(feature.positions.tolist()) == sorted(places.tolist())
        assert (np.diff(feature.values) <= 0).all()
    assert case.index.feature(3).is_dead


def test_both_forms_of_the_codes_hold_the_same_entries(case: Case) -> None:
    by_feature = {(int(p), i) for i in range(D_SAE) for p in case.index.feature(i).positions}
    by_token = {
        (place, int(i))
        for place in range(case.index.n_places)
        for i in case.index.latents_at(np.array([place]))
    }
    assert by_feature == by_token


def test_the_table_is_brute_force_arithmetic(case: Case) -> None:
    table, f = case.index.table, case.truth.f
    for i in range(D_SAE):
        row, (_, values) = table.iloc[i], case.fired(i)
        assert (row["fired"], row["n_tokens"]) == (len(values), N_TOKENS)
        assert row["density"] == len(values) / N_TOKENS
        if not len(values):
            assert row["max"] == 0
            assert np.isnan([row["mean"], row["q50"], row["gamma"]]).all()
            continue
        expected = [values.max(), values.mean(), *np.quantile(values, [0.5, 0.9, 0.99])]
        found = [row[name] for name in ("max", "mean", "q50", "q90", "q99")]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert case.index.manifest.l0 == pytest.approx(float((f > 0).sum()) / N_TOKENS)


def test_gates_gamma_and_the_whole_saes_numbers_are_those_of_the_metrics(case: Case) -> None:
    sae, x = case.sae, case.truth.x
    pi_gate = sae.pre_activations(x).pi_gate if isinstance(sae, GatedSAE) else None
    metrics = Metrics()
    metrics.add(
        batch_stats(
            x=x,
            x_hat=sae(x),
            x_hat_gate=None if pi_gate is None else sae.decode(torch.relu(pi_gate)),
            f=case.truth.f,
            pi_gate=pi_gate,
            W_dec=sae.W_dec,
        )
    )
    table, manifest = case.index.table, case.index.manifest
    # Upside down: where x_hat and x are nearly at right angles, gamma divides by nearly nothing.
    np.testing.assert_allclose(1 / table["gamma"], 1 / metrics.gamma_per_feature, atol=1e-5)
    assert metrics.sums is not None
    assert table["gate_open"].tolist() == metrics.sums.opened.tolist()
    assert manifest.fvu == pytest.approx(metrics.fvu, rel=1e-5)
    assert manifest.gamma == pytest.approx(metrics.gamma, rel=1e-5)


def test_the_histogram_is_numpys(case: Case) -> None:
    for i in range(D_SAE):
        feature = case.index.feature(i)
        if feature.is_dead:
            assert feature.histogram.counts.sum() == 0
            continue
        values = feature.values.astype(float)
        counts, edges = np.histogram(values, bins=40, range=(0, values.max()))
        np.testing.assert_array_equal(feature.histogram.counts, counts)
        np.testing.assert_allclose(feature.histogram.edges, edges)


def test_near_misses_are_the_nearest_silent_tokens(case: Case) -> None:
    # 600 tokens are the whole sample, and the band of 512 holds more than the 256 that are kept.
    margin, fires = margins(case.sae, case.truth.x)
    if isinstance(case.sae, GatedSAE):
        # An open gate without a magnitude is no near miss of an untied gate.
        fires = fires if case.sae.W_mag is not None else case.truth.f > 0
    margin = margin.masked_fill(fires, -torch.inf)
    for i in range(D_SAE):
        nearest = np.sort(margin[:, i].detach().numpy())[::-1]
        nearest = nearest[np.isfinite(nearest)][:NEAR_KEPT]
        _, found = case.index.feature(i).near_misses
        n = len(found)
        assert n >= min(len(nearest), NEAR_KEPT)
        np.testing.assert_allclose(found[: len(nearest)], nearest, rtol=1e-4, atol=1e-5)
        assert (np.diff(found) <= 0).all()


def test_decoder_neighbours_and_cosines_are_those_of_the_weights(case: Case) -> None:
    W = torch.nn.functional.normalize(case.sae.W_dec.detach(), dim=1)
    cosine = (W @ W.T).fill_diagonal_(-2)
    nearest = case.index.feature(5).neighbours
    expected = cosine[5].topk(20)
    assert nearest["feature"].tolist() == expected.indices.tolist()
    np.testing.assert_allclose(nearest["cosine"], expected.values, atol=1e-6)
    W_enc = case.sae.W_gate if isinstance(case.sae, GatedSAE) else case.sae.get_parameter("W_enc")
    own = torch.cosine_similarity(W_enc.detach().T, W, dim=1)
    np.testing.assert_allclose(case.index.table["encoder_cosine"], own, atol=1e-6)


def test_companions_are_counted_on_every_token(case: Case) -> None:
    fires = (case.truth.f > 0).numpy()
    both = fires.T.astype(int) @ fires.astype(int)
    fired = fires.sum(0)
    for i in (0, 7):
        jaccard = both[i] / np.maximum(fired[i] + fired - both[i], 1)
        jaccard[i] = -1
        order = [j for j in np.lexsort((np.arange(D_SAE), -jaccard)) if jaccard[j] > 0][:20]
        found = case.index.feature(i).co_firing
        assert found["feature"].tolist() == order
        assert found["both"].tolist() == both[i][order].tolist()
        np.testing.assert_allclose(found["jaccard"], jaccard[order])
        expected = both[i][order] * N_TOKENS / (fired[i] * fired[order])
        np.testing.assert_allclose(found["lift"], expected)


def test_top_tokens_are_those_with_the_most_activation(case: Case) -> None:
    for i in (0, 7):
        sums = np.bincount(case.truth.ids, weights=case.truth.f[:, i].numpy(), minlength=40)
        order = [t for t in np.argsort(-sums, kind="stable") if sums[t] > 0][:5]
        row = case.index.table.iloc[i]
        assert row["top_tokens"].tolist() == order
        np.testing.assert_allclose(row["top_token_shares"], sums[order] / sums.sum(), rtol=1e-5)


def test_features_of_a_token_are_ordered_by_how_specific_they_are(case: Case) -> None:
    fires, on = (case.truth.f > 0).numpy(), case.truth.ids == 7
    counts = fires[on].sum(0)
    found = case.index.by_token(7)
    assert found.attrs["tokens"] == on.sum()
    assert set(found["feature"]) == set(np.flatnonzero(counts))
    assert found["on"].tolist() == counts[found["feature"]].tolist()
    np.testing.assert_allclose(found["recall"], counts[found["feature"]] / on.sum())
    np.testing.assert_allclose(
        found["precision"], (counts / np.maximum(fires.sum(0), 1))[found["feature"]]
    )
    assert (np.diff(found["f1"]) <= 0).all()
    # Token 7 is the word w5, and no other word holds "w5".
    assert case.index.by_text("w5").equals(found)


def test_ranges_select_rows_and_nan_lies_in_none(case: Case) -> None:
    table = case.index.table
    low, high = 0.05, 0.3
    found = case.index.select(density=(low, high), mean=(None, None))
    assert set(found.index) == {
        i
        for i in range(D_SAE)
        if low <= table["density"][i] <= high and table["fired"][i]  # pyright: ignore
    }


def test_the_theta_rule_is_the_lowest_a_gated_latent_fires(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    sae = some_sae("gated")
    index = built(tiny_lm, sae, tmp_path)
    theta = index.table["theta"]
    np.testing.assert_allclose(theta, sae.jumprelu_threshold())  # pyright: ignore
    for i in range(D_SAE):
        feature = index.feature(i)
        assert feature.is_dead or feature.values[-1] > theta[i] - 1e-5
    line = index.feature(0).gate_line()
    row = index.table.iloc[0]
    on_line = row["gain"] * (line["pi_gate"] - row["b_gate"]) + row["b_mag"]
    np.testing.assert_allclose(line["pi_mag"], on_line, atol=1e-5)
    fires = line["f"] > 0
    assert fires.sum() == row["fired"]
    assert (line["pi_gate"][fires] > -1e-5).all()  # pyright: ignore
    np.testing.assert_allclose(line["pi_mag"][fires], line["f"][fires], atol=1e-5)


def test_parts_and_their_splits_are_stated(case: Case) -> None:
    splits = case.index.manifest.splits
    assert [(s.name, s.n_sequences, s.n_tokens) for s in splits] == [
        ("held_out", 10, 150),
        ("train", 30, 450),
    ]
    assert case.index.split_of(9) == "held_out"
    assert case.index.split_of(10) == "train"
    assert len(some_parts()) == 2
