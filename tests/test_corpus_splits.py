"""`--split` of a folder: what its names or README.md tell, as the `datasets` library reads them."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import counted, file, load, refusal, words

PILE = ["train/00.jsonl", "train/01.jsonl", "val/0.jsonl", "test/0.jsonl"]
SHARDS = [f"data/{name}-00000-of-00001.jsonl" for name in ("train", "test", "extra")]


def folder(root: Path, names: list[str]) -> Path:
    """Write a table for each name, whose only words are 100 times its place in the list and on."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": words(100 * i, 100 * i + 20)})
        path.write_bytes(gzip.compress(line.encode()) if name.endswith(".gz") else line.encode())
    return root


def seen(source: Path, **settings: Any) -> set[int]:
    """Return which of the files were read."""
    corpus = load(source, **settings)
    return {i // 100 for i in counted(corpus.train) + counted(corpus.held_out)}


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (PILE, "train", {0, 1}),
        (PILE, "validation", {2}),
        (PILE, "test", {3}),
        (PILE, "all", {0, 1, 2, 3}),
        (SHARDS, "train", {0}),
        (SHARDS, "extra", {2}),
        (["train.jsonl.gz", "dev.jsonl.gz"], "validation", {1}),
        (["plain_text/train-00000-of-00002.jsonl", "plain_text/train-1.jsonl"], "train", {0, 1}),
        (["my_test_set/a.jsonl", "en/training-1.jsonl"], "test", {0}),
        (["train/0.jsonl", "train/test.jsonl", "val.jsonl"], "train", {0, 1}),  # by folders alone
        (["a.jsonl", "trainer.jsonl", "latest.jsonl"], "train", {0, 1, 2}),  # words, not parts
        (["a.jsonl", "b.jsonl"], "all", {0, 1}),
    ],
)
def test_a_split_is_the_files_whose_names_tell(
    tmp_path: Path, names: list[str], split: str, read: set[int]
) -> None:
    source = folder(tmp_path / "set", names)
    file(source / "README.md", "A data set.")
    assert seen(source, split=split) == read


@pytest.mark.parametrize("names", [PILE[:3], SHARDS, ["en/train_1.jsonl", "en/test_1.jsonl"]])
def test_the_library_reads_the_same_files_as_training(tmp_path: Path, names: list[str]) -> None:
    import datasets

    source = folder(tmp_path / "set", names)
    read = datasets.load_dataset(str(source), split="train", streaming=True)
    assert seen(source) == {int(row["text"].split()[0][1:]) // 100 for row in read}


@pytest.mark.parametrize(
    ("names", "split", "there"),
    [
        (PILE, "tset", "train, validation, test"),
        (["a.jsonl", "test.jsonl"], "train", "test"),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, names: list[str], split: str, there: str
) -> None:
    source = folder(tmp_path / "set", names)
    assert refusal(source, split=split) == (
        f"expected a split {split!r} in {source}, found {there}: name one that is "
        "there with --split, or `all`"
    )


def test_a_shard_whose_name_has_no_split_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "set", ["data/-00000-of-00001.jsonl"])
    assert "(a name without its split): mend them" in refusal(source)


def test_a_folder_without_splits_is_read_whole_and_has_no_other(tmp_path: Path) -> None:
    source = folder(tmp_path / "set", ["a.jsonl", "b.jsonl"])
    assert seen(source) == {0, 1}
    assert refusal(source, split="test") == (
        f"expected a split 'test' in {source}, found train: name one that is there with --split, "
        "or `all`"
    )


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: first/*.jsonl
  - split: held
    path: ["second/b.jsonl", "second/c*"]
---
A data set."""


def test_the_card_of_a_data_set_tells_its_splits(tmp_path: Path) -> None:
    source = folder(tmp_path / "set", ["first/a.jsonl", "second/b.jsonl", "second/test.jsonl"])
    file(source / "README.md", CARD)
    assert [seen(source, split=split) for split in ("train", "held")] == [{0}, {1}]
    two = CARD.replace("default", "one").replace("---\nA", "- config_name: two\n---\nA")
    file(source / "README.md", two)
    reads = f"expected splits as the Hub reads them in {source}, by names or by `configs` in README"
    assert refusal(source).startswith(reads)
    assert "(none of one, two is the default): mend them" in refusal(source)
    file(source / "README.md", "---\nconfigs: {\n---\n")
    assert refusal(source).startswith(reads)
    assert seen(source, split="all") == {0, 1, 2}
    # No configs at its head: the names tell.
    file(source / "README.md", "---\nbroken: {\n---\nA data set with configs: none")
    assert seen(source, split="test") == {2}


def test_files_of_ids_and_texts_have_splits_too(tmp_path: Path) -> None:
    ids, texts = tmp_path / "ids", tmp_path / "texts"
    ids.mkdir()
    texts.mkdir()
    for i, name in enumerate(("train", "val")):
        np.arange(100 * i, 100 * i + 40, dtype="uint16").tofile(ids / f"{name}.bin")
        file(texts / f"wiki.{name}.txt", words(100 * i, 100 * i + 40))
    for source in (ids, texts):
        assert [seen(source, split=split) for split in ("train", "validation")] == [{0}, {1}]


def test_documents_and_code_are_called_what_they_like(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    essays, code = tmp_path / "essays", tmp_path / "code"
    essays.mkdir()
    code.mkdir()
    for i, name in enumerate(("train journey", "test drive", "a", "b", "c")):
        file(essays / f"{name}.txt", words(100 * i, 100 * i + 20))
    for i, name in enumerate(("train", "test_model", "eval")):
        file(code / f"{name}.py", words(100 * i, 100 * i + 20))
    assert seen(essays) == {0, 1, 2, 3, 4}
    assert seen(code) == {0, 1, 2}
    assert seen(essays, split="test") == {1}  # asked for by name
    two = tmp_path / "two"
    two.mkdir()
    for i, name in enumerate(("notes", "test")):
        file(two / f"{name}.txt", words(100 * i, 100 * i + 20))
    assert seen(two) == {0, 1}
    with caplog.at_level(logging.INFO):
        seen(folder(tmp_path / "set", PILE))
    assert "2 files read as table, 2 others left out" in caplog.text


def test_the_preview_shows_what_training_reads(tmp_path: Path) -> None:
    from gsae_core.config import DataConfig
    from gsae_core.lm.preview import preview

    source = tmp_path / "set"
    source.mkdir()
    for name in ("train", "test"):
        rows = f"label;text\n1;{name}, one\n2;{name} two\n"
        (source / f"{name}.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    for name in ("train", "test"):
        lines = preview(DataConfig(source=str(source), split=name), "bundled").lines
        assert ["".join(line) for line in lines] == [f"{name}, one", f"{name} two"]
