"""Which features a list shows: ranges, filters, searches, orders, and who is next."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gsae_core.analysis.features.filter import (
    Chosen,
    Wanted,
    beside,
    choose,
    parse_range,
    range_text,
)
from gsae_core.analysis.labels import Labels
from gsae_core.errors import InputError

ROWS = pd.DataFrame(
    {
        "feature": range(5),
        "tokens": ["a", "b", "", "c", "d"],
        "density": [0.5, 0.1, 0.0, 0.01, 0.2],
        "max": [1.0, 5.0, 0.0, 3.0, 2.0],
        "theta": [0.1, 0.2, 0.3, 0.4, 0.5],
        "gamma": [1.0, 0.9, np.nan, 0.7, 1.1],
        "fired": [50, 10, 0, 1, 20],
        "no_output": [0.0, 0.3, 0.0, 0.1, 0.2],
    }
)


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    return Labels(tmp_path)


def chosen(labels: Labels, **wanted: object) -> Chosen:
    order = str(wanted.pop("order", "number"))
    matches = wanted.pop("matches", None)
    asked = Wanted(**wanted)  # type: ignore[arg-type]
    return choose(ROWS, asked, said=labels.frame(), matches=matches, order=order)  # type: ignore[arg-type]


def features(found: Chosen) -> list[int]:
    return found.rows["feature"].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, None)),
        ("0.8..0.95", (0.8, 0.95)),
        (" 1e-4 .. 1e-2 ", (1e-4, 1e-2)),
        ("..0.1", (None, 0.1)),
        ("30..", (30.0, None)),
        ("-1 to 1", (-1.0, 1.0)),
    ],
)
def test_a_range_is_read_as_it_is_written(text: str, expected: tuple) -> None:
    assert parse_range(text, "γ") == expected


@pytest.mark.parametrize("text", ["0.5", "a..b", "1..2..3", "nan..", "<script>" * 20])
def test_what_is_no_range_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"γ: expected a range like 0.5..0.9, .* got '"):
        parse_range(text, "γ")


def test_a_range_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected the smaller number first, got '2..1'"):
        parse_range("2..1", "θ")


def test_a_range_written_is_the_range_read() -> None:
    for pair in ((0.1, 0.25), (None, 3.0), (1e-5, None)):
        assert parse_range(range_text(*pair), "γ") == pair


def test_nothing_asked_leaves_every_feature_by_number(labels: Labels) -> None:
    assert features(chosen(labels)) == [0, 1, 2, 3, 4]


def test_the_ends_of_a_range_are_in_it_and_what_has_no_number_is_not(labels: Labels) -> None:
    assert features(chosen(labels, gamma=(0.7, 1.0))) == [0, 1, 3]
    assert features(chosen(labels, gamma=(None, None))) == [0, 1, 2, 3, 4]
    assert features(chosen(labels, gamma=(None, 2.0))) == [0, 1, 3, 4]


def test_filters_hold_together_and_each_says_how_many_it_excludes(labels: Labels) -> None:
    found = chosen(labels, density=(0.1, None), theta=(0.2, None), life="alive")
    assert features(found) == [1, 4]
    # Of five: density excludes 2 and 3, theta 0, dead ones 2.
    assert found.excluded == {"feature density": 2, "θ": 1, "alive or dead": 1}
    assert next(iter(found.excluded)) == "feature density"


def test_dead_features_are_those_that_never_fired(labels: Labels) -> None:
    assert features(chosen(labels, life="dead")) == [2]


def test_labels_and_stars_are_beside_the_rows_and_can_be_asked_for(labels: Labels) -> None:
    labels.add(3, "label", "Names of loops", author="a")
    labels.add(4, "star", "on", author="a")
    rows = chosen(labels).rows
    assert rows["label"].tolist() == ["", "", "", "Names of loops", ""]
    assert rows["star"].tolist() == [False, False, False, False, True]
    assert features(chosen(labels, label="LOOP")) == [3]
    assert features(chosen(labels, starred=True)) == [4]


def test_a_search_finds_tokens_and_labels_the_best_match_first(labels: Labels) -> None:
    labels.add(0, "label", "loops", author="a")
    found = chosen(labels, text="loop", matches={1: 0.2, 4: 0.6}, order="best match")
    # A label that holds the text counts 1.
    assert features(found) == [0, 4, 1]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("most frequent", [0, 4, 1, 3, 2]),
        ("least frequent", [2, 3, 1, 4, 0]),
        ("strongest", [1, 3, 4, 0, 2]),
        ("largest θ", [4, 3, 2, 1, 0]),
        ("most shrunk", [3, 1, 0, 4, 2]),
        ("gate open, no output", [1, 4, 3, 0, 2]),
    ],
)
def test_rows_are_ordered_and_those_without_the_number_come_last(
    labels: Labels, order: str, expected: list[int]
) -> None:
    assert features(chosen(labels, order=order)) == expected


def test_next_goes_down_the_list_and_round_its_end() -> None:
    rows = pd.DataFrame({"feature": [7, 2, 9]})
    assert beside(rows, 7, 1) == 2
    assert beside(rows, 9, 1) == 7
    assert beside(rows, 7, -1) == 9


def test_a_feature_outside_the_list_goes_on_from_where_its_number_stands() -> None:
    rows = pd.DataFrame({"feature": [7, 2, 9]})
    assert beside(rows, 8, 1) == 9
    assert beside(rows, 8, -1) == 7
    assert beside(rows, 99, 1) == 2
    assert beside(rows.head(0), 1, 1) is None


def test_a_label_stands_beside_who_wrote_it_and_its_score(labels: Labels) -> None:
    labels.add(0, "label", "dots", author="ada")
    labels.add(1, "label", "commas", author="automatic", model="small", score=0.9)
    labels.add(2, "label", "ends", author="automatic", model="small")
    labels.add(3, "star", "on", author="ada")
    rows = chosen(labels).rows
    assert rows["by"].tolist() == ["ada", "small, 0.90", "small", "", ""]
