"""Who writes labels in tests: an address that speaks OpenAI's chat completions, a small model."""

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch


class Chat(HTTPServer):
    """An address that answers with a label, or with digits of which the first half are 1."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[str] = []
        self.before: Callable[[str], str | None] = lambda question: None
        """What to do about a question; returns another answer, or None."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Chat)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        other = self.server.before(question)
        self.server.questions.append(question)
        n = len(re.findall(r"^\d+\. ", question, re.MULTILINE))
        digits = " ".join("1" * (n // 2) + "0" * (n - n // 2))
        answer = other or (digits if "Digits:" in question else "words\x1b[31m of a kind")
        data = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:  # pyright: ignore
        pass


def save_writer(folder: Path, tokenizer: Any) -> Path:
    """Save a random GPT-2 of one layer whose context holds a question."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 600}
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **shape))
    with torch.no_grad():
        # The head is tied: the end of the text has logit 0, and is never the most likely token.
        hf.transformer.wte.weight[0] = 0.0
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
