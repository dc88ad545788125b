"""The admin API's keys and usage. `gateway.app` lets nobody without an admin key come here."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from gateway.accounts import key_table
from gateway.accounts.report import Question, report
from gateway.methods import by_method
from gateway.store import Store
from handler.body import json_object
from handler.errors import BadRequest, json_reply
from handler.messages import Call, Reply, Request, once

_KEYS = "/admin/keys"
_USAGE = "/admin/usage"


@dataclass(frozen=True, slots=True)
class Admin:
    """`GET` and `POST /admin/keys`, `DELETE /admin/keys/{id}`, `GET /admin/usage`."""

    store: Store
    following: key_table.Following

    def find(self, request: Request) -> Call | None:
        """The call for one of them. Raises `MethodNotAllowed`."""
        calls: dict[str, Call]
        if request.path == _KEYS:
            calls = {"GET": self._list, "POST": self._create}
        elif request.path.startswith(_KEYS + "/"):
            calls = {"DELETE": self._revoke}
        elif request.path == _USAGE:
            calls = {"GET": self._usage}
        else:
            return None
        return by_method(request, calls)

    @asynccontextmanager
    async def _list(self, _: Request) -> AsyncIterator[Reply]:
        keys, _revision = await self.store.read(key_table.load)
        yield json_reply(200, {"data": [key.view() for key in keys]})

    @asynccontextmanager
    async def _create(self, request: Request) -> AsyncIterator[Reply]:
        new = key_table.parse(json_object(request), time.time())
        key, made = await self.store.write(partial(key_table.create, new=new))
        await self.following.look()
        yield json_reply(201, {**key.view(), "key": made}, (("cache-control", "no-store"),))

    @asynccontextmanager
    async def _revoke(self, request: Request) -> AsyncIterator[Reply]:
        name = request.path.removeprefix(_KEYS + "/")
        key = await self.store.write(partial(key_table.revoke, name=name, now_s=time.time()))
        await self.following.look()
        yield json_reply(200, key.view())

    @asynccontextmanager
    async def _usage(self, request: Request) -> AsyncIterator[Reply]:
        fields = request.parameters
        form = fields.pop("format", "json")
        if form not in {"json", "csv"}:
            raise BadRequest("`format` must be json or csv.", param="format", code="invalid_question")
        found = await self.store.read(partial(report, question=Question.parse(fields)))
        if form == "json":
            yield json_reply(200, found.view())
            return
        text = found.csv().encode()
        headers = (("content-type", "text/csv; charset=utf-8"), ("content-length", str(len(text))))
        yield Reply(200, headers, once(text))
