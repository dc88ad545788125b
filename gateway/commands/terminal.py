"""A terminal in which answers appear as they are made."""

from __future__ import annotations

import asyncio
import os
import readline
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from gateway.commands.client import Client
from gateway.commands.conversation import Conversation
from handler.errors import Unreachable
from handler.plain import plain

CLEAR_LINE = "\r\x1b[2K"
HISTORY_LINES = 1000
LOOK_S = 1.0
QUIET_S = 0.5
"""How long nothing is said of a wait: most answers begin before."""


@contextmanager
def history(folder: Path | None) -> Iterator[None]:
    """The lines that were typed, of this and earlier times, kept in `folder` for its owner alone."""
    path = folder / "chat_history" if folder is not None else None
    if path is not None:
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                readline.write_history_file(path)


class Answering:
    """Shows one answer on `out`: the wait for it, the text, and what it took."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._conversation: Conversation | None = None
        self._waiting = False

    async def show(self, asked: Client, conversation: Conversation, text: str) -> None:
        """Ask, and show the answer. Raises `Unreachable`."""
        self._conversation = conversation
        wait = asyncio.create_task(self._wait(asked, conversation.endpoint_id))
        try:
            async with aclosing(conversation.ask(asked, text)) as parts:
                async for part in parts:
                    wait.cancel()
                    self._end_wait()
                    self._write(plain(part))
        finally:
            wait.cancel()
            await asyncio.wait({wait})
            self._end_wait()
        self._write(f"\n{_figures(conversation)}\n")

    def stopped(self) -> None:
        """The user has stopped it."""
        self._write("\n[stopped]\n")

    def failed(self, why: str) -> None:
        """It could not be had, or not all of it."""
        self._write(f"\n[{plain(why)}]\n")

    async def _wait(self, asked: Client, endpoint_id: str) -> None:
        """Say, each second, for how long there is no answer, and what the worker does meanwhile."""
        began_s = time.monotonic()
        await asyncio.sleep(QUIET_S)
        self._waiting = True
        what: str | None = "waiting"
        while True:
            if what is not None:
                what = await _doing(asked, endpoint_id)
            self._write(f"{CLEAR_LINE}[{what or 'waiting'}, {time.monotonic() - began_s:.0f} s]")
            await asyncio.sleep(LOOK_S)

    def _end_wait(self) -> None:
        if self._waiting:
            self._waiting = False
            self._write(CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


async def _doing(asked: Client, endpoint_id: str) -> str | None:
    """What keeps an answer from beginning; None if this key is not to know."""
    try:
        endpoints = (await asked.get("/admin/status"))["endpoints"]
    except Unreachable:
        return None
    for shown in endpoints:
        if shown["id"] == endpoint_id:
            starting = [worker for worker in shown["workers"] if worker["state"] == "starting"]
            if starting and not shown["capacity"]:
                phase = starting[0]["phase"]
                return f"a worker starts: {phase}" if phase else "a worker starts"
            if shown["waiting"]:
                return f"{shown['waiting']} wait"
    return "waiting"


def _figures(conversation: Conversation) -> str:
    parts = []
    if conversation.first_token_s is not None:
        parts.append(f"first token after {conversation.first_token_s:.2f} s")
    if conversation.tokens is not None:
        parts.append(f"{conversation.tokens} tokens")
    if conversation.tokens_per_s is not None:
        parts.append(f"{conversation.tokens_per_s:.1f} tokens/s")
    return f"[{', '.join(parts)}]" if parts else "[no answer]"
