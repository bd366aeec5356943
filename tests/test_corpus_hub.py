"""Data sets of the Hub as they are there, streamed from a Hub on loopback by the real library."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from corpora import WordTokenizer, counted, load, refusal, words
from hub_server import Hub

from gsae_core.config import DataConfig
from gsae_core.lm.corpus import Corpus, load_corpus
from gsae_core.presets import preset, presets


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pile(texts: list[str]) -> dict[str, bytes]:
    """Return the files of monology/pile-uncopyrighted, with few rows."""

    def rows(texts: list[str]) -> bytes:
        meta = {"pile_set_name": "Pile-CC"}
        lines = [json.dumps({"text": text, "meta": meta}) + "\n" for text in texts]
        return zstd.compress("".join(lines).encode())

    half, other = len(texts) // 2, ["w999"]
    return {
        "README.md": b"---\nlicense: other\n---\nThe Pile.",
        "train/00.jsonl.zst": rows(texts[:half]),
        "train/01.jsonl.zst": rows(texts[half:]),
        "val.jsonl.zst": rows(other),
        "test.jsonl.zst": rows(other),
    }


def openwebtext(texts: list[str]) -> dict[str, bytes]:
    """Return the files of Skylion007/openwebtext, with few rows: Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(texts: list[str]) -> bytes:
        out = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), out)
        return out.getvalue()

    half = len(texts) // 2
    return {
        "README.md": b"---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: train\n"
        b"    path: plain_text/train-*\n  default: true\n---\n",
        "plain_text/train-00000-of-00002.parquet": rows(texts[:half]),
        "plain_text/train-00001-of-00002.parquet": rows(texts[half:]),
    }


SHAPES = {"monology/pile-uncopyrighted": pile, "Skylion007/openwebtext": openwebtext}
STREAMED = [name for name in presets() if preset(name).config().data.source != "stdlib"]


def read(data: DataConfig) -> Corpus:
    """Return a corpus in rows as long as the preset's, of documents of 100 words."""
    return load_corpus(data, WordTokenizer(), n_tokens=4096, model_n_ctx=8192)


@pytest.mark.parametrize("name", STREAMED)
def test_each_preset_reads_a_data_set_shaped_like_its_own(
    name: str, hub: Hub, tmp_path: Path
) -> None:
    data = preset(name).config().data
    texts = [words(i % 8 * 100, i % 8 * 100 + 100) for i in range(120)]
    files = SHAPES[data.source](texts)
    hub.add(data.source, files, kind="datasets")
    streamed = read(data)
    assert streamed.n_ctx == data.n_ctx
    # Every hundredth word ends a document, and 0.05 of the sequences are held out.
    n_train = len(streamed.train)
    assert 4096 <= streamed.train.n_tokens < 4096 + streamed.n_ctx
    first = counted(streamed.train)[:200]
    # The first sequence is held out, so training starts n_ctx - 1 ids later; 101 ids a document.
    start = data.n_ctx - 1 if data.n_ctx else 0
    expected = [i for text in texts for i in [*(int(w[1:]) for w in text.split()), None]]
    assert first == [i for i in expected[start:] if i is not None][:200]
    # And downloaded, it is the same text, whatever else lies beside it.
    for path, content in files.items():
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(content)
    local = read(data.model_copy(update={"source": str(tmp_path / "set")}))
    assert local.train[:].ids.tolist() == streamed.train[:].ids.tolist()
    assert len(local.train) == n_train


