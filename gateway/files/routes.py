"""`/v2/{endpoint_id}/openai/v1/files`: OpenAI's files, kept on this machine.

A file belongs to the key that made it and is the same under every endpoint; an admin key sees all.
https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from sqlalchemy import Connection

from gateway import openai_route
from gateway.accounts.keys import Keys
from gateway.app import Reads
from gateway.files.store import READ_BYTES, FileStore, no_such_file
from gateway.files.uploads import OVERHEAD_BYTES, read_form
from gateway.methods import by_method
from handler.errors import BadRequest, json_reply
from handler.messages import Call, Reply, Request

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""What a client may upload a file for; only `batch` is something that this gateway then does."""
BATCH_EXPIRES_S = 30 * 86_400
"""How long a file for a batch is kept unless its form says; all others stay until they are deleted."""
EXPIRES_MIN_S, EXPIRES_MAX_S = 3600, 30 * 86_400
LIST_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Files:
    """The routes of files. `check_delete(file_id, connection)` raises where a file has to stay."""

    store: FileStore
    endpoints: Container[str]
    keys: Keys
    check_delete: Callable[[str, Connection], None] = lambda _file_id, _connection: None

    def find(self, request: Request) -> Call | None:
        """The call for a route of files. Raises `MethodNotAllowed`."""
        found = openai_route.parts(request.path, "files")
        if found is None or found[0] not in self.endpoints:
            return None
        _, file_id, below = found
        methods: Mapping[str, Call]
        if file_id is None:
            upload = Reads(self._upload, self.store.max_file_bytes + OVERHEAD_BYTES)
            methods = {"GET": self._list, "POST": upload}
        elif below is None:
            methods = {"GET": partial(self._retrieve, file_id), "DELETE": partial(self._delete, file_id)}
        elif below == "content":
            methods = {"GET": partial(self._content, file_id)}
        else:
            return None
        return by_method(request, methods)

    @asynccontextmanager
    async def _upload(self, request: Request) -> AsyncIterator[Reply]:
        announced = request.header("content-length") or "0"
        await self.store.make_room(int(announced) - OVERHEAD_BYTES if announced.isdecimal() else 0)
        with self.store.draft() as draft:
            form = await read_form(request, draft.write)
            purpose = _purpose(form.fields)
            file = await self.store.keep(
                draft,
                key_id=request.visit.caller,
                purpose=purpose,
                filename=form.filename,
                expires_in_s=_expires_in_s(form.fields, purpose),
            )
        yield json_reply(200, file.public())

    @asynccontextmanager
    async def _list(self, request: Request) -> AsyncIterator[Reply]:
        given = request.parameters
        limit = openai_route.limit(given, most=LIST_MAX, otherwise=LIST_MAX)
        order = given.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise BadRequest("Invalid 'order': it has to be 'asc' or 'desc'.", param="order")
        files = await self.store.list(
            openai_route.owner(self.keys, request),
            purpose=given.get("purpose"),
            after=given.get("after"),
            limit=limit + 1,
            newest_first=order == "desc",
        )
        shown = [file.public() for file in files[:limit]]
        yield json_reply(200, openai_route.page(shown, has_more=len(files) > limit))

    @asynccontextmanager
    async def _retrieve(self, file_id: str, request: Request) -> AsyncIterator[Reply]:
        file = await self.store.find(file_id, openai_route.owner(self.keys, request))
        yield json_reply(200, file.public())

    @asynccontextmanager
    async def _delete(self, file_id: str, request: Request) -> AsyncIterator[Reply]:
        await self.store.find(file_id, openai_route.owner(self.keys, request))
        await self.store.delete([file_id], partial(self.check_delete, file_id))
        yield json_reply(200, {"id": file_id, "object": "file", "deleted": True})

    @asynccontextmanager
    async def _content(self, file_id: str, request: Request) -> AsyncIterator[Reply]:
        file = await self.store.find(file_id, openai_route.owner(self.keys, request))
        try:
            opened = await asyncio.to_thread(self.store.path(file.id).open, "rb")
        except FileNotFoundError:  # deleted just now
            raise no_such_file(file_id) from None

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await asyncio.to_thread(opened.read, READ_BYTES):
                yield piece

        headers = (
            ("content-type", "application/octet-stream"),
            ("content-length", str(file.bytes)),
            ("content-disposition", f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}"),
            ("x-content-type-options", "nosniff"),
        )
        with opened:
            yield Reply(200, headers, pieces())


def _purpose(fields: Mapping[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise BadRequest(
            "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
        )
    if purpose not in PURPOSES:
        raise BadRequest(f"'{purpose}' is not one of {list(PURPOSES)} - 'purpose'", param="purpose")
    return purpose


def _expires_in_s(fields: Mapping[str, str], purpose: str) -> int | None:
    anchor, text = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and text is None:
        return BATCH_EXPIRES_S if purpose == "batch" else None
    return expires_in_s({"anchor": anchor, "seconds": int(text) if text and text.isdecimal() else text})


def expires_in_s(after: object, param: str = "expires_after") -> int:
    """The seconds of an object `expires_after`. Raises `BadRequest`."""
    if not isinstance(after, Mapping) or after.get("anchor") != "created_at":
        raise BadRequest(f"'{param}' has to have the anchor 'created_at'.", param=f"{param}.anchor")
    wanted = after.get("seconds")
    if type(wanted) is not int or not EXPIRES_MIN_S <= wanted <= EXPIRES_MAX_S:
        raise BadRequest(
            f"'{param}' has to have seconds from {EXPIRES_MIN_S} to {EXPIRES_MAX_S}.",
            param=f"{param}.seconds",
        )
    return wanted
