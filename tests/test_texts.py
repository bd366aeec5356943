"""What token ids stand for, of every kind of tokenizer; expected strings are written by hand."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_of_each_kind as kinds
import torch
from app_pages import labelled, opened, text
from index_cases import built, some_sae

from gsae_core.analysis.features.build import Part
from gsae_core.analysis.features.index import open_index
from gsae_core.analysis.generation import followed_by, new_texts
from gsae_core.analysis.prompt import read_prompt
from gsae_core.cli import main
from gsae_core.config import DataConfig
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.preview import preview
from gsae_core.lm.texts import by_itself, in_sequence, raw_texts, running_text, token_texts

Make = Callable[[], Any]

# What is typed; its tokens' texts.
SEQUENCES: list[tuple[Make, str, list[str]]] = [
    (kinds.byte_level, "the pond\n\n", ["the", " pond", "\n\n"]),
    (kinds.byte_level, " the", [" the"]),
    (kinds.byte_level, "é the", ["é", "", " the"]),
    # U+1F600 is f0 9f 98 80.
    (kinds.byte_level, "the😀", ["the", "😀", "", "", ""]),
    (kinds.llama_2, "the pond", ["the", " pond"]),
    (kinds.llama_2, " the pond", ["", " the", " pond"]),
    (kinds.llama_2, "the\nthe", ["the", "\n", "t", "h", "e"]),
    (kinds.llama_2, "the 😀é", ["the", " ", "😀", "", "", "", "é", ""]),
    (kinds.metaspace, "the pond", ["the", " pond"]),
    (kinds.metaspace, " the pond", [" the", " pond"]),
    (kinds.metaspace, "   the", ["  ", " the"]),
    (kinds.gemma, "the pond", ["t", "h", "e", " pond"]),
    (kinds.gemma, " the pond", [" the", " pond"]),
    (kinds.gemma, "  😀\n", ["  ", "😀", "", "", "", "\n"]),
    (kinds.unigram, "the ponds.", ["the", " pond", "s", "."]),
    (kinds.word_piece, "the ponds.", ["the", " pond", "s", "."]),
    (kinds.word_level, "the pond", ["the", " pond"]),
    (kinds.end_of_word, "the dad", ["the ", "dad "]),
]


@pytest.mark.parametrize(
    ("make", "typed", "texts"), SEQUENCES, ids=[f"{m.__name__} {t!r}" for m, t, _ in SEQUENCES]
)
def test_the_tokens_of_a_text_are_the_text(make: Make, typed: str, texts: list[str]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(typed, add_special_tokens=False)
    assert token_texts(tokenizer, ids, text=typed) == texts
    # The preview has the library's own tokenizer and nothing around it.
    assert token_texts(tokenizer.backend_tokenizer, ids, text=typed) == texts
    if make is not kinds.end_of_word:  # its words end in a space, a text's last one too
        assert "".join(texts) == typed


@pytest.mark.parametrize(
    ("make", "token", "text"),
    [
        (kinds.byte_level, "Ġthe", " the"),
        (kinds.byte_level, "the", "the"),
        (kinds.byte_level, "ð", "\ufffd"),  # the byte f0
        (kinds.llama_2, "▁the", " the"),
        (kinds.llama_2, "▁", " "),
        (kinds.llama_2, "▁▁", "  "),
        (kinds.llama_2, "<0x41>", "A"),
        (kinds.llama_2, "<0xF0>", "\ufffd"),
        (kinds.gemma, "▁the", " the"),
        (kinds.unigram, "▁the", " the"),
        (kinds.unigram, "s", "s"),
        (kinds.word_piece, "the", " the"),
        (kinds.word_piece, "##s", "s"),
        (kinds.word_piece, ".", "."),
        (kinds.word_level, "pond", " pond"),
        (kinds.end_of_word, "the</w>", "the "),
        (kinds.end_of_word, "th", "th"),
        *[(getattr(kinds, name), "<s>", "<s>") for name in ("byte_level", "llama_2", "gemma")],
    ],
)
def test_a_token_by_itself_has_its_space(make: Make, token: str, text: str) -> None:
    tokenizer = make()
    (raw,) = raw_texts(tokenizer, [tokenizer.convert_tokens_to_ids(token)])
    assert by_itself(raw) == text


EVERY = [
    kinds.byte_level,
    kinds.llama_2,
    kinds.metaspace,
    kinds.gemma,
    kinds.unigram,
    kinds.word_piece,
    kinds.word_level,
]


@pytest.mark.parametrize("make", EVERY)
def test_any_tokens_are_what_the_tokenizer_decodes_them_to(make: Make) -> None:
    """The library decodes whole texts rightly, save one leading space that it takes off."""
    tokenizer, rng = make(), random.Random(0)
    # Bytes apart: the library gives up on a run of them that is not UTF-8 throughout.
    plain = [
        i
        for i, raw in enumerate(raw_texts(tokenizer, range(len(tokenizer))))
        if raw == by_itself(raw) and not tokenizer.convert_ids_to_tokens(i).startswith("<")
    ]
    for _ in range(50):
        ids = rng.choices(plain, k=12)
        # Metaspace's decoder takes every space off a first token; SentencePiece takes one.
        first = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("the")[:1])
        whole = tokenizer.decode([*first, *ids], clean_up_tokenization_spaces=False)
        texts = token_texts(tokenizer, [*first, *ids])
        assert "".join(texts).removeprefix(" ") == whole.removeprefix(" ")


@pytest.mark.parametrize("make", [kinds.byte_level, kinds.llama_2, kinds.gemma])
def test_a_text_goes_on_behind_a_prompt_with_its_space(make: Make) -> None:
    tokenizer = make()
    prompt, more = "the pond", " the 😀 dad"
    before = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + more, add_special_tokens=False)
    assert whole[: len(before)] == before
    assert running_text(tokenizer, whole[len(before) :]) == more
    assert running_text(tokenizer, [*whole[len(before) :], tokenizer.eos_token_id]) == more
    assert tokenizer.decode(whole) == prompt + more


@pytest.mark.parametrize("make", [kinds.byte_level, kinds.llama_2])
def test_a_character_that_the_continuation_completes_is_whole_and_shown_once(make: Make) -> None:
    tokenizer = make()
    ids = tokenizer.encode("the😀", add_special_tokens=False)
    n = len(ids)
    assert token_texts(tokenizer, ids[: n - 1])[-3:] == ["\ufffd", "", ""]
    assert token_texts(tokenizer, ids)[-4:] == ["😀", "", "", ""]
    # Its rest alone is no character: three bytes that none begins with.
    assert token_texts(tokenizer, ids[n - 3 :]) == ["\ufffd"] * 3


def test_bytes_that_are_no_characters_lose_none_beside_them() -> None:
    # 漢 is e6 bc a2; of e9 alone nothing can be made; " a" begins behind the rest of a character.
    split = [data.decode("utf-8", "surrogateescape") for data in (b"x\xe6\xbc", b"\xa2 a", b"\xe9")]
    assert in_sequence([*split, "b"]) == ["x漢", " a", "\ufffd", "b"]
    assert "".join(in_sequence(split)) == b"x\xe6\xbc\xa2 a\xe9".decode("utf-8", "replace")
    # An id without a token writes nothing, and breaks nothing.
    assert in_sequence(["\udcc3", "", "\udca9"]) == ["é", "", ""]


def test_special_tokens_are_themselves_and_no_space_is_made_beside_them() -> None:
    tokenizer = kinds.llama_2()
    ids = [tokenizer.bos_token_id, *tokenizer.encode("the pond", add_special_tokens=False)]
    assert token_texts(tokenizer, ids)[0] == "<s>"
    assert running_text(tokenizer, ids) == " the pond"


def test_an_id_without_a_token_writes_nothing() -> None:
    tokenizer = kinds.byte_level()
    assert token_texts(tokenizer, [len(tokenizer) + 5]) == [""]
    assert token_texts(tokenizer, []) == []


def test_an_added_token_of_a_byte_level_tokenizer_is_its_own_letters() -> None:
    # As bytes, é would be e9 alone and Ġ a space.
    tokenizer = kinds.byte_level()
    tokenizer.add_tokens(["éĠ"])
    ids = tokenizer.encode("theéĠ", add_special_tokens=False)
    assert token_texts(tokenizer, ids, text="theéĠ") == ["the", "éĠ"]


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("the pond", ["the", " pond"]),
        (" the pond", ["", " the", " pond"]),
        ("the 😀 pond", ["the", " ", "😀", "", "", "", " pond"]),
    ],
)
def test_a_tokenizer_written_in_python_is_read_alike(
    tmp_path: Path, typed: str, texts: list[str]
) -> None:
    tokenizer = kinds.sentencepiece(tmp_path)
    assert not tokenizer.is_fast
    ids = tokenizer.encode(typed, add_special_tokens=False)
    assert token_texts(tokenizer, ids, text=typed) == texts
    assert "".join(texts) == typed
    assert running_text(tokenizer, [*ids, tokenizer.eos_token_id]) == f" {typed}"


# Where they are shown


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(str(kinds.write_llama(tmp_path_factory.mktemp("llama"))))


@pytest.mark.parametrize("typed", ["the pond", " the pond", "  the\n\n pond ", "the 😀é"])
def test_what_is_typed_into_prompt_is_what_its_tokens_say(llama: LanguageModel, typed: str) -> None:
    prompt = read_prompt(llama, typed)
    assert prompt.tokens[0] == "<s>"
    assert "".join(prompt.tokens[1:]) == typed


def test_what_is_written_goes_on_behind_the_prompt(llama: LanguageModel) -> None:
    prompt = read_prompt(llama, "the pond")
    (the, dad) = llama.tokenizer.convert_tokens_to_ids(["▁the", "▁dad"])
    assert new_texts(prompt, [the, dad], model=llama) == (" the", " dad")
    # The first three bytes of 😀 typed as they come from a model, the last one written.
    smile = [llama.tokenizer.convert_tokens_to_ids(f"<0x{b}>") for b in ("F0", "9F", "98", "80")]
    cut = prompt._replace(ids=torch.tensor([[*prompt.ids[0].tolist(), *smile[:1]]]))
    assert new_texts(cut, [*smile[1:], dad], model=llama) == ("", "", "", " dad")
    whole = followed_by(prompt, [the, *smile], model=llama)
    assert "".join(whole.tokens) == "<s>the pond the😀"


def test_the_preview_shows_the_spaces_of_text_and_of_token_arrays(tmp_path: Path) -> None:
    folder = str(kinds.write_llama(tmp_path / "llama"))
    (tmp_path / "a.txt").write_text("the pond 😀", encoding="utf-8")
    found = preview(DataConfig(source=str(tmp_path / "a.txt")), folder)
    assert found.lines == [["the", " pond", " ", "😀", "", "", ""]]
    ids = kinds.llama_2().encode("the pond é", add_special_tokens=False)
    np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
    found = preview(DataConfig(source=str(tmp_path / "ids.npy")), folder)
    assert found.lines == [[" the", " pond", " ", "é", ""]]


def test_examples_put_characters_together_and_old_indexes_open(
    llama: LanguageModel, tmp_path: Path
) -> None:
    # Rows of BOS, then "the pond 漢 the" over and over: 漢 is e6 bc a2.
    tokenizer = llama.tokenizer
    some = tokenizer.encode("the pond 漢 the", add_special_tokens=False)
    row = [tokenizer.bos_token_id, *(3 * some)[:15]]
    rows = SequenceSet(np.array([row] * 8), (tokenizer.bos_token_id,))
    index = built(llama, some_sae("relu"), tmp_path, [Part("train", rows, 8)])
    number = int(np.flatnonzero(index.alive())[0])
    said = "<s> the pond 漢 the the pond 漢 the the"
    (example,) = index.feature(number).top(1, before=None, after=None)
    assert "".join(example.tokens) == said
    for example in index.feature(number).top(5, before=1, after=0):
        start = example.position - 1
        whole = token_texts(tokenizer, row)
        assert list(example.tokens) == whole[max(start, 0) : example.position + 1]
    byte = tokenizer.convert_tokens_to_ids("<0xE6>")
    assert index.vocabulary[byte] == "\ufffd"
    assert index.vocabulary[some[0]] == " the"
    # Earlier versions wrote what each token decodes to by itself.
    path = index.folder / index.manifest.data / "vocabulary.json"
    path.write_text(json.dumps(index.vocabulary), encoding="utf-8")
    (example,) = open_index(tmp_path).feature(number).top(1, before=None, after=None)
    assert "".join(example.tokens) == said.replace("漢", 3 * "\ufffd")


def test_the_pages_keep_the_spaces_of_sentencepiece(root: Path) -> None:
    assert main.main(kinds.llama_run(root)) == 0
    at = opened("pages/6_Prompt.py", run="spaces", text="the pond", tok="1")
    drawn = re.sub("<[^>]+>", "", text(at))
    assert "&gt;the pond" in drawn
    assert labelled(at.selectbox, "Next token").options[0].startswith("·pond")
    at = opened("pages/7_Steer.py", run="spaces", text="the pond", f="1", len="30", seed="3")
    job = at.session_state["steer.generation"]
    tokenizer = kinds.llama_2()
    ids = job.prompt.ids[0].tolist()
    for kind, new in job.tokens.items():
        texts = new_texts(job.prompt, new, model=load_model(str(root / "llama")))
        whole = b"".join(_written(tokenizer, i) for i in [*ids[1:], *new]).decode(errors="replace")
        assert "<s>" + whole.removeprefix(" ") == "<s>the pond" + "".join(texts), kind


def _written(tokenizer: Any, i: int) -> bytes:
    """Return the bytes a token of Llama 2's kind stands for."""
    name = str(tokenizer.convert_ids_to_tokens(i))
    byte = re.fullmatch("<0x(..)>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()
