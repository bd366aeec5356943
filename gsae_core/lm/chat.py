"""Chats in rows of tables, and their text by the chat template of a tokenizer."""

from dataclasses import dataclass
from typing import Any

from gsae_core.errors import InputError

# Columns of chats are looked for under these names first.
CHAT_COLUMNS = ("messages", "conversations", "conversation")

# Who speaks, as ShareGPT's files say it, in the words of templates.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

Chat = list[dict[str, Any]]


def as_chat(value: Any) -> Chat | None:
    """Return messages with `role` and `content`; None if a value of a table is no chat.

    Read are OpenAI's form (`role`, `content`) and ShareGPT's (`from`, `value`), a list of messages
    or, as `datasets` may keep them, a dict of lists.
    """
    for role, content in (("role", "content"), ("from", "value")):
        told = value
        if isinstance(told, dict) and all(isinstance(told.get(k), list) for k in (role, content)):
            told = [
                dict(zip(told, each, strict=False)) for each in zip(*told.values(), strict=False)
            ]
        if not (isinstance(told, list) and told):
            continue
        if all(isinstance(m, dict) and isinstance(m.get(role), str) and content in m for m in told):
            return [_message(m, role, content) for m in told]
    return None


def _message(told: dict[str, Any], role: str, content: str) -> dict[str, Any]:
    # A table has a null where a message lacks what another one has; templates ask what is there.
    rest = {k: v for k, v in told.items() if k not in (role, content) and v is not None}
    who = told[role] if role == "role" else ROLES.get(told[role].lower(), told[role])
    return {"role": who, "content": "" if told[content] is None else told[content], **rest}


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template."""

    template: str
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatTemplate":
        """Return a tokenizer's; an InputError says that it has none."""
        try:
            return cls(tokenizer.get_chat_template(), tokenizer)
        except (AttributeError, ValueError) as error:
            raise InputError(
                "expected a tokenizer with a chat template for --chat, got one without "
                f"({type(tokenizer).__name__}): take the instruction-tuned model, put its "
                "chat_template.jinja into the model's folder, or leave out --chat"
            ) from error

    def text(self, chat: Chat, where: str) -> str:
        """Return a chat as the template writes it; an InputError if it takes no such chat."""
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in chat[:6])
            raise InputError(
                f"expected chats that the model's chat template takes in {where}, got one of "
                f"{roles} ({error}): mend or leave out such rows, or take another model"
            ) from None
