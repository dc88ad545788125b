"""What the model is trained on: dialogues in OpenAI's message form, and plain passages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One message as `/v1/chat/completions` takes it."""

Turns = tuple[Message, ...]
"""A piece of a dialogue."""

Tool = dict[str, Any]
"""One tool as `/v1/chat/completions` takes it."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages, and the tools that were offered: the model learns what the assistant says."""

    messages: Turns
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """A text without roles, as `/v1/completions` takes it: the model learns all of it."""

    text: str


Sample = Dialogue | Passage


def user(content: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """What the assistant answers."""
    return {"role": "assistant", "content": content}


def exchange(question: str, answer: str) -> Turns:
    """One question and its answer."""
    return user(question), assistant(answer)
