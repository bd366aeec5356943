"""Data sets of the Hub as they are there, streamed from a Hub on loopback by the real library."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
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
        return zstandard.compress("".join(lines).encode())

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
        ("a.csv", b'text;label\n"' + words(0, 12).encode() + b'";"a, b"\n'),
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": words(0, 12)}).encode()),
        ("a.txt", b"\xef\xbb\xbf" + words(0, 12).encode()),
        ("a.jsonl.gz", gzip.compress(json.dumps({"text": words(0, 12)}).encode())),
    ],
)
def test_a_mark_and_semicolons_are_no_text_on_the_hub_either(
    hub: Hub, name: str, content: bytes
) -> None:
    hub.add("owner/name", {name: content}, kind="datasets")
    corpus = load("owner/name")
    assert counted(corpus.held_out) + counted(corpus.train) == list(range(12))


@pytest.mark.parametrize(
    ("files", "settings", "sentence"),
    [
        (
            {"a.jsonl": b'{"id": "q-000002", "messages": [{"role": "user", "content": "w1"}]}\n'},
            {},
            "expected a column of text in owner/name, found id (strings such as 'q-000002'), "
            "messages (chats: lists of {role, content}): none of these is a column of text; write "
            "the text out as one, each chat by the model's chat template",
        ),
        (
            {"a.csv": f"1,{words(0, 12)}\n2,{words(20, 29)}\n".encode()},
            {"text_column": "text"},
            "expected a column 'text' in owner/name (its first row is read as the header), found 1 "
            "(numbers), w0 w1 w2 w3 w4 w5 w6 w7 w8 w9\u2026 (text such as 'w20 w21 w22 w23 w24 w25 "
            "w26 w\u2026'): name one of these with --text-column",
        ),
        (
            {"train.jsonl": b'{"text": "w1"}\n', "test.jsonl": b'{"text": "w2"}\n'},
            {"split": "nonsense"},
            "expected a data set, config and split that can be streamed, got owner/name and "
            "'nonsense': Bad split: nonsense. Available splits: ['train', 'test']",
        ),
        (
            {"a.txt": "w1 w2".encode("utf-16")},
            {},
            "expected UTF-8 text in the files of owner/name, got something else ('utf-8' codec "
            "can't decode byte 0xff in position 0: invalid start byte); download and convert them, "
            "or choose another data set",
        ),
    ],
)
def test_what_cannot_be_read_from_the_hub_is_one_sentence(
    hub: Hub, files: dict[str, bytes], settings: dict[str, Any], sentence: str
) -> None:
    hub.add("owner/name", files, kind="datasets")
    assert refusal("owner/name", **settings) == sentence


def test_a_missing_zstandard_is_one_sentence_for_the_hub_too(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.compression import compr

    hub.add("monology/pile-uncopyrighted", pile(["w1", "w2"]), kind="datasets")
    known: Any = compr
    monkeypatch.delitem(known, "zstd")  # as it is where fsspec found nothing to import
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert refusal("monology/pile-uncopyrighted") == (
        "expected the package zstandard to unpack the files of monology/pile-uncopyrighted, found "
        "it not installed; pip install -r requirements.txt"
    )
