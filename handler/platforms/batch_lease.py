"""Who works on a batch: a lease in a table of DynamoDB, one item for each version of an input.

    pk                       sk       holder    attempt  expires     ttl
    batch#bucket/in/a.jsonl  VERSION  9f2c...   3        1795428694  1798020694

It is taken when there is none or the last one has expired, and kept by being renewed. `attempt` counts the
holders: it fences what a replaced one still writes (`handler.platforms.batch_store`). Clocks of workers
may differ: the worst that follows is that two work on the same lines, of which one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handler.errors import AwsFailed
from handler.platforms.aws_clients import Clients

KEPT_S = 30 * 86_400
"""How long an item stays after its last change: the table's `ttl`."""

_REFUSED = "ConditionalCheckFailedException"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of `holder` to work on a version of a batch, the `attempt`th that was given."""

    batch: str
    version: str
    holder: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Another holder has the lease, for `left_s` unless it is renewed."""

    left_s: float


class Leases:
    """The leases in the table called `table`, each for `lease_s`. Every method raises `AwsFailed`."""

    def __init__(
        self, table: str, clients: Clients, lease_s: float, *, now: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._clients = clients
        self._lease_s = lease_s
        self._now = now

    def take(self, batch: str, version: str, holder: str) -> Lease | Taken:
        """The lease of `version` of `batch` for `holder`; `Taken` if another has it."""
        now = self._now()
        try:
            answer = self._update(
                batch,
                version,
                "SET holder = :holder, expires = :expires, #ttl = :ttl ADD attempt :one",
                # The last: a request that is sent again because its answer was lost.
                "attribute_not_exists(expires) OR expires < :now OR holder = :holder",
                {":holder": {"S": holder}, ":now": _number(now), ":one": _number(1)},
                until_s=now + self._lease_s,
                ReturnValues="ALL_NEW",
            )
        except AwsFailed as error:
            if error.reason != _REFUSED:
                raise
            return self._taken(batch, version, now)
        return Lease(batch, version, holder, int(float(answer["Attributes"]["attempt"]["N"])))

    def renew(self, lease: Lease) -> bool:
        """Have `lease` last for `lease_s` from now. False if it is another holder's by now."""
        return self._keep(lease, until_s=self._now() + self._lease_s)

    def release(self, lease: Lease) -> bool:
        """Let another take it at once. False if it is another holder's by now."""
        return self._keep(lease, until_s=0)

    def _keep(self, lease: Lease, *, until_s: float) -> bool:
        try:
            self._update(
                lease.batch,
                lease.version,
                "SET expires = :expires, #ttl = :ttl",
                "holder = :holder AND attempt = :attempt",
                {":holder": {"S": lease.holder}, ":attempt": _number(lease.attempt)},
                until_s=until_s,
            )
        except AwsFailed as error:
            if error.reason != _REFUSED:
                raise
            return False
        return True

    def _taken(self, batch: str, version: str, now: float) -> Taken:
        item = self._clients.call(
            "dynamodb", "get_item", TableName=self._table, Key=_key(batch, version), ConsistentRead=True
        )
        expires = float(item.get("Item", {}).get("expires", {}).get("N", now))
        return Taken(max(0.0, expires - now))

    def _update(
        self,
        batch: str,
        version: str,
        update: str,
        condition: str,
        values: dict[str, dict[str, str]],
        *,
        until_s: float,
        **options: str,
    ) -> Any:
        given = {":expires": _number(until_s), ":ttl": _number(int(self._now() + KEPT_S)), **values}
        return self._clients.call(
            "dynamodb",
            "update_item",
            TableName=self._table,
            Key=_key(batch, version),
            UpdateExpression=update,
            ConditionExpression=condition,
            ExpressionAttributeNames={"#ttl": "ttl"},
            ExpressionAttributeValues=given,
            **options,
        )


def _key(batch: str, version: str) -> dict[str, dict[str, str]]:
    return {"pk": {"S": f"batch#{batch}"}, "sk": {"S": version}}


def _number(value: float) -> dict[str, str]:
    return {"N": f"{value:.3f}"}
