"""The page as files: what is served, how, and that it needs nothing from elsewhere."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gateway.accounts.keys import Key, Keys
from gateway.app import Gateway
from gateway.metrics import Metrics
from gateway.page import IMMUTABLE, POLICY, SECURITY, Page
from gateway.page.session import Session
from handler.asgi import App, call_app, refuse
from handler.auth import digest
from handler.errors import NoSuchRoute
from handler.messages import Headers, Request, read
from tests import gateways

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "gateway" / "page"
OURS = [path for path in sorted(FOLDER.iterdir()) if path.suffix in {".html", ".js", ".css", ".svg"}]


def app(keys: Keys | None = None) -> App:
    """A gateway that has the page, and two endpoints."""
    keys = keys or Keys("secret")
    nothing = refuse(NoSuchRoute("GET", "/"))
    endpoints = {name: gateways.endpoint(nothing, name, model=f"org/{name}") for name in ("a", "b")}
    gateway = Gateway([Session(keys, endpoints), Page.open()], keys, Metrics())
    return gateway.app(max_body_bytes=100, cors_origins=())


async def ask(
    path: str, *headers: tuple[str, str], method: str = "GET", keys: Keys | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer."""
    async with call_app(app(keys))(Request(method, path, headers)) as reply:
        return reply.status, dict(reply.headers), await read(reply)


class Links(HTMLParser):
    """What a document fetches, and what of it would be code or style in its own text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.inline: list[str] = []
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what it fetches and holds."""
        given = dict(attrs)
        self.inline += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        if tag == "style":
            self.inline.append("style")
        if tag == "script" and "src" not in given:
            self.inline.append("script")
        found = given.get("src") or (given.get("href") if tag == "link" else None)
        if found:
            self.fetched.append(found)


async def test_everything_the_index_names_is_there_and_never_changes() -> None:
    """Scripts, styles and icon come from a folder whose name is that of their contents."""
    status, headers, body = await ask("/")
    assert (status, headers["content-type"], headers["cache-control"]) == (
        200,
        "text/html; charset=utf-8",
        "no-cache",
    )
    links = Links(body.decode())
    assert links.inline == []
    assert len(links.fetched) >= 6
    for link in links.fetched:
        status, headers, body = await ask(f"/{link}")
        assert (status, headers["cache-control"]) == (200, IMMUTABLE)
        assert body


async def test_every_module_imports_what_is_served() -> None:
    """A browser resolves each import against the module that has it."""
    page = Page.open()
    for name, file in page.files.items():
        for imported in re.findall(r'^import .*?from "\./([^"]+)";', file.body.decode(), re.MULTILINE):
            assert imported in page.files, f"{name} imports {imported}"


async def test_every_answer_of_the_page_has_its_headers() -> None:
    """Nothing from elsewhere, nothing inline, no frame; 304 too."""
    for path in ("/", f"/page/{Page.open().version}/main.js"):
        _, headers, _ = await ask(path)
        again = await ask(path, ("if-none-match", headers["etag"]))
        assert (again[0], again[2]) == (304, b"")
        for name, value in SECURITY:
            assert headers[name] == again[1][name] == value
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(POLICY.split("; "))
    assert not re.search("unsafe|http|data:", POLICY)


async def test_gzip_is_for_whoever_takes_it() -> None:
    """The same bytes, under a tag of their own."""
    path = f"/page/{Page.open().version}/vendor/uPlot.esm.js"
    plain, packed = await ask(path), await ask(path, ("accept-encoding", "br, gzip"))
    assert "content-encoding" not in plain[1]
    assert (packed[1]["content-encoding"], packed[1]["vary"]) == ("gzip", "accept-encoding")
    assert gzip.decompress(packed[2]) == plain[2]
    assert plain[1]["etag"] != packed[1]["etag"]
    assert len(packed[2]) < 50_000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/", 200),
        ("POST", "/", 405),
        ("GET", "/page/000000000000/main.js", 404),
        ("GET", "/page/VERSION/__init__.py", 404),
        ("GET", "/page/VERSION/../../keys.py", 404),
        ("GET", "/page/VERSION/package.json", 404),
        ("GET", "/page/VERSION/", 404),
        ("GET", "/page", 404),
        ("GET", "/index.html", 404),
        ("POST", "/page/session", 405),
        ("GET", "/page/session", 401),
    ],
)
async def test_what_is_not_the_page_is_not_served(method: str, path: str, status: int) -> None:
    """Only GET and HEAD, only this version, only files for browsers."""
    answer = await ask(path.replace("VERSION", Page.open().version), method=method)
    assert answer[0] == status
    if method == "HEAD":
        assert answer[2] == b""
        assert int(answer[1]["content-length"]) > 1000


async def test_session_says_whose_key_it_is_and_what_it_may_ask() -> None:
    """A key that is no admin's sees its own endpoints only."""
    scoped = Key("key_1", "mine", digest("scoped"), endpoints=frozenset({"b"}), models=frozenset({"org/b"}))
    keys = Keys("secret", [scoped])

    async def session(key: str) -> object:
        status, headers, body = await ask("/page/session", *bearer(key), keys=keys)
        assert (status, headers["cache-control"]) == (200, "no-store")
        return json.loads(body)

    a, b = {"id": "a", "model": "org/a"}, {"id": "b", "model": "org/b"}
    assert await session("secret") == {
        "key": {"id": "env", "name": "API_KEY", "admin": True, "models": None},
        "endpoints": [a, b],
    }
    assert await session("scoped") == {
        "key": {"id": "key_1", "name": "mine", "admin": False, "models": ["org/b"]},
        "endpoints": [b],
    }


def bearer(key: str) -> Headers:
    """The header that a key is sent in."""
    return (("authorization", f"Bearer {key}"),)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_a_file_of_ours_asks_no_other_host_and_parses_no_html(path: Path) -> None:
    """What users and workers say reaches the page as text only."""
    text = path.read_text()
    named = set(re.findall(r"https?://([^/\s\"'`)]+)", text))
    assert named <= {"www.w3.org", "html.spec.whatwg.org"}  # a name space, and a comment
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
    )
    assert not re.search(r"@import|url\(", text)


def test_vendored_files_are_those_that_were_copied() -> None:
    """`sha256sum -c` in a test; the version in use is the one that is locked."""
    vendor = FOLDER / "vendor"
    lines = (vendor / "SHA256SUMS").read_text().splitlines()
    recorded = {name: sha for sha, _, name in (line.partition("  ") for line in lines)}
    found = {path.name: path for path in vendor.iterdir() if path.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()} == recorded
    lock = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]["uplot"]
    assert lock["node_modules/uplot"]["version"] == wanted
    assert f"(v{wanted})" in found["uPlot.esm.js"].read_text()[:400]
    assert "resolved" not in lock["node_modules/uplot"]  # a host is the reader's to choose


def test_modules_do_what_their_own_tests_say() -> None:
    """`node --test` of all that needs no browser, and `node --check` of the rest."""
    if not (node := shutil.which("node")):
        pytest.skip("this lane did not run: node is missing (Debian: apt-get install nodejs)")
    for path in OURS:
        if path.suffix == ".js":
            subprocess.run([node, "--check", path], check=True)
    tests = sorted((ROOT / "tests" / "node" / "page").glob("*.test.mjs"))
    line = [node, "--test", "--test-reporter=tap", *map(str, tests)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^# pass [1-9]", done.stdout, re.MULTILINE)
