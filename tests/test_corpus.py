"""Text from anywhere to sequences: what a row is, what counts, what is held out."""

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backports import zstd
from corpora import BOS, EOS, WordTokenizer, counted, file, load, refusal, rows, words


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


# Packing


def test_rows_start_with_bos_and_hold_the_text_end_to_end(tmp_path: Path) -> None:
    # 12 words and EOS are 13 ids: four rows of BOS and 3 ids; the EOS is left over.
    corpus = load(file(tmp_path / "a.txt", words(0, 12)))
    assert rows(corpus.held_out) == [[BOS, 0, 1, 2]]
    assert rows(corpus.train) == [[BOS, 3, 4, 5], [BOS, 6, 7, 8], [BOS, 9, 10, 11]]
    assert (corpus.n_ctx, corpus.bos, corpus.name) == (4, True, str(tmp_path / "a.txt"))


def test_documents_are_separated_by_eos_and_special_positions_are_not_counted(
    tmp_path: Path,
) -> None:
    lines = [json.dumps({"text": words(0, 4)}), json.dumps({"text": words(4, 9)})]
    corpus = load(file(tmp_path / "a.jsonl", "\n".join(lines)))
    # 0 1 2 | 3 EOS 4 | 5 6 7 | 8 EOS left over
    assert rows(corpus.held_out) == [[BOS, 0, 1, 2]]
    assert rows(corpus.train) == [[BOS, 3, EOS, 4], [BOS, 5, 6, 7]]
    assert corpus.train[:].mask.tolist() == [[False, True, False, True], [False, True, True, True]]
    assert corpus.train.counts.tolist() == [2, 3]
    assert (corpus.train.n_tokens, corpus.held_out.n_tokens) == (5, 3)


def test_bos_never_fills_whole_rows_and_says_so(tmp_path: Path) -> None:
    corpus = load(file(tmp_path / "a.txt", words(0, 12)), bos="never")
    assert rows(corpus.train) == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert not corpus.bos


def test_bos_auto_does_without_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    corpus = load(file(tmp_path / "a.txt", words(0, 12)), WordTokenizer(bos=None))
    assert not corpus.bos
    assert rows(corpus.held_out) == [[0, 1, 2, 3]]


def test_bos_separates_documents_where_there_is_no_eos(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([words(0, 2), words(2, 9)]))
    corpus = load(tmp_path / "a.json", WordTokenizer(eos=None), bos="never")
    assert rows(corpus.held_out) == [[0, 1, BOS, 2]]


def test_a_long_text_is_read_in_parts_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.lm import readers
    from gsae_core.lm.packed import text_parts

    path = file(tmp_path / "a.txt", "\n".join(f"w{i}" for i in range(100)))
    whole = load(path)
    parts = list(text_parts(path, 10))
    assert len(parts) > 10
    assert [part.ends for part in parts[-2:]] == [False, True]
    monkeypatch.setattr(readers, "text_parts", lambda path, **_: iter(parts))
    assert rows(load(path).train) == rows(whole.train)


def test_indices_and_slices_give_the_same_sequences(tmp_path: Path) -> None:
    train = load(file(tmp_path / "a.txt", words(0, 60))).train
    by_index = train[np.array([4, 1])]
    assert by_index.ids.tolist() == [rows(train)[4], rows(train)[1]]
    assert train[torch.tensor([4, 1])].ids.tolist() == by_index.ids.tolist()
    assert by_index.mask.tolist() == [train[4:5].mask[0].tolist(), train[1:2].mask[0].tolist()]


