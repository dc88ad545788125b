"""AWS Lambda: invocations from its Runtime API, as many at once as the environment takes, one engine for all.

Nothing listens here: the worker asks. The first time it does is how Lambda knows that it is ready, so
that is once a token was made. What is answered how is in `handler.platforms.lambda_answers`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from handler import edge
from handler.asgi import refuse
from handler.auth import Key, digest
from handler.drain import Drain
from handler.engine import Engine
from handler.errors import (
    EngineFailed,
    NoResources,
    RuntimeApiFailed,
    StartError,
    StartFailed,
    UpstreamFailed,
)
from handler.messages import Call
from handler.phases import Phases
from handler.platforms.aws_clients import Clients, check_installed
from handler.platforms.lambda_runtime import Fault, Runtime, init_error
from handler.platforms.secret_keys import SecretKeys
from handler.platforms.stop import from_elsewhere, on_signal
from handler.settings import LAMBDA, Settings
from handler.supervision import Notifier

if TYPE_CHECKING:  # they import AWS's models of events
    from handler.platforms.lambda_answers import Answers
    from handler.platforms.lambda_messages import S3Batch

log = logging.getLogger(__name__)

CONCURRENCY = "AWS_LAMBDA_MAX_CONCURRENCY"
"""Set on Managed Instances: how many invocations an environment may have at once. Elsewhere it has one."""

TRIES, PAUSE_S = 5, 0.1
"""How often the Runtime API is asked in vain before the worker ends; the pause doubles."""
REGISTER_S = 1.0
LINGER_S = 2.0
"""What answers get, after the drain's deadline, to say that they were ended."""
FLUSH_S = 5.0
"""What usage gets at the end to be written."""


def open(settings: Settings, s3_batch: S3Batch | None = None) -> AwsLambda:  # noqa: A001 - each platform has one
    """The platform. `s3_batch` does what new objects in S3 ask for, in place of what the settings say."""
    return AwsLambda(settings, os.environ, s3_batch)


class AwsLambda:
    """One execution environment of a function."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], s3_batch: S3Batch | None) -> None:
        self._settings = settings
        self._environ = environ
        self._address = environ.get(LAMBDA, "")
        self._s3_batch = s3_batch

    def fit(self) -> None:
        """Nothing is asked of the machine."""

    def prepare(self) -> None:
        """See that there is what answers need. Raises `NoResources`."""
        if not self._address:
            raise NoResources(f"{LAMBDA} is not set: this is no execution environment of Lambda")
        check_installed()

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Answer invocations until SIGTERM, then finish what was taken. Raises `StartError`."""
        worker = self.worker(engine)
        stop = from_elsewhere(engine.loop, worker.stop)
        engine.dead.add_done_callback(lambda _: stop())
        on_signal(stop)
        try:
            engine.submit(worker.open()).result()
        except StartError as failure:
            self.refuse(failure)
            raise
        notifier.ready(phases.report())
        engine.submit(worker.serve(notifier)).result()
        if engine.is_dead:
            raise EngineFailed("the engine died; the invocations that it held have failed")

    def fail(self, failure: StartError, notifier: Notifier) -> None:
        """Answer every invocation with `failure` until SIGTERM."""
        self.prepare()
        drain = Drain()

        async def answer() -> None:
            worker = self._worker(drain.wrap(refuse(StartFailed(failure))), drain, 1)
            on_signal(from_elsewhere(asyncio.get_running_loop(), worker.stop))
            await worker.open()
            notifier.status(f"can't start: {failure}")
            await worker.serve(notifier)

        asyncio.run(answer())

    def refuse(self, failure: StartError | None) -> None:
        """Tell Lambda why there will be no first `next`. Nothing was taken yet: nobody else waits."""
        if failure is not None and self._address:
            init_error(self._address, Fault(f"Worker.{type(failure).__name__}", str(failure)))

    def worker(self, engine: Engine) -> Worker:
        """What asks Lambda, and answers with `engine`; it lives on the engine's loop."""
        drain = Drain()
        call = drain.wrap(edge.openai(engine.call, engine_is_dead=lambda: engine.is_dead))
        return self._worker(call, drain, engine.capacity())

    def _worker(self, call: Call, drain: Drain, capacity: int) -> Worker:
        stopping = asyncio.Event()
        answers = self._answers(call, stopping, capacity)
        return Worker(
            self._address, self._at_once(), answers, drain, stopping, self._settings.drain_timeout_s
        )

    def _at_once(self) -> int:
        """How many invocations are asked for at once: what Lambda allows, fewer if that is set."""
        allowed = self._environ.get(CONCURRENCY, "").strip()
        wanted = self._settings.max_concurrency
        if not allowed.isdecimal() or int(allowed) < 1:
            return wanted or 1
        return min(int(allowed), wanted or int(allowed))

    def _answers(self, call: Call, stopping: asyncio.Event, capacity: int) -> Answers:
        # Late: this imports AWS's models of events.
        from handler.platforms.lambda_answers import Answers, Rules  # noqa: PLC0415
        from handler.platforms.lambda_replies import Replies  # noqa: PLC0415
        from handler.platforms.s3_batch import batches  # noqa: PLC0415
        from handler.platforms.usage_table import UsageTable  # noqa: PLC0415

        settings, clients = self._settings, Clients()
        rules = Rules(
            keys=self._keys(clients) if settings.auth else None,
            usage=UsageTable(settings.usage_table, clients) if settings.usage_table else None,
            replies=Replies(settings.reply_to, clients),
            model_id=settings.model_id,
            endpoint_id=settings.endpoint_id,
            cors_origins=settings.cors_origins,
            max_body_bytes=settings.max_body_bytes,
            streams=settings.lambda_response_mode == "stream",
            freezes=not self._environ.get(CONCURRENCY),
            most=settings.max_concurrency or capacity,
        )
        return Answers(call, rules, self._s3_batch or batches(settings, clients), stopping)

    def _keys(self, clients: Clients) -> SecretKeys:
        settings = self._settings
        fixed = [Key("api_key", digest(settings.api_key))] if settings.api_key else []
        secret = settings.api_keys_secret
        if secret is None:
            return SecretKeys(None, fixed)

        def fetch() -> str:
            found = clients.call("secretsmanager", "get_secret_value", SecretId=secret)
            return str(found.get("SecretString", ""))  # it has none if it is of bytes

        return SecretKeys(fetch, fixed)


