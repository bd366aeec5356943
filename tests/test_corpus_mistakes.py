"""Each mistake with a corpus is one sentence: what was expected, what came, what to do."""

import gzip
import json
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import WordTokenizer, file, refusal, token_rows, words

NAME_ONE = "name a column of text with --text-column, or write the text out as one"
READ_CHATS = (
    "read chats by the model's chat template with --chat, or name a column of text with "
    "--text-column"
)
SAVE_IT = "save it as UTF-8, unpack it or download it again"


def sentences(folder: Path) -> dict[str, tuple[str | Path, dict[str, Any], str]]:
    """Return, for each mistake, the source, the settings and the sentence."""
    text = file(folder / "a.txt", words(0, 100))
    table = file(folder / "t.jsonl", json.dumps({"question": words(0, 9), "answer": words(0, 9)}))
    chat = {"id": "q-000002", "messages": [{"role": "user", "content": words(0, 9)}]}
    chats = file(folder / "chat.jsonl", json.dumps(chat | {"gone": None}))
    # 32 characters, and a line break.
    bare = file(folder / "bare.csv", f'pos,"{words(0, 4)}\n{words(4, 11)}"\nneg,{words(0, 6)}\n')
    damaged = folder / "d.jsonl.bz2"
    damaged.write_bytes(b"BZh9 not so")
    numbers = file(folder / "n.jsonl", json.dumps({"text": 5}))
    broken = file(folder / "b.jsonl", '{"text": "w1"}\n{"text"')
    empty = file(folder / "empty.txt", "")
    short = file(folder / "short.txt", words(0, 3))
    strange = file(folder / "s.npy", "not an array")
    beyond = token_rows(folder / "i.jsonl", [[1, 2, 1000]])
    ragged = token_rows(folder / "r.jsonl", [[1, 2, 3, 4]] * 64 + [[1, 2]])
    odd = folder / "odd.bin"
    odd.write_bytes(b"12345")
    binary = folder / "b.txt"
    binary.write_bytes(b"\xfe\xfe\x00")
    parquet = file(folder / "p.parquet", "no")
    spoilt = folder / "spoilt.parquet"
    pq.write_table(pa.table({"text": [words(0, 9)] * 99}), spoilt, compression="zstd")
    spoilt.write_bytes(b"PAR1" + bytes(60) + spoilt.read_bytes()[64:])
    csv = file(folder / "c.csv", "a,text\n1,w1\n1,w1,3\n")
    tarball = folder / "t.tar.gz"
    tarball.write_bytes(gzip.compress(b"a.txt" + bytes(507) + words(0, 99).encode()))
    nothing = folder / "nothing"
    nothing.mkdir()
    return {
        "no such column": (
            table,
            {"text_column": "body"},
            f"expected a column 'body' in {table}, got rows such as {{'answer': 'w0 w1 w2 w3 "
            f"w4 w5 w6 w7 w8', 'question': 'w0 w1 w2 w3 w4 w5 w6 w7 w8'}}: {NAME_ONE}",
        ),
        "which column": (
            table,
            {},
            f"expected a column of text in {table}, got rows such as {{'answer': 'w0 w1 w2 w3 "
            f"w4 w5 w6 w7 w8', 'question': 'w0 w1 w2 w3 w4 w5 w6 w7 w8'}}: {NAME_ONE}",
        ),
        "an id beside messages": (
            chats,
            {},
            f"expected a column of text in {chats}, got chats in column 'messages': {READ_CHATS}",
        ),
        "no header": (
            bare,
            {},
            f"expected a column of text in {bare}, got rows such as {{'pos': 'neg', 'w0 w1 w2 "
            f"w3\\... w7 w8 w9 w10': 'w0 w1 w2 w3 w4 w5'}}: {NAME_ONE}",
        ),
        "not a text column": (
            numbers,
            {},
            f"expected text or token ids in column 'text' in {numbers}, got rows such as "
            f"{{'text': 5}}: {NAME_ONE}",
        ),
        "broken line": (
            broken,
            {},
            f"expected JSON in row 2 of {broken}, got something else: Expecting ':' delimiter: "
            "line 1 column 8 (char 7)",
        ),
        "empty": (empty, {}, f"expected some text in {empty}, got none"),
        "short": (
            short,
            {},
            f"expected enough text in {short} for a training and a held-out sequence of 4 tokens, "
            "got 1 in all: give more text, a smaller n_ctx or another held_out",
        ),
        "not NumPy": (
            strange,
            {},
            f"expected a NumPy array in {strange}, got something else: ",
        ),
        "foreign ids": (
            beyond,
            {},
            "expected token ids from 0 to 999, got 1000: were they made by another tokenizer, or "
            "stored in another width?",
        ),
        "ragged ids": (
            ragged,
            {},
            "expected rows of 4 token ids like the first ones, got one of 2: give n_ctx to have "
            "the rows packed anew",
        ),
        "half an id": (
            odd,
            {},
            f"expected whole uint16 token ids in {odd}, got 5 bytes; say the width in "
            'odd.bin.json, e.g. {"dtype": "uint32"}',
        ),
        "binary": (
            binary,
            {},
            f"expected UTF-8 text in {binary}, got something else (not UTF-8, or with a NUL): "
            + SAVE_IT,
        ),
        "damaged archive": (
            damaged,
            {},
            f"expected UTF-8 text in {damaged}, got something else (Invalid data stream): "
            + SAVE_IT,
        ),
        "split of a file": (
            text,
            {"split": "test"},
            f"expected a split 'test' in {text}, found train: name one that is there with --split, "
            "or `all`",
        ),
        "not Parquet": (parquet, {}, f"expected Parquet in {parquet}, got something else: "),
        "damaged Parquet": (
            spoilt,
            {},
            f"expected Parquet in {spoilt}, got something else: ",
        ),
        "ragged CSV": (
            csv,
            {},
            f"expected 2 fields in the row that ends at line 3 of {csv}, got another number",
        ),
        "empty folder": (
            nothing,
            {},
            f"expected text (UTF-8), tables or token arrays in {nothing}, found 0 files, none of "
            "them readable",
        ),
        "no file": (
            folder / "missing.txt",
            {},
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            f"nothing at {folder / 'missing.txt'}: check the path",
        ),
        "no name": (
            "",
            {},
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            "nothing at an empty name: check the path",
        ),
        "packed archive": (
            tarball,
            {},
            f"expected an archive in {tarball}, got something else: ",
        ),
        "no file of that kind": (
            "missing.jsonl",
            {},
            "expected `stdlib`, a file, a folder or the name of a data set on the Hub, found "
            "nothing at missing.jsonl: check the path",
        ),
        "context": (
            text,
            {"n_ctx": 65},
            "expected n_ctx of at most 64, the model's context, got 65: lower n_ctx or leave it "
            "out",
        ),
        "no context": (
            text,
            {"n_ctx": 1},
            "expected n_ctx of at least 2, got 1: nothing can be predicted",
        ),
        "no BOS": (
            text,
            {"bos": "always", "tokenizer": WordTokenizer(bos=None)},
            "expected a tokenizer with a BOS token for bos='always', got one without: use "
            "bos='auto' or 'never'",
        ),
    }


