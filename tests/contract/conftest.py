"""The servers of the contract: each path to an application, the scripted one and vLLM's.

The paths: a worker by itself; a gateway and its worker with an admin's key, with one that is bound to a
second endpoint, and with one that has limits; a gateway whose worker is asked through jobs by RunPod's own
SDK; and a Lambda function behind a REST API and behind a URL of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import scripted_server, servers
from tests.scripted_app import ScriptedApp
from tests.servers import KEY, ROOT, Server, engine_environ, first_line, program


@dataclass(frozen=True)
class ScriptedJobs:
    """A gateway that asks an application through RunPod's SDK: where it is asked, and where it asks."""

    server: Server
    engine_socket: Path


@dataclass(frozen=True)
class ScriptedFunction:
    """A Lambda function that asks an application: its front doors by name, and where it asks."""

    servers: Mapping[str, Server]
    engine_socket: Path


@pytest.fixture(scope="session")
def scripted_jobs() -> Iterator[ScriptedJobs]:
    """One gateway and one worker for all tests; each test serves its own application."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        socket = Path(folder) / "engine.sock"
        environ = {**engine_environ(ROOT), "PORT": "0", "API_KEY": KEY, "TMPDIR": folder}
        environ |= {"WARM_PARENT": "off", "ENGINE_SOCKET": str(socket), "DATA_DIR": f"{folder}/data"}
        with program("tests.jobs_worker", environ, Path(folder), "gateway") as (process, errors):
            ready = first_line(process, "/openai/v1", errors)
            url = next(word for word in ready.split() if word.startswith("http://"))
            yield ScriptedJobs(Server(url), socket)


@pytest.fixture(scope="session")
def scripted_function() -> Iterator[ScriptedFunction]:
    """One function for all tests; each test serves its own application."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        socket = Path(folder) / "engine.sock"
        environ = {**engine_environ(ROOT), "API_KEY": KEY, "ENGINE_SOCKET": str(socket)}
        with servers.function(environ, Path(folder), "tests.jobs_worker") as urls:
            yield ScriptedFunction(urls, socket)


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


ELSEWHERE = "CONTRACT_URL"
"""Names an OpenAI server, whose key is the tests' own: the contract is then tried there, and nowhere else."""


@pytest.fixture(
    params=["elsewhere"]
    if ELSEWHERE in os.environ
    else [
        *("scripted-worker", "scripted-gateway", "scripted-runpod", "scripted-lambda", "scripted-url"),
        *("vllm-worker", "vllm-gateway", "vllm-bound", "vllm-limited", "vllm-runpod", "vllm-lambda"),
    ]
)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """Each program around each application; of the scripted one every script must be played."""
    if request.param == "elsewhere":
        yield Server(os.environ[ELSEWHERE])
        return
    app, _, program = request.param.partition("-")
    if request.param == "vllm-lambda":
        yield request.getfixturevalue("lambda_function")["rest"]
        return
    if app == "vllm":
        stack = request.getfixturevalue("jobs_stack" if program == "runpod" else "stack")
        yield stack.worker if program == "worker" else stack.others.get(program, stack.gateway)
        return
    scripted = request.getfixturevalue("scripted")
    uds = tmp_path / "worker.sock"
    if program == "worker":
        async with scripted_server.worker(scripted, {"UDS": str(uds)}):
            yield Server("http://worker/v1", uds=uds)
    elif program == "runpod":
        jobs = request.getfixturevalue("scripted_jobs")
        async with scripted_server.application(scripted, jobs.engine_socket):
            yield jobs.server
    elif program in {"lambda", "url"}:
        function = request.getfixturevalue("scripted_function")
        async with scripted_server.application(scripted, function.engine_socket):
            yield function.servers["url" if program == "url" else "rest"]
    else:
        async with scripted_server.gateway(scripted, KEY, uds) as port:
            yield Server(f"http://127.0.0.1:{port}/v2/local/openai/v1")
    scripted.finish()