class Worker:
    """Asks for invocations, at most `at_once` at a time, and has each answered. Lives on one event loop."""

    def __init__(
        self,
        address: str,
        at_once: int,
        answers: Answers,
        drain: Drain,
        stopping: asyncio.Event,
        drain_timeout_s: float,
    ) -> None:
        self._address = address
        self._at_once = at_once
        self._answers = answers
        self._drain = drain
        self._stopping = stopping
        self._drain_timeout_s = drain_timeout_s
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def stop(self) -> None:
        """Ask for no more."""
        self._stopping.set()

    async def open(self) -> None:
        """Learn who may ask. Raises `StartError`, and Lambda was asked for nothing yet."""
        try:
            await self._answers.open()
        except UpstreamFailed as error:
            raise NoResources(f"API_KEYS_SECRET can't be read: {error}") from error

    async def serve(self, notifier: Notifier) -> None:
        """Answer invocations until `stop`, then finish what was taken. Raises `NoResources`."""
        extension = await self._register()
        pollers = [asyncio.create_task(self._poll()) for _ in range(self._at_once)]
        log.info("ready", extra={"invocations_at_once": self._at_once})
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({stopped, *pollers}, return_when=asyncio.FIRST_COMPLETED)
            self.stop()  # if it was one of the pollers that has ended
            notifier.stopping()
            await self._finish()
            for poller in pollers:
                if poller.done() and not poller.cancelled():
                    poller.result()
        except RuntimeApiFailed as error:
            raise NoResources(f"{error}; asked {TRIES} times") from error
        finally:
            for task in (stopped, *pollers, *extension):
                task.cancel()
            await asyncio.gather(stopped, *pollers, *extension, return_exceptions=True)
            await self._answers.close(FLUSH_S)

    async def _register(self) -> list[asyncio.Task[None]]:
        """Become an extension of Lambda: without one there is no SIGTERM before SIGKILL.

        What aws-lambda-go does for `WithEnableSIGTERM`. Where it can't be, SIGKILL it is.
        """
        runtime = Runtime(self._address)
        try:
            async with asyncio.timeout(REGISTER_S):
                identifier = await runtime.register()
        except (RuntimeApiFailed, TimeoutError) as error:
            log.info("there will be no SIGTERM", extra={"reason": str(error) or "no answer"})
            return []

        async def stay() -> None:
            with suppress(RuntimeApiFailed):
                await runtime.extension_events(identifier)

        return [asyncio.create_task(stay())]

    async def _poll(self) -> None:
        """Ask for one invocation after the other, on one connection. Raises `RuntimeApiFailed`."""
        runtime, failed = Runtime(self._address), 0
        try:
            while not self._stopping.is_set():
                try:
                    invocation = await runtime.next()
                except RuntimeApiFailed as error:
                    failed += 1
                    if failed == TRIES:
                        raise
                    log.warning("no invocation could be had", extra={"reason": str(error)})
                    await asyncio.sleep(PAUSE_S * 2 ** (failed - 1))
                    continue
                failed = 0
                self._busy += 1
                self._idle.clear()
                try:
                    await self._answers.answer(runtime, invocation)
                except RuntimeApiFailed as error:
                    log.warning("an answer was not taken", extra={"id": invocation.id, "reason": str(error)})
                except Exception:  # the boundary of an invocation: it is answered whatever happens
                    log.exception("an invocation failed", extra={"id": invocation.id})
                    with suppress(RuntimeApiFailed):
                        fault = Fault("Worker.internal_error", "The server had an internal error.")
                        await runtime.fail(invocation, fault)
                finally:
                    self._busy -= 1
                    if not self._busy:
                        self._idle.set()
        finally:
            runtime.close()

    async def _finish(self) -> None:
        """What runs gets its time, and what the outstanding polls bring meanwhile; the rest is ended."""
        log.info("draining", extra={"invocations": self._busy})
        ended = 0
        if not await self._idle_within(self._drain_timeout_s):
            ended = await self._drain.finish(0)
            await self._idle_within(LINGER_S)
        log.info("drained", extra={"ended_early": ended})

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
