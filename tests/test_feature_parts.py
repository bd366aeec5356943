"""What the Features page is made of: figures, strips, pairs, numbers of weights, the example."""

from pathlib import Path

import numpy as np
import pytest
from index_cases import KINDS, built, some_sae

from gsae_core.analysis.features.export import Row, readable_token, strips
from gsae_core.analysis.features.feature import Histogram
from gsae_core.analysis.features.table import weight_columns
from gsae_core.analysis.labels import Labels
from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.errors import InputError
from gsae_core.files import EXAMPLE
from gsae_core.lm.model import LanguageModel
from gsae_core.plots.features import activation_histogram, density_histogram, gate_plane
from gsae_core.runs.jobs import job as process
from gsae_core.runs.run import SHOWN_FEATURE, SHOWN_SAE, Run, example_run, labels_folder

# Figures


def test_bars_of_densities_are_a_fifth_of_a_decade_wide_and_hold_every_live_feature() -> None:
    density = np.array([0.001, 0.0012, 0.5, 0.0, np.nan])
    kept = np.array([True, False, True, True, True])
    data = density_histogram(density, kept, theme="light").data
    # 0.001 and 0.0012 lie in the first bar from 10^-3 to 10^-2.8 = 0.00158; 0.5 from 0.398.
    assert int(data["n"].to_numpy().sum()) == 3
    first = data.iloc[0]
    assert (first["low"], first["n"], first["kept"]) == (pytest.approx(0.001), 2, 1)
    assert first["high"] == pytest.approx(10**-2.8)
    assert data["low"].to_numpy()[data["n"].to_numpy() > 0][-1] == pytest.approx(10**-0.4)


def test_a_feature_that_always_fires_has_a_bar() -> None:
    data = density_histogram(np.array([1.0]), np.array([True]), theme="dark").data
    assert data.iloc[-1][["low", "high", "n"]].tolist() == [pytest.approx(10**-0.2), 1.0, 1]


def test_the_theta_rule_is_drawn_once_and_only_inside_the_histogram() -> None:
    histogram = Histogram(np.array([0.0, 1.0, 2.0]), np.array([0, 5]))
    data = activation_histogram(histogram, theta=0.8, theme="light").data
    assert data["theta"].dropna().tolist() == [0.8]
    assert data["count"].tolist() == [0, 5]
    for theta in (0.0, 3.0, np.nan):
        rules = activation_histogram(histogram, theta=theta, theme="light").data["theta"]
        assert np.isnan(rules.to_numpy()).all()


def test_going_on_to_another_feature_changes_rows_and_no_specification() -> None:
    one, two = (
        activation_histogram(
            Histogram(np.array([0.0, 1.0, top]), np.array([1, 2])), theta=0.5, theme="light"
        )
        for top in (2.0, 9.0)
    )
    assert one.spec is two.spec
    assert not one.data.equals(two.data)


