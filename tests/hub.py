"""A stand-in for Hugging Face on loopback: what huggingface_hub asks to list and download a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "5eed" * 10


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
    url: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def paths(self, method: str) -> list[str]:
        """The paths that were asked for with `method`."""
        return [path for verb, path in self.seen if verb == method]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of loopback; sets its `url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
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
            server.shutdown()
            thread.join()


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = request.path.partition("?")[0]
    hub.seen.append((request.command, path))
    model, _, rest = path.removeprefix("/api/models/").partition("/revision/")
    if path == "/":
        _send(request, 200, b"")
    elif hub.failing is not None:
        _send(request, hub.failing, b"{}")
    elif hub.token is not None and request.headers.get("authorization") != f"Bearer {hub.token}":
        _send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
    elif "/resolve/" in path:
        model, _, name = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")
        _send_file(hub, request, name, hub.models[model][name])
    elif "/tree/" in path:
        _send_json(request, _tree(hub.models[model.partition("/tree/")[0]]))
    elif model not in hub.models:
        _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    elif rest not in {"", COMMIT}:
        _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    else:
        files = [{"rfilename": name, "size": len(body)} for name, body in hub.models[model].items()]
        _send_json(request, {"id": model, "sha": COMMIT, "siblings": files})


def _send_file(hub: Hub, request: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
    start = int((request.headers.get("range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
    headers = {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    if hub.cut == name and request.command == "GET":
        hub.cut = None
        half = body[start : (start + len(body)) // 2]
        return _send(request, 206 if start else 200, half, headers, length=len(body) - start)
    return _send(request, 206 if start else 200, body[start:], headers)


def _tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in files.items()]


def _oid(body: bytes) -> str:
    return sha1(body).hexdigest()


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
