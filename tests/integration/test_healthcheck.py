"""`python -m handler.healthcheck` as Docker runs it, beside servers of the worker as they are."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from handler.errors import EngineFailed, StartFailed
from judge.servers import free_port
from tests.scripted_app import ScriptedApp
from tests.scripted_server import starting, worker
from tests.servers import ROOT


async def check(**environ: str) -> tuple[int | None, str]:
    """The exit code of a check in `environ`, and what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "handler.healthcheck", cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_a_container_is_healthy_once_its_worker_is_ready() -> None:
    """And not before, so that nobody is sent to it, nor after its engine has died."""
    async with starting(ScriptedApp({}), {"API_KEY": "secret", "HOST": "0.0.0.0"}) as served:
        at = {"HOST": "0.0.0.0", "PORT": str(served.port), "API_KEY": "secret"}
        assert await check(**at) == (1, "starting\n")
        served.become_ready()
        while (seen := await check(**at)) != (0, "ready\n"):
            assert seen == (1, "starting\n")
        assert served.engine is not None
        served.engine.dead.set_result(None)
        assert await check(**at) == (1, "/ping is answered with 503\n")
    code, said = await check(**at)
    assert code == 1
    assert said.startswith("nobody answers: ")


async def test_a_worker_that_cannot_start_is_unhealthy() -> None:
    """Though it stays and answers."""
    async with starting(ScriptedApp({})) as served:
        served.lobby.refuse(lambda: StartFailed(EngineFailed("no device")))
        assert await check(PORT=str(served.port)) == (1, "/ping is answered with 503\n")


async def test_the_port_of_the_probes_is_asked() -> None:
    """Where a worker has one."""
    health = str(free_port())
    async with starting(ScriptedApp({}), {"PORT_HEALTH": health}):
        assert await check(PORT="1", PORT_HEALTH=health) == (1, "starting\n")


async def test_a_unix_socket_is_asked(tmp_path: Path) -> None:
    """It is there once the worker is ready."""
    uds = tmp_path / "worker.sock"
    code, said = await check(UDS=str(uds))
    assert (code, said.partition(":")[0]) == (1, "nobody answers")
    async with worker(ScriptedApp({}), {"UDS": str(uds)}):
        assert await check(UDS=str(uds)) == (0, "ready\n")
