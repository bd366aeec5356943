"""Text as it comes: archives, encodings, chats, separators, padding, long lines, odd numbers."""

import bz2
import io
import json
import logging
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from corpora import BOS, EOS, WordTokenizer, counted, file, load, refusal, rows, token_rows, words
from refusals import refusal as refused

from gsae_core.config import DataConfig, load_config, validated
from gsae_core.errors import InputError
from gsae_core.lm.corpus import Corpus
from gsae_core.lm.packed import LONG_LINE, LONG_ROW, PART, parts_of, text_parts
from gsae_core.lm.readers import open_source
from gsae_core.lm.tables import file_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class PaddedTokenizer(WordTokenizer):
    """Has a padding token, 902, and calls the end of a text `</s>`."""

    eos_token = "</s>"

    def __init__(self, pad: int | None = 902) -> None:
        super().__init__()
        self.pad_token_id = pad


def seen(corpus: Corpus) -> list[int]:
    """Return every counted token, in the order of the text where nothing is held out of it."""
    return sorted(counted(corpus.train) + counted(corpus.held_out))


def documents(source: Path, *, end_of_text: str | None = None, **settings: Any) -> list[str]:
    """Return the documents of a source as they are read."""
    cfg = DataConfig(source=str(source), **settings)
    found, text = [], ""
    for part in open_source(cfg, 1000, end_of_text=end_of_text).train():
        text += str(part.content)
        if part.ends:
            found.append(text)
            text = ""
    assert not text
    return found


# Archives


def zipped(path: Path, contents: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return path


def tarred(path: Path, contents: dict[str, str]) -> Path:
    bare = io.BytesIO()
    with tarfile.open(fileobj=bare, mode="w") as archive:
        for name, text in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".bz2": bz2.compress,
        ".txz": lzma.compress,
        ".zst": zstd.compress,
    }
    path.write_bytes(packers.get(path.suffix, bytes)(bare.getvalue()))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.bz2", "a.txz", "a.tar.zst"])
def test_an_archive_is_read_file_by_file(tmp_path: Path, name: str) -> None:
    pack = zipped if name.endswith(".zip") else tarred
    texts = {"deep/b.txt": "w1 w2", "a.txt": "w3", ".git/c.txt": "w9", "d.png": "\0"}
    assert documents(pack(tmp_path / name, texts)) == ["w1 w2", "w3"]
    tables = {
        "1.jsonl": '{"text": "w1"}\n{"text": "w2"}\n',
        "2.jsonl": '{"text": "w3"}\n',
        "n.txt": "w9",
    }
    assert documents(pack(tmp_path / f"t-{name}", tables)) == ["w1", "w2", "w3"]
    code = {"a.py": "w1 = w2", "b.md": "w3", "c.png": "\0"}
    assert documents(pack(tmp_path / f"c-{name}", code)) == ["w1 = w2", "w3"]


def test_shards_of_a_web_data_set_give_their_texts_or_their_json(tmp_path: Path) -> None:
    captions = tmp_path / "captions"
    captions.mkdir()
    for shard in range(2):
        sample = {
            f"{shard}.jpg": "\0",
            f"{shard}.json": '{"url": "https://x", "caption": "w9"}',
            f"{shard}.txt": f"w{shard}",
        }
        tarred(captions / f"{shard:06d}.tar", sample)
    assert documents(captions) == ["w0", "w1"]
    assert documents(captions, text_column="caption") == ["w9", "w9"]
    pile = {f"{i}.json": json.dumps({"text": f"w{i}", "meta": {}}, indent=1) for i in range(3)}
    assert documents(tarred(tmp_path / "pile.tar", pile)) == ["w0", "w1", "w2"]


