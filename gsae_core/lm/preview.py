"""The first lines of a corpus as tokens, within a time limit; without torch, but for chats."""

import json
import sys
from itertools import islice
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NamedTuple

from gsae_core.config import DataConfig
from gsae_core.errors import InputError, expecting, hub_answers
from gsae_core.files import read_json
from gsae_core.lm.catalog import lens_repo, model_folder
from gsae_core.lm.chat import ChatTemplate
from gsae_core.lm.packed import PACKED, Part, is_archive
from gsae_core.lm.readers import Source, open_source, permitted
from gsae_core.lm.tables import TABLE_SUFFIXES
from gsae_core.lm.texts import token_texts
from gsae_core.machine import run_python

LINES = 10
LINE_TOKENS = 40
# Of each document: enough for a line in any language, and to count tokens a byte by.
SAMPLE_CHARACTERS = 4000


class Preview(NamedTuple):
    """The beginnings of a corpus's first documents."""

    lines: list[list[str]]
    """The text of each token, as `token_texts` returns it."""
    sampled_tokens: int
    sampled_bytes: int
    """UTF-8 bytes of the sample; 0 for token arrays."""
    n_tokens: int | None
    """About how many tokens the whole corpus has; None where that takes reading it."""


def preview(data: DataConfig, model: str, revision: str | None = None) -> Preview:
    """Return the first lines of a corpus as `model` reads it; InputError if one is unreadable."""
    model, revision = _with_tokenizer(model, revision)
    tokenizer = load_tokenizer(model, revision)
    with permitted(data.source):
        source = open_source(
            data,
            tokenizer.get_vocab_size(),
            end_of_text=_end_of_text(model, revision),
            chats=_chat_template(model, revision) if data.chat else None,
        )
        parts = list(islice(source.train(), LINES))
    if not parts:
        raise InputError(f"expected some text in {source.name}, got none")
    samples = [_sample(part, tokenizer) for part in parts]
    texts, sizes = zip(*samples, strict=True)
    n_tokens, n_bytes = sum(map(len, texts)), sum(sizes)
    # The first line of every document, then the second of each, and so on.
    starts = range(0, max(map(len, texts)), LINE_TOKENS)
    lines = [text[i : i + LINE_TOKENS] for i in starts for text in texts if len(text) > i]
    whole = _estimate(source, parts, n_tokens / n_bytes if n_bytes else None)
    return Preview(lines[:LINES], n_tokens, n_bytes, whole if source.files else None)


def _sample(part: Part, tokenizer: Any) -> tuple[list[str], int]:
    """Return the beginning of a document, token by token, and its UTF-8 bytes."""
    if not isinstance(part.content, str):
        ids = [int(id_) for id_ in part.content[: LINES * LINE_TOKENS]]
        return token_texts(tokenizer, ids), 0
    text = part.content[:SAMPLE_CHARACTERS]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return token_texts(tokenizer, ids, text=text), len(text.encode())


def _estimate(source: Source, parts: list[Part], tokens_per_byte: float | None) -> int | None:
    """Return about how many tokens a corpus on this disk has, from the sizes of its files."""
    n_bytes = sum(path.stat().st_size for path in source.files)
    if tokens_per_byte is None:
        content: Any = parts[0].content
        return n_bytes // content.dtype.itemsize
    # Tables and packed files hold more, or less, than the text in them.
    no_text = {*TABLE_SUFFIXES, *PACKED}
    if any(path.suffix.lower() in no_text or is_archive(path) for path in source.files):
        return None
    return round(n_bytes * tokens_per_byte)


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Return a model's fast tokenizer."""
    from tokenizers import Tokenizer

    path = _model_file("tokenizer.json", model, revision)
    if path is None:
        raise InputError(
            f"expected a tokenizer.json to show tokens of {model}, found none on the Hub; "
            "training may still work"
        )
    with expecting("a tokenizer", path, Exception):  # the library raises bare ones
        return Tokenizer.from_file(str(path))


def _with_tokenizer(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return the model itself, or the repository that one in TransformerLens' layout names."""
    if model_folder(model) is not None or (repo := lens_repo(model)) is None:
        return model, revision
    path = _model_file("config.json", repo, revision)
    return str(path and read_json(path).get("tokenizer_name")), None


def _model_file(name: str, model: str, revision: str | None) -> Path | None:
    """Return a file of a model; None where the Hub has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if (folder := model_folder(model)) is not None:
        return folder / name
    with hub_answers(model, what="model", revision=revision):
        try:
            return Path(hf_hub_download(model, name, revision=revision))
        except RemoteEntryNotFoundError:
            return None


def _end_of_text(model: str, revision: str | None) -> str | None:
    """Return the token that the files of a model's tokenizer call the end of a text, if they do."""
    try:
        path = _model_file("tokenizer_config.json", model, revision)
        told = None if path is None else read_json(path).get("eos_token")
    except InputError:  # without it, offline, there is still something to see
        return None
    return told.get("content") if isinstance(told, dict) else told


def _chat_template(model: str, revision: str | None) -> ChatTemplate:
    # Only here: with it comes torch.
    from gsae_core.lm.load import open_tokenizer

    return ChatTemplate.of(open_tokenizer(model, revision=revision))


def preview_within(
    seconds: float | int, data: DataConfig, model: str, revision: str | None = None
) -> Preview:
    """Return `preview(...)` from a process of its own, which is ended after `seconds`.

    A stalled network or a file that does not fit in memory may not take the page along.
    """
    asked = {"data": data.model_dump(mode="json"), "model": model, "revision": revision}
    try:
        done, answer = run_python("gsae_core.lm.preview", seconds=seconds, given=json.dumps(asked))
    except TimeoutExpired:
        raise InputError(
            f"expected the first lines of {data.source} as tokens of {model} within {seconds:g} s, "
            "got none; what comes from the Hub needs the network. Training has no such limit"
        ) from None
    if not done:
        raise InputError(f"expected the first lines of {data.source}, got a failure: {answer}")
    fields = json.loads(answer)
    if "error" in fields:
        raise InputError(fields["error"])
    return Preview(**fields)


def main() -> None:
    """Answer one question of `preview_within`: JSON in, JSON out."""
    asked = json.load(sys.stdin)
    try:
        found = preview(DataConfig(**asked["data"]), asked["model"], asked["revision"])
    except InputError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps(found._asdict()))


if __name__ == "__main__":
    main()
