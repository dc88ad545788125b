"""How a command asks a running gateway: through its owner's door, or at a URL with a key."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from gateway import data_folder, door
from gateway.settings import KeptSettings
from handler.errors import BadSettings, Unreachable, UsageError

CONNECT_TIMEOUT_S = 10.0
LINE_MAX_BYTES = 16 << 20
"""The longest line of a stream: one holds a whole tool call, or the log probabilities of a few tokens."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where the gateway is."""
    parser.add_argument(
        "--url",
        help="a gateway elsewhere, http://HOST:PORT, or its whole base URL; without: the one of this machine "
        "that keeps its data in DATA_DIR, and no key is needed",
    )
    parser.add_argument(
        "--key-from-env",
        metavar="NAME",
        default="API_KEY",
        help="the variable that holds the key for --url (default: API_KEY)",
    )


@dataclass(frozen=True, slots=True)
class Place:
    """A gateway, and with which headers it is asked. `folder` is that of its door, if it is asked there."""

    base: str
    headers: Mapping[str, str]
    folder: Path | None = None
    endpoint_id: str | None = None
    """What the URL says, if it says one."""

    @classmethod
    def of(cls, args: argparse.Namespace, environ: Mapping[str, str]) -> Place:
        """The place that the arguments name. Raises `StartError`."""
        if args.url is None:
            folder = KeptSettings.from_environ(environ).data_dir
            data_folder.check(folder, serves=False)
            return cls("http://gateway", {}, folder)
        url = urlsplit(args.url)
        if url.scheme not in {"http", "https"} or not url.netloc or url.query or url.username:
            raise UsageError("--url is no URL such as http://127.0.0.1:8000")
        if not (key := environ.get(args.key_from_env, "").strip()):
            raise BadSettings([f"{args.key_from_env} is not set; it is where the key for --url comes from"])
        before, found, after = url.path.rstrip("/").partition("/v2/")
        return cls(
            f"{url.scheme}://{url.netloc}{before}",
            {"authorization": f"Bearer {key}"},
            endpoint_id=after.split("/")[0] if found else None,
        )

    def __str__(self) -> str:
        return self.base if self.folder is None else f"the gateway of {self.folder}"


class Client:
    """Asks the gateway at `place`. Raises `Unreachable`, also for what it refuses, in its words."""

    def __init__(self, place: Place, session: aiohttp.ClientSession) -> None:
        self.place = place
        self._session = session

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """The JSON that is at `path`."""
        async with self._ask("GET", path, params=query) as response:
            return await _json(response)

    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[str, None]:
        """The lines of the text at `path`."""
        async with self._ask("GET", path, params=query) as response:
            async for line in _lines(response):
                yield line

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What a stream says, an object for each of its events."""
        async with self._ask("POST", path, json=body) as response:
            async for line in _lines(response):
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Unreachable(_message(event))
                    yield event

    @asynccontextmanager
    async def _ask(self, method: str, path: str, **what: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(
                method, self.place.base + path, headers=self.place.headers, allow_redirects=False, **what
            ) as response:
                if response.status >= 400:
                    raise Unreachable(_message(await _json(response)))
                yield response
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"{self.place} can't be reached: {error.strerror or error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{self.place} went away: {error}") from None


@asynccontextmanager
async def connected(place: Place) -> AsyncIterator[Client]:
    """A client of `place`. Raises `Unreachable` if there is no door."""
    async with AsyncExitStack() as stack:
        connector: aiohttp.BaseConnector | None = None
        if place.folder is not None:
            try:
                path = stack.enter_context(door.reachable(place.folder))
            except OSError:
                path = None
            if path is None or not path.is_socket():
                raise Unreachable(
                    f"no gateway of this user runs with DATA_DIR={place.folder}; "
                    "`python -m gateway` starts one, --url names one elsewhere"
                )
            connector = aiohttp.UnixConnector(str(path))
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=LINE_MAX_BYTES,
        )
        yield Client(place, await stack.enter_async_context(session))


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        yield line.decode(errors="replace").rstrip("\r\n")


async def _json(response: aiohttp.ClientResponse) -> Any:
    raw = await response.read()
    try:
        return json.loads(raw)
    except ValueError:
        raise Unreachable(f"the answer is no gateway's: status {response.status}") from None


def _message(body: object) -> str:
    """What an error says in its words, and its code."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return "the answer is no gateway's"
    return f"{error.get('message')} ({error.get('code')})"