def test_a_damaged_archive_or_one_with_a_password_is_a_sentence(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar"):
        path = file(tmp_path / name, "not an archive")
        assert refusal(path).startswith(f"expected an archive in {path}, got something else: ")
    path = zipped(tmp_path / "b.zip", {"a.txt": "w1"})
    # Bit 0 of the flags, in the entry and in the directory.
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    path.write_bytes(data)
    assert refusal(path) == (
        f"expected an archive without a password in {path}, got a.txt encrypted: unpack it"
    )


# Tables


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_tables(tmp_path: Path, new: Any) -> None:
    table = pa.table({"text": [f"w{i}" for i in range(600)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    assert documents(tmp_path / "a.arrow") == [f"w{i}" for i in range(600)]
    (tmp_path / "b.arrow.zst").write_bytes(zstd.compress((tmp_path / "a.arrow").read_bytes()))
    assert documents(tmp_path / "b.arrow.zst")[-1] == "w599"
    broken = file(tmp_path / "c.arrow", "no")
    assert refusal(broken).startswith(f"expected Arrow in {broken}, got something else: ")


def test_parquet_is_read_packed_and_beside_dates_that_python_lacks(tmp_path: Path) -> None:
    far = pa.array([2**50], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["w1"], "when": far}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["w1"]
    (tmp_path / "a.parquet.xz").write_bytes(lzma.compress((tmp_path / "a.parquet").read_bytes()))
    assert documents(tmp_path / "a.parquet.xz") == ["w1"]
    bad = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    said = refusal(tmp_path / "b.parquet")
    assert said.startswith(f"expected Parquet in {tmp_path / 'b.parquet'}, got something else: ")
    assert "utf-8" in said


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [{"text": "w1"}, {"text": "w2"}]}',
        '{\n "version": 1,\n "data": [\n  {"text": "w1"},\n  {"text": "w2"}\n ]\n}\n',
        '{"data": ["w1", "w2"]}',
    ],
)
def test_rows_under_data_are_the_rows_of_a_json_file(tmp_path: Path, text: str) -> None:
    assert documents(file(tmp_path / "a.json", text)) == ["w1", "w2"]


def test_an_object_with_text_of_its_own_is_a_row_whatever_data_it_has(tmp_path: Path) -> None:
    row = {"text": "w1", "data": [{"text": "w2"}]}
    assert list(file_rows(file(tmp_path / "a.json", json.dumps(row, indent=1)))) == [row]


def test_empty_rows_in_front_decide_nothing(tmp_path: Path) -> None:
    empty = ["{}", "null", '{"body": ""}', '{"body": null}'] * 20
    text = json.dumps({"body": words(0, 12)})
    assert documents(file(tmp_path / "a.jsonl", "\n".join([*empty, text]))) == [words(0, 12)]
    assert documents(file(tmp_path / "a.csv", "\n\r\ntext,n\nw1,2\n")) == ["w1"]
    assert documents(token_rows(tmp_path / "b.jsonl", [[], [1, 2]])) == ["[1 2]"]


def test_rows_with_other_columns_are_read_under_the_names_that_are_known_or_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = [
        {"text": "w1"},
        {"content": "w2"},
        {"id": 3},
        {"tokens": [4], "id": 4},
        {"n": 1, "text": "w5"},
    ]
    path = file(tmp_path / "a.jsonl", "\n".join(map(json.dumps, told)))
    assert documents(path) == ["w1", "w2", "[4]", "w5"]
    assert f"{path}: left out 1 rows without anything in 'tokens'" in caplog.text
    caplog.clear()
    assert documents(path, text_column="text") == ["w1", "w5"]
    assert f"{path}: left out 3 rows without anything in 'text'" in caplog.text


def test_columns_of_identifiers_or_addresses_are_no_text(tmp_path: Path) -> None:
    told = [
        [{"source": "sharegpt", "conversations": SHARED}],
        # Which of two is the text is not guessed, nor by what one row lacks.
        [{"url": f"http://x/{i}", "body": words(0, 9) if i else None} for i in range(40)],
    ]
    path = tmp_path / "a.jsonl"
    chats, addresses = (refusal(file(path, "\n".join(map(json.dumps, each)))) for each in told)
    assert "got chats in column 'conversations'" in chats
    assert "got rows such as {'body': None, 'url': 'http://x/0'}" in addresses


def test_a_column_of_words_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl", json.dumps({"id": "7", "tokens": ["a", "dog"]}))
    shown = "{'id': '7', 'tokens': ['a', 'dog']}"
    assert refusal(path).startswith(
        f"expected a column of text in {path}, got rows such as {shown}"
    )
    assert refusal(path, text_column="tokens").startswith(
        f"expected text or token ids in column 'tokens' in {path}, got rows such as {shown}"
    )


def test_a_csv_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path / "a.csv", "text,text\nw1,w2\n")
    assert refusal(path) == (
        f"expected a name for each column of {path}, got 'text' twice: rename one"
    )
    # Columns without a name are an index, or empty.
    assert documents(file(tmp_path / "b.csv", ",text,\n0,w1,\n")) == ["w1"]


