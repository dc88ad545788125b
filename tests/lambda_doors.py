"""The front doors of a Lambda function, for tests: HTTP on a port for each, events for the function behind.

`python -m tests.lambda_doors COMMAND ...` runs a function, as AWS's emulator `aws-lambda-rie` does, with
doors in front: it prints their URLs once the function asks for an invocation. What is imitated is what AWS
documents and a client or the function can tell; the names below are those of `DOORS`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.lambda_runtime import HOST, HTTP_INTEGRATION, Invocation, RuntimeApi

ENDPOINT_ID = "abc123"
DELIMITER = b"\0" * 8
REST_MAX_BYTES = 10 << 20
BINARY = ("multipart/form-data", "application/octet-stream")
"""The media types that the API was told are no text."""
NO_WORKER_S = 60.0
"""How long is waited for a worker that asks; Lambda rejects at once."""
REMAPPED = {"www-authenticate": "x-amzn-remapped-www-authenticate"}
"""What a REST API calls headers of a function that it wants for itself."""


@dataclass(frozen=True, slots=True)
class Door:
    """A kind of front door, and whether it passes a stream on. `base` is what stands before `/v1`."""

    name: str
    streams: bool
    base: str


DOORS = {
    door.name: door
    for door in (
        Door("rest", streams=True, base=f"/v2/{ENDPOINT_ID}/openai"),  # stage v2
        Door("rest-buffered", streams=False, base=f"/v2/{ENDPOINT_ID}/openai"),
        Door("url", streams=True, base=f"/v2/{ENDPOINT_ID}/openai"),
        Door("http", streams=False, base=f"/v2/{ENDPOINT_ID}/openai"),  # stage $default
        Door("alb", streams=False, base=""),
        Door("alb-lists", streams=False, base=""),
    )
}


def event_of(door: Door, request: web.Request, body: bytes) -> dict[str, Any]:
    """What `door` makes of a request."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    encoded = media_type in BINARY
    text = base64.b64encode(body).decode() if encoded else body.decode(errors="replace")
    now_s = time.time()
    headers = [*request.headers.items(), ("X-Forwarded-For", HOST), ("X-Forwarded-Proto", "https")]
    lists: dict[str, list[str]] = {}
    for name, value in headers:
        lists.setdefault(name, []).append(value)
    single = {name: values[-1] for name, values in lists.items()}
    query = {name: request.query.getall(name) for name in request.query}
    if door.name.startswith("rest"):
        path = request.raw_path.partition("?")[0].removeprefix("/v2")
        return {
            "resource": "/{endpoint_id}/openai/v1/{proxy+}",
            "path": path,
            "httpMethod": request.method,
            "headers": single,
            "multiValueHeaders": lists,
            "queryStringParameters": {name: values[-1] for name, values in query.items()} or None,
            "multiValueQueryStringParameters": query or None,
            "pathParameters": {"endpoint_id": ENDPOINT_ID, "proxy": path.partition("/v1/")[2]},
            "stageVariables": None,
            "requestContext": {
                "resourceId": "123456",
                "resourcePath": "/{endpoint_id}/openai/v1/{proxy+}",
                "httpMethod": request.method,
                "extendedRequestId": "JKJaXmPLvHcESHA=",
                "requestTime": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now_s)),
                "requestTimeEpoch": round(now_s * 1000),
                "path": f"/v2{path}",
                "accountId": "123456789012",
                "protocol": "HTTP/1.1",
                "stage": "v2",
                "domainPrefix": "1234567890",
                "domainName": "1234567890.execute-api.eu-central-1.amazonaws.com",
                "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
                "apiId": "1234567890",
                "identity": {"sourceIp": HOST, "userAgent": request.headers.get("user-agent")},
            },
            "body": text or None,
            "isBase64Encoded": encoded,
        }
    if door.name.startswith("alb"):
        several = door.name == "alb-lists"
        raw_query = [pair.partition("=") for pair in request.rel_url.raw_query_string.split("&") if pair]
        return {
            "requestContext": {
                "elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-central-1:1:targetgroup/w/1"}
            },
            "httpMethod": request.method,
            "path": request.raw_path.partition("?")[0],
            ("multiValueQueryStringParameters" if several else "queryStringParameters"): {
                name: [value] if several else value for name, _, value in raw_query
            },
            **(
                {"multiValueHeaders": {name.lower(): values for name, values in lists.items()}}
                if several
                else {"headers": {name.lower(): value for name, value in single.items()}}
            ),
            "body": text,
            "isBase64Encoded": encoded,
        }
    cookies = request.headers.getall("cookie", [])
    domain = (
        "abcdef.lambda-url.eu-central-1.on.aws"
        if door.name == "url"
        else "1234567890.execute-api.eu-central-1.amazonaws.com"
    )
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": request.raw_path.partition("?")[0],
        "rawQueryString": request.rel_url.raw_query_string,
        **({"cookies": "; ".join(cookies).split("; ")} if cookies else {}),
        "headers": {
            name.lower(): ",".join(values) for name, values in lists.items() if name.lower() != "cookie"
        },
        "requestContext": {
            "accountId": "anonymous",
            "apiId": domain.partition(".")[0],
            "domainName": domain,
            "domainPrefix": domain.partition(".")[0],
            "http": {
                "method": request.method,
                "path": request.path,
                "protocol": "HTTP/1.1",
                "sourceIp": HOST,
                "userAgent": request.headers.get("user-agent", ""),
            },
            "requestId": "id",
            "routeKey": "$default",
            "stage": "$default",
            "time": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now_s)),
            "timeEpoch": round(now_s * 1000),
        },
        **({"body": text} if body else {}),
        "isBase64Encoded": encoded,
    }


