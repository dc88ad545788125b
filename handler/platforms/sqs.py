"""A queue of SQS, asked for messages: what a Lambda function does with them, on any machine.

One message at a time is asked for, so that the others are there for other workers; while a batch is worked on
none is. A message is hidden from others for as long as it is worked on and the worker lives, deleted once
it is done, and shown again where it could not be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from handler import edge
from handler.drain import Drain
from handler.engine import Engine
from handler.errors import AwsFailed, BadEvent, EngineFailed, NoResources, StartError
from handler.phases import Phases
from handler.platforms.aws_clients import Clients, check_installed
from handler.platforms.sqs_queue import Message, Queue, Times
from handler.platforms.stop import from_elsewhere, on_signal
from handler.settings import Settings
from handler.supervision import Notifier

if TYPE_CHECKING:  # they import AWS's models of events, for half a second
    from handler.platforms.lambda_messages import Record, S3Batch
    from handler.platforms.message_work import MessageWork
    from handler.platforms.usage_table import UsageTable

log = logging.getLogger(__name__)

PAUSE_S, PAUSE_MAX_S = 1.0, 30.0
"""How long the queue is left alone after it could not be asked; the pause doubles."""
LINGER_S = 5.0
"""What is left at the drain's end gets this long to be shown again."""


def open(settings: Settings) -> Sqs:  # noqa: A001 - each platform has one
    """The platform."""
    return Sqs(settings)


class Sqs:
    """One worker of a queue. `s3_batch` runs batches, in place of what the settings say."""

    def __init__(
        self,
        settings: Settings,
        times: Times | None = None,
        s3_batch: Callable[[Clients], S3Batch] | None = None,
    ) -> None:
        self._settings = settings
        self._times = times or Times()
        self._s3_batch = s3_batch

    def fit(self) -> None:
        """Nothing is asked of the machine."""

    def prepare(self) -> None:
        """See that there is what messages need. Raises `NoResources`."""
        check_installed()

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Do what messages ask for until SIGTERM, then finish what was begun. Raises `StartError`."""
        consumer = self.consumer(engine)
        stop = from_elsewhere(engine.loop, consumer.stop)
        engine.dead.add_done_callback(lambda _: stop())
        on_signal(stop)
        engine.submit(consumer.serve(notifier, lambda: notifier.ready(phases.report()))).result()
        if engine.is_dead:
            raise EngineFailed("the engine died; the messages that it held will be seen again")

    def fail(self, failure: StartError, notifier: Notifier) -> None:  # noqa: ARG002 - of the protocol
        """Nobody waits to be told: the messages stay for another worker. Raises `failure`."""
        raise failure

    def refuse(self, failure: StartError | None) -> None:
        """No message was taken yet."""

    def consumer(self, engine: Engine) -> Consumer:
        """What asks the queue, and works with `engine`; it lives on the engine's loop."""
        # Late: this imports AWS's models of events.
        from handler.platforms.lambda_replies import Replies  # noqa: PLC0415
        from handler.platforms.message_work import MessageWork  # noqa: PLC0415
        from handler.platforms.s3_batch import batches  # noqa: PLC0415
        from handler.platforms.usage_table import UsageTable, metering  # noqa: PLC0415

        settings, clients, drain, stopping = self._settings, Clients(), Drain(), asyncio.Event()
        assert settings.sqs_queue_url is not None, "the settings are for a queue"
        usage = UsageTable(settings.usage_table, clients) if settings.usage_table else None
        work = MessageWork(
            drain.wrap(edge.openai(engine.call, engine_is_dead=lambda: engine.is_dead)),
            metering(usage, settings.model_id),
            Replies(settings.reply_to, clients),
            self._s3_batch(clients) if self._s3_batch else batches(settings, clients),
            settings.max_concurrency or engine.capacity(),
            stopping,
        )
        queue = Queue(settings.sqs_queue_url, clients, self._times)
        return Consumer(queue, work, drain, usage, settings.drain_timeout_s)


