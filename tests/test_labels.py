"""Labels, notes and stars: appended, never lost, the latest counts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gsae_core.analysis.labels import FILE, Labels
from gsae_core.errors import InputError


def test_the_latest_counts_and_the_others_stay(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    assert labels.of(5) == {}
    before = time.time()
    labels.add(5, "label", "dots", author="ada")
    labels.add(5, "label", "full stops", author="automatic", model="gpt", score=0.8)
    labels.add(5, "note", "only in\nprose", author="ada")
    labels.add(6, "label", "commas", author="ada")
    found = labels.of(5)
    assert found["label"].text == "full stops"
    assert (found["label"].author, found["label"].model, found["label"].score) == (
        "automatic",
        "gpt",
        0.8,
    )
    assert before <= found["label"].time <= time.time()
    assert found["note"].text == "only in\nprose"
    assert [said.text for said in labels.all()] == [
        "dots",
        "full stops",
        "only in\nprose",
        "commas",
    ]


def test_a_label_is_taken_back_and_a_star_switched_off(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    labels.add(5, "star", "on", author="ada")
    labels.add(5, "label", "dots", author="ada")
    assert set(labels.of(5)) == {"star", "label"}
    labels.add(5, "star", "off", author="ada")
    labels.add(5, "label", "", author="ada")
    assert labels.of(5) == {}
    assert len(labels.all()) == 4
    labels.add(5, "label", "off", author="ada")  # a switch, say: of a label, no more than a word
    assert labels.of(5)["label"].text == "off"


def test_the_table_has_a_row_for_each_feature_with_something(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    assert len(labels.frame()) == 0
    labels.add(9, "star", "on", author="ada")
    labels.add(5, "label", "dots", author="ada", score=0.7)
    frame = labels.frame()
    assert frame.index.tolist() == [5, 9]
    assert frame["star"].tolist() == [False, True]
    assert frame["label"].tolist() == ["dots", ""]
    assert frame["score"][5] == 0.7  # pyright: ignore


def test_what_another_process_says_is_seen(tmp_path: Path) -> None:
    mine, theirs = Labels(tmp_path), Labels(tmp_path)
    assert mine.all() == []
    theirs.add(1, "label", "dots", author="bob")
    assert mine.of(1)["label"].author == "bob"


def test_a_score_says_by_what_it_was_measured_where_that_is_known(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    assert labels.add(1, "label", "dots", author="ada").measured == ""
    said = labels.add(1, "label", "dots", author="a", score=0.75, scored_by="fuzzing")
    assert said.measured == "score 0.75 by fuzzing, where 0.5 is guessing"
    old = said._asdict()
    del old["scored_by"]  # as written before it was kept
    (tmp_path / FILE).write_text(json.dumps(old) + "\n")
    assert labels.of(1)["label"].measured == "score 0.75, where 0.5 is guessing"


def test_lines_of_a_newer_version_are_read_and_lines_that_say_nothing_left_out(
    tmp_path: Path,
) -> None:
    labels = Labels(tmp_path)
    said = labels.add(1, "label", "dots", author="ada")._asdict()
    lines = [said | {"seen_by": "bob"}, {"feature": 2}, said | {"feature": "two"}, 3]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(each.feature, each.text) for each in labels.all()] == [(1, "dots")]


def test_a_line_cut_short_costs_that_line_alone(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    labels.add(1, "label", "dots", author="ada")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"feature": 2, "kind": "lab')
    labels.add(3, "label", "commas", author="ada")
    assert [said.feature for said in Labels(tmp_path).all()] == [1, 3]
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(lines[i])["feature"] for i in (0, 2)] == [1, 3]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gsae_core.analysis.labels import Labels; "
        "labels = Labels(Path(sys.argv[1])); "
        "[labels.add(i, 'note', sys.argv[2] * 3000, author=sys.argv[2]) for i in range(20)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = Labels(tmp_path).all()
    assert len(found) == 60
    assert {(said.author, said.feature) for said in found} == {
        (name, i) for name in "abc" for i in range(20)
    }
    assert all(said.text == said.author * 3000 for said in found)


def test_what_cannot_be_said_is_one_sentence(tmp_path: Path) -> None:
    labels = Labels(tmp_path)
    with pytest.raises(InputError, match="expected a label of one line, got several"):
        labels.add(1, "label", "a\nb", author="ada")
    with pytest.raises(InputError, match="expected a label of at most 200 characters, got 201"):
        labels.add(1, "label", "a" * 201, author="ada")
    with pytest.raises(InputError, match="expected a star that is on or off, got 'yes'"):
        labels.add(1, "star", "yes", author="ada")
    assert labels.all() == []
