"""nginx in front of a gateway, as docs/gateway.md sets it up: a stream arrives in pieces.

Where there is no nginx (`apt install nginx-light`) this is skipped.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from judge.servers import free_port
from scripts.gateway_page import PAGE
from tests import scripted_server
from tests.scripted_app import Pause, ScriptedApp, stream

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
KEY = "secret"
CHAT = "POST /v1/chat/completions"

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def configuration(folder: Path, front: int, behind: int) -> str:
    """nginx's whole configuration: the page's, on a port without TLS."""
    found = re.search(r"^```nginx\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    shown = found[1].replace("127.0.0.1:8000", f"127.0.0.1:{behind}")
    shown = shown.replace("listen 443 ssl;", f"listen 127.0.0.1:{front};")
    shown = re.sub(r"^ +ssl_certificate.*\n", "", shown, flags=re.MULTILINE)
    temporary = "\n".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off;\n{temporary}\n{shown}\n}}\n"
    )


@asynccontextmanager
async def proxied(folder: Path, app: ScriptedApp) -> AsyncIterator[str]:
    """The URL of nginx in front of a gateway whose worker is `app`."""
    front = free_port()
    async with scripted_server.gateway(app, KEY, folder / "worker.sock") as behind:
        file = folder / "nginx.conf"
        file.write_text(configuration(folder, front, behind))
        assert NGINX is not None
        process = await asyncio.create_subprocess_exec(
            *(NGINX, "-c", str(file), "-p", str(folder), "-e", "stderr"), stderr=asyncio.subprocess.PIPE
        )
        try:
            await answers(front, process)
            yield f"http://127.0.0.1:{front}/v2/local/openai/v1"
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


async def answers(port: int, process: asyncio.subprocess.Process) -> None:
    """Return once somebody listens."""
    while True:
        assert process.returncode is None, "nginx has ended"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        await writer.wait_closed()
        return


async def test_a_stream_through_nginx_arrives_in_pieces(tmp_path: Path) -> None:
    """Each frame while the next has not been made, and a client that leaves is noticed."""
    app = ScriptedApp({CHAT: [stream("1", Pause("second"), "2"), stream("1", Pause("never"))]})
    async with (
        proxied(tmp_path, app) as url,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
    ):
        async with session.post(f"{url}/chat/completions", json={"stream": True}) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert await reply.content.readuntil(b"\n\n") == b"data: 1\n\n"
            assert not app.gate("second").opened.is_set()
            app.gate("second").opened.set()
            assert await reply.content.read() == b"data: 2\n\ndata: [DONE]\n\n"
        async with session.post(f"{url}/chat/completions", json={"stream": True}) as reply:
            assert await reply.content.readuntil(b"\n\n") == b"data: 1\n\n"
        await app.seen[1].over.wait()
        assert app.seen[1].ended == "disconnected"


async def test_errors_and_their_headers_come_through_nginx(tmp_path: Path) -> None:
    """401 before the body is read, in OpenAI's shape."""
    async with (
        proxied(tmp_path, ScriptedApp({})) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/chat/completions", data=b"x" * 1_000_000) as reply,
    ):
        assert (reply.status, (await reply.json())["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["x-request-id"].startswith("req_")