def test_a_number_of_5000_digits_is_a_sentence(tmp_path: Path) -> None:
    path = file(tmp_path / "a.jsonl", '{"text": "w1"}\n{"n": ' + "9" * 5000 + "}")
    start = f"expected JSON in row 2 of {path}, got something else: Exceeds the limit (4300 digits)"
    assert refusal(path).startswith(start)


# Encodings and names


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_text_is_read_by_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    for name, text in {
        "a.txt": words(0, 12),
        "a.csv": f"text,n\r\n{words(0, 12)},1\r\n",
        "a.jsonl": json.dumps({"text": words(0, 12)}),
    }.items():
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        assert documents(path) == [words(0, 12)]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes("é 漢".encode(encoding))
    assert documents(tmp_path / "folder") == ["é 漢"]
    (tmp_path / "half.txt").write_bytes(words(0, 12).encode("utf-16")[:-1])
    assert refusal(tmp_path / "half.txt").startswith("expected UTF-8 text in ")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_files_whose_names_are_not_utf_8_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    file(folder / name, words(0, 12))
    assert seen(load(folder)) == list(range(12))
    # A config, which is JSON, could not name the file itself.
    with pytest.raises(InputError) as error:
        validated(DataConfig, {"source": str(folder / name)})
    assert str(error.value) == (
        "source: expected a name in UTF-8: rename it, or name the folder that it is in, got "
        f"{str(folder / name)!r}"
    )


# Chats

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
SHARED = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]


class ChattingTokenizer(PaddedTokenizer):
    """Writes `w900` (BOS), `w20` before a user's words and `w21` before others', `w901` (EOS)."""

    def get_chat_template(self) -> str:
        return "the template"

    def apply_chat_template(self, chat: list[dict[str, Any]], *, tokenize: bool) -> str:
        assert not tokenize
        if chat[0]["role"] == "tool":
            raise ValueError("a chat begins with the user")
        marks = {"user": "w20"}
        said = [f"{marks.get(each['role'], 'w21')} {each['content']}" for each in chat]
        return " ".join(["w900", *said, "w901"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "id": "q-1"},
        {"conversations": SHARED},
        {"conversations": {"from": ["human", "gpt"], "value": ["w1 w2", "w3"]}},
        {"messages": [message | {"name": None} for message in CHAT], "text": "w9"},
        {"other": CHAT},
    ],
)
def test_a_chat_is_read_as_the_template_writes_it(tmp_path: Path, row: dict[str, Any]) -> None:
    path = file(tmp_path / "a.jsonl", "\n".join([json.dumps(row)] * 2))
    corpus = load(path, ChattingTokenizer(), chat=True, n_ctx=7)
    # BOS and EOS stand where packing puts them, once; markers of the template count.
    assert rows(corpus.held_out) == [[BOS, 20, 1, 2, 21, 3, EOS]]
    assert rows(corpus.train) == [[BOS, 20, 1, 2, 21, 3, EOS]]
    assert counted(corpus.train) == [20, 1, 2, 21, 3]