class Consumer:
    """Takes messages from `queue` and has each done. Lives on one event loop."""

    def __init__(
        self,
        queue: Queue,
        work: MessageWork,
        drain: Drain,
        usage: UsageTable | None,
        drain_timeout_s: float,
    ) -> None:
        self._queue = queue
        self._work = work
        self._drain = drain
        self._usage = usage
        self._drain_timeout_s = drain_timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._batch: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    def stop(self) -> None:
        """Take no more."""
        self._work.stopping.set()
        self._room.set()

    async def serve(self, notifier: Notifier, ready: Callable[[], None]) -> None:
        """Take messages until `stop`, then finish those that were taken. Raises `NoResources`."""
        try:
            if not await self._queue.has_dead_letters():
                log.warning("the queue has no dead-letter queue: a message that fails comes again and again")
        except AwsFailed as error:
            raise NoResources(f"SQS_QUEUE_URL can't be used: {error}") from error
        ready()
        log.info("ready", extra={"at_once": self._work.most})
        stopped = asyncio.create_task(self._work.stopping.wait())
        polling = asyncio.create_task(self._poll())
        try:
            await asyncio.wait({stopped, polling}, return_when=asyncio.FIRST_COMPLETED)
            if polling.done():
                polling.result()
            notifier.stopping()
            await self._finish(polling)
        finally:
            left = [stopped, polling, *self._tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        if self._usage is not None:
            await self._usage.flush(LINGER_S)

    async def _poll(self) -> None:
        pause_s = PAUSE_S
        while await self._may_take():
            try:
                received = await self._queue.receive()
            except AwsFailed as error:
                log.warning("the queue can't be asked", extra={"reason": str(error), "again_in_s": pause_s})
                await _within(pause_s, self._work.stopping)
                pause_s = min(pause_s * 2, PAUSE_MAX_S)
                continue
            pause_s = PAUSE_S
            for message in received:
                self._take(message)

    async def _may_take(self) -> bool:
        """Return once there is room for a message; False after a stop."""
        while not self._work.stopping.is_set() and (self._batch or len(self._tasks) >= self._work.most):
            self._room.clear()
            await self._room.wait()
        return not self._work.stopping.is_set()

    def _take(self, message: Message) -> None:
        stopped = self._work.stopping.is_set()
        task = asyncio.create_task(self._hand_back(message) if stopped else self._do(message))
        self._tasks.add(task)
        if not stopped and _is_batch(message.record):
            self._batch = task
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._batch is task:
            self._batch = None
        self._room.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("a message was left", exc_info=error)  # it will be seen again

    async def _do(self, message: Message) -> None:
        from handler.platforms.lambda_messages import work_off  # noqa: PLC0415 - as above

        done = asyncio.Event()
        hiding = asyncio.create_task(self._keep_hidden(message, done))
        deadline_s = asyncio.get_running_loop().time() + self._queue.times.shift_s
        work = partial(self._work.work, "sqs", deadline_s)
        try:
            failed = await work_off([message.record], work, most=1, deadline_s=deadline_s)
        finally:
            done.set()
            await hiding  # or what it has just asked for would be heard after what follows
        if failed:
            await self._hand_back(message)
        else:
            await _try(self._queue.delete(message), "a message that was done will come again")

    async def _keep_hidden(self, message: Message, done: asyncio.Event) -> None:
        times, otherwise = self._queue.times, "others may see a message that is worked on"
        while not await _within(times.hidden_s / 3, done):
            await _try(self._queue.hide(message, times.hidden_s), otherwise)

    async def _hand_back(self, message: Message) -> None:
        """Let others have the message: at once if this worker ends."""
        in_s = 0 if self._work.stopping.is_set() else self._queue.times.again_s
        await _try(self._queue.hide(message, in_s), "a message is seen again later than it could be")

    async def _finish(self, polling: asyncio.Task[None]) -> None:
        """What was taken gets its time, also what an outstanding request brings; the rest is handed back."""
        log.info("draining", extra={"messages": len(self._tasks)})
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._drain_timeout_s
        await asyncio.wait({polling}, timeout=self._drain_timeout_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, until_s - loop.time()))
        ended = await self._drain.finish(0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LINGER_S)
        log.info("drained", extra={"ended_early": ended})


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether `event` comes within `seconds`, which are waited for otherwise."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _is_batch(record: Record) -> bool:
    from handler.platforms.lambda_messages import Continued, Created, tasks  # noqa: PLC0415 - as above

    try:
        return any(isinstance(task, Created | Continued) for task in tasks(record))
    except BadEvent:
        return False


async def _try(request: Awaitable[None], otherwise: str) -> None:
    try:
        await request
    except AwsFailed as error:
        log.warning(otherwise, extra={"reason": str(error)})