class FrontDoors:
    """Doors in front of the function that asks `api`; `urls` are their base URLs, up to and with `/v1`.

    `timeout_s` is the function's. A client that leaves is not told to a function, unless `cuts`: then the
    connection on which its answer comes is closed.
    """

    def __init__(self, api: RuntimeApi, *, timeout_s: float = 900.0, cuts: bool = False) -> None:
        self.api = api
        self.urls: dict[str, str] = {}
        self._timeout_s = timeout_s
        self._cuts = cuts

    @asynccontextmanager
    async def open(self, names: Sequence[str] = tuple(DOORS)) -> AsyncIterator[FrontDoors]:
        """Listen on a port for each of `names`."""
        async with AsyncExitStack() as stack:
            for name in names:
                self.urls[name] = await stack.enter_async_context(self._listen(DOORS[name]))
            yield self

    @asynccontextmanager
    async def _listen(self, door: Door) -> AsyncIterator[str]:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(door, request)

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        try:
            yield f"http://{HOST}:{runner.addresses[0][1]}{door.base}/v1"
        finally:
            await runner.cleanup()

    async def _handle(self, door: Door, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if door.name.startswith("rest"):
            if not request.raw_path.startswith(f"{door.base}/v1/"):
                return web.json_response({"message": "Missing Authentication Token"}, status=403)
            if len(body) > REST_MAX_BYTES:
                return web.json_response({"message": "Request Too Long"}, status=413)
        invocation = await self.api.invoke(event_of(door, request, body), self._timeout_s)
        try:
            async with asyncio.timeout(NO_WORKER_S):
                await invocation.taken.wait()
        except TimeoutError:
            return web.json_response({"message": "Too Many Requests"}, status=429)
        try:
            async with asyncio.timeout(self._timeout_s + self.api.patience_s + 1):
                if door.streams:
                    return await self._stream(door, request, invocation)
                return _buffered(door, await invocation.said.get())
        except TimeoutError:
            return web.json_response({"message": "Endpoint request timed out"}, status=504)
        except (asyncio.CancelledError, ConnectionResetError):
            if self._cuts:
                invocation.cut()
            raise

    async def _stream(self, door: Door, request: web.Request, invocation: Invocation) -> web.StreamResponse:
        said = await invocation.said.get()
        if said.what != "head" or said.headers["content-type"] != HTTP_INTEGRATION:
            return web.json_response({"message": "Internal server error"}, status=502)
        head = b""
        while DELIMITER not in head:
            said = await invocation.said.get()
            if said.what != "data":
                return web.json_response({"message": "Internal server error"}, status=502)
            head += said.data
        raw, _, first = head.partition(DELIMITER)
        told = json.loads(raw)
        assert set(told) == {"statusCode", "headers", "cookies"}, told
        response = web.StreamResponse(status=told["statusCode"])
        _set_headers(door, response, told["headers"], told["cookies"])
        response.enable_chunked_encoding()
        await response.prepare(request)
        if first:
            await response.write(first)
        while (said := await invocation.said.get()).what == "data":
            await response.write(said.data)
        if said.what == "cut" or "lambda-runtime-function-error-type" in said.headers:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write_eof()
        return response


def _buffered(door: Door, said: Any) -> web.Response:
    if said.what != "whole":
        return web.json_response({"message": "Internal server error"}, status=502)
    told = json.loads(said.data)
    assert isinstance(told["statusCode"], int)
    body = base64.b64decode(told["body"]) if told["isBase64Encoded"] else told["body"].encode()
    response = web.Response(status=told["statusCode"], body=body)
    if door.name.startswith("alb"):
        assert told["statusDescription"].startswith(f"{told['statusCode']} ")
    if door.name in {"alb-lists", "rest-buffered"}:
        for name, values in told["multiValueHeaders"].items():
            for value in values:
                response.headers.add(REMAPPED.get(name, name) if door.name != "alb-lists" else name, value)
    else:
        _set_headers(door, response, told["headers"], told.get("cookies", []))
    return response


def _set_headers(
    door: Door, response: web.StreamResponse, headers: Mapping[str, str], cookies: Sequence[str]
) -> None:
    for name, value in headers.items():
        response.headers[REMAPPED.get(name, name) if door.name.startswith("rest") else name] = value
    for cookie in cookies:
        response.headers.add("set-cookie", cookie)


async def main(command: Sequence[str]) -> int:
    """Run the function `command`; returns its exit code."""
    api = RuntimeApi(int(os.environ.get("AT_ONCE", "8")))
    doors = FrontDoors(api, timeout_s=float(os.environ.get("FUNCTION_TIMEOUT_S", "900")))
    async with api.open(), doors.open():
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **api.environ()})
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, process.terminate)
        polled, ended = asyncio.create_task(api.polled(1)), asyncio.create_task(process.wait())
        await asyncio.wait({polled, ended}, return_when=asyncio.FIRST_COMPLETED)
        if polled.done():
            print(json.dumps(doors.urls), flush=True)
        polled.cancel()
        code = await ended
    for told in api.init_errors:
        print(json.dumps({"init_error": told}), flush=True)
    if api.faults:
        print(f"faults: {api.faults}", file=sys.stderr, flush=True)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
