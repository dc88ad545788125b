"""The fake Runtime API of the tests, asked by AWS's own client for Python: what it takes, Lambda takes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lambda_runtime import RuntimeApi

HANDLER = """
def handler(event, context):
    if "fail" in event:
        raise ValueError(event["fail"])
    return {**event, "id": context.aws_request_id, "arn": context.invoked_function_arn,
            "in_time": 0 < context.get_remaining_time_in_millis() <= 60_000}
"""

pytest.importorskip("awslambdaric", reason="AWS's client is in the extra dev")


@asynccontextmanager
async def runtime(folder: Path, source: str, at_once: int | None) -> AsyncIterator[tuple[RuntimeApi, Any]]:
    """`python -m awslambdaric` with a handler whose module is `source`."""
    (folder / "function.py").write_text(source)
    api = RuntimeApi(at_once or 1)
    async with api.open():
        environ = {**os.environ, **api.environ(), "LAMBDA_TASK_ROOT": str(folder)}
        if at_once is None:
            del environ["AWS_LAMBDA_MAX_CONCURRENCY"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "awslambdaric", "function.handler"),
            cwd=folder,
            env=environ,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield api, process
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert api.faults == []


@pytest.mark.parametrize("at_once", [None, 2], ids=["one", "several"])
async def test_awss_client_is_answered_as_by_lambda(at_once: int | None, tmp_path: Path) -> None:
    """It takes events, answers and fails; also in the mode for several at once, a process for each."""
    async with runtime(tmp_path, HANDLER, at_once) as (api, _):
        await api.polled(at_once or 1)
        for number in range(3):
            invocation = await api.invoke({"number": number}, timeout_s=60)
            assert await invocation.whole() == {
                "number": number,
                "id": invocation.id,
                "arn": "arn:aws:lambda:eu-central-1:123456789012:function:worker:live",
                "in_time": True,
            }
        told = await (await api.invoke({"fail": "so"})).error()
        assert (told["errorType"], told["errorMessage"]) == ("ValueError", "so")
        assert any(agent.startswith("aws-lambda-python/") for agent in api.user_agents)


async def test_awss_client_tells_why_it_can_not_start(tmp_path: Path) -> None:
    """Where we do."""
    async with runtime(tmp_path, "import nothing_of_that_name", None) as (api, process):
        await process.wait()
    (told,) = api.init_errors
    assert told["errorType"] == "Runtime.ImportModuleError"
    assert "nothing_of_that_name" in told["errorMessage"]
