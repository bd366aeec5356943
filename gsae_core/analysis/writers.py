"""Who writes automatic labels: a causal language model here, or one behind an OpenAI-like address.

Nothing here is used unless somebody asks for a label: text of the corpus leaves this machine only
for the address that OPENAI_BASE_URL names.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any, Protocol, runtime_checkable
from urllib.parse import SplitResult, urlsplit

from gsae_core.errors import InputError
from gsae_core.lm.texts import running_text

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
        if urlsplit(url).scheme not in ("http", "https"):
            raise InputError(
                f"expected an address in OPENAI_BASE_URL such as http://localhost:8000/v1, got "
                f"{url or 'none'!r}"
            )
        _check_plain(urlsplit(url))
        self.name, self.where = name, url.rstrip("/")
        self._url, self._token = self.where + "/chat/completions", _token()

    @property
    def has_token(self) -> bool:
        return bool(self._token)

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return the model's answer, at temperature 0.

        Raises:
            InputError: if the address does not answer, or not as OpenAI's would.
        """
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            refused = f"does {TOKEN} hold a token for it?" if error.code in (401, 403) else None
            raise InputError(
                f"expected an answer from {self._url}, got {error.code} {error.reason}; "
                f"{refused or f'is {self.name!r} served there?'}"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
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


def _check_plain(url: SplitResult) -> None:
    """Check that nothing in an address is a secret: addresses are shown and end up in logs."""
    if url.username is not None or url.query or url.fragment:
        raise InputError(
            "expected an address in OPENAI_BASE_URL without a user, a password or a query, got "
            f"one with them for {url.hostname}; put the token into {TOKEN}"
        )


def _token() -> str:
    token = os.environ.get(TOKEN, "").strip()
    # http.client would say the whole header in its error.
    if not (token.isascii() and token.isprintable()) and token:
        raise InputError(
            f"expected a token of plain characters in {TOKEN}, got one with others; copy it again"
        )
    return token


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Text and token go to the address that was named, and to no other that it names."""

    def redirect_request(self, *_: Any) -> None:  # pyright: ignore
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


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
