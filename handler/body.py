"""What can be told from a request's body by itself, and what it can be refused for: as JSON, by its type.

`handler.early` asks while no model is loaded, the edge when vLLM has refused a request with a 400:
so both answer the same, and in words instead of with the parser's own structures.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from handler.errors import BadRequest
from handler.members import LARGE_BYTES, Members, find
from handler.messages import Request, as_json

TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
FALSE = frozenset({"0", "off", "f", "false", "n", "no"})
"""What pydantic reads as true and false, beside themselves, 1 and 0."""

_KINDS = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def body_fault(request: Request) -> BadRequest | None:
    """What keeps the body of `request` from being the JSON object that its route takes, or None.

    None too for a route that takes something else.
    """
    if not takes_json(request):
        return None
    try:
        json_object(request)
    except BadRequest as fault:
        return fault
    return None


def takes_json(request: Request) -> bool:
    """Whether the body of `request` has to be a JSON object."""
    return request.method == "POST" and not request.path.startswith("/v1/audio/")


def json_object(request: Request) -> dict[str, Any]:
    """The body of `request`, which has to be a JSON object and say so; of a large one what was `looked` for.

    Raises `BadRequest`.
    """
    media_type = (request.header("content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BadRequest("The content type of your request must be application/json.")
    if request.members is not None:
        if request.members.broken:
            raise BadRequest("We could not parse the JSON body of your request.")
        return {**request.members.values}
    try:
        body = json.loads(request.body)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"We could not parse the JSON body of your request: {error.msg} (character {error.pos})."
        ) from None
    except (ValueError, RecursionError):  # no UTF-8, a number without end, lists in lists in lists
        raise BadRequest("We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        kind = _KINDS.get(type(body), "null")
        raise BadRequest(f"The body of your request must be a JSON object, not {kind}.")
    return body


def asks_for_stream(request: Request) -> bool:
    """Whether the body of `request` has `"stream": true`, or what vLLM takes for it."""
    if request.members is not None:
        return truth(request.members.values.get("stream")) is True
    if b'"stream"' not in request.body:
        return False
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and truth(body.get("stream")) is True


def member(request: Request, name: str) -> Any:
    """The member `name`, one of `handler.members.WANTED`, of the JSON object of `request`; None for none."""
    if request.members is not None:
        return request.members.values.get(name)
    return json.loads(request.body).get(name) if b'"%b"' % name.encode() in request.body else None


def with_member(request: Request, name: str, value: object) -> Request:
    """`request`, of whose JSON object the member `name`, one of several, is `value`."""
    body, members, said = request.body, request.members, as_json(value)
    there = b'"%b"' % name.encode() in body if members is None else name in members.values
    if members is not None and name in members.spans:
        at, end = members.spans[name]
        body = b"".join((body[:at], said, body[end:]))
    elif not there:
        body = body.replace(b"{", b'{"%b":%b,' % (name.encode(), said), 1)
    else:
        body = as_json({**json.loads(body), name: value})
    if members is not None:
        members = Members({**members.values, name: value})
    return replace(request, body=body, members=members)


def look(request: Request) -> Request:
    """`request`, in whose body, if it is large, was found what may be asked of it."""
    if len(request.body) <= LARGE_BYTES or not takes_json(request):
        return request
    return replace(request, members=find(request.body))


async def looked(request: Request) -> Request:
    """The same, and the loop goes on meanwhile."""
    return request if len(request.body) <= LARGE_BYTES else await asyncio.to_thread(look, request)


def truth(value: object) -> bool | None:
    """What vLLM takes `value` for where it wants a boolean or null; None if for neither."""
    if value is None or value in (0, 1):
        return value == 1
    if isinstance(value, str):
        return True if value.lower() in TRUE else False if value.lower() in FALSE else None
    return None
