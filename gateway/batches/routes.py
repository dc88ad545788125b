"""`/v2/{endpoint_id}/openai/v1/batches`: OpenAI's batches, asked of the endpoint after all others.

A batch belongs to the key that made it and to the endpoint; an admin key sees those of all keys.
https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Container, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from gateway import openai_route
from gateway.accounts.keys import Keys
from gateway.batches import table
from gateway.batches.runs import BatchRuns
from gateway.batches.table import Row
from gateway.files import store as file_store
from gateway.files.routes import expires_in_s
from gateway.files.store import new_id
from gateway.methods import by_method
from handler import batch_lines, batch_object
from handler.batch_lines import FILE_MAX_BYTES
from handler.batch_object import Batch
from handler.body import json_object
from handler.errors import BadRequest, NotFound, RateLimited, RequestError, json_reply
from handler.messages import Call, Reply, Request

LIST_MAX, LIST_DEFAULT = 100, 20
UNFINISHED_MAX = 100
"""How many batches a key may have that are not over."""
UNFINISHED_RETRY_S = 60
_ID = re.compile(r"[!-~]{1,64}")
METADATA_MAX, METADATA_NAME_CHARS, METADATA_VALUE_CHARS = 16, 64, 512


@dataclass(frozen=True, slots=True)
class Batches:
    """The routes of batches."""

    runs: BatchRuns
    endpoints: Container[str]
    keys: Keys

    def find(self, request: Request) -> Call | None:
        """The call for a route of batches. Raises `MethodNotAllowed`."""
        found = openai_route.parts(request.path, "batches")
        if found is None or found[0] not in self.endpoints:
            return None
        endpoint_id, batch_id, below = found
        methods: Mapping[str, Call]
        if batch_id is None:
            methods = {"GET": partial(self._list, endpoint_id), "POST": partial(self._create, endpoint_id)}
        elif below is None:
            methods = {"GET": partial(self._retrieve, endpoint_id, batch_id)}
        elif below == "cancel":
            methods = {"POST": partial(self._cancel, endpoint_id, batch_id)}
        else:
            return None
        return by_method(request, methods)

    @asynccontextmanager
    async def _create(self, endpoint_id: str, request: Request) -> AsyncIterator[Reply]:
        wanted = _Wanted.parse(json_object(request))
        owner, caller, now = openai_route.owner(self.keys, request), request.visit.caller, self.runs.means.now
        batch = batch_object.begin(
            new_id("batch_"),
            input_file_id=wanted.input_file_id,
            endpoint=wanted.endpoint,
            model=None,
            metadata=wanted.metadata,
            now=now,
        )
        row = Row(
            id=batch["id"],
            key_id=caller,
            endpoint_id=endpoint_id,
            input_file_id=wanted.input_file_id,
            output_file_id=new_id("file-"),
            error_file_id=new_id("file-"),
            expires_in_s=wanted.expires_in_s,
            object=batch,
        )

        def check(connection: Connection) -> None:
            file = file_store.find(connection, wanted.input_file_id, owner, now)
            if file is None:
                raise _bad("input_file_id", f"No such File object: {wanted.input_file_id}", "file_not_found")
            if file.purpose != "batch":
                why = f"The purpose of the file is '{file.purpose}'; it has to be 'batch'."
                raise _bad("input_file_id", why, "invalid_file_purpose")
            if file.bytes > FILE_MAX_BYTES:
                why = f"The file has {file.bytes} bytes, and a batch may have {FILE_MAX_BYTES}."
                raise _bad("input_file_id", why, "file_too_large")
            if table.unfinished_of(connection, caller) >= UNFINISHED_MAX:
                why = f"{UNFINISHED_MAX} batches of this key are not over yet."
                raise RateLimited(why, retry_after_s=UNFINISHED_RETRY_S, code="too_many_batches")

        yield json_reply(200, await self.runs.submit(row, check))

    @asynccontextmanager
    async def _list(self, endpoint_id: str, request: Request) -> AsyncIterator[Reply]:
        given = request.parameters
        limit = openai_route.limit(given, most=LIST_MAX, otherwise=LIST_DEFAULT)
        wanted = partial(
            table.listed,
            key_id=openai_route.owner(self.keys, request),
            endpoint_id=endpoint_id,
            after=given.get("after"),
            limit=limit + 1,
        )
        batches = await self.runs.means.store.read(wanted)
        page = openai_route.page(list(batches[:limit]), has_more=len(batches) > limit)
        yield json_reply(200, page)

    @asynccontextmanager
    async def _retrieve(self, endpoint_id: str, batch_id: str, request: Request) -> AsyncIterator[Reply]:
        yield json_reply(200, await self._find(endpoint_id, batch_id, request))

    @asynccontextmanager
    async def _cancel(self, endpoint_id: str, batch_id: str, request: Request) -> AsyncIterator[Reply]:
        await self._find(endpoint_id, batch_id, request)
        yield json_reply(200, await self.runs.cancel(batch_id))

    async def _find(self, endpoint_id: str, batch_id: str, request: Request) -> Batch:
        owner = openai_route.owner(self.keys, request)
        batch = await self.runs.means.store.read(
            lambda connection: table.find(connection, batch_id, owner, endpoint_id)
        )
        if batch is None:
            raise NotFound(f"No batch found with id '{batch_id}'.", param="id", code="batch_not_found")
        return batch


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a batch is to be made of."""

    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None
    expires_in_s: int | None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> _Wanted:
        """What the body of a request asks for. Raises `BadRequest`."""
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(given.get(name), str):
                raise _bad(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
        if not _ID.fullmatch(given["input_file_id"]):
            raise _bad("input_file_id", f"No such File object: {given['input_file_id']}", "file_not_found")
        if given["completion_window"] != "24h":
            why = f"Invalid value: '{given['completion_window']}'. Supported values are: '24h'."
            raise _bad("completion_window", why, "invalid_value")
        try:
            batch_lines.route({"method": "POST", "url": given["endpoint"]})
        except RequestError:
            why = f"Invalid value: '{given['endpoint']}' is no route that a batch can ask."
            raise _bad("endpoint", why, "invalid_value") from None
        after = given.get("output_expires_after")
        return cls(
            given["input_file_id"],
            given["endpoint"],
            _metadata(given.get("metadata")),
            None if after is None else expires_in_s(after, "output_expires_after"),
        )


def _metadata(given: object) -> Mapping[str, str] | None:
    if given is None:
        return None
    if not (
        isinstance(given, dict)
        and len(given) <= METADATA_MAX
        and all(len(name) <= METADATA_NAME_CHARS for name in given)
        and all(isinstance(value, str) and len(value) <= METADATA_VALUE_CHARS for value in given.values())
    ):
        why = (
            f"'metadata' has to be an object of at most {METADATA_MAX} texts, each of at most "
            f"{METADATA_VALUE_CHARS} characters under a name of at most {METADATA_NAME_CHARS}."
        )
        raise _bad("metadata", why, "invalid_value")
    return given


def _bad(param: str, why: str, code: str) -> BadRequest:
    return BadRequest(why, param=param, code=code)
