"""A Lambda function in the test's own process: the platform as it is, with a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from handler.platforms.aws_lambda import AwsLambda, Worker
from handler.settings import Settings
from handler.supervision import Notifier
from tests.lambda_doors import FrontDoors
from tests.lambda_runtime import RuntimeApi
from tests.scripted_app import ScriptedApp
from tests.scripted_server import ScriptedEngine
from tests.servers import KEY, Server

if TYPE_CHECKING:
    from handler.engine import Engine
    from handler.platforms.lambda_messages import S3Batch


@dataclass(frozen=True)
class Function:
    """A function, and what is in front of it."""

    api: RuntimeApi
    doors: FrontDoors
    engine: ScriptedEngine
    worker: Worker
    serving: asyncio.Task[None]

    def server(self, door: str = "rest", key: str = KEY) -> Server:
        """The OpenAI server that a client sees through `door`."""
        return Server(self.doors.urls[door], key)


@asynccontextmanager
async def function(
    app: ScriptedApp,
    environ: Mapping[str, str] | None = None,
    *,
    at_once: int = 8,
    timeout_s: float = 900.0,
    patience_s: float = 0.0,
    cuts: bool = False,
    s3_batch: S3Batch | None = None,
) -> AsyncIterator[Function]:
    """A function that is ready, with the settings of `environ`; stopped at the end. Nothing is at fault."""
    api = RuntimeApi(at_once, patience_s)
    doors = FrontDoors(api, timeout_s=timeout_s, cuts=cuts)
    async with api.open(), doors.open():
        given = {**api.environ(), "API_KEY": KEY, "DRAIN_TIMEOUT_S": "0", **(environ or {})}
        settings = Settings.from_environ({name: value for name, value in given.items() if value})
        engine = ScriptedEngine(app, settings)
        worker = AwsLambda(settings, given, s3_batch).worker(cast("Engine", engine))
        await worker.open()
        serving = asyncio.create_task(worker.serve(Notifier(None)))
        polled = asyncio.create_task(api.polled(at_once))
        try:
            await asyncio.wait({polled, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            yield Function(api, doors, engine, worker, serving)
        finally:
            polled.cancel()
            worker.stop()
            await asyncio.wait({serving})
    assert not api.faults, api.faults
    serving.result()