def test_every_token_lies_on_the_line_that_crosses_the_gate_at_theta(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    index = built(tiny_lm, some_sae("gated"), tmp_path)
    feature = index.feature(7)
    chart = gate_plane(feature, theme="light")
    assert chart is not None
    rows, row = chart.data, feature.stats
    dots = rows[rows["kind"].isin(["dot", "miss"])]
    expected = row["gain"] * (dots["x"] - row["b_gate"]) + row["b_mag"]
    np.testing.assert_allclose(dots["y"], expected, atol=1e-5)
    regions = set(rows[rows["kind"] == "region"]["region"])
    assert regions == {"both closed", "gate closed", "open", "fires"}
    if row["theta"] > 0:
        (crossing,) = rows[rows["kind"] == "theta"]["y"]
        assert crossing == pytest.approx(row["theta"], abs=1e-6)


def test_a_baseline_has_no_plane(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    index = built(tiny_lm, some_sae("relu"), tmp_path)
    assert gate_plane(index.feature(7), theme="light") is None


# Strips


def test_all_strips_of_a_list_share_one_scale() -> None:
    rows = [Row(["a"], [4.0], 0, "4"), Row(["b"], [2.0], 0, "2")]
    markup = strips(rows, top=4.0)
    # The strongest shade is 0.6: half the value is half of it.
    assert "--a:0.60" in markup
    assert "--a:0.30" in markup


def test_values_are_said_of_both_features_and_reached_by_keyboard() -> None:
    row = Row(["a", "b", "c"], [4.0, 0.0, 1.0], 0, "4", below=[0.0, 3.0, 0.0])
    markup = strips([row], top=4.0, below_top=3.0)
    assert 'data-v="4 · beside: does not fire"' in markup
    assert 'data-v="does not fire · beside: 3"' in markup
    # Of the three, the one it is about is a stop; the weak ones are hovered.
    assert markup.count("tabindex") == 1


def test_a_line_is_broken_where_the_text_is_only_if_asked() -> None:
    row = [Row(["a\n", "b"], [1.0, 0.0], 0, "1")]
    assert "<br>" not in strips(row, top=1.0)
    assert strips(row, top=1.0, breaks=True).count("<br>") == 1


def test_tokens_read_as_text_and_hide_nothing() -> None:
    assert readable_token(" def") == " def"
    assert readable_token("  ") == "··"
    assert readable_token("a\n") == "a↵"
    assert readable_token("\u200b") == "⟨200B⟩"
    assert readable_token("x" * 10_000).endswith("… (10,000 characters)")
    assert len(readable_token("x" * 10_000)) < 200


# Pairs


def test_a_pair_counts_tokens_and_compares_lengths_where_both_fire(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    one = built(tiny_lm, some_sae("gated"), tmp_path / "a").feature(7)
    other = built(tiny_lm, some_sae("relu"), tmp_path / "b").feature(9)
    found = one.pair(other)
    first, second = set(one.positions.tolist()), set(other.positions.tolist())
    both = sorted(first & second)
    assert (found.only_first, found.both, found.only_second) == (
        len(first - second),
        len(both),
        len(second - first),
    )
    assert found.both > 0
    lengths = one.everywhere[both].mean() * one.stats["decoder_norm"]
    assert found.first == pytest.approx(lengths, rel=1e-5)
    assert found.shorter == pytest.approx(1 - found.second / found.first)


def test_the_others_values_are_those_on_the_same_tokens(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    one = built(tiny_lm, some_sae("gated"), tmp_path / "a").feature(7)
    example = one.top(1)[0]
    # Of a feature on its own examples the values are the example's.
    np.testing.assert_array_equal(one.on_example(example), example.values)


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_alone_say_what_the_index_says_of_them(
    tiny_lm: LanguageModel, tmp_path: Path, kind: str
) -> None:
    sae = some_sae(kind)
    save_sae(sae, tmp_path / "sae", metadata={})
    columns = weight_columns(load_sae(tmp_path / "sae"))
    known = built(tiny_lm, sae, tmp_path / "index").table
    for name, column in columns.items():
        np.testing.assert_allclose(column, known[name], rtol=1e-5, atol=1e-6, err_msg=name)


# The example


@pytest.fixture
def run() -> Run:
    found = example_run()
    assert found is not None
    return found


def test_the_example_is_small_finished_and_whole(run: Run) -> None:
    assert run.status.state == "finished"
    n_bytes = sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file())
    assert n_bytes <= 15_000_000
    kinds = {spec.architecture: run.features(spec.name).manifest for spec in run.config.saes}
    assert set(kinds) == {"gated", "relu"}
    assert kinds["gated"].tokens_sha256 == kinds["relu"].tokens_sha256
    assert all(not str(file).startswith("/") for m in kinds.values() for file in m.files)


def test_the_example_shows_the_papers_claim(run: Run) -> None:
    gamma = {row["architecture"]: row["gamma"] for row in run.evals()}
    assert abs(gamma["gated"] - 1) < 0.02
    assert gamma["relu"] < 0.9


def test_the_examples_feature_of_def_fires_on_def_and_raises_names(run: Run) -> None:
    feature = run.features(SHOWN_SAE).feature(SHOWN_FEATURE)
    assert all("def" in example.tokens[example.at] for example in feature.top(10))
    assert " test" in [each.text for each in feature.logits.top]


def test_nothing_is_written_to_the_example(run: Run, tmp_path: Path) -> None:
    before = sorted(EXAMPLE.rglob("*"))
    for act in (
        lambda: process.delete(run),
        lambda: run.add_event("seen"),
        lambda: run.features("gated-0.35").labels.add(0, "label", "x", author="a"),
    ):
        with pytest.raises(InputError, match="got the bundled example, which is only read"):
            act()
    Labels(labels_folder(tmp_path, "gated-0.35")).add(0, "label", "x", author="a")
    assert Labels(labels_folder(tmp_path, "gated-0.35")).latest("label")[0].text == "x"
    assert sorted(EXAMPLE.rglob("*")) == before
