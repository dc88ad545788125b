"""A gateway from its first socket to its last answer."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from gateway import data_folder, door
from gateway.accounts import key_table
from gateway.accounts.key_table import Following
from gateway.accounts.keys import Keys
from gateway.alone import alone
from gateway.assembly import Assembly, Base, faults_told
from gateway.console import Address, Console
from gateway.endpoints.file import Description
from gateway.running import Running
from gateway.settings import GatewaySettings
from gateway.store import Store
from gateway.upstreams import folder
from handler import traces
from handler.listener import listen
from handler.supervision import Notifier

if TYPE_CHECKING:
    from handler.otel import Traces


log = logging.getLogger("gateway")

FILES_MAX = 65536
"""How many files a gateway may have open at most, as vLLM has it for itself."""


def raise_files_limit() -> None:
    """Have as many files open as the system lets: a stream takes two, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    settings: GatewaySettings, description: Description, environ: Mapping[str, str], worker: Sequence[str]
) -> int:
    """Listen, keep workers, each a `worker` command, and answer until a signal comes.

    Returns 0 once drained, or the exit code of a first worker that can never start.
    Raises `StartError`.
    """
    raise_files_limit()
    data_folder.check_database(settings.database_url, settings.data_dir, serves=True)
    with faults_told():
        note = data_folder.make(settings.data_dir)
    if note:
        log.warning(note)
    with (
        listen(settings.host, settings.port) as listener,  # before a key is made that nobody would see
        alone(settings.database_url),
        closing(Store.open(settings.database_url)) as store,
        door.listen(settings.data_dir) as owners,
        traced(settings) as tracing,
    ):
        folder.sweep()
        keys = Keys(settings.api_key)
        with faults_told():
            first = partial(key_table.first, now_s=time.time())
            made = None if settings.api_key else await store.write(first)
            following = Following(keys, store)
            await following.look()
        addresses = _addresses(settings, description, listener, made)
        with closing(Console(addresses, sys.stdout, sys.stderr)) as console:
            running = Running(settings, console)
            base = Base(settings, environ, worker, store, keys, following, tracing, running.tell)
            async with Assembly(base, description) as assembly, beside(following.run()):
                running.begin(assembly, Notifier(environ.get("NOTIFY_SOCKET")))
                await asyncio.gather(
                    running.answer(assembly.gateway(keys), listener),
                    running.answer(assembly.gateway(door.Owner()), owners),
                )
        return running.exit_code


@contextmanager
def traced(settings: GatewaySettings) -> Iterator[Traces | None]:
    """Where traces go, if `settings` say it."""
    found = traces.open(settings)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` as a task while the block runs, and cancel it at its end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _addresses(
    settings: GatewaySettings, description: Description, listener: socket.socket, made: str | None
) -> dict[str, Address]:
    """Where each endpoint is; `made` is a key that is to be shown."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    base = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    return {
        one.id: Address(
            f"{base}/v2/{one.id}/openai/v1",
            one.settings.model_id,
            made,
            given=settings.api_key is not None,
        )
        for one in description.endpoints
    }
