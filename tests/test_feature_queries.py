"""What an index answers about a feature: examples, groups, draws, likes, markup, exports."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from index_cases import Dense, built, dense, some_parts, some_sae

from gsae_core.analysis.features import feature as features_of
from gsae_core.analysis.features.export import card, neuronpedia_batch, page
from gsae_core.analysis.features.feature import distinct
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel

FEATURE = 7


@pytest.fixture(scope="module")
def index(tiny_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    return built(tiny_lm, some_sae("gated"), tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def truth(tiny_lm: LanguageModel) -> Dense:
    return dense(tiny_lm, some_sae("gated"))


# Examples


def test_the_top_of_a_list_is_its_strongest_with_each_context_once() -> None:
    # Two sequences of six tokens, the same but for the last one.
    ids = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]])
    # Place 8 is token 3 of the second sequence; with one token on either side it reads as place 2.
    assert distinct(np.array([2, 8]), ids, 5, before=1, after=1) == [2]
    # With all after it, the last tokens differ.
    assert distinct(np.array([2, 8]), ids, 5, before=1, after=None) == [2, 8]
    # Places 2 and 3 overlap; 0 and 5 overlap with neither, one token after and none before.
    assert distinct(np.array([2, 3, 0, 5]), ids, 5, before=0, after=1) == [2, 0, 5]
    assert distinct(np.array([2, 3, 0, 5]), ids, 2, before=0, after=1) == [2, 0]


def test_an_example_is_a_token_in_its_context_with_the_features_value_on_each(
    index: FeatureIndex, truth: Dense
) -> None:
    values = dict(zip(truth.places.tolist(), truth.f[:, FEATURE].tolist(), strict=True))
    found = index.feature(FEATURE).top(3, before=2, after=1)
    ids = index.array("ids").reshape(-1)
    assert found[0].value == pytest.approx(max(values.values()), rel=1e-5)
    for example in found:
        place = 16 * example.sequence + example.position
        around = range(place - example.at, place - example.at + len(example.tokens))
        assert example.value == pytest.approx(values[place], rel=1e-5)
        assert example.values == pytest.approx([values.get(p, 0.0) for p in around], rel=1e-4)
        # w0 is token 2.
        expected = [f" w{i - 2}" if i else " <|endoftext|>" for i in ids[list(around)]]
        assert list(example.tokens) == expected
        assert example.split == ("held_out" if example.sequence < 10 else "train")
    whole = index.feature(FEATURE).top(1, before=None, after=None)[0]
    assert len(whole.tokens) == 16


def test_near_threshold_begins_with_the_weakest_firing(index: FeatureIndex, truth: Dense) -> None:
    f = truth.f[:, FEATURE]
    weakest = index.feature(FEATURE).near_threshold(1)[0]
    assert weakest.value == pytest.approx(float(f[f > 0].min()), rel=1e-4)


def test_just_missed_are_silent_and_say_by_how_much(index: FeatureIndex, truth: Dense) -> None:
    sae = some_sae("gated")
    pi_gate = sae.pre_activations(truth.x).pi_gate[:, FEATURE].detach()  # pyright: ignore
    pi_gate = dict(zip(truth.places.tolist(), pi_gate.tolist(), strict=True))
    theta = float(index.table["theta"][FEATURE])  # pyright: ignore
    found = index.feature(FEATURE).just_missed(5, before=1, after=1)
    assert len(found) == 5
    for example in found:
        assert example.values[example.at] == 0
        assert example.value <= 0
        if theta > 0:  # then the gate alone decides
            place = 16 * example.sequence + example.position
            assert example.value == pytest.approx(pi_gate[place], abs=1e-5)
    assert [e.value for e in found] == sorted((e.value for e in found), reverse=True)


def test_random_examples_are_drawn_from_all_firings_by_a_seed(index: FeatureIndex) -> None:
    feature = index.feature(FEATURE)
    drawn = [(e.sequence, e.position) for e in feature.random(10, seed=1)]
    assert drawn == [(e.sequence, e.position) for e in feature.random(10, seed=1)]
    assert drawn != [(e.sequence, e.position) for e in feature.random(10, seed=2)]
    assert len(set(drawn)) == 10
    assert all(example.value > 0 for example in feature.random(10, seed=1))
    n = len(feature.values)
    every = {(e.sequence, e.position) for e in feature.random(n + 5)}
    assert every == {divmod(place, 16) for place in feature.positions.tolist()}


def test_quantile_groups_are_slices_of_equal_size(index: FeatureIndex) -> None:
    feature = index.feature(FEATURE)
    n = len(feature.values)
    groups = feature.quantiles(4, k=3)
    assert [group.n_fired for group in groups] == [n * (i + 1) // 4 - n * i // 4 for i in range(4)]
    for i, group in enumerate(groups):
        own = feature.values[n * i // 4 : n * (i + 1) // 4]
        assert (group.low, group.high) == (float(own.min()), float(own.max()))
        assert len(group.examples) == 3
        assert all(group.low <= example.value <= group.high for example in group.examples)


def test_non_activating_tokens_count_and_are_silent(index: FeatureIndex) -> None:
    found = index.feature(FEATURE).non_activating(50)
    assert len(found) == 50
    assert all(example.values[example.at] == 0 and example.position > 0 for example in found)


# The like of a feature in another SAE


def test_a_feature_is_its_own_best_match_however_it_is_sought(index: FeatureIndex) -> None:
    for by in ("decoder", "firing"):
        first = index.feature(FEATURE).matched(index, by=by).iloc[0]
        assert first["feature"] == FEATURE
        assert first["mutual"]
        assert first["cosine"] == pytest.approx(1)
        assert first["f1"] == 1


def test_a_match_counts_shared_tokens(
    index: FeatureIndex, truth: Dense, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    other_sae = some_sae("topk")
    other = built(tiny_lm, other_sae, tmp_path)
    fires = truth.f[:, FEATURE] > 0
    theirs = dense(tiny_lm, other_sae).f > 0
    both = (fires[:, None] & theirs).sum(0)
    f1 = 2 * both / (fires.sum() + theirs.sum(0))
    found = index.feature(FEATURE).matched(other, by="firing", k=3)
    np.testing.assert_allclose(found["f1"], f1.sort(descending=True).values[:3], rtol=1e-6)
    assert found["both"].tolist() == both[found["feature"].tolist()].tolist()
    W = torch.nn.functional.normalize
    mine, all_theirs = (W(sae.W_dec.detach(), dim=1) for sae in (some_sae("gated"), other_sae))
    cosine = all_theirs @ mine[FEATURE]
    np.testing.assert_allclose(found["cosine"], cosine[found["feature"].tolist()], atol=1e-6)
    nearest = index.feature(FEATURE).matched(other, by="decoder", k=1).iloc[0]
    assert nearest["feature"] == int(cosine.argmax())
    back = mine @ all_theirs[int(cosine.argmax())]
    assert nearest["mutual"] == (int(back.argmax()) == FEATURE)


def test_of_tokens_with_too_many_firings_an_even_sample_is_counted_and_scaled(
    index: FeatureIndex, truth: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    feature = index.feature(FEATURE)
    theirs = truth.f > 0
    on = truth.f[:, FEATURE] > 0
    # One too few for all asks for every second token; one less than half, for every third.
    found = int(theirs[on].sum())
    for most, step in ((found, 1), (found - 1, 2), (found // 2 - 1, 3)):
        monkeypatch.setattr(features_of, "MOST_FOUND", most)
        counts = feature.fired_with(index)
        looked_at = -(-len(feature.positions) // step)
        assert counts[FEATURE] == pytest.approx(len(feature.positions))
        unit = len(feature.positions) / looked_at
        np.testing.assert_allclose(counts / unit, np.rint(counts / unit), atol=1e-9)
        assert (counts / unit).max() == pytest.approx(looked_at)


def test_indices_of_other_tokens_are_not_compared(
    index: FeatureIndex, tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    other = built(tiny_lm, some_sae("relu"), tmp_path, some_parts(seed=1))
    with pytest.raises(InputError, match=r"expected two indices over the same tokens, got 600 of"):
        index.feature(FEATURE).matched(other)


# Markup and exports


def test_a_page_holds_all_there_is_and_needs_nothing_from_elsewhere(
    index: FeatureIndex,
) -> None:
    text = page([index.feature(FEATURE), index.feature(3)])
    for piece in ("Feature 7 of small", "Feature 3 of small", "a dead feature", "Just missed", "θ"):
        assert piece in text
    assert not any(word in text for word in ("<script", "src=", "href=", "url(", "@import"))
    assert card(index.feature(FEATURE)) in page([index.feature(FEATURE)], k=10)
    assert index.feature(FEATURE)._repr_html_() == card(index.feature(FEATURE))
    example = index.feature(FEATURE).top(1)[0]
    assert example._repr_html_() == example.html()


def test_hostile_tokens_and_labels_are_text_and_nothing_else(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    index = built(tiny_lm, some_sae("gated"), tmp_path)
    hostile = '<img src=x onerror="alert(1)">\u202e\n'
    index._raw_texts[:] = [hostile] * 40
    index.labels.add(FEATURE, "label", '<b>bold</b> & "quoted"', author="<i>me</i>")
    text = page([index.feature(FEATURE)])
    assert "<img" not in text
    assert "\u202e" not in text
    assert "⟨202E⟩↵" in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; " in text
    assert "<i>" not in text


def test_the_json_is_a_batch_as_neuronpedias_importer_reads_it(
    index: FeatureIndex, truth: Dense
) -> None:
    features = [index.feature(FEATURE), index.feature(3)]
    batch = json.loads(json.dumps(neuronpedia_batch(features, model_id="tiny", sae_set="res")))
    assert {key: batch[key] for key in ("model_id", "layer", "sae_set")} == {
        "model_id": "tiny",
        "layer": 1,
        "sae_set": "res",
    }
    alive, dead = batch["features"]
    assert alive["feature_index"] == FEATURE
    assert alive["frac_nonzero"] == float(index.table["density"][FEATURE])  # pyright: ignore
    assert sum(alive["freq_hist_data_bar_heights"]) == len(features[0].values)
    assert len(alive["pos_str"]) == len(alive["neg_values"]) == 10
    top = alive["activations"][0]
    assert (top["bin_min"], top["bin_contains"]) == (-1, -1)
    assert max(top["values"]) == pytest.approx(float(features[0].values[0]), abs=1e-3)
    grouped = [each for each in alive["activations"] if each["bin_contains"] > 0]
    assert {round(each["bin_contains"], 1) for each in grouped} == {0.1}
    assert dead["activations"] == []
    fires = (truth.f > 0).double().numpy()
    alike = alive["correlated_features_indices"]
    expected = [np.corrcoef(fires[:, FEATURE], fires[:, i])[0, 1] for i in alike]
    np.testing.assert_allclose(alive["correlated_features_pearson"], expected, atol=6e-4)


# Without torch


def test_an_index_is_opened_and_asked_without_torch(index: FeatureIndex) -> None:
    code = (
        "import sys; from gsae_core import open_index; "
        f"i = open_index({str(index.folder)!r}); f = i.feature(7); f.top(); f.quantiles(); "
        "f.just_missed(); f.co_firing; f.neighbours; f.logits; f.matched(i); f._repr_html_(); "
        "i.by_text('w5'); i.select(density=(0, 1)); i.labels.frame(); "
        "from gsae_core.runs.work import index; "
        "print(sorted({'torch', 'numba', 'transformers', 'streamlit'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
