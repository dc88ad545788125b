"""A stand-in for Hugging Face that speaks as much of its protocol as it takes to download a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

COMMIT = "5eed" * 10
LARGE = (".safetensors", ".bin")
"""What git keeps elsewhere, so that the hub knows its SHA-256."""


@dataclass
class Hub:
    """What the stand-in holds, and what it saw."""

    models: Mapping[str, Mapping[str, bytes]]
    token: str | None = None
    """Needed to read anything, where it is set."""
    failing: int | None = None
    """The status of every answer, where it is set."""
    cut: str | None = None
    """The file whose body ends early, once."""
    wrong: dict[str, int] = field(default_factory=dict)
    """Of a file, how many more times its first byte is sent as another one."""
    stall: tuple[str, int] | None = None
    """A file and an offset: what holds that byte stops there, until `go_on`."""
    signed: bool = False
    """Whether files lie at an address of their own, which the hub sends those to who ask it."""
    url: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """The files that were sent, and which bytes of each."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """The paths that were asked for, and what each was authorized with."""
    stalled: Event = field(default_factory=Event)
    go_on: Event = field(default_factory=Event)

    def paths(self, method: str) -> list[str]:
        """The paths that were asked for with `method`."""
        return [path for verb, path in self.seen if verb == method]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of loopback; sets its `url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # who asked was killed
                _answer(hub, self)

        do_HEAD = do_GET  # noqa: N815 - the names are http.server's

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.go_on.set()
            server.shutdown()
            thread.join()


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = request.path.partition("?")[0]
    hub.seen.append((request.command, path))
    hub.tokens.append((path, request.headers.get("authorization")))
    model, _, rest = path.removeprefix("/api/models/").partition("/revision/")
    if path == "/":
        _send(request, 200, b"")
    elif hub.failing is not None:
        _send(request, hub.failing, b"{}")
    elif path.startswith("/signed/"):
        model, _, name = path.removeprefix("/signed/").partition("/-/")
        _send_file(hub, request, name, hub.models[model][name])
    elif hub.token is not None and request.headers.get("authorization") != f"Bearer {hub.token}":
        _send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
    elif "/resolve/" in path:
        model, _, name = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")
        if hub.signed:
            # Another host, as far as a client can tell.
            place = hub.url.replace("127.0.0.1", "localhost")
            _send(request, 302, b"", {"Location": f"{place}/signed/{model}/-/{name}"})
        else:
            _send_file(hub, request, name, hub.models[model][name])
    elif model not in hub.models:
        _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    elif rest not in {"", COMMIT}:
        _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    else:
        files = [_sibling(name, body) for name, body in hub.models[model].items()]
        _send_json(request, {"id": model, "sha": COMMIT, "siblings": files})


def _sibling(name: str, body: bytes) -> dict[str, Any]:
    """A file as the hub lists it: https://huggingface.co/docs/hub/api."""
    told = {"rfilename": name, "size": len(body), "blobId": sha1(b"blob %d\0" % len(body) + body).hexdigest()}
    if name.endswith(LARGE):
        told["lfs"] = {"size": len(body), "sha256": sha256(body).hexdigest(), "pointerSize": 130}
    return told


def _send_file(hub: Hub, request: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range") or "")
    start, end = (int(asked[1]), int(asked[2] or len(body) - 1)) if asked else (0, len(body) - 1)
    hub.ranges.append((name, f"{start}-{end}"))
    headers = {"Accept-Ranges": "bytes"}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
    status, sent = 206 if asked else 200, body[start : end + 1]
    if start == 0 and hub.wrong.get(name, 0):
        hub.wrong[name] -= 1
        sent = bytes([sent[0] ^ 1]) + sent[1:]
    if hub.cut == name:
        hub.cut = None
        return _send(request, status, sent[: len(sent) // 2], headers, length=len(sent))
    if hub.stall and hub.stall[0] == name and start <= hub.stall[1] <= end:
        half = hub.stall[1] - start
        _send(request, status, sent[:half], headers, length=len(sent))
        request.wfile.flush()
        hub.stalled.set()
        hub.go_on.wait()
        request.wfile.write(sent[half:])
        return None
    return _send(request, status, sent, headers)


def _send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    length: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
    if length is not None:
        request.close_connection = True
