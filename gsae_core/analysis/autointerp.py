"""Automatic labels of features, and how well a label tells where its feature fires.

A label is written from the strongest examples and scored on others: by *detection* (which of these
texts does the feature fire in?) or *fuzzing* (in which of these is what is marked what it fires
on?), after Bills et al. 2023 and EleutherAI's automated interpretability. A score is the share of
right answers over as many true as false texts: 0.5 is guessing. It is never shown as truth.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np

from gsae_core.analysis.features.feature import Example
from gsae_core.analysis.labels import LONGEST, Annotation
from gsae_core.errors import InputError
from gsae_core.lm.texts import running_text

if TYPE_CHECKING:
    from gsae_core.analysis.features.feature import Feature

TIMEOUT_SECONDS = 60.0
TOKEN = "OPENAI_API_KEY"
"""Variable of the environment that holds the token of an address, if it wants one."""


@runtime_checkable
class Writer(Protocol):
    """Answers one question at a time; `name` goes into every label."""

    name: str

    def answer(self, question: str, *, max_tokens: int) -> str: ...


class RemoteWriter:
    """A model behind an address that speaks OpenAI's chat completions.

    Args:
        name: of the model there.
        base_url: such as `http://localhost:8000/v1`; None takes OPENAI_BASE_URL.

    Attributes:
        where: the address.
        has_token: whether OPENAI_API_KEY goes there too.

    Raises:
        InputError: if there is no address, it is none, or it or the token cannot be sent.
    """

    def __init__(self, name: str, *, base_url: str | None = None) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL", "")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise InputError(
                f"expected an address in OPENAI_BASE_URL such as http://localhost:8000/v1, got "
                f"{url or 'none'!r}"
            )
        # Addresses are shown and end up in logs.
        if parts.username is not None or parts.query or parts.fragment:
            raise InputError(
                "expected an address in OPENAI_BASE_URL without a user, a password or a query, got "
                f"one with them for {parts.hostname}; put the token into {TOKEN}"
            )
        token = os.environ.get(TOKEN, "").strip()
        # The client's own error would show the token.
        if not (token.isascii() and token.isprintable()) and token:
            raise InputError(
                f"expected a token of plain characters in {TOKEN}, got one with others; copy it "
                "again"
            )
        self.name, self.where = name, url.rstrip("/")
        self._url, self._token = self.where + "/chat/completions", token

    @property
    def has_token(self) -> bool:
        return bool(self._token)

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return the model's answer, at temperature 0.

        Raises:
            InputError: if the address does not answer, or not as OpenAI's would.
        """
        # Not huggingface_hub's InferenceClient: it follows redirects, and without a token of ours
        # it sends the one for the Hub to whatever address was named.
        import httpx2

        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        try:
            response = httpx2.post(self._url, json=body, headers=headers, timeout=TIMEOUT_SECONDS)
            response.raise_for_status()
            found = response.json()
        except httpx2.HTTPStatusError as error:
            code = error.response.status_code
            refused = f"does {TOKEN} hold a token for it?" if code in (401, 403) else None
            raise InputError(
                f"expected an answer from {self._url}, got {code} {error.response.reason_phrase}; "
                f"{refused or f'is {self.name!r} served there?'}"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise InputError(
                f"expected an answer from {self._url}, got none ({error}); is the server running?"
            ) from None
        try:
            return str(found["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"expected a chat completion from {self._url}, got something else: "
                f"{json.dumps(found)[:200]}"
            ) from None


class LocalWriter:
    """A Hugging Face causal LM on this machine; greedy.

    Args:
        source: what `load_model` takes: a folder, a name on the Hub, or `bundled`.
        device: where it computes.
        name: what labels call it; None: as `load_model` does.
    """

    def __init__(self, source: Any, *, device: str = "cpu", name: str | None = None) -> None:
        from gsae_core.lm.model import load_model

        self._model = load_model(source, device=device)
        self.name = name or self._model.name

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return how the model goes on.

        Raises:
            InputError: if question and answer do not fit into its context.
        """
        import torch

        hf, tokenizer = self._model.hf, self._model.tokenizer
        chats = bool(getattr(tokenizer, "chat_template", None))
        if chats:
            messages = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        # A chat's template has written BOS already.
        encoded = tokenizer(
            question, return_tensors="pt", verbose=False, add_special_tokens=not chats
        )
        ids = encoded["input_ids"]
        # Cut at either end, a question lacks what it asks or what it is about.
        if (n := ids.shape[1] + max_tokens) > self._model.n_ctx:
            raise InputError(
                f"expected a model whose context holds a question and its answer, {n} tokens, got "
                f"{self.name} with {self._model.n_ctx}; choose another"
            )
        ids = ids.to(self._model.device)
        with torch.inference_mode():
            out = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        return running_text(tokenizer, out[0, ids.shape[1] :].tolist())


By = Literal["detection", "fuzzing"]
N_SHOWN, N_SCORED = 12, 5
"""Examples that a label is written from; texts of each kind that it is scored on."""
BEFORE, AFTER = 12, 6
LOOKED_AT = 200
"""Texts looked at to find some in which a feature is silent."""

WRITE = """A feature of a language model fires on the tokens between << and >> in these texts.
In at most ten words, say what those tokens have in common. Answer with that phrase alone.

{texts}

The feature fires on:"""

DETECT = """A feature of a language model fires on: {label}

In which of these {n} texts does it fire? Answer with {n} digits separated by spaces, 1 for a text
in which it does and 0 for one in which it does not.

{texts}

Digits:"""

FUZZ = """A feature of a language model fires on: {label}

In which of these {n} texts do << and >> mark what it fires on? Answer with {n} digits separated by
spaces, 1 where they do and 0 where they do not.

{texts}

Digits:"""


class NotLabelled(InputError):
    """One feature cannot be labelled; the next one may be."""


class NotUnderstood(NotLabelled):
    """The writer answered, but not what it was asked."""


class LabelScore(NamedTuple):
    """How well a label tells where its feature fires."""

    score: float
    """Share of right answers; 0.5 is guessing."""
    answers: tuple[int, ...]
    truth: tuple[int, ...]


def write_label(feature: "Feature", writer: Writer) -> str:
    """Return a label in a line, from the feature's strongest examples.

    Raises:
        InputError: if the feature is dead, the writer does not answer, or (NotUnderstood) answers
            nothing.
    """
    check_fires(feature)
    texts = numbered([marked(e) for e in feature.top(N_SHOWN, before=BEFORE, after=AFTER)])
    answer = writer.answer(WRITE.format(texts=texts), max_tokens=40).strip()
    lines = ["".join(filter(str.isprintable, line)).strip(" \"'.") for line in answer.splitlines()]
    label = next(filter(None, lines), "")
    if not label:
        raise NotUnderstood(
            f"expected a label from {writer.name}, got an empty answer; try another"
        )
    return label[: LONGEST["label"]]


def check_fires(feature: "Feature") -> None:
    """Check that there is something to label.

    Raises:
        InputError: if the feature is dead.
    """
    if feature.is_dead:
        raise InputError(
            f"expected a feature that fires, got {feature.number}, which is dead on these "
            f"{feature.index.n_tokens} tokens: there is nothing to label"
        )


def score_label(
    feature: "Feature", label: str, writer: Writer, *, by: By = "detection", seed: int = 0
) -> LabelScore:
    """Return how well a label tells where the feature fires, on texts drawn by `seed`.

    Raises:
        InputError: if the writer does not answer; NotUnderstood: not with as many digits as there
            are texts; NotLabelled: the feature fires in every text that was looked at.
    """
    rng = np.random.default_rng([feature.number, seed])
    fires = feature.random(N_SCORED, seed=seed, before=BEFORE, after=AFTER)
    if by == "detection":
        silent = _silent(feature, len(fires), seed=seed)
        # As many of either kind, or a writer that always says yes would score above guessing.
        fires = fires[: len(silent)]
        texts = [plain(example) for example in [*fires, *silent]]
    else:
        texts = [marked(e) for e in fires] + [marked(e, _elsewhere(e, rng)) for e in fires]
    truth = np.array([1] * len(fires) + [0] * len(fires))
    order = rng.permutation(len(truth))
    shown = numbered([texts[i] for i in order])
    question = (DETECT if by == "detection" else FUZZ).format(
        label=label, n=len(order), texts=shown
    )
    answers = _digits(writer.answer(question, max_tokens=4 * len(order)), len(order), writer.name)
    right = np.array(answers) == truth[order]
    return LabelScore(float(right.mean()), tuple(answers), tuple(int(t) for t in truth[order]))


def label_feature(
    feature: "Feature", writer: Writer, *, by: By | None = "detection", seed: int = 0
) -> Annotation:
    """Write a label, score it, and append both to the index's labels as automatic.

    Args:
        by: how it is scored; None: not at all.

    Raises:
        InputError: as `write_label` and `score_label` do.
    """
    label = write_label(feature, writer)
    score = score_label(feature, label, writer, by=by, seed=seed).score if by else None
    labels = feature.index.labels
    return labels.add(
        feature.number,
        "label",
        label,
        author="automatic",
        model=writer.name,
        score=score,
        scored_by=by,
    )


def marked(example: Example, which: set[int] | None = None) -> str:
    """Return a text with << >> around the tokens that the feature fires on, or around others."""
    fires = {i for i, value in enumerate(example.values) if value > 0} if which is None else which
    holder = _holders(example)
    shown = {holder[i] for i in fires}
    return "".join(
        f"<<{token}>>" if i in shown else token for i, token in enumerate(example.tokens)
    )


def plain(example: Example) -> str:
    """Return a text as it stands."""
    return "".join(example.tokens)


def numbered(texts: Sequence[str]) -> str:
    """Return texts as a numbered list, each on a line of its own."""
    return "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(texts, start=1))


def _silent(feature: "Feature", n: int, *, seed: int) -> list[Example]:
    """Return up to `n` texts in which the feature is silent throughout.

    Raises:
        InputError: if none of those drawn is.
    """
    drawn = feature.non_activating(LOOKED_AT, seed=seed, before=BEFORE, after=AFTER)
    silent = [example for example in drawn if not any(example.values)]
    if not silent:
        raise NotLabelled(
            f"expected texts in which feature {feature.number} is silent, found none among "
            f"{len(drawn)}: it fires in nearly every text; score its label by fuzzing"
        )
    order = np.random.default_rng(seed).permutation(len(silent))
    return [silent[i] for i in order[:n]]


def _holders(example: Example) -> list[int]:
    """Return of each token the one that has its text: of a split character, the first."""
    holders = [0]
    for i, token in enumerate(example.tokens):
        holders.append(i if token else holders[-1])
    return holders[1:]


def _elsewhere(example: Example, rng: np.random.Generator) -> set[int]:
    """Return as many silent tokens of a text as it fires on, or as there are."""
    holder = _holders(example)
    fires = {holder[i] for i, value in enumerate(example.values) if value > 0}
    silent = sorted(set(holder) - fires)
    n = min(len(silent), len(fires))
    return {int(i) for i in rng.choice(silent, n, replace=False)} if n else set()


def _digits(answer: str, n: int, name: str) -> list[int]:
    digits = [int(digit) for digit in re.findall(r"(?<!\d)[01](?!\d)", answer)]
    if len(digits) != n:
        raise NotUnderstood(
            f"expected {n} digits, 0 or 1, from {name}, got {answer.strip()[:80]!r}; the model is "
            "too small for scoring, or needs another prompt"
        )
    return digits
