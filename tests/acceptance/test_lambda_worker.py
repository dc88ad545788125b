"""`python -m handler` as Lambda starts it: the real engine, a strict Runtime API, and starts that fail."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from handler import sse
from tests.lambda_doors import FrontDoors
from tests.lambda_runtime import BrokenStream, RuntimeApi
from tests.servers import KEY, MAX_MODEL_LEN, MODEL, Server, engine_environ, worker_process

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
LONG = {**ASK, "max_tokens": MAX_MODEL_LEN - 64, "stream": True}
ON = {"ignore_eos": True}
"""So that no stop token ends it."""
ENDLESS: dict[str, Any] = {**LONG, "n": 16, "temperature": 1, "extra_body": ON}
"""With one sequence at a time (`ONE`) it takes ten seconds, however late a test is to end it."""
ONE = {"MAX_NUM_SEQS": "1"}


def direct(body: Mapping[str, Any]) -> dict[str, Any]:
    """A direct invoke."""
    return {"openai_route": "/v1/chat/completions", "openai_input": body}


@asynccontextmanager
async def environment(
    model: Path, folder: Path, environ: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[RuntimeApi, asyncio.subprocess.Process]]:
    """An execution environment and its worker, which says what it says in `folder`."""
    api = RuntimeApi(at_once=4)
    async with api.open():
        given = {
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            **engine_environ(model),
            **api.environ(),
            "API_KEY": KEY,
            **(environ or {}),
        }
        async with worker_process(given, folder / "said") as process:
            yield api, process
    assert api.faults == []


async def told(api: RuntimeApi, process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """The exit code of a worker that does not start, and what it told Lambda."""
    code = await process.wait()
    assert api.polling == 0
    (error,) = api.init_errors
    return code, error["errorType"], error["errorMessage"]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for thread in threads for word in thread.read_text().split()]


async def test_a_worker_is_asked_once_it_has_made_a_token(lambda_function: dict[str, Server]) -> None:
    """Then the official client gets a whole answer, the same as a stream, through either front door."""
    for door in ("rest", "url"):
        async with lambda_function[door].client() as client:
            whole = await client.chat.completions.create(**ASK, max_tokens=8)
            stream = await client.chat.completions.create(**ASK, max_tokens=8, stream=True)
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(words) == whole.choices[0].message.content


async def test_eight_clients_are_answered_at_once(lambda_function: dict[str, Server]) -> None:
    """One engine works on all of them: the last begins before the first has ended."""
    loop = asyncio.get_running_loop()

    async def ask(client: openai.AsyncOpenAI) -> tuple[float, float]:
        stream = await client.chat.completions.create(**ASK, max_tokens=600, stream=True, extra_body=ON)
        times = [loop.time() async for _ in stream]
        return times[0], times[-1]

    async with lambda_function["rest"].client() as client:
        heard = await asyncio.gather(*(ask(client) for _ in range(8)))
    assert max(first for first, _ in heard) < min(last for _, last in heard)


async def test_a_worker_that_is_told_to_stop_ends_what_it_has(tiny_model: Path, tmp_path: Path) -> None:
    """It asks for nothing more; what does not end in time is told so; exit 0."""
    async with environment(tiny_model, tmp_path, {"DRAIN_TIMEOUT_S": "0"}) as (api, process):
        await api.polled(4)
        assert "cold start {" in (tmp_path / "said").read_text()
        assert api.extensions == ["firsttoken"]
        long = await api.invoke(direct({**LONG, **ON, "n": 4, "temperature": 1}))
        short = await api.invoke(direct({**ASK, "max_tokens": 8}))
        assert (await short.whole())["usage"]["completion_tokens"] == 8
        process.send_signal(signal.SIGTERM)
        frames: list[bytes] = []
        with pytest.raises(BrokenStream) as broken:
            await long.stream(frames)
        assert sse.data(sse.split(b"".join(frames))[-1])["error"]["code"] == "worker_stopping"
        assert broken.value.told is not None
        assert broken.value.told["errorType"] == "Worker.worker_stopping"
        assert await process.wait() == 0
    assert "Traceback" not in (tmp_path / "said").read_text()


@asynccontextmanager
async def streaming(api: RuntimeApi) -> AsyncIterator[Any]:
    """A client's stream through a REST API, which has begun."""
    doors = FrontDoors(api)
    async with doors.open(["rest"]), Server(doors.urls["rest"]).client() as client:
        stream = await client.chat.completions.create(**ENDLESS)
        await anext(aiter(stream))
        yield stream


async def read(stream: Any) -> None:
    """Read the rest."""
    async for _ in stream:
        pass


async def test_a_worker_whose_engine_dies_fails_what_it_holds_and_exits(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The stream ends with an error; exit 70, so that Lambda replaces the worker."""
    async with environment(tiny_model, tmp_path, {**ONE, "ENGINE_MODE": "fork"}) as (api, process):
        await api.polled(4)
        async with streaming(api) as stream:
            (core,) = children(process.pid)
            os.kill(core, signal.SIGKILL)
            with pytest.raises(openai.APIError) as raised:
                await read(stream)
        assert raised.value.code == "engine_dead"
        assert await process.wait() == 70


async def test_a_worker_that_is_killed_answers_nothing_more(tiny_model: Path, tmp_path: Path) -> None:
    """Its connections end with it, by which Lambda knows: the client of a stream gets no end."""
    async with environment(tiny_model, tmp_path, ONE) as (api, process):
        await api.polled(4)
        async with streaming(api) as stream:
            process.kill()
            with pytest.raises(openai.APIConnectionError):
                await read(stream)


async def test_a_model_that_is_not_there_is_told_to_lambda(tmp_path: Path) -> None:
    """Why the worker does not start, with its exit code the usual one."""
    async with environment(tmp_path / "nothing-here", tmp_path) as (api, process):
        code, kind, message = await told(api, process)
    assert (code, kind) == (66, "Worker.ModelNotFound")
    assert "nothing-here" in message


async def test_wrong_settings_are_told_to_lambda(tiny_model: Path, tmp_path: Path) -> None:
    """All of them, ours and vLLM's, and that there is no key."""
    environ = {"MAX_MODEL_LENGTH": "12", "DRAIN_TIMEOUT_S": "soon", "API_KEY": ""}
    async with environment(tiny_model, tmp_path, environ) as (api, process):
        code, kind, message = await told(api, process)
    assert (code, kind) == (78, "Worker.BadSettings")
    assert "DRAIN_TIMEOUT_S='soon' is not allowed" in message
    assert "MAX_MODEL_LENGTH is not a flag of vLLM" in message
    assert "set API_KEYS_SECRET or API_KEY, or AUTH=off" in message


async def test_a_failed_start_may_be_told_to_everybody(tmp_path: Path) -> None:
    """With START_FAILURE=answer; who has no key hears no reason."""
    environ = {"START_FAILURE": "answer"}
    async with environment(tmp_path / "nothing-here", tmp_path, environ) as (api, process):
        await api.polled(4)
        doors = FrontDoors(api)
        async with doors.open(["rest"]):
            for key, status, code in ((KEY, 503, "worker_start_failed"), ("wrong", 401, "invalid_api_key")):
                async with Server(doors.urls["rest"], key).http() as http:
                    refused = await http.post("chat/completions", json=ASK)
                assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
                assert ("nothing-here" in refused.text) is (key == KEY)
        assert (await (await api.invoke(direct(ASK))).error())["errorType"] == "Worker.worker_start_failed"
        process.terminate()
        assert await process.wait() == 0
    assert api.init_errors == []