def test_a_named_column_of_chats_is_read(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "w9"}], "chosen": CHAT}
    path = file(tmp_path / "a.jsonl", "\n".join([json.dumps(row)] * 3))
    corpus = load(path, ChattingTokenizer(), chat=True, n_ctx=7, text_column="chosen")
    assert 9 not in seen(corpus)
    assert {20, 1, 2, 21, 3} == set(seen(corpus))


def test_what_is_wrong_with_chats_is_a_sentence(tmp_path: Path) -> None:
    how = (
        "read chats by the model's chat template with --chat, or name a column of text with "
        "--text-column"
    )
    chats = file(tmp_path / "a.jsonl", json.dumps({"id": "q-1", "messages": CHAT}))
    assert refusal(chats) == (
        f"expected a column of text in {chats}, got chats in column 'messages': {how}"
    )
    assert refusal(chats, text_column="messages") == (
        f"expected text or token ids in column 'messages' in {chats}, got a chat: {how}"
    )
    assert refusal(chats, chat=True) == (
        "expected a tokenizer with a chat template for --chat, got one without (WordTokenizer): "
        "take the instruction-tuned model, put its chat_template.jinja into the model's folder, or "
        "leave out --chat"
    )
    table = file(tmp_path / "b.jsonl", json.dumps({"text": "w1", "tags": ["a"]}))
    assert refusal(table, ChattingTokenizer(), chat=True) == (
        f"expected a column of chats in {table}, got rows such as {{'tags': ['a'], 'text': 'w1'}}: "
        "name a column of text with --text-column, or write the text out as one"
    )
    odd = file(tmp_path / "c.jsonl", json.dumps({"messages": [{"role": "tool", "content": "w1"}]}))
    assert refusal(odd, ChattingTokenizer(), chat=True) == (
        f"expected chats that the model's chat template takes in {odd}, got one of tool (a chat "
        "begins with the user): mend or leave out such rows, or take another model"
    )
    text = file(tmp_path / "a.txt", words(0, 12))
    assert refusal(text, ChattingTokenizer(), chat=True) == (
        f"expected a table with chats for --chat, got text in {text}: leave out --chat"
    )


def test_chats_beside_a_column_that_reads_like_text_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file(tmp_path / "a.jsonl", json.dumps({"prompt": words(0, 12), "messages": CHAT}))
    assert documents(path) == [words(0, 12)]
    assert f"{path}: column 'prompt' is read; --chat reads the chats in 'messages'" in caplog.text


def test_a_real_template_writes_special_tokens_that_are_read_as_such(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from gsae_core.lm.catalog import BUNDLED
    from gsae_core.lm.preview import preview

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    end = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}" + end + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    for name in ("config.json",):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_bytes((BUNDLED / name).read_bytes())
    tokenizer.save_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "def f():"}, {"role": "assistant", "content": "pass"}]
    path = file(tmp_path / "a.jsonl", json.dumps({"messages": chat}) * 1)
    found = preview(DataConfig(source=str(path), chat=True), str(tmp_path / "model"))
    line = found.lines[0]
    # A special token is one token, where it stands.
    assert [line.index(end), line.count(end)] == [0, 2]
    assert "".join(line) == f"{end}user: def f():\n{end}assistant: pass\n"
    again = file(tmp_path / "b.jsonl", "\n".join([json.dumps({"messages": chat})] * 9))
    corpus = load(again, AutoTokenizer.from_pretrained(tmp_path / "model"), chat=True, n_ctx=8)
    text = tokenizer.decode(np.concatenate([corpus.held_out[0:1].ids[0], corpus.train[0:1].ids[0]]))
    assert text.startswith(f"{end}user: def f():\n")


# Lines that end a document


