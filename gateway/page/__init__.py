"""The page at `/`: static files of this package, each under a name that changes with their contents."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Self

from gateway.methods import by_method, read_only
from handler.errors import NoSuchRoute
from handler.messages import Call, Headers, Reply, Request, once

TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What is served: everything else in the package is not."""

INDEX = "index.html"
FOLDER = "/page/"
VERSION = b"VERSION"
"""Stands in `index.html` where the name of the folder that changes goes."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PERMISSIONS = (
    "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=(), "
    "clipboard-read=(), clipboard-write=(self)"
)
SECURITY: Headers = (
    ("content-security-policy", POLICY),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("permissions-policy", PERMISSIONS),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
)
IMMUTABLE = "public, max-age=31536000, immutable"
CHECKED = "no-cache"
"""Kept, and used again once the gateway has said that it is still the same."""


@dataclass(frozen=True, slots=True)
class File:
    """One file as it is served: plain, and as gzip."""

    body: bytes
    packed: bytes
    tag: str
    type: str
    cache: str

    @classmethod
    def of(cls, name: str, body: bytes) -> Self:
        """The file `name`. The index is asked for again each time, the others never change."""
        suffix = name[name.rindex(".") :]
        return cls(
            body,
            gzip.compress(body, mtime=0),
            hashlib.sha256(body).hexdigest()[:16],
            TYPES[suffix],
            CHECKED if name == INDEX else IMMUTABLE,
        )

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """The answer to a GET or HEAD: the file, or 304 to whoever has it."""
        packs = "gzip" in (request.header("accept-encoding") or "")
        tag = f'"{self.tag}-gz"' if packs else f'"{self.tag}"'
        head: Headers = (
            *SECURITY,
            ("cache-control", self.cache),
            ("etag", tag),
            ("vary", "accept-encoding"),
        )
        if tag in (request.header("if-none-match") or ""):
            yield Reply(304, head, once(b""))
            return
        body = self.packed if packs else self.body
        head = (*head, ("content-type", self.type), ("content-length", str(len(body))))
        if packs:
            head = (*head, ("content-encoding", "gzip"))
        yield Reply(200, head, once(b"" if request.method == "HEAD" else body))


@dataclass(frozen=True, slots=True)
class Page:
    """`/`, and what it needs under `/page/{version}/`. None of it is secret: the data wants a key."""

    index: File
    files: Mapping[str, File]
    version: str

    @classmethod
    def open(cls) -> Self:
        """The page as this package has it, from a folder or a wheel."""
        found = dict(sorted(_walk(files(__package__))))
        digest = hashlib.sha256()
        for name, body in found.items():
            digest.update(f"{name}\0{len(body)}\0".encode() + body)
        version = digest.hexdigest()[:12]
        index = File.of(INDEX, found.pop(INDEX).replace(VERSION, version.encode()))
        return cls(index, {name: File.of(name, body) for name, body in found.items()}, version)

    def find(self, request: Request) -> Call | None:
        """The call for a file. Raises `NoSuchRoute`, for the files of another version too."""
        if request.path == "/":
            file = self.index
        elif request.path.startswith(FOLDER):
            version, _, name = request.path.removeprefix(FOLDER).partition("/")
            if version != self.version or name not in self.files:
                raise NoSuchRoute(request.method, request.path)
            file = self.files[name]
        else:
            return None
        return by_method(request, read_only(file.call))


def _walk(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file that is served."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name[entry.name.rfind(".") :] in TYPES:
            yield prefix + entry.name, entry.read_bytes()