def test_the_quick_preset_reads_what_every_python_has() -> None:
    assert set(presets()) - set(STREAMED) == {"quick"}
    assert preset("quick").config().data.source == "stdlib"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\xef\xbb\xbftext,label\n" + words(0, 12).encode() + b",1\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": words(0, 12)}).encode()),
        ("a.txt", b"\xef\xbb\xbf" + words(0, 12).encode()),
        ("a.jsonl.gz", gzip.compress(json.dumps({"text": words(0, 12)}).encode())),
    ],
)
def test_a_mark_is_no_text_on_the_hub_either(hub: Hub, name: str, content: bytes) -> None:
    hub.add("owner/name", {name: content}, kind="datasets")
    corpus = load("owner/name")
    assert counted(corpus.held_out) + counted(corpus.train) == list(range(12))


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_data_of_a_json_file_are_rows_on_the_hub_too(
    hub: Hub, indent: int | None
) -> None:
    held = {"version": "1", "data": [{"id": i, "text": f"w{2 * i} w{2 * i + 1}"} for i in range(6)]}
    hub.add("owner/name", {"a.json": json.dumps(held, indent=indent).encode()}, kind="datasets")
    corpus = load("owner/name")
    assert sorted(counted(corpus.held_out) + counted(corpus.train)) == list(range(12))
    texts = {"data": [f"w{i}" for i in range(12)]}
    hub.add("owner/texts", {"a.json": json.dumps(texts, indent=indent).encode()}, kind="datasets")
    corpus = load("owner/texts")
    assert sorted(counted(corpus.held_out) + counted(corpus.train)) == list(range(12))


def test_chats_in_a_column_data_are_chats_on_the_hub(hub: Hub) -> None:
    line = json.dumps({"id": "q-000002", "data": [{"role": "user", "content": "w1"}]})
    hub.add("owner/name", {"a.jsonl": f"{line}\n{line}\n".encode()}, kind="datasets")
    assert "got chats in column 'data': read chats" in refusal("owner/name")


MEND = "; name others, or mend the files in a folder"


@pytest.mark.parametrize(
    ("files", "settings", "sentence"),
    [
        (
            {"a.jsonl": b'{"id": "q-000002", "messages": [{"role": "user", "content": "w1"}]}\n'},
            {},
            "expected a column of text in owner/name, got chats in column 'messages': read chats "
            "by the model's chat template with --chat, or name a column of text with --text-column",
        ),
        (
            {"train.jsonl": b'{"text": "w1"}\n', "test.jsonl": b'{"text": "w2"}\n'},
            {"split": "nonsense"},
            "expected a data set, config and split that can be streamed, got owner/name and "
            "'nonsense': Bad split: nonsense. Available splits: ['train', 'test']" + MEND,
        ),
        (
            {"a.txt": "w1 w2".encode("utf-16")},
            {},
            "expected a data set, config and split that can be streamed, got owner/name and "
            "'train': 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
            + MEND,
        ),
        (
            {"a.jsonl.zst": zstd.compress(b'{"text": "w1"}\n' * 40)[:-3]},
            {},
            "expected a data set, config and split that can be streamed, got owner/name and "
            "'train': Compressed file ended before the end-of-stream marker was reached" + MEND,
        ),
        (
            {"a.jsonl.gz": gzip.compress(b"w1" * 40, mtime=0)[:10] + b"\xff" * 40},
            {},
            "expected a data set, config and split that can be streamed, got owner/name and "
            "'train': Error -3 while decompressing data: invalid block type" + MEND,
        ),
        (
            {"a.csv": f'text;label\n"{words(0, 12)}";"a, b"\n'.encode()},
            {},
            "expected fields between commas in the CSV files of owner/name, got the header "
            "'text;label': download them and name the folder, or a data set whose card has their "
            "`sep`",
        ),
    ],
)
def test_what_cannot_be_read_from_the_hub_is_one_sentence(
    hub: Hub, files: dict[str, bytes], settings: dict[str, Any], sentence: str
) -> None:
    hub.add("owner/name", files, kind="datasets")
    assert refusal("owner/name", **settings) == sentence


def test_a_web_data_set_on_the_hub_gives_its_text(hub: Hub, tmp_path: Path) -> None:
    from test_corpus_formats import tarred

    texts = tarred(tmp_path / "a.tar", {"1.txt": words(0, 6), "2.txt": words(6, 12)})
    hub.add("owner/texts", {"a.tar": texts.read_bytes()}, kind="datasets")
    rows = {f"{i}.json": json.dumps({"text": words(6 * i, 6 * i + 6)}) for i in range(2)}
    hub.add("owner/rows", {"b.tar": tarred(tmp_path / "b.tar", rows).read_bytes()}, kind="datasets")
    for name in ("owner/texts", "owner/rows"):
        corpus = load(name)
        # 6 words, EOS, 6 words, EOS: four rows of three.
        assert counted(corpus.held_out) + counted(corpus.train) == list(range(11))
