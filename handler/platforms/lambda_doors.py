"""The HTTP front doors of a Lambda function: their events as requests, and answers as they take them.

A door that streams gets status and headers as JSON, eight zero bytes, and the body as it is made; one that
collects gets a JSON object. Which of the two a function URL or a REST API does is not in its event
(`LAMBDA_RESPONSE_MODE`); an HTTP API and a load balancer always collect.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import responses
from typing import Any
from urllib.parse import unquote, urlencode

from aws_lambda_powertools.utilities.parser import models

from handler.errors import NoSuchEndpoint, NoSuchRoute
from handler.messages import Headers, Request
from handler.platforms.lambda_runtime import DELIMITER

LAMBDA_MAX_BYTES = 6_291_556
"""What a whole answer may have, as JSON: "6 MB", as the Runtime API counts it."""
ALB_MAX_BYTES = 1_000_000
"""What a load balancer takes of a function: https://docs.aws.amazon.com/elasticloadbalancing/latest/application/lambda-functions.html."""

_OF_THE_CONNECTION = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding"})
_ENDPOINT = re.compile(r"(?:/[^/]+)?/(?P<endpoint_id>[^/]+)/openai(?P<path>/v1/.+)")

Render = Callable[[int, Headers, bytes], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Door:
    """How one kind of front door is answered."""

    name: str
    render: Render
    """A whole answer as the object that it takes."""
    can_stream: bool = False
    max_bytes: int = LAMBDA_MAX_BYTES


class AlbEvent(models.AlbModel):  # type: ignore[misc] # powertools need not be installed to check types
    """A load balancer's event; a target group can be set to say each header and parameter as a list."""

    headers: dict[str, str] | None = None
    multiValueHeaders: dict[str, list[str]] | None = None  # noqa: N815 - the names are AWS's
    queryStringParameters: dict[str, str] | None = None  # noqa: N815
    multiValueQueryStringParameters: dict[str, list[str]] | None = None  # noqa: N815
    isBase64Encoded: bool = False  # noqa: N815


def parse_v2(event: Mapping[str, Any]) -> tuple[Request, Door]:
    """A request of a function URL or an HTTP API, format 2.0."""
    given = models.LambdaFunctionUrlModel.model_validate(event)
    context = given.requestContext
    path = unquote(given.rawPath)
    if context.stage != "$default":  # an HTTP API says it as a part of the path
        path = path.removeprefix(f"/{context.stage}")
    headers = [*given.headers.items(), *(("cookie", cookie) for cookie in given.cookies or ())]
    body = _body(given.body, given.isBase64Encoded)
    request = Request(context.http.method, path, _headers(headers), body, given.rawQueryString)
    return request, FUNCTION_URL if ".lambda-url." in context.domainName else HTTP_API


def parse_v1(event: Mapping[str, Any]) -> tuple[Request, Door]:
    """A request of a REST API with a proxy integration, format 1.0. Its path is without the stage."""
    given = models.APIGatewayProxyEventModel.model_validate(event)
    body = _body(given.body, given.isBase64Encoded)
    query = urlencode(given.multiValueQueryStringParameters or {}, doseq=True)
    return (
        Request(given.httpMethod, unquote(given.path), _lists(given.multiValueHeaders), body, query),
        REST_API,
    )


def parse_alb(event: Mapping[str, Any]) -> tuple[Request, Door]:
    """A request of an application load balancer, which leaves parameters as they were written."""
    given = AlbEvent.model_validate(event)
    several = given.multiValueHeaders is not None
    headers = _lists(given.multiValueHeaders) if several else _headers((given.headers or {}).items())
    lists = given.multiValueQueryStringParameters or {
        name: [value] for name, value in (given.queryStringParameters or {}).items()
    }
    query = "&".join(f"{name}={value}" for name, values in lists.items() for value in values)
    body = _body(given.body, given.isBase64Encoded)
    return (
        Request(given.httpMethod, unquote(given.path), headers, body, query),
        ALB_LISTS if several else ALB,
    )


def openai_path(request: Request, endpoint_id: str | None) -> str:
    """The part of the request's path that an OpenAI server knows, from `/v1` on.

    `/v1/...`, or `/v2/{endpoint_id}/openai/v1/...` where `/v2` is the stage or the base path of an API, and
    may be called otherwise or be missing. Raises `NoSuchEndpoint` for another id than `endpoint_id` (None:
    any will do) and `NoSuchRoute`.
    """
    if request.path.startswith("/v1/"):
        return request.path
    match = _ENDPOINT.fullmatch(request.path)
    if match is None:
        raise NoSuchRoute(request.method, request.path)
    if endpoint_id not in {None, match["endpoint_id"]}:
        raise NoSuchEndpoint(match["endpoint_id"])
    return match["path"]


def prelude(status: int, headers: Headers) -> bytes:
    """How a streamed answer begins."""
    cookies, single = _split(headers)
    head = {"statusCode": status, "headers": single, "cookies": cookies}
    return json.dumps(head).encode() + DELIMITER


def _render_v2(status: int, headers: Headers, body: bytes) -> dict[str, Any]:
    cookies, single = _split(headers)
    return {"statusCode": status, "headers": single, "cookies": cookies, **_text(body)}


def _render_v1(status: int, headers: Headers, body: bytes) -> dict[str, Any]:
    lists: dict[str, list[str]] = {}
    for name, value in _kept(headers):
        lists.setdefault(name, []).append(value)
    return {"statusCode": status, "multiValueHeaders": lists, **_text(body)}


def _render_alb(status: int, headers: Headers, body: bytes) -> dict[str, Any]:
    cookies, single = _split(headers)
    single |= {"set-cookie": cookies[-1]} if cookies else {}  # it takes one header of a name
    return {"statusCode": status, "statusDescription": _described(status), "headers": single, **_text(body)}


def _render_alb_lists(status: int, headers: Headers, body: bytes) -> dict[str, Any]:
    return {"statusDescription": _described(status), **_render_v1(status, headers, body)}


FUNCTION_URL = Door("function URL", _render_v2, can_stream=True)
HTTP_API = Door("HTTP API", _render_v2)
REST_API = Door("REST API", _render_v1, can_stream=True)
ALB = Door("load balancer", _render_alb, max_bytes=ALB_MAX_BYTES)
ALB_LISTS = Door("load balancer", _render_alb_lists, max_bytes=ALB_MAX_BYTES)


def _body(body: str | None, encoded: bool | None) -> bytes:
    if body is None:
        return b""
    return base64.b64decode(body) if encoded else body.encode(errors="replace")


def _headers(pairs: Any) -> Headers:
    return tuple((name.lower(), value) for name, value in pairs)


def _lists(lists: Mapping[str, list[str]] | None) -> Headers:
    return _headers((name, value) for name, values in (lists or {}).items() for value in values)


def _kept(headers: Headers) -> Headers:
    return tuple(pair for pair in headers if pair[0] not in _OF_THE_CONNECTION)


def _split(headers: Headers) -> tuple[list[str], dict[str, str]]:
    """Cookies, and one value for each other name."""
    single: dict[str, str] = {}
    for name, value in _kept(headers):
        if name != "set-cookie":
            single[name] = f"{single[name]}, {value}" if name in single else value
    return [value for name, value in headers if name == "set-cookie"], single


def _text(body: bytes) -> dict[str, Any]:
    try:
        return {"body": body.decode(), "isBase64Encoded": False}
    except UnicodeDecodeError:
        return {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}


def _described(status: int) -> str:
    return f"{status} {responses.get(status, 'Unknown')}"
