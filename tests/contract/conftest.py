"""The servers of the contract: both programs, around the scripted application and around vLLM's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import scripted_server
from tests.scripted_app import ScriptedApp
from tests.servers import KEY, Server


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark of this folder known."""
    config.addinivalue_line(
        "markers", "scripts(routes): what the scripted application plays in this test, by route"
    )


@pytest.fixture
def scripted(request: pytest.FixtureRequest) -> ScriptedApp:
    """The scripted application with the test's `scripts`."""
    mark = request.node.get_closest_marker("scripts")
    assert mark is not None, "say with @pytest.mark.scripts what vLLM would answer"
    return ScriptedApp(*mark.args)


@pytest.fixture(params=["scripted-worker", "scripted-gateway", "vllm-worker", "vllm-gateway"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """Each program around each application; of the scripted one every script must be played."""
    app, _, program = request.param.partition("-")
    if app == "vllm":
        stack = request.getfixturevalue("stack")
        yield stack.worker if program == "worker" else stack.gateway
        return
    scripted = request.getfixturevalue("scripted")
    uds = tmp_path / "worker.sock"
    if program == "worker":
        async with scripted_server.worker(scripted, {"UDS": str(uds)}):
            yield Server("http://worker/v1", uds=uds)
    else:
        async with scripted_server.gateway(scripted, KEY, uds) as port:
            yield Server(f"http://127.0.0.1:{port}/v2/local/openai/v1")
    scripted.finish()
