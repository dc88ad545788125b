"""What was said between a person and a model, and the next answer to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from gateway.commands.client import Client
from handler.errors import Unreachable


class Conversation:
    """Messages, the `model` that answers them at the endpoint `endpoint_id`, and what it is told first.

    Without a `model` it is the first of the endpoint's, which is looked up when there is something to ask it.

    Of the last answer: `first_token_s` after it was asked for, `tokens` as the engine has counted them, made
    at `tokens_per_s` from the first to the last. None is not known.
    """

    def __init__(
        self,
        endpoint_id: str,
        model: str | None = None,
        system: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint_id = endpoint_id
        self.model = model
        self.system = system
        self._clock = clock
        self._said: list[dict[str, str]] = []
        self._forget_figures()

    def _forget_figures(self) -> None:
        self.first_token_s: float | None = None
        self.tokens: int | None = None
        self.tokens_per_s: float | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as the API has it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return [*told, *self._said]

    def clear(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def save(self, path: Path) -> None:
        """Write it to a new file that only its owner can read. Raises `OSError`."""
        text = json.dumps({"model": self.model, "messages": self.messages}, ensure_ascii=False, indent=2)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")

    async def choose(self, asked: Client, model: str) -> None:
        """Have `model` answer from now on.

        Raises `Unreachable` if the endpoint has none of that name, which is known while a worker is ready: a
        name is nothing to start one for.
        """
        shown = (await asked.get("/health"))["endpoints"]
        if any(one["id"] == self.endpoint_id and one["workers"].get("ready") for one in shown):
            models = await self._models(asked)
            if model not in models:
                there = ", ".join(models) or "none for this key"
                raise Unreachable(f"endpoint {self.endpoint_id} has no {model}; it has {there}")
        self.model = model

    @property
    def _base(self) -> str:
        return f"/v2/{self.endpoint_id}/openai/v1"

    async def _models(self, asked: Client) -> list[str]:
        return [one["id"] for one in (await asked.get(f"{self._base}/models"))["data"]]

    async def ask(self, asked: Client, text: str) -> AsyncGenerator[str, None]:
        """The parts of the answer to `text` as they come.

        What was said by the time this is left stays said, but a question without an answer is forgotten.
        Raises `Unreachable`.
        """
        self._forget_figures()
        began_s = self._clock()
        if self.model is None:
            models = await self._models(asked)
            if not models:
                raise Unreachable(f"endpoint {self.endpoint_id} has no model for this key; --model names one")
            self.model = models[0]
        question = {"role": "user", "content": text}
        body = {
            "model": self.model,
            "messages": [*self.messages, question],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        last_s = began_s
        answer = ""
        try:
            async with aclosing(asked.stream(f"{self._base}/chat/completions", body)) as events:
                async for event in events:
                    if part := _text(event):
                        last_s = self._clock()
                        if self.first_token_s is None:
                            self.first_token_s = last_s - began_s
                        answer += part
                        yield part
                    if usage := event.get("usage"):
                        self._count(usage["completion_tokens"], last_s - began_s)
        finally:
            if answer:
                self._said += [question, {"role": "assistant", "content": answer}]

    def _count(self, tokens: int, took_s: float) -> None:
        self.tokens = tokens
        if self.first_token_s is not None and tokens > 1 and took_s > self.first_token_s:
            self.tokens_per_s = (tokens - 1) / (took_s - self.first_token_s)


def _text(event: dict[str, Any]) -> str:
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices") or ())
