"""OpenAI's batches from S3: `in/a.jsonl` is put there, `out/a/` is made of it, whoever is killed meanwhile.

A message (a new object, or `batch.continue`) has a worker take the batch's lease, look how far it is, and
work its lines off through the same call as every request, until the batch is over or the worker's time is.
Then it asks by a message that the batch be gone on with. Whatever is missing when a worker ends is done by
the next one that a message comes to. docs/decisions/0011-s3-batch.md says why nothing is lost by that, or
counts twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from handler import batch_object
from handler.batch_window import Pace
from handler.errors import AwsFailed, BadEvent, BatchLost, UpstreamFailed
from handler.platforms import batch_record as record
from handler.platforms.aws_clients import Clients
from handler.platforms.batch_lease import Leases, Taken
from handler.platforms.batch_shift import BatchShift, Means, Times
from handler.platforms.batch_store import BatchStore, Place
from handler.platforms.lambda_messages import CONTINUE, Continued, Created, Shift
from handler.settings import Settings

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
THREADS = 16
DELAY_MAX_S = 900
"""The longest that SQS keeps a message back."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which batch a message is about. `version` is that of the input which it means, empty for any."""

    place: Place
    version: str


class S3Batches:
    """Runs the batches of the bucket and prefix that the settings name (a `lambda_messages.S3Batch`)."""

    def __init__(
        self,
        settings: Settings,
        clients: Clients,
        *,
        times: Times | None = None,
        pace: Callable[[int], Pace] = Pace,
        now: Callable[[], float] = time.time,
    ) -> None:
        assert settings.batch_input is not None, "the settings are for batches"
        assert settings.batch_output is not None, "the settings are for batches"
        assert settings.batch_table is not None, "the settings are for batches"
        self._settings = settings
        self._clients = clients
        self._times = times or Times()
        leases = Leases(settings.batch_table, clients, self._times.lease_s, now=now)
        threads = ThreadPoolExecutor(THREADS, "batch")
        self._means = Means(settings, leases, self._times, pace, now, threads)
        self._input = _bucket(settings.batch_input)
        self._output = _bucket(settings.batch_output)

    async def __call__(self, task: Created | Continued, shift: Shift) -> None:
        """Do what `task` asks for: all of the batch, or as much of it as fits in `shift`.

        Raises `FirstTokenError` where that could not be done, and the message has to come again.
        """
        asked = self._asked(task)
        if asked is None:
            return
        store = BatchStore(asked.place, self._clients)
        version = await self._means.thread(_open_version, store, asked)
        if version is None:
            return
        held = await self._means.thread(self._means.leases.take, asked.place.name, version, uuid.uuid4().hex)
        if isinstance(held, Taken):
            log.info("another worker has the batch", extra={"batch": asked.place.id, "left_s": held.left_s})
            await self._look_again(asked.place, version, max(1.0, held.left_s))
            return
        try:
            over = await BatchShift(self._means, store, held, shift).run()
        except BatchLost as error:
            log.warning("the batch is another's now", extra={"batch": asked.place.id, "reason": str(error)})
            await self._look_again(asked.place, version, self._times.lease_s)
            return
        finally:
            with suppress(AwsFailed):  # it will expire
                await asyncio.shield(self._means.thread(self._means.leases.release, held))
        if not over:
            await self._look_again(asked.place, version, 0)

    def _asked(self, task: Created | Continued) -> Asked | None:
        """The batch that `task` is about; None for an object that is none. Raises `BadEvent`."""
        if isinstance(task, Created):
            bucket, key, version = task.bucket, task.key, task.version
        else:
            said = [task.message.get(name) for name in ("bucket", "key", "version")]
            if not all(isinstance(value, str) for value in said):
                raise BadEvent(f'A message of type "{CONTINUE}" says "bucket", "key" and "version".')
            bucket, key, version = map(str, said)
        if bucket != self._input[0]:
            raise BadEvent(f"Batches are read from {self._settings.batch_input}, and this is in {bucket!r}.")
        name = key.removeprefix(self._input[1]).removesuffix(SUFFIX)
        if not name or key != f"{self._input[1]}{name}{SUFFIX}":
            log.info("an object is no batch", extra={"key": key})
            return None
        return Asked(Place(name, bucket, key, self._output[0], f"{self._output[1]}{name}/"), version)

    async def _look_again(self, place: Place, version: str, in_s: float) -> None:
        """Have somebody go on with the batch, in `in_s` seconds or a little later.

        A message of its own, and not this one once more: that would count as a failure. While a batch
        is not over there is always a message that will have somebody look at it.
        """
        queue = self._settings.sqs_queue_url
        if queue is None:
            raise UpstreamFailed("there is no SQS_QUEUE_URL, so nobody would go on with the batch")
        message = {"type": CONTINUE, "bucket": place.bucket, "key": place.key, "version": version}
        await self._means.thread(
            partial(
                self._clients.call,
                "sqs",
                "send_message",
                QueueUrl=queue,
                MessageBody=json.dumps(message),
                DelaySeconds=min(math.ceil(in_s), DELAY_MAX_S),
            )
        )


def batches(settings: Settings, clients: Clients) -> S3Batches | None:
    """What runs batches, if the settings say where they are."""
    return None if settings.batch_input is None else S3Batches(settings, clients)


def _bucket(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix


def _open_version(store: BatchStore, asked: Asked) -> str | None:
    """The version of the input for which there is something to do, or None."""
    said, _ = store.load()
    given = store.head()
    if given is None:  # it was deleted: of a batch that has begun, that is to be told
        return asked.version if record.is_of(said, asked.version) and not batch_object.is_over(said) else None
    if not given.is_named(asked.version):
        log.info("a newer input has taken the place of this", extra={"batch": asked.place.id})
        return None
    return None if record.is_of(said, given.version) and batch_object.is_over(said) else given.version
