"""What stands between clients and an endpoint: the models of their keys, their limits, the account."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP

from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.usage import Prices
from handler.body import json_object
from handler.errors import BadRequest, NoSuchModel, json_reply
from handler.messages import Call, Reply, Request, read

MODELS = "/v1/models"
_DISPOSITION = "content-disposition"


@dataclass(frozen=True, slots=True)
class Clients:
    """Makes of an endpoint's call the one that clients have."""

    keys: Keys
    limits: Limits
    metering: Metering

    def call(self, ask: Call, *, endpoint_id: str, model_id: str, prices: Prices) -> Call:
        """`ask`, for the key that is `Visit.caller`: its models and limits first, its usage after.

        Raises `NoSuchModel`, `BadRequest` and `RateLimited`.
        """
        metered = self.metering.metered(ask, endpoint_id=endpoint_id, model_id=model_id, prices=prices)

        @asynccontextmanager
        async def call(request: Request) -> AsyncIterator[Reply]:
            key = self.keys.of(request.visit.caller)
            permit(key, request, model_id)
            if request.method == "POST":
                self.limits.take(key)
            async with metered(request) as reply:
                lists = request.path.rstrip("/") == MODELS and reply.status == 200
                yield await _allowed_only(reply, key) if lists and key.models is not None else reply

        return call


def permit(key: Key, request: Request, model_id: str) -> None:
    """Raise `NoSuchModel` unless `key` may ask the model that `request` names.

    A request that names none asks `model_id`. Raises `BadRequest` for a body that can't be parsed.
    """
    if key.models is None:
        return
    path = request.path.rstrip("/")
    if request.method == "POST":
        form = path.startswith("/v1/audio/")
        model = (_form_model(request) if form else json_object(request).get("model")) or model_id
    elif path.startswith(MODELS + "/"):
        model = path.removeprefix(MODELS + "/")
    else:
        return
    if not (isinstance(model, str) and key.may_ask(model)):
        raise NoSuchModel(str(model), served=[model_id] if key.may_ask(model_id) else ())


def _form_model(request: Request) -> str | None:
    head = f"content-type: {request.header('content-type') or ''}\r\n\r\n".encode("latin-1")
    form = BytesParser(policy=HTTP).parsebytes(head + request.body)
    named = [part for part in form.iter_parts() if part.get_param("name", None, _DISPOSITION) == "model"]
    if not form.is_multipart() or len(named) > 1:
        raise BadRequest("The form of your request must name one model.", param="model")
    return str(named[0].get_payload()) if named else None


async def _allowed_only(reply: Reply, key: Key) -> Reply:
    listing = json.loads(await read(reply))
    listing["data"] = [model for model in listing["data"] if key.may_ask(model["id"])]
    return json_reply(200, listing)