def test_the_context_is_the_models_and_256_at_most(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", words(0, 800))
    assert load(path, n_ctx=None, model_n_ctx=64).n_ctx == 64
    assert load(path, n_ctx=None, model_n_ctx=2048).n_ctx == 256


# The split


def test_training_and_held_out_sequences_never_overlap_and_lose_nothing(tmp_path: Path) -> None:
    corpus = load(file(tmp_path / "a.txt", words(0, 900)), held_out=0.05)
    # 901 ids are 300 rows of 3; ceil(300 * 0.05) = 15 are held out.
    assert len(corpus.held_out) == 15
    assert set(counted(corpus.train)).isdisjoint(counted(corpus.held_out))
    assert sorted(counted(corpus.train) + counted(corpus.held_out)) == list(range(900))


def test_a_corpus_for_fewer_tokens_is_a_prefix_of_one_for_more(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", words(0, 900))
    short, long = load(path, n_tokens=100), load(path)
    # Rows of 3 counted tokens: 34 of them hold 100.
    assert short.train.n_tokens == 102
    assert rows(short.train) == rows(long.train)[:34]
    assert rows(short.held_out) == rows(long.held_out)[: len(short.held_out)]
    # Row 0 of every 4 is held out, and 34 training rows end in row 45: rows 0, 4 ... 44.
    assert len(short.held_out) == 12


def test_held_out_tokens_are_read_for_beyond_the_last_training_sequence(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", words(0, 900))
    short, whole = load(path, n_tokens=100), load(path)
    longer = load(path, n_tokens=100, n_held_out=150)
    # 50 rows of 3 are 150 tokens: rows 0, 4 ... 196. 36 of the 100 lie among the training rows.
    assert short.held_out.n_tokens == 36
    assert longer.held_out.n_tokens == 150
    assert rows(longer.held_out) == rows(whole.held_out)[:50]
    # What is trained on is the same to the bit, and none of it is held out.
    assert rows(longer.train) == rows(short.train)
    assert longer.digest == short.digest
    assert set(counted(longer.train)).isdisjoint(counted(longer.held_out))
    # Nor would a run that trains on all there is have met any of it.
    assert set(counted(whole.train)).isdisjoint(counted(longer.held_out))


@pytest.mark.parametrize("n_held_out", [0, 1, 36])
def test_no_fewer_are_held_out_than_lie_among_the_training_sequences(
    tmp_path: Path, n_held_out: int
) -> None:
    path = file(tmp_path / "a.txt", words(0, 900))
    assert load(path, n_tokens=100, n_held_out=n_held_out).held_out.n_tokens == 36


def test_where_the_text_has_no_more_all_of_it_is_held_out(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", words(0, 900))
    corpus = load(path, n_tokens=100, n_held_out=10**6)
    # 901 ids are 300 rows; a quarter of them.
    assert corpus.held_out.n_tokens == 225
    assert rows(corpus.train) == rows(load(path, n_tokens=100).train)


def test_stdlib_holds_out_as_many_files_as_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.lm import corpus, readers

    paths = {f"m{i}.py": file(tmp_path / f"m{i}.py", words(i, i + 15)) for i in range(200)}
    monkeypatch.setattr(readers, "stdlib_paths", lambda: paths)
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 20)
    few = load("stdlib", n_tokens=100, held_out=0.1)
    more = load("stdlib", n_tokens=100, held_out=0.1, n_held_out=120)
    assert 20 <= few.held_out.n_tokens < 30
    assert 120 <= more.held_out.n_tokens < 130
    assert rows(more.held_out)[: len(few.held_out)] == rows(few.held_out)
    assert rows(more.train) == rows(few.train)


def test_stdlib_is_split_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsae_core.lm import readers
    from gsae_core.lm.readers import is_held_out

    names = [f"m{i}.py" for i in range(60)]
    paths = {n: file(tmp_path / n, words(i * 15, i * 15 + 15)) for i, n in enumerate(names)}
    monkeypatch.setattr(readers, "stdlib_paths", lambda: paths)
    corpus = load("stdlib", n_ctx=6, held_out=0.1)
    of_held_out = {names.index(n) for n in names if is_held_out(n, 10)}
    assert {token // 15 for token in counted(corpus.held_out)} == of_held_out
    assert {token // 15 for token in counted(corpus.train)} == set(range(60)) - of_held_out
    # A short reading sees files from all over, not the first of the alphabet.
    assert max(counted(load("stdlib", n_ctx=6, held_out=0.1, n_tokens=60).train)) > 300


# Sources


def test_a_folder_of_text_is_read_file_by_file_and_other_files_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    file(folder / "a.txt", words(0, 10))
    file(folder / "b.md", words(10, 20))
    file(folder / "deep" / "c.py", words(20, 30))
    file(folder / ".git" / "d.txt", words(30, 40))
    (folder / "e.png").write_bytes(b"\x89PNG\0\0")
    with caplog.at_level(logging.INFO):
        corpus = load(folder)
    seen = set(counted(corpus.train) + counted(corpus.held_out))
    assert seen <= set(range(30))
    assert len(seen) >= 27
    assert "3 files read as text, 1 others left out" in caplog.text


def as_jsonl(path: Path, texts: list[str]) -> Path:
    return file(path, "".join(json.dumps({"id": "x", "text": text}) + "\n\n" for text in texts))


def as_packed(path: Path, texts: list[str]) -> Path:
    plain = as_jsonl(path.with_suffix(""), texts).read_bytes()
    # Two streams one after the other, as parallel compressors write them.
    packed = [PACKERS[path.suffix](part) for part in (plain[:50], plain[50:])]
    path.write_bytes(b"".join(packed))
    return path


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def as_semicolons(path: Path, texts: list[str]) -> Path:
    # Commas in the text, as in German; a quoted field holds the delimiter, in the header too.
    rows = "".join(f'"{text}";"a, b; c"\n' for text in texts)
    return file(path, f'text;"label, or; note,"\n{rows}')


def as_pandas(path: Path, texts: list[str]) -> Path:
    import pandas as pd

    # With its index in front, in a column called "".
    pd.DataFrame({"text": texts}).to_csv(path)
    return path


def as_marked_json(path: Path, texts: list[str]) -> Path:
    return file(path, "\ufeff" + json.dumps([{"text": text} for text in texts]))


def as_csv(path: Path, texts: list[str]) -> Path:
    quoted = "".join('{},"{}"\n'.format(i, t.replace(" ", "\n")) for i, t in enumerate(texts))
    return file(path, "id,content\n" + quoted)


def as_parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": list(range(len(texts))), "body": texts}), path)
    return path


def as_folder(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    as_jsonl(path / "1.jsonl", texts[:1])
    as_jsonl(path / "2.jsonl", texts[1:])
    file(path / "README.md", "read me")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_jsonl),
        ("a.jsonl.gz", as_packed),
        ("a.jsonl.bz2", as_packed),
        ("a.jsonl.xz", as_packed),
        ("a.jsonl.zst", as_packed),
        ("a.csv", as_semicolons),
        ("a.json", as_marked_json),
        ("a.csv", as_csv),
        ("a.csv", as_pandas),
        ("a.parquet", as_parquet),
        ("a", as_folder),
    ],
)
def test_every_table_gives_its_rows_in_order(tmp_path: Path, name: str, write: Any) -> None:
    path = write(tmp_path / name, [words(0, 5), words(5, 11), words(11, 20)])
    corpus = load(path, n_ctx=7, held_out=0.3)
    assert rows(corpus.held_out) == [[BOS, 0, 1, 2, 3, 4, EOS]]
    assert rows(corpus.train)[0] == [BOS, 5, 6, 7, 8, 9, 10]


def test_a_text_column_can_be_named(tmp_path: Path) -> None:
    row = {"text": words(0, 9), "answer": words(100, 120)}
    path = file(tmp_path / "a.jsonl", json.dumps(row))
    assert min(counted(load(path, text_column="answer").train)) >= 100


def test_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    lines = [{"text": None}, {"text": ""}, {"text": words(0, 9)}]
    path = file(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert rows(load(path).held_out) == [[BOS, 0, 1, 2]]


# Columns


SENTENCE = "A dog that has run all day sleeps well."


@pytest.mark.parametrize(
    ("values", "reads"),
    [
        ([SENTENCE, "Well."], True),  # 9 words and 1: five each
        (["def f(x):\n    return g(x) if x else None"], True),
        (["\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17"], True),  # Japanese has no spaces
        (["q-000002", "q-000003"], False),
        (["https://example.org/1 https://example.org/2 https://a/b ftp://c/d s3://e/f"], False),
        (["Mon, 02 Jan 2020 10:00:00 GMT"], False),
        (["positive", "very negative"], False),
        (["0 1 2 3 4 5 6 7"], False),
        (["8f14e45fceea167a5a36dedd4bea2543 " * 2], False),
        (["QUJD" * 19 + "\n" + "REVG" * 19], False),  # Base64, 76 letters a line
        ([json.dumps([{"role": "user", "content": SENTENCE}])], False),
    ],
)
def test_strings_read_like_text_if_they_have_five_words_each(
    values: list[str], reads: bool
) -> None:
    from gsae_core.lm.tables import reads_like_text

    assert reads_like_text(values) == reads


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"content": SENTENCE, "text": SENTENCE, "tokens": [1, 2], "input_ids": [3]}, "input_ids"),
        ({"content": SENTENCE, "text": SENTENCE, "tokens": [1, 2]}, "tokens"),
        ({"content": SENTENCE, "text": "short", "tokens": ["a", "b"]}, "text"),
        ({"content": SENTENCE, "text": None, "id": "7"}, "content"),
        ({"n": 1, "body": SENTENCE, "messages": [{"role": "user"}]}, "body"),
    ],
)
def test_a_column_is_taken_by_its_name_before_its_looks(row: dict[str, Any], column: str) -> None:
    from gsae_core.lm.tables import pick_column

    assert pick_column([row]) == column


