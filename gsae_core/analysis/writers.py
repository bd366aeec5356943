"""Who writes automatic labels: a causal language model here, or one behind an OpenAI-like address.

Nothing here is used unless somebody asks for a label: text of the corpus leaves this machine only
for the address that OPENAI_BASE_URL names.
"""

import json
import os
import urllib.error
import urllib.request
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from gsae_core.errors import InputError

TIMEOUT_SECONDS = 60.0


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

    Raises:
        InputError: if there is no address, or it is none.
    """

    def __init__(self, name: str, *, base_url: str | None = None) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL", "")
        if urlsplit(url).scheme not in ("http", "https"):
            raise InputError(
                f"expected an address in OPENAI_BASE_URL such as http://localhost:8000/v1, got "
                f"{url or 'none'!r}"
            )
        self.name, self._url = name, url.rstrip("/") + "/chat/completions"

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
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            raise InputError(
                f"expected an answer from {self._url}, got {error.code} {error.reason}; is "
                f"{self.name!r} served there?"
            ) from None
        except (OSError, ValueError) as error:
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
    """

    def __init__(self, source: Any, *, device: str = "cpu") -> None:
        from gsae_core.lm.model import load_model

        self._model = load_model(source, device=device)
        self.name = self._model.name

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return how the model goes on, cut at its context."""
        import torch

        hf, tokenizer = self._model.hf, self._model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(question, return_tensors="pt", verbose=False)["input_ids"]
        # The end of a question holds what is asked: what does not fit is cut from its start.
        ids = ids[:, -max(1, self._model.n_ctx - max_tokens) :].to(self._model.device)
        with torch.inference_mode():
            out = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