def test_lines_of_end_of_text_part_the_documents_of_a_txt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "w1\nw2\n<|endoftext|>\r\n\n<|endoftext|> \nw3 <|endoftext|>\n</s>\nw4\n<|endoftext|>"
    path = file(tmp_path / "a.txt", text)
    with caplog.at_level(logging.INFO):
        found = documents(path, end_of_text="</s>")
    assert found == ["w1\nw2\n", "w3 <|endoftext|>\n", "w4\n"]
    assert caplog.text.count(f"{path}: lines in it end documents; --separator says which") == 1
    assert documents(path)[1] == "w3 <|endoftext|>\n</s>\nw4\n"
    for off in ({"separator": "none"}, {"reading": 1}):
        assert documents(path, end_of_text="</s>", **off) == [text]
    # Source code that has such a line is code.
    assert documents(file(tmp_path / "a.py", text)) == [text]


def test_a_line_of_ones_own_parts_every_kind_of_text(tmp_path: Path) -> None:
    text = "w1\n---\nw2 ---\n<|endoftext|>\n---\nw3"
    for name in ("a.txt", "a.md"):
        found = documents(file(tmp_path / name, text), separator="---")
        assert found == ["w1\n", "w2 ---\n<|endoftext|>\n", "w3"]
    archive = zipped(tmp_path / "a.zip", {"a.txt": text})
    assert documents(archive) == ["w1\n---\nw2 ---\n", "---\nw3"]


@pytest.mark.parametrize("line", ["", "\n", "--\n--", "--\r"])
def test_what_ends_documents_is_one_line(line: str) -> None:
    told = refused(lambda: validated(DataConfig, {"separator": line}, {"separator": "--separator"}))
    assert told == (
        "--separator: expected one line of text, or none where no line ends a document, got "
        f"{line!r}"
    )


def test_a_line_is_refused_where_documents_are_told_in_another_way(tmp_path: Path) -> None:
    np.arange(24, dtype="uint16").tofile(tmp_path / "a.bin")
    table = json.dumps({"text": "w1"})
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        file(tmp_path / "saved" / name, "{}")
    for source, kind in {
        tmp_path / "a.bin": "token ids",
        file(tmp_path / "t.jsonl", table): "a table",
        zipped(tmp_path / "t.zip", {"t.jsonl": table}): "a table",
        tmp_path / "saved": "a table",
        "owner/name": "a data set on the Hub",
        "stdlib": "files that are a document each",
    }.items():
        assert refusal(source, separator="---") == (
            f"expected plain text for --separator, got {kind} in {source}: leave out --separator"
        )
    assert counted(load(tmp_path / "a.bin", separator="none").train)


def test_a_document_may_end_in_another_part_than_it_began(tmp_path: Path) -> None:
    lines = [f"w{i}" if i % 10 else "<|endoftext|>" for i in range(1, 100)]
    path = file(tmp_path / "a.txt", "\n".join(lines))
    for size in (1, 7, 50):
        parts = list(text_parts(path, size, ("<|endoftext|>",)))
        texts = "".join(str(part.content) + "|" * part.ends for part in parts)
        assert texts.split("|")[:-1] == [
            "".join(f"w{i}\n" for i in range(start, min(start + 9, 100)) if i % 10).removesuffix(
                "\n" if start > 90 else ""
            )
            for start in range(1, 100, 10)
        ]


