"""Automatic labels: written from examples, scored on others, by a model here or an address."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from index_cases import built, some_sae

from gsae_core.analysis.autointerp import (
    LocalWriter,
    RemoteWriter,
    Writer,
    label_feature,
    marked,
    score_label,
    write_label,
)
from gsae_core.analysis.features.feature import Example
from gsae_core.analysis.features.index import FeatureIndex
from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel


def sparse(index: FeatureIndex) -> int:
    """Return a feature that fires seldom, and at least ten times."""
    fired = index.table["fired"]
    return int(fired[fired >= 10].idxmin())  # pyright: ignore


class Answers:
    """A writer that knows the truth of a text by a test of its own."""

    name = "oracle"

    def __init__(self, knows: object) -> None:
        self.questions: list[str] = []
        self._knows = knows

    def answer(self, question: str, *, max_tokens: int) -> str:
        self.questions.append(question)
        if "Digits:" not in question:
            return ' "words of a kind." \nmore'
        texts = re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)
        return " ".join(str(int(self._knows(text))) for text in texts)  # type: ignore[operator]


class Says(Answers):
    """A writer that says one thing whatever it is asked."""

    def __init__(self, text: str) -> None:
        super().__init__(bool)
        self._text = text

    def answer(self, question: str, *, max_tokens: int) -> str:
        return self._text


@pytest.fixture
def index(tiny_lm: LanguageModel, tmp_path: Path) -> FeatureIndex:
    return built(tiny_lm, some_sae("topk"), tmp_path)


def test_a_label_is_the_first_line_of_the_answer(index: FeatureIndex) -> None:
    writer = Answers(bool)
    assert write_label(index.feature(sparse(index)), writer) == "words of a kind"
    assert "<< w" in writer.questions[0]


def test_a_split_character_is_marked_once_whichever_of_its_tokens_fires() -> None:
    example = Example(
        tokens=("x", "漢", "", "", " y"),
        values=(0.0, 0.0, 1.0, 0.5, 0.0),
        at=2,
        value=1.0,
        sequence=0,
        position=2,
        split="train",
    )
    assert marked(example) == "x<<漢>> y"
    drawn = {marked(example, elsewhere=np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {"<<x>>漢 y", "x漢<< y>>"}


def test_who_knows_everything_scores_1_and_who_knows_nothing_half(index: FeatureIndex) -> None:
    feature = index.feature(sparse(index))
    drawn = feature.random(5, seed=0, before=12, after=6)
    true = {" ".join("".join(e.tokens).split()) for e in drawn}
    assert score_label(feature, "x", Answers(lambda text: text in true)) == 1
    assert score_label(feature, "x", Answers(lambda text: True)) == 0.5
    true = {" ".join(marked(e).split()) for e in drawn}
    writer = Answers(lambda text: text in true)
    assert score_label(feature, "x", writer, by="fuzzing") == 1
    assert "In which of these 10 texts" in writer.questions[0]


def test_a_label_is_kept_with_author_model_and_score(index: FeatureIndex) -> None:
    label_feature(index.feature(sparse(index)), Answers(lambda text: False))
    said = index.labels.of(sparse(index))["label"]
    assert said.scored_by == "detection"
    assert (said.text, said.author, said.model, said.score) == (
        "words of a kind",
        "automatic",
        "oracle",
        0.5,
    )


def test_marks_stand_around_what_fires() -> None:
    example = Example(("a", " b", "c"), (0.0, 2.0, 0.0), 1, 2.0, 0, 1, "train")
    assert marked(example) == "a<< b>>c"
    drawn = {marked(example, elsewhere=np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {"<<a>> bc", "a b<<c>>"}


def test_what_cannot_be_labelled_is_one_sentence(index: FeatureIndex) -> None:
    dead = int(index.table["fired"].idxmin())  # pyright: ignore
    with pytest.raises(InputError, match=f"expected a feature that fires, got {dead}, which is de"):
        write_label(index.feature(dead), Answers(bool))

    with pytest.raises(InputError, match="expected a label from oracle, got an empty answer"):
        write_label(index.feature(sparse(index)), Says(""))
    with pytest.raises(InputError, match="expected 10 digits, 0 or 1, from oracle, got ''"):
        score_label(index.feature(sparse(index)), "x", Says(""))


def test_a_model_on_this_machine_writes(tiny_lm_folder: Path) -> None:
    writer = LocalWriter(str(tiny_lm_folder), device="cpu", name="tiny")
    assert isinstance(writer, Writer)
    answer = writer.answer(" ".join(["w1"] * 12), max_tokens=4)
    assert all(re.fullmatch(r"w\d+|<unk>", word) for word in answer.split())
    with pytest.raises(InputError, match=r"holds a question and its answer, 17 tokens, got .* 16"):
        writer.answer(" ".join(["w1"] * 13), max_tokens=4)


def test_what_fires_in_every_text_has_no_score_by_detection(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    # It fires on 355 of 600 tokens, and a text is as long as a sequence.
    feature = built(tiny_lm, some_sae("gated"), tmp_path).feature(7)
    with pytest.raises(
        InputError, match=r"expected texts in which feature 7 is silent, found none"
    ):
        score_label(feature, "x", Answers(bool))
    assert score_label(feature, "x", Answers(bool), by="fuzzing") == 0.5


# Behind an address


class Handler(BaseHTTPRequestHandler):
    seen: list[dict] = []  # noqa: RUF012
    headers_seen: list[str | None] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body | {"path": self.path})
        self.headers_seen.append(self.headers.get("Authorization"))
        code = {"missing": 404, "locked": 401, "elsewhere": 302}.get(body["model"], 200)
        answer = {"choices": [{"message": {"content": "full stops"}}]}
        data = json.dumps({"odd": 1} if body["model"] == "odd" else answer).encode()
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/other")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        raise AssertionError("expected nobody to be led elsewhere")

    def log_message(self, *_: object) -> None:  # pyright: ignore
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def at(url: str, monkeypatch: pytest.MonkeyPatch, name: str = "any") -> RemoteWriter:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    return RemoteWriter(name)


def test_a_server_is_asked_as_openais_would_be(
    address: str, index: FeatureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", address + "/")
    monkeypatch.setenv("HF_TOKEN", "of-the-hub")
    assert write_label(index.feature(sparse(index)), RemoteWriter("small")) == "full stops"
    body = Handler.seen[-1]
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("small", 0, 40)
    assert "<< w" in body["messages"][0]["content"]
    assert Handler.headers_seen[-1] is None  # nor does a token for another service go there
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    RemoteWriter("small").answer("?", max_tokens=1)
    assert Handler.headers_seen[-1] == "Bearer secret"


def test_a_server_that_does_not_help_is_one_sentence(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"expected an answer from .*, got 404 .* 'missing' served"
    ):
        at(address, monkeypatch, "missing").answer("?", max_tokens=1)
    with pytest.raises(InputError, match=r"expected a chat completion from .*, got something else"):
        at(address, monkeypatch, "odd").answer("?", max_tokens=1)
    with pytest.raises(InputError, match=r"expected an answer from .*, got none .* is the server"):
        at("http://127.0.0.1:1/v1", monkeypatch).answer("?", max_tokens=1)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="expected an address in OPENAI_BASE_URL such as http"):
        RemoteWriter("any")
    with pytest.raises(InputError, match="expected an address in OPENAI_BASE_URL"):
        at("file:///etc/hosts", monkeypatch)
    with pytest.raises(InputError, match=r"got 401 .*; does OPENAI_API_KEY hold a token for it"):
        at(address, monkeypatch, "locked").answer("?", max_tokens=1)


def test_nobody_is_led_to_another_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"expected an answer from .*, got 302"):
        at(address, monkeypatch, "elsewhere").answer("?", max_tokens=1)


def test_no_secret_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://ada:hidden@host/v1", "https://host/v1?key=hidden"):
        with pytest.raises(InputError, match="without a user, a password or a query") as error:
            at(url, monkeypatch)
        assert "hidden" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "hid\nden")
    with pytest.raises(InputError, match="expected a token of plain characters") as error:
        at("http://host/v1", monkeypatch)
    assert "den" not in str(error.value).replace("OPENAI_API_KEY", "")


def test_what_cannot_be_seen_is_no_part_of_a_label(index: FeatureIndex) -> None:
    writer = Says("\x1b\x07\nfull\u202e stops")
    assert write_label(index.feature(sparse(index)), writer) == "full stops"