def test_a_column_is_judged_by_the_first_rows_and_not_by_one(tmp_path: Path) -> None:
    # Of 1, 9 and 5 words: five each.
    lines = [{"body": "w0"}, {"body": words(1, 10)}, {"body": words(10, 15)}]
    path = file(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    corpus = load(path)
    assert sorted(counted(corpus.train) + counted(corpus.held_out)) == list(range(15))


def test_a_column_chosen_for_a_folder_holds_for_its_last_small_file(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    file(folder / "1.jsonl", json.dumps({"body": words(0, 12)}))
    file(folder / "2.jsonl", json.dumps({"body": "w12"}))
    # 12 words, EOS, a word, EOS: five rows of three; the last one is held out.
    assert rows(load(folder).held_out)[-1] == [BOS, EOS, 12, EOS]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in {
        "a.txt": words(0, 12),
        "a.csv": f"text,n\n{words(0, 12)},1\n",
        "a.jsonl": json.dumps({"text": words(0, 12)}),
    }.items():
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert rows(load(path).held_out) == [[BOS, 0, 1, 2]]
        assert rows(load(path, text_column="text").held_out) == [[BOS, 0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "text", "row"),
    [
        ("a.csv", "text\nw1 w2\n", {"text": "w1 w2"}),
        ("a.csv", "a,b\n1,2\n", {"a": "1", "b": "2"}),
        ("a.csv", "a;b\n1,5;2,5\n", {"a": "1,5", "b": "2,5"}),
        ("a.csv", "a\tb\n1;2\t3\n", {"a": "1;2", "b": "3"}),
        ("a.csv", "a|b\n1|2\n", {"a": "1", "b": "2"}),
        ("a.csv", "a,b;c\n1,2;3\n", {"a": "1", "b;c": "2;3"}),  # as many: the usual one
        ("a.tsv", "text\nw1, w2\n", {"text": "w1, w2"}),
    ],
)
def test_what_a_header_has_most_of_delimits_the_fields_of_a_csv(
    tmp_path: Path, name: str, text: str, row: dict[str, str]
) -> None:
    from gsae_core.lm.tables import file_rows

    assert list(file_rows(file(tmp_path / name, text))) == [row]


def test_tokens_that_an_older_version_kept_of_another_reading_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.config import DataConfig
    from gsae_core.lm.readers import READ_ANEW, open_source

    def anew(path: Path | str, **fields: Any) -> bool:
        return open_source(DataConfig(source=str(path), **fields), 1000).stamp[-1] == READ_ANEW

    assert not anew(file(tmp_path / "a.txt", "w1"))
    assert anew(as_jsonl(tmp_path / "a.jsonl", ["w1"]))
    # A named column of the Hub is read as ever, so a run goes on with the tokens it began with.
    assert [anew("owner/name"), anew("owner/name", text_column="text")] == [True, False]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_packed_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a{kind}{suffix}"
    plain = as_jsonl(tmp_path / "plain", [words(0, 9)] * 40).read_bytes()
    path.write_bytes(PACKERS[suffix](plain)[:-3])
    assert refusal(path) == (
        f"expected UTF-8 text in {path}, got something else (Compressed file ended before the "
        "end-of-stream marker was reached): save it as UTF-8, unpack it or download it again"
    )