def test_documents_that_lines_part_are_separated_by_eos(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", "w1 w2\n<|endoftext|>\nw3\n</s>\nw4 w5 w6 w7 w8\n")
    corpus = load(path, PaddedTokenizer(), n_ctx=5)
    assert rows(corpus.held_out) + rows(corpus.train) == [[BOS, 1, 2, EOS, 3], [BOS, EOS, 4, 5, 6]]


def test_earlier_runs_read_their_text_as_they_did(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", "w1\n")
    spec = {"name": "a", "architecture": "gated", "d_sae": 8, "sparsity": 0.1}
    old = {"saes": [spec], "train": {"n_tokens": 4096}, "data": {"source": str(path)}}
    cfg = load_config(file(tmp_path / "config.json", json.dumps(old)))
    assert cfg.data.reading == 1
    new = load_config(
        file(
            tmp_path / "new.json",
            cfg.model_copy(update={"data": DataConfig(source=str(path))}).model_dump_json(),
        )
    )
    assert new.data.reading == 2

    def stamp(source: Path | str, reading: int, **settings: Any) -> tuple[str, ...]:
        cfg = DataConfig.model_validate({"source": str(source), "reading": reading, **settings})
        return open_source(cfg, 1000).stamp

    # Of what is read as ever the tokens that were kept are found.
    code = file(tmp_path / "a.py", "w1")
    assert stamp(path, 1) != stamp(path, 2)
    assert stamp(path, 1) == stamp(path, 2, separator="none")
    assert stamp(code, 1) == stamp(code, 2)
    assert stamp("owner/name", 1, text_column="text") == stamp("owner/name", 2, text_column="text")
    assert stamp("owner/name", 1) != stamp("owner/name", 2)
    # Nor does a folder have files in it that were left out.
    folder = tmp_path / "folder"
    folder.mkdir()
    file(folder / "a.txt", "w1")
    (folder / "b.txt").write_bytes("w2".encode("utf-16"))
    for name in ("c.zip", "d.zip", "e.zip"):
        zipped(folder / name, {"c.txt": "w3"})
    assert documents(folder, reading=1) == ["w1"]
    assert documents(folder) == ["w3"] * 3


# Token ids


def test_padding_at_the_ends_of_token_rows_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [[1, 2, 902, 902], [902, 3, 4, 5], [6, 902, 7, 8], [902] * 4, [9, 10, 11, 902]]
    path = token_rows(tmp_path / "a.jsonl", ids)
    with caplog.at_level(logging.INFO):
        corpus = load(path, PaddedTokenizer(), n_ctx=5)
    # 1 2 EOS 3 | 4 5 EOS 6 | 902 7 8 EOS | 9 10 11 EOS
    assert rows(corpus.held_out) + rows(corpus.train) == [
        [BOS, 1, 2, EOS, 3],
        [BOS, 4, 5, EOS, 6],
        [BOS, 902, 7, 8, EOS],
        [BOS, 9, 10, 11, EOS],
    ]
    assert caplog.text.count(f"{path}: padding at the ends of rows (id 902) is left out") == 1
    # As an earlier version read them: every row as it is, padding uncounted.
    assert rows(load(path, PaddedTokenizer(), n_ctx=4, reading=1).held_out) == [ids[0], ids[4]]


@pytest.mark.parametrize("pad", [None, EOS])
def test_where_eos_pads_two_of_them_are_padding_and_one_is_the_end(
    tmp_path: Path, pad: int | None
) -> None:
    path = token_rows(tmp_path / "a.jsonl", [[1, 2, EOS, EOS], [3, 4, 5, EOS]])
    corpus = load(path, PaddedTokenizer(pad), n_ctx=4)
    # 1 2 EOS | 3 4 5 | EOS left over
    assert rows(corpus.held_out) + rows(corpus.train) == [[BOS, 1, 2, EOS], [BOS, 3, 4, 5]]
    whole = token_rows(tmp_path / "b.jsonl", [[1, 2, 3, EOS], [4, 5, 6, EOS]])
    kept = load(whole, PaddedTokenizer(pad), n_ctx=4)
    assert rows(kept.held_out) + rows(kept.train) == [[1, 2, 3, EOS], [4, 5, 6, EOS]]


def test_a_padded_row_after_whole_ones_stays_a_row(tmp_path: Path) -> None:
    ids = [[1, 2, 3, 4]] * 70 + [[5, 6, 902, 902]]
    corpus = load(token_rows(tmp_path / "a.jsonl", ids), PaddedTokenizer(), held_out=0.01)
    assert rows(corpus.train)[-1] == [5, 6, 902, 902]
    assert corpus.train.counts[-1] == 2


def test_whole_numbers_are_ids_also_as_floats(tmp_path: Path) -> None:
    path = token_rows(tmp_path / "a.jsonl", [[1.0, 2.0, 3.0, 4.0], [5, 6.0, 7, 8]])  # type: ignore
    assert seen(load(path)) == list(range(1, 9))
    np.save(tmp_path / "a.npy", np.arange(24.0))
    assert rows(load(tmp_path / "a.npy").held_out)[0] == [BOS, 0, 1, 2]
    np.save(tmp_path / "b.npy", np.arange(24) + 0.5)
    assert refusal(tmp_path / "b.npy") == (
        f"expected token ids in {tmp_path / 'b.npy'}, got numbers that are not whole"
    )


@pytest.mark.parametrize(
    ("ids", "wrong"), [([1, 2.5], "2.5"), ([1, True], "True"), ([1, float("inf")], "inf")]
)
def test_what_is_no_whole_number_is_no_id(tmp_path: Path, ids: list[Any], wrong: str) -> None:
    path = token_rows(tmp_path / "a.jsonl", [ids])
    assert refusal(path, text_column="input_ids").startswith(
        f"expected text or token ids (whole numbers, {wrong} is none) in column 'input_ids' in "
    )


def test_an_id_beyond_64_bits_is_beyond_the_vocabulary(tmp_path: Path) -> None:
    assert refusal(token_rows(tmp_path / "a.jsonl", [[1, 2**70]])).startswith(
        f"expected token ids from 0 to 999, got {2**70}"
    )


@pytest.mark.parametrize("mask", [[1, 1], [[1], [1], [0]], [1, -1, 0], "110", [1, 0.5, 0]])
def test_a_mask_that_hides_nothing_in_particular_is_refused(tmp_path: Path, mask: Any) -> None:
    path = token_rows(tmp_path / "a.jsonl", [[1, 2, 3]], attention_mask=[mask])
    assert refusal(path) == (
        "expected an attention_mask of 3 numbers, as many as token ids, 0 where one is left out, "
        f"in {path}, got {mask!r}: mend it, or leave the column out"
    )


def test_masks_of_any_kind_of_number_hide_zeros_and_a_missing_one_nothing(tmp_path: Path) -> None:
    ids = [[1, 2, 9], [3, 4, 9], [5, 6, 7], [9, 9, 9]]
    masks = [[True, True, False], [1.0, 2, 0], None, [0, 0, 0]]
    path = token_rows(tmp_path / "a.jsonl", ids, attention_mask=masks)
    assert sorted({*seen(load(path))}) == [1, 2, 3, 4, 5, 6, 7]


def test_npz_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    ids, mask = np.arange(24).reshape(6, 4), np.ones((6, 4), bool)
    mask[0, 0] = False
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
    assert rows(load(tmp_path / "a.npz").held_out)[0] == [BOS, 1, 2, 3]
    np.savez_compressed(tmp_path / "b.npz", ids)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    assert rows(load(tmp_path / "b.npy").held_out)[0] == [0, 1, 2, 3]
    np.savez(tmp_path / "c.npz", a=ids, b=ids)
    assert refusal(tmp_path / "c.npz") == (
        f"expected one array of token ids in {tmp_path / 'c.npz'}, or one called input_ids or "
        "tokens, got a, b"
    )
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask[:3])
    assert refusal(tmp_path / "d.npz") == (
        "expected an attention_mask of shape (6, 4), as input_ids, in "
        f"{tmp_path / 'd.npz'}, got (3, 4)"
    )
    file(tmp_path / "e.npz", "PK\3\4 no")
    assert refusal(tmp_path / "e.npz").startswith("expected a NumPy array in ")


def test_four_bytes_an_id_are_not_read_as_two(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.arange(24, dtype="uint32").tofile(path)
    assert refusal(path) == (
        f"expected uint16 token ids in {path}, got every other one 0, as uint32 would be; say the "
        'width in a.bin.json: {"dtype": "uint32"}, or "uint16" if they are so'
    )
    file(tmp_path / "a.bin.json", '{"dtype": "uint32"}')
    assert rows(load(path).held_out)[0] == [BOS, 0, 1, 2]
    file(tmp_path / "a.bin.json", '{"dtype": "uint16"}')
    assert rows(load(path).held_out)[0] == [BOS, 0, 0, 1]


def test_a_sidecar_that_says_no_width_is_a_sentence(tmp_path: Path) -> None:
    np.arange(24, dtype="uint16").tofile(tmp_path / "a.bin")
    sidecar = tmp_path / "a.bin.json"
    sidecar.mkdir()
    start = f'expected {{"dtype": "uint16"}} or "uint32" in {sidecar}, got '
    assert refusal(tmp_path / "a.bin") == f"{start}'a folder'"
    sidecar.rmdir()
    sidecar.write_bytes(b"\xff\0")
    assert refusal(tmp_path / "a.bin") == f"{start}{chr(0xFFFD) + chr(0)!r}"


# Long lines, and what cannot be read


def test_a_long_line_is_cut_before_spaces_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "abcdefg " * (3 * LONG_LINE // 8) + "\nand a line\n"
    path = file(tmp_path / "a.txt", text)
    parts = list(text_parts(path))
    assert "".join(str(part.content) for part in parts) == text
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part.content) for part in parts) <= LONG_LINE
    assert all(str(part.content).startswith(" ") for part in parts[1:-1])
    # Where there is no space it is cut all the same.
    solid = "a" * (LONG_LINE + 1)
    assert [len(part.content) for part in parts_of(solid)] == [PART, PART, 1]


def test_a_long_row_is_cut_at_the_ends_of_its_lines() -> None:
    text = ("x" * 99 + "\n") * (LONG_ROW // 100 + 1)
    parts = [str(part.content) for part in parts_of(text)]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    assert max(map(len, parts)) <= PART


def test_a_long_row_is_cut_by_copying_it_once() -> None:
    copied = 0

    class Text(str):
        def __getitem__(self, which: Any) -> str:
            nonlocal copied
            found = super().__getitem__(which)
            copied += len(found)
            return Text(found)

    text = Text("x" * (16 * PART))
    assert sum(len(part.content) for part in parts_of(text)) == len(text)
    # Once to look for an end, once as a part.
    assert copied <= 2 * len(text)


def test_an_ordinary_text_is_tokenised_in_one_piece_as_ever(tmp_path: Path) -> None:
    line = "x" * LONG_LINE + "\n"
    for text in (line * 3, "x" * LONG_LINE, "x\n" * (LONG_ROW // 2)):
        assert [(part.content, part.ends) for part in parts_of(text)] == [(text, True)]
    # Files too: about a million characters and the rest of their line.
    text = ("x" * 999_999 + "\n") * 3
    sizes = [len(part.content) for part in text_parts(file(tmp_path / "a.txt", text))]
    assert sizes == [2_000_000, 1_000_000]


def test_a_file_that_may_not_be_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.lm.preview import preview

    path = file(tmp_path / "a.txt", "w1")

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    sentence = (
        f"expected a file that can be read at {path}, got no permission: change its owner or "
        "mode, or leave it out"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert refusal(path) == sentence
        with pytest.raises(InputError, match="got no permission"):
            preview(DataConfig(source=str(path)), "bundled")
    # A folder in it that cannot be opened is not passed over.
    (tmp_path / "set" / "shut").mkdir(parents=True)

    def walk(folder: Path, onerror: Callable[[OSError], None]) -> list[Any]:
        onerror(PermissionError(13, "Permission denied", str(folder / "shut")))
        return []

    monkeypatch.setattr("os.walk", walk)
    assert refusal(tmp_path / "set") == sentence.replace(str(path), str(tmp_path / "set" / "shut"))


def test_a_column_that_plain_text_does_not_have_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file(tmp_path / "a.txt", words(0, 12))
    assert seen(load(path, text_column="body")) == list(range(12))
    assert f"{path} is read as text, so the column 'body' is not looked for" in caplog.text
