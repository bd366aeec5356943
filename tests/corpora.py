"""Small corpora: a tokenizer whose ids can be read off the text, and ways to load and look."""

import json
from pathlib import Path
from typing import Any

import pytest

from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.corpus import Corpus, SequenceSet, load_corpus

BOS, EOS, VOCABULARY = 900, 901, 1000


class WordTokenizer:
    """`w7` is token 7. Has what the corpus uses of a Hugging Face tokenizer; counts its work."""

    is_fast = False

    def __init__(self, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, None
        self.n_tokenised = 0

    def __len__(self) -> int:
        return VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(VOCABULARY)}

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options == {
            "add_special_tokens": False,
            "return_attention_mask": False,
            "verbose": False,
        }
        rows = [[int(word[1:]) for word in text.split()] for text in texts]
        self.n_tokenised += sum(map(len, rows))
        return {"input_ids": rows}


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def load(
    source: str | Path,
    tokenizer: Any = None,
    *,
    n_ctx: int | None = 4,
    n_tokens: int | None = None,
    model_n_ctx: int = 64,
    held_out: float = 0.25,
    n_held_out: int = 0,
    **settings: Any,
) -> Corpus:
    cfg = DataConfig(source=str(source), n_ctx=n_ctx, held_out=held_out, **settings)
    return load_corpus(
        cfg,
        tokenizer or WordTokenizer(),
        n_tokens=n_tokens,
        model_n_ctx=model_n_ctx,
        n_held_out=n_held_out,
    )


def rows(sequences: SequenceSet) -> list[list[int]]:
    return sequences[:].ids.tolist()


def counted(sequences: SequenceSet) -> list[int]:
    ids, mask = sequences[:]
    return ids[mask].tolist()


def file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: str | Path, *args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        load(source, *args, **settings)
    return str(error.value)


def token_rows(path: Path, ids: list[list[int]], **columns: Any) -> Path:
    lines = [{"input_ids": row} for row in ids]
    for name, values in columns.items():
        for line, value in zip(lines, values, strict=True):
            line[name] = value
    return file(path, "\n".join(map(json.dumps, lines)))