def test_every_mistake_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    for source, settings, sentence in sentences(tmp_path).values():
        refused = refusal(source, **settings)
        # Some sentences end in another library's words.
        assert refused.startswith(sentence) if sentence.endswith(": ") else refused == sentence


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        (
            "owner/name",
            ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"),
            "expected to stream owner/name from the Hub, got no connection (Couldn't reach "
            "'owner/name' on the Hub (OfflineModeIsEnabled)): go online, unset HF_HUB_OFFLINE, or "
            "use `stdlib` or a local file",
        ),
        (
            "owner/name",
            httpx2.ReadTimeout("The read operation timed out"),  # no OSError
            "expected to stream owner/name from the Hub, got no connection (The read operation "
            "timed out): go online, unset HF_HUB_OFFLINE, or use `stdlib` or a local file",
        ),
        (
            "owner/name:small",
            ValueError("Config name is missing.\nPlease pick one of ['a', 'b']"),
            "expected a data set, config and split that can be streamed, got owner/name:small and "
            "'train': Config name is missing. Please pick one of ['a', 'b']; name others, or mend "
            "the files in a folder",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, sentence: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert refusal(name) == sentence


def test_a_data_set_that_the_hub_does_not_have_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'owner/nme' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert refusal("owner/nme") == (
        "expected a data set on the Hub, a file or a folder, found none called owner/nme: check "
        "the name, or log in if it is gated (Dataset 'owner/nme' doesn't exist on the Hub)"
    )
