"""Automatic labels of features, and how well a label tells where its feature fires.

A label is written from the strongest examples and scored on others: by *detection* (which of these
texts does the feature fire in?) or *fuzzing* (in which of these is what is marked what it fires
on?), after Bills et al. 2023 and EleutherAI's automated interpretability. A label is a guess, and
is shown as one, with its score.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable
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

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return the answer, cut off after `max_tokens`."""
        ...


class RemoteWriter:
    """A model that speaks chat completions at OPENAI_BASE_URL; OPENAI_API_KEY goes there too."""

    def __init__(self, name: str) -> None:
        url = os.environ.get("OPENAI_BASE_URL", "")
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
        self.name: str = name
        self.where: str = url.rstrip("/")
        self.has_token: bool = bool(token)
        self._headers = {"Authorization": f"Bearer {token}"} if token else None

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return the model's answer, at temperature 0."""
        # Not huggingface_hub's InferenceClient: it follows redirects, and without a token of ours
        # it sends the one for the Hub to whatever address was named.
        import httpx2

        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        url = f"{self.where}/chat/completions"
        try:
            response = httpx2.post(url, json=body, headers=self._headers, timeout=TIMEOUT_SECONDS)
            response.raise_for_status()
            found = response.json()
        except httpx2.HTTPStatusError as error:
            code = error.response.status_code
            refused = f"does {TOKEN} hold a token for it?" if code in (401, 403) else None
            raise InputError(
                f"expected an answer from {url}, got {code} {error.response.reason_phrase}; "
                f"{refused or f'is {self.name!r} served there?'}"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise InputError(
                f"expected an answer from {url}, got none ({error}); is the server running?"
            ) from None
        try:
            return str(found["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"expected a chat completion from {url}, got something else: "
                f"{json.dumps(found)[:200]}"
            ) from None


class LocalWriter:
    """A Hugging Face causal LM on this machine, greedy; `source` is what `load_model` takes."""

    def __init__(self, source: str, *, device: str, name: str) -> None:
        from gsae_core.lm.model import load_model

        self._model = load_model(source, device=device)
        self.name: str = name

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return how the model goes on."""
        import torch

        tokenizer = self._model.tokenizer
        chats = bool(getattr(tokenizer, "chat_template", None))
        if chats:
            messages = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        # A chat's template has written BOS already.
        ids = tokenizer(question, return_tensors="pt", verbose=False, add_special_tokens=not chats)
        ids = ids["input_ids"].to(self._model.device)
        # Cut at either end, a question lacks what it asks or what it is about.
        if (n := ids.shape[1] + max_tokens) > self._model.n_ctx:
            raise InputError(
                f"expected a model whose context holds a question and its answer, {n} tokens, got "
                f"{self.name} with {self._model.n_ctx}; choose another"
            )
        with torch.inference_mode():
            out = self._model.hf.generate(
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


# Of a vector of a folder a caption is all there is.
WRITE_OF_CAPTIONS = """A feature of a neural network fires on what these captions describe.
In at most ten words, say what they have in common. Answer with that phrase alone.

{texts}

The feature fires on:"""

DETECT_OF_CAPTIONS = """A feature of a neural network fires on: {label}

On which of these {n} captions does it fire? Answer with {n} digits separated by spaces, 1 for a
caption on which it does and 0 for one on which it does not.

{texts}

Digits:"""


class NotLabelled(InputError):
    """One feature cannot be labelled; the next one may be."""


class NotUnderstood(NotLabelled):
    """The writer answered, but not what it was asked."""


def write_label(feature: "Feature", writer: Writer) -> str:
    """Return a label in a line, from the feature's strongest examples."""
    check_fires(feature)
    found = feature.top(N_SHOWN, before=BEFORE, after=AFTER)
    whole = feature.index.manifest.unit == "vector"
    texts = numbered(["".join(e.tokens) if whole else marked(e) for e in found])
    question = (WRITE_OF_CAPTIONS if whole else WRITE).format(texts=texts)
    answer = writer.answer(question, max_tokens=40).strip()
    lines = ["".join(filter(str.isprintable, line)).strip(" \"'.") for line in answer.splitlines()]
    label = next(filter(None, lines), "")
    if not label:
        raise NotUnderstood(
            f"expected a label from {writer.name}, got an empty answer; try another"
        )
    return label[: LONGEST["label"]]


def check_fires(feature: "Feature") -> None:
    """Raise InputError if the feature is dead."""
    if feature.is_dead:
        raise InputError(
            f"expected a feature that fires, got {feature.number}, which is dead on these "
            f"{feature.index.n_tokens} {feature.index.manifest.unit}s: there is nothing to label"
        )


def score_label(feature: "Feature", label: str, writer: Writer, *, by: By = "detection") -> float:
    """Return the share of right answers on where the feature fires; 0.5 is guessing."""
    whole = feature.index.manifest.unit == "vector"
    rng = np.random.default_rng([feature.number, 0])
    fires = feature.random(N_SCORED, seed=0, before=BEFORE, after=AFTER)
    if by == "detection":
        silent = _silent(feature, len(fires))
        # As many of either kind, or a writer that always says yes would score above guessing.
        fires = fires[: len(silent)]
        texts = ["".join(example.tokens) for example in [*fires, *silent]]
    else:
        texts = [marked(e) for e in fires] + [marked(e, elsewhere=rng) for e in fires]
    truth = np.array([1] * len(fires) + [0] * len(fires))
    order = rng.permutation(len(truth))
    shown, n = numbered([texts[i] for i in order]), len(order)
    detect = DETECT_OF_CAPTIONS if whole else DETECT
    question = (detect if by == "detection" else FUZZ).format(label=label, n=n, texts=shown)
    answer = writer.answer(question, max_tokens=4 * n)
    digits = [int(digit) for digit in re.findall(r"(?<!\d)[01](?!\d)", answer)]
    if len(digits) != n:
        raise NotUnderstood(
            f"expected {n} digits, 0 or 1, from {writer.name}, got {answer.strip()[:80]!r}; the "
            "model is too small for scoring, or needs another prompt"
        )
    return float((np.array(digits) == truth[order]).mean())


def label_feature(feature: "Feature", writer: Writer, *, by: By | None = "detection") -> Annotation:
    """Write a label, score it (`by` None: not), and append both to the index's labels."""
    if by == "fuzzing" and feature.index.manifest.unit == "vector":
        raise InputError(
            "expected detection of captions, got fuzzing: a caption stands for its whole vector, "
            "and nothing in it is marked"
        )
    label = write_label(feature, writer)
    return feature.index.labels.add(
        feature.number,
        "label",
        label,
        author="automatic",
        model=writer.name,
        score=score_label(feature, label, writer, by=by) if by else None,
        scored_by=by,
    )


def marked(example: Example, *, elsewhere: np.random.Generator | None = None) -> str:
    """Return a text with << >> around the tokens that the feature fires on.

    `elsewhere` draws as many silent ones instead, or as there are.
    """
    # Of each token the one that has its text: of a split character, the first.
    holder = np.maximum.accumulate([i if token else 0 for i, token in enumerate(example.tokens)])
    shown = np.unique(holder[np.array(example.values) > 0])
    if elsewhere is not None:
        silent = np.setdiff1d(holder, shown)
        shown = elsewhere.choice(silent, min(len(silent), len(shown)), replace=False)
    tokens = enumerate(example.tokens)
    return "".join(f"<<{token}>>" if i in shown else token for i, token in tokens)


def numbered(texts: Sequence[str]) -> str:
    """Return texts as a numbered list, a line each."""
    return "\n".join(f"{i}. {' '.join(text.split())}" for i, text in enumerate(texts, start=1))


def _silent(feature: "Feature", n: int) -> list[Example]:
    """Return up to `n` texts in which the feature is silent throughout."""
    drawn = feature.non_activating(LOOKED_AT, seed=0, before=BEFORE, after=AFTER)
    silent = [example for example in drawn if not any(example.values)]
    if not silent:
        raise NotLabelled(
            f"expected texts in which feature {feature.number} is silent, found none among "
            f"{len(drawn)}: it fires in nearly every text; score its label by fuzzing"
        )
    order = np.random.default_rng(0).permutation(len(silent))
    return [silent[i] for i in order[:n]]
