"""What token ids stand for, as text: the one decoder of pages, notebooks and files; without torch.

A tokenizer's own `decode` answers for whole texts. Of a token alone it drops what only its place
decides (the space in front of a SentencePiece word, of a WordPiece one too), and of a character
that is split over tokens it gives U+FFFD for each. So a token is first given its bytes, as it
writes them in the middle of a text (`raw_texts`), and characters are put together from those.
"""

import re
from collections.abc import Sequence
from typing import Any

# Ids among which a token that decodes to plain characters is looked for.
LOOKED_AT = 1000
SPLIT = 3
"""Most tokens on either side that can hold the rest of a character: it has four bytes at most."""
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BROKEN = re.compile("[\udc80-\udcff]")


def token_texts(tokenizer: Any, ids: Sequence[int], *, text: str | None = None) -> list[str]:
    """Return the text of each token of a sequence; set end to end they are the sequence's text.

    A character that is split over tokens is the first one's. What is no whole character is U+FFFD,
    as in `bytes.decode(errors="replace")`. Where the ids are the beginning of `text`, the space
    that many tokenizers put in front of a text is left out; None: they go on from others.
    """
    texts = in_sequence(raw_texts(tokenizer, ids))
    whole = "".join(texts)
    if text is not None and len(whole) - len(whole.lstrip(" ")) > len(text) - len(text.lstrip(" ")):
        first = next(i for i, each in enumerate(texts) if each)
        texts[first] = texts[first][1:]
    return texts


def running_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens that go on from others, special tokens left out."""
    added = _backend(tokenizer).get_added_tokens_decoder()
    kept = [i for i in ids if i not in added or not added[i].special]
    return "".join(token_texts(tokenizer, kept))


def by_itself(raw: str) -> str:
    """Return a token of `raw_texts` by itself; what is no whole character is U+FFFD."""
    return _bytes(raw).decode("utf-8", "replace") if BROKEN.search(raw) else raw


def in_sequence(raw: Sequence[str]) -> list[str]:
    """Return the texts of tokens that follow each other from `raw_texts`; see `token_texts`."""
    if not any(map(BROKEN.search, raw)):
        return list(raw)
    parts = [_bytes(each) for each in raw]
    owner = [i for i, part in enumerate(parts) for _ in part]
    texts, data, at = [""] * len(raw), b"".join(parts), 0
    while at < len(data):
        character, size = _first_character(data[at : at + SPLIT + 1])
        texts[owner[at]] += character
        at += size
    return texts


def _first_character(data: bytes) -> tuple[str, int]:
    """Return the character that bytes begin with, and of how many it is made."""
    size = 1 + (data[0] >= 0xC0) + (data[0] >= 0xE0) + (data[0] >= 0xF0)
    try:
        return data[:size].decode(), size
    except UnicodeDecodeError as error:
        return "\ufffd", error.end


def _bytes(raw: str) -> bytes:
    return raw.encode("utf-8", "surrogateescape")


def raw_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token writes in the middle of a text, its leading space included.

    Bytes that are no whole characters stand as lone surrogates (`errors="surrogateescape"`), for
    `in_sequence` or `by_itself`; so they can be kept as JSON. An id without a token writes nothing.
    """
    backend = _backend(tokenizer)
    added = backend.get_added_tokens_decoder()
    byte_level = backend.decoder is not None and backend.decoder.decode(["Ġ"]) == " "
    names = {i: backend.id_to_token(i) for i in dict.fromkeys(ids)}
    known = [i for i, name in names.items() if name is not None]
    if byte_level:
        texts = [added[i].content if i in added else _from_byte_level(names[i]) for i in known]
    else:
        between = _in_the_middle(backend, known)
        texts = [_from_byte_fallback(names[i], t) for i, t in zip(known, between, strict=True)]
    found = dict(zip(known, texts, strict=True))
    return [found.get(i, "") for i in ids]


def _in_the_middle(backend: Any, ids: list[int]) -> list[str]:
    """Return what tokens decode to with a plain token before and after them."""

    def decoded(rows: list[list[int]]) -> list[str]:
        # All at once: a fiftieth of the time that a tokenizer of transformers takes one by one.
        return backend.decode_batch(rows, skip_special_tokens=False)

    plain = _plain(backend) if ids else None
    if plain is None:
        return decoded([[i] for i in ids])
    one, two = decoded([[plain], [plain, plain]])
    around = decoded([[plain, i, plain] for i in ids])
    return [whole.removeprefix(one).removesuffix(two.removeprefix(one)) for whole in around]


def _plain(backend: Any) -> int | None:
    """Return an id that decodes to letters or digits, and is neither added nor a byte."""
    added = backend.get_added_tokens_decoder()
    for i in range(LOOKED_AT):
        name = backend.id_to_token(i)
        if name is None or i in added or BYTE.fullmatch(name):
            continue
        (text,) = backend.decode_batch([[i]], skip_special_tokens=False)
        if text.strip().isalnum():
            return i
    return None


def _from_byte_fallback(name: str, text: str) -> str:
    """Return a token's text: of one that stands for a byte, such as `<0xE2>`, that byte."""
    byte = BYTE.fullmatch(name)
    if byte is None or text.endswith(name):
        return text
    return bytes.fromhex(byte[1]).decode("utf-8", "surrogateescape")


def _from_byte_level(name: str) -> str:
    """Return the text of a byte-level token, which has a character for each byte."""
    if not all(c in _BYTES for c in name):
        return name
    return bytes(_BYTES[c] for c in name).decode("utf-8", "surrogateescape")


# The character that GPT-2's byte-level tokenizer writes for each byte: itself where it shows, and
# for the others, in order, those from U+0100 on.
_SHOWN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {chr(byte): byte for byte in _SHOWN}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(sorted({*range(0x100)} - _SHOWN))}


def _backend(tokenizer: Any) -> Any:
    if hasattr(tokenizer, "id_to_token"):
        return tokenizer
    return tokenizer.backend_tokenizer if tokenizer.is_fast else _Slow(tokenizer)


class _Slow:
    """A tokenizer of transformers that is written in Python, asked like one of `tokenizers`."""

    decoder = None  # none of them is GPT-2's: that one is always fast

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return self._tokenizer.added_tokens_decoder

    def id_to_token(self, i: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(i) if 0 <= i < len(self._tokenizer) else None

    def decode_batch(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        said = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
        decode = self._tokenizer.decode
        return [decode(row, skip_special_tokens=skip_special_tokens, **said) for row in rows]
