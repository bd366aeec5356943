"""Token arrays, saved and streamed data sets, the cache, and the sentence of every mistake."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import BOS, EOS, WordTokenizer, counted, file, load, refusal, rows, token_rows, words

from gsae_core.lm.catalog import BUNDLED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gsae_core" / "tokens"


# Token arrays


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_token_rows_of_the_right_length_stay_as_they_are(tmp_path: Path, bos: str) -> None:
    ids = [[BOS, 1, 2, 3, 4], [BOS, 5, 6, EOS, 7], [BOS, 8, 9, 10, 11]]
    corpus = load(token_rows(tmp_path / "a.jsonl", ids), n_ctx=None, bos=bos)
    assert (corpus.n_ctx, corpus.bos) == (5, True)
    assert rows(corpus.held_out) + rows(corpus.train) == ids
    assert counted(corpus.train) == [5, 6, 7, 8, 9, 10, 11]


def test_token_rows_without_bos_stay_as_they_are_unless_bos_is_asked_for(tmp_path: Path) -> None:
    path = token_rows(tmp_path / "a.jsonl", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    corpus = load(path, n_ctx=4)
    assert not corpus.bos
    assert rows(corpus.train) == [[5, 6, 7, 8], [9, 10, 11, 12]]
    packed = load(path, n_ctx=4, bos="always")
    assert rows(packed.held_out) == [[BOS, 1, 2, 3], [BOS, 11, 12, EOS]]
    assert rows(packed.train) == [[BOS, 4, EOS, 5], [BOS, 6, 7, 8], [BOS, EOS, 9, 10]]


def test_token_rows_of_other_lengths_are_packed_anew_without_their_own_bos_and_eos(
    tmp_path: Path,
) -> None:
    path = token_rows(tmp_path / "a.jsonl", [[BOS, 1, 2, 3, EOS], [BOS, 4, 5]])
    corpus = load(path, n_ctx=4)
    assert rows(corpus.held_out) + rows(corpus.train) == [[BOS, 1, 2, 3], [BOS, EOS, 4, 5]]


def test_padding_that_an_attention_mask_marks_is_dropped(tmp_path: Path) -> None:
    masks = [[1, 1, 0], [0, 1, 1], [1, 1, 1]]
    ids = [[1, 2, 0], [0, 3, 4], [5, 6, 7]]
    corpus = load(token_rows(tmp_path / "a.jsonl", ids, attention_mask=masks), n_ctx=3)
    # 1 2 | EOS 3 | 4 EOS | 5 6 | 7 EOS
    assert sorted(counted(corpus.train) + counted(corpus.held_out)) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_width_of_a_flat_file_is_the_vocabularys_or_its_sidecars(
    tmp_path: Path, dtype: str
) -> None:
    np.arange(1, 25, dtype=dtype).tofile(tmp_path / "a.bin")
    if dtype == "uint32":  # 1000 ids fit into uint16, which is what a bare file is read as
        file(tmp_path / "a.bin.json", '{"dtype": "uint32"}')
    corpus = load(tmp_path / "a.bin")
    assert rows(corpus.held_out)[0] == [BOS, 1, 2, 3]
    assert sorted(counted(corpus.train) + counted(corpus.held_out)) == list(range(1, 25))


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")]
)
def test_a_header_of_llm_c_is_understood(
    tmp_path: Path, magic: int, version: int, dtype: str
) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, 24
    ids = np.arange(1, 25, dtype=dtype)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + ids.tobytes())
    assert rows(load(tmp_path / "a.bin").held_out)[0] == [BOS, 1, 2, 3]


def test_numpy_arrays_are_one_text_or_a_row_a_document(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.arange(24))
    (tmp_path / "UPPER.NPY").write_bytes((tmp_path / "flat.npy").read_bytes())
    np.save(tmp_path / "rows.npy", np.arange(24).reshape(6, 4))
    for name in ("flat.npy", "UPPER.NPY"):
        assert rows(load(tmp_path / name).held_out)[0] == [BOS, 0, 1, 2]
    assert rows(load(tmp_path / "rows.npy").held_out)[0] == [0, 1, 2, 3]


# Data sets


def test_a_saved_data_set_is_read_whole_in_an_order_of_its_own(tmp_path: Path) -> None:
    import datasets

    texts = [words(10 * i, 10 * i + 9) for i in range(40)]
    saved = datasets.Dataset.from_dict({"text": texts, "n": list(range(40))})
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    corpus = load(tmp_path / "saved", n_ctx=11)  # BOS, 9 words and EOS: a row a document
    seen = counted(corpus.train) + counted(corpus.held_out)
    assert sorted(seen) == sorted(int(word[1:]) for text in texts for word in text.split())
    assert seen != sorted(seen)
    sentence = refusal(tmp_path / "saved", split="validation")
    assert sentence == (
        f"expected a split 'validation' in {tmp_path / 'saved'}, found train, test: name one that "
        "is there with --split, or `all`"
    )
    every = load(tmp_path / "saved", n_ctx=11, split="all")
    assert every.train.n_tokens + every.held_out.n_tokens == 2 * len(seen)


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])  # SAELens', TransformerLens'
def test_a_saved_data_set_is_read_alike_whatever_library_it_remembers(
    tmp_path: Path, kind: str, column: str
) -> None:
    import datasets

    ids = [[BOS, 3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
    saved = datasets.Dataset.from_dict({column: ids, "n": list(range(8))})
    saved.save_to_disk(tmp_path / "plain")
    saved.set_format(kind, columns=[column])
    saved.save_to_disk(tmp_path / "kind")
    plain, read = load(tmp_path / "plain"), load(tmp_path / "kind")
    assert rows(read.train) == rows(plain.train)
    assert rows(load(tmp_path / "kind", text_column=column).train) == rows(plain.train)
    assert sorted(rows(read.train) + rows(read.held_out)) == ids


class HubStream:
    """Rows of five tokens; knows how many were taken, and what it was asked for."""

    info = SimpleNamespace(builder_name="json")

    def __init__(self) -> None:
        self.taken, self.asked = 0, {}

    def load(self, path: str, name: str | None, **options: Any) -> "HubStream":
        self.asked = {"path": path, "name": name, **options}
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i in range(10**6):
            self.taken += 1
            yield {"text": words(5 * i % 800, 5 * i % 800 + 5)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HubStream:
    stream = HubStream()
    monkeypatch.setattr("datasets.load_dataset", stream.load)
    return stream


def test_a_stream_is_read_as_far_as_needed_and_kept(hub: HubStream) -> None:
    corpus = load("owner/name:config", n_tokens=3000, held_out=0.1, split="validation")
    assert hub.asked == {
        "path": "owner/name",
        "name": "config",
        "split": "validation",
        "streaming": True,
    }
    # Rows of 3 ids, one in six EOS; the last row may carry one token too many or two.
    assert 3000 <= corpus.train.n_tokens <= 3002
    # 3000 / 0.9 = 3334 tokens are 667 documents of 5; a last block of 4096 characters is 170 more.
    assert 667 <= hub.taken <= 667 + 171
    taken = hub.taken
    again = load("owner/name:config", n_tokens=3000, held_out=0.1, split="validation")
    fewer = load("owner/name:config", n_tokens=500, held_out=0.1, split="validation")
    assert hub.taken == taken
    assert rows(again.train) == rows(corpus.train)
    assert rows(fewer.train) == rows(corpus.train)[: len(fewer.train)]


def test_a_stream_is_read_on_for_held_out_tokens_and_that_is_kept(hub: HubStream) -> None:
    short = load("owner/name", n_tokens=500, held_out=0.1)
    assert short.held_out.n_tokens < 80
    longer = load("owner/name", n_tokens=500, held_out=0.1, n_held_out=400)
    assert 400 <= longer.held_out.n_tokens <= 402
    assert rows(longer.held_out)[: len(short.held_out)] == rows(short.held_out)
    assert (rows(longer.train), longer.digest) == (rows(short.train), short.digest)
    taken = hub.taken
    # A tenth of the rows is held out: 4000 tokens, 800 documents of 5, and a last block.
    assert taken < 2000
    again = load("owner/name", n_tokens=500, held_out=0.1, n_held_out=300)
    assert rows(again.held_out) == rows(longer.held_out)[: len(again.held_out)]
    assert hub.taken == taken
    # A run in one go ends with what two readings came to.
    assert (
        rows(load("owner/name", n_tokens=2000, held_out=0.1).train)[:10] == rows(short.train)[:10]
    )


def test_out_of_reach_a_stream_says_how_many_held_out_tokens_were_read(
    hub: HubStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load("owner/name", n_tokens=500, held_out=0.1, n_held_out=300)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr("datasets.load_dataset", offline)
    said = refusal("owner/name", n_tokens=500, held_out=0.1, n_held_out=10**5)
    start, n = said.split("; or ask for no more held-out tokens than were read before, ")
    assert start.endswith("use `stdlib` or a local file")
    again = load("owner/name", n_tokens=500, held_out=0.1, n_held_out=int(n))
    assert again.held_out.n_tokens == int(n) >= 300
    assert rows(again.train) == rows(before.train)


# The cache


def test_tokens_are_kept_and_found_until_text_tokenizer_or_settings_change(
    tmp_path: Path, cache: Path
) -> None:
    path = file(tmp_path / "a.txt", words(0, 900))
    first = WordTokenizer()
    before = rows(load(path, first).train)
    assert first.n_tokenised == 900
    second = WordTokenizer()
    assert rows(load(path, second).train) == before
    assert second.n_tokenised == 0
    assert load(path, second, n_tokens=50).train.n_tokens == 51  # a prefix of what is kept
    assert second.n_tokenised == 0
    for changed in (WordTokenizer(eos=None), WordTokenizer(bos=7)):
        load(path, changed)
        assert changed.n_tokenised == 900
    load(path, second, n_ctx=5)
    load(path, second, bos="never")
    assert second.n_tokenised == 1800
    file(path, words(0, 899))
    load(path, second)
    assert second.n_tokenised == 2699
    assert not list(cache.glob("*.tmp"))


def test_a_short_reading_does_not_pass_for_a_long_one(tmp_path: Path) -> None:
    path = file(
        tmp_path / "a.jsonl", "\n".join(json.dumps({"text": words(0, 900)}) for _ in "abcd")
    )
    tokenizer = WordTokenizer()
    load(path, tokenizer, n_tokens=600)
    assert tokenizer.n_tokenised == 900
    assert load(path, tokenizer).train.n_tokens > 2600
    assert tokenizer.n_tokenised == 900 + 3600


def test_a_cache_that_cannot_be_written_costs_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file(tmp_path / "not-a-folder", "")))
    with caplog.at_level(logging.WARNING):
        assert load(file(tmp_path / "a.txt", words(0, 900))).train.n_tokens > 600
    assert "no token cache, so tokens stay in memory" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_says_where_the_room_is_missing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tempfile.mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "tmp"))
    )
    sentence = refusal(file(tmp_path / "a.txt", words(0, 900)))
    assert sentence.startswith(f"expected 2.4 kB free for {cache}, found ")
    assert sentence.endswith("; make room on the disk and resume the run")
    assert not list(cache.iterdir())


def test_the_real_tokenizer_reads_texts_longer_than_its_model_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    text = "def one():\n    return 1\n" * 300
    corpus = load(file(tmp_path / "a.py", text), tokenizer, n_ctx=None, model_n_ctx=256)
    ids = np.array(rows(corpus.held_out) + rows(corpus.train))
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert text.startswith(tokenizer.decode(ids[0, 1:]))
    assert not caplog.records
