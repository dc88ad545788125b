"""What the person who started the gateway sees."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from gateway.upstreams.events import (
    Ended,
    Event,
    KeyRefused,
    KeyTaken,
    Progress,
    Ready,
    StartFailed,
    Starting,
)
from handler.plain import plain

log = logging.getLogger("gateway")

_CLEAR_LINE = "\x1b[2K"

_ANOTHER = "no key is shown twice; `python -m gateway keys create --name NAME` makes another"
_SNIPPET = """\
{imports}from openai import OpenAI

client = OpenAI(
    api_key={key},
    base_url={base_url},
)
response = client.chat.completions.create(
    model={model},
    messages=[
        {{"role": "system", "content": "You are a helpful assistant."}},
        {{"role": "user", "content": "Hello, who are you?"}},
    ],
    temperature=0.7,
    max_tokens=500,
)
print(response.choices[0].message.content)
# In a browser: {page}
"""


@dataclass(frozen=True, slots=True)
class Address:
    """What a client needs. `key` is one that was just made, the only one that is ever printed.

    Without it the user has `given` one, or there are keys already.
    """

    base_url: str
    model: str
    key: str | None
    given: bool = False

    def line(self) -> str:
        """URL, model and key on one line, and where to get one on the next."""
        return f"{self.base_url}  model {self.model}  {self.keys()}"

    def keys(self) -> str:
        """The key, and on the next line where to get one."""
        line = f"key {self.key or '$API_KEY'}"
        return line if self.key or self.given else f"{line}\n{_ANOTHER}"

    def snippet(self) -> str:
        """A Python program that works when pasted."""
        return _SNIPPET.format(
            imports="" if self.key else "import os\n\n",
            key=json.dumps(self.key) if self.key else 'os.environ["API_KEY"]',
            base_url=json.dumps(self.base_url),
            model=json.dumps(self.model),
            page=self.base_url.partition("/v2/")[0] + "/",
        )


class Console:
    """Tells events to a person: the addresses of the endpoints, by their ids, on `out`, all else on `err`.

    On a terminal the start is one line that keeps up to date; elsewhere it is log lines.
    """

    def __init__(self, addresses: Mapping[str, Address], out: TextIO, err: TextIO) -> None:
        self._addresses = addresses
        self._several = len(addresses) > 1
        self._address = next(iter(addresses.values()))
        self._out = out
        self._err = err
        self._terminal = err.isatty()
        self._shown = False
        self._phase: str | None = None
        self._began_s = 0.0
        self._tick: asyncio.TimerHandle | None = None

    def waits_for_request(self) -> None:
        """Nothing is started yet: the address is worth knowing all the same."""
        self._show("the worker starts with the first request")

    def shows_all(self) -> None:
        """Several endpoints start, each in its time: where they are is worth knowing before that."""
        self._shown = True
        lines = [f"{one.base_url}  model {one.model}" for one in self._addresses.values()]
        self._out.write("\n".join([*lines, self._address.keys(), "", self._address.snippet()]))
        self._out.flush()

    def __call__(self, endpoint_id: str, event: Event) -> None:
        """Tell `event`, of a worker of that endpoint."""
        of = {"endpoint": endpoint_id} if self._several else {}
        match event:
            case Starting():
                self._began_s = time.monotonic()
                self._progress("starting the worker", of)
            case Progress(text=text):
                self._progress(text, of)
            case Ready(worker, took_s, cold_start):
                self._end_progress()
                total_s = cold_start.get("total_s", took_s)
                if self._shown:
                    log.info(
                        "worker ready", extra={**of, "worker": worker, "cold_start_s": round(total_s, 1)}
                    )
                else:
                    self._show(f"ready in {total_s:.1f} s")
            case StartFailed(worker, reason, exit_code, again_in_s=again_in_s):
                self._end_progress()
                why = {"reason": reason, "exit_code": exit_code, "again_in_s": again_in_s}
                log.error("worker could not start", extra={**of, "worker": worker, **why})
            case Ended(worker, reason, expected):
                level = logging.INFO if expected else logging.ERROR
                log.log(level, "worker ended", extra={**of, "worker": worker, "reason": reason})
            case KeyRefused(worker, reason):
                log.error("UPSTREAM_KEY is refused", extra={**of, "worker": worker, "reason": reason})
            case KeyTaken(worker):
                log.info("UPSTREAM_KEY is taken again", extra={**of, "worker": worker})

    def _show(self, how: str) -> None:
        self._shown = True
        self._out.write(f"{how}  {self._address.line()}\n\n{self._address.snippet()}")
        self._out.flush()

    def _progress(self, text: str, of: Mapping[str, str]) -> None:
        if not self._terminal:
            log.info("worker starting", extra={**of, "phase": text})
            return
        self._phase = plain(": ".join([*of.values(), text]))
        self._draw()

    def _draw(self) -> None:
        # The cursor goes back to the line's start: whatever else is written there covers the line.
        elapsed_s = time.monotonic() - self._began_s
        self._err.write(f"{_CLEAR_LINE}{self._phase} ({elapsed_s:.0f} s)\r")
        self._err.flush()
        if self._tick is not None:
            self._tick.cancel()
        self._tick = asyncio.get_running_loop().call_later(1, self._draw)

    def _end_progress(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._phase is not None:
            self._phase = None
            self._err.write(_CLEAR_LINE)
            self._err.flush()

    def close(self) -> None:
        """Leave the terminal as it was, and let no key be lost that was made."""
        self._end_progress()
        if self._address.key and not self._shown:
            self._show("no worker was ready")
