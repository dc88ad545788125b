"""What each key has used, added up in a table of DynamoDB: one item for a key, a model and a day (UTC).

    pk                sk                           prompt_tokens  completion_tokens  requests
    usage#mobile app  2026-11-25#Qwen/Qwen3-8B     1200           340                3

and `key`, `model` and `day` by themselves. Numbers are added by DynamoDB (`ADD`), so that any number of
workers may write. A write that is tried again bears the same token (`TransactWriteItems`), so that it counts
once. What is not written yet is in memory: a worker that is killed loses the requests of its last moments.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from handler.errors import UpstreamFailed
from handler.messages import Call
from handler.platforms.aws_clients import Clients
from handler.usage import Usage, metered

log = logging.getLogger(__name__)

ITEMS_MAX = 100
"""What one transaction may write."""
RETRY_S, RETRY_MAX_S = 1.0, 60.0

_Item = tuple[str, str, str]


class UsageTable:
    """Adds to the table called `name`, off the path of the requests. Lives on one event loop."""

    def __init__(
        self,
        name: str,
        clients: Clients,
        *,
        today: Callable[[], str] = lambda: datetime.now(UTC).date().isoformat(),
    ) -> None:
        self._name = name
        self._clients = clients
        self._today = today
        self._counts: dict[_Item, Counter[str]] = {}
        self._writing: asyncio.Task[None] | None = None

    def add(self, key: str, model: str, usage: Usage) -> None:
        """Count one answer."""
        counts = self._counts.setdefault((key, model, self._today()), Counter())
        counts["prompt_tokens"] += usage.prompt_tokens
        counts["completion_tokens"] += usage.completion_tokens
        counts["requests"] += 1
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def flush(self, within_s: float) -> None:
        """Return once all is written, or after `within_s`."""
        if self._writing is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._writing), within_s)

    async def _write(self) -> None:
        """Write until nothing is left; while one write is on its way, the next is added up."""
        try:
            while self._counts:
                items = dict(list(self._counts.items())[:ITEMS_MAX])
                for item in items:
                    del self._counts[item]
                await self._until_written(items)
        finally:
            self._writing = None

    async def _until_written(self, items: Mapping[_Item, Counter[str]]) -> None:
        token, pause_s = secrets.token_hex(16), RETRY_S
        while True:
            try:
                await asyncio.to_thread(self._put, items, token)
            except UpstreamFailed as error:
                log.warning("usage is not written yet", extra={"reason": str(error), "again_in_s": pause_s})
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
            else:
                return

    def _put(self, items: Mapping[_Item, Counter[str]], token: str) -> None:
        updates = [{"Update": self._update(*item, counts)} for item, counts in items.items()]
        self._clients.call(
            "dynamodb", "transact_write_items", TransactItems=updates, ClientRequestToken=token
        )

    def _update(self, key: str, model: str, day: str, counts: Mapping[str, int]) -> dict[str, Any]:
        return {
            "TableName": self._name,
            "Key": {"pk": {"S": f"usage#{key}"}, "sk": {"S": f"{day}#{model}"}},
            "UpdateExpression": "SET #key = :key, #model = :model, #day = :day "
            "ADD prompt_tokens :prompt_tokens, completion_tokens :completion_tokens, requests :requests",
            "ExpressionAttributeNames": {"#key": "key", "#model": "model", "#day": "day"},
            "ExpressionAttributeValues": {
                ":key": {"S": key},
                ":model": {"S": model},
                ":day": {"S": day},
                **{f":{name}": {"N": str(counts[name])} for name in _NAMES},
            },
        }


_NAMES = ("prompt_tokens", "completion_tokens", "requests")


def metering(table: UsageTable | None, model_id: str) -> Callable[[Call, str], Call]:
    """A function of a call and a key, whose result counts the call's answers in `table`.

    Without a table it returns the call as it is.
    """

    def counted(call: Call, key: str) -> Call:
        if table is None:
            return call

        def tell(usage: Usage) -> None:
            table.add(key, usage.model or model_id, usage)

        return metered(call, tell)

    return counted
