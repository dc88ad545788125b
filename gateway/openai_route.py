"""Routes of OpenAI's API that the gateway answers by itself, under an endpoint's URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gateway.accounts.keys import Keys
from handler.errors import BadRequest
from handler.messages import Request

_ROUTE = re.compile(r"/v2/([^/]+)/openai/v1/([^/]+)(?:/([^/]+))?(?:/([^/]+))?/?")


def parts(path: str, collection: str) -> tuple[str, str | None, str | None] | None:
    """Endpoint, object id and action of `/v2/ENDPOINT/openai/v1/COLLECTION/ID/ACTION`; None for another path.

    Id and action are None where `path` ends before them.
    """
    found = _ROUTE.fullmatch(path)
    return (found[1], found[3], found[4]) if found and found[2] == collection else None


def owner(keys: Keys, request: Request) -> str | None:
    """The id of the key whose objects `request` may see; None for an admin's key, which sees all."""
    key = keys.of(request.visit.caller)
    return None if key.admin else key.id


def limit(given: Mapping[str, str], *, most: int, otherwise: int) -> int:
    """The parameter `limit`. Raises `BadRequest`."""
    text = given.get("limit", str(otherwise))
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and 1 <= int(text) <= most):
        raise BadRequest(f"Invalid 'limit': it has to be a number from 1 to {most}.", param="limit")
    return int(text)


def page(objects: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's list object for one page; clients ask for the next one by its `last_id`."""
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }
