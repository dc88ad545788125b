"""The gateway with the settings that Kubernetes would give it, and what KEDA would read of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from judge.servers import free_port
from scripts.kubernetes import check
from scripts.kubernetes.pods import environ, pods
from tests.servers import KEY, first_line, program
from tests.until import until

OVERLAY = check.FOLDER / "overlays" / "keda"
HEAD = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"


@dataclass
class Workers:
    """What the Service leads to; each answer to a POST waits until it is `let`."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    let: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            self.asked.set()
            await self.let.wait()
        writer.write(HEAD.encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def served(workers: Workers, port: int) -> AsyncIterator[None]:
    """There are workers at the port."""
    async with await asyncio.start_server(workers.answer, "127.0.0.1", port, reuse_address=True):
        yield


def as_keda(trigger: Mapping[str, Any], base: str) -> float:
    """The value that KEDA's `metrics-api` scaler would read, with the key that it is given."""
    metadata = trigger["metadata"]
    path = metadata["url"].removeprefix("http://gateway.firsttoken.svc:8000")
    answer = httpx.get(base + path, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 200
    metric, _, labels = metadata["valueLocation"].partition("{")
    (value,) = (
        sample.value
        for family in text_string_to_metric_families(answer.text)
        if family.name == metric
        for sample in family.samples
        if f'endpoint="{sample.labels["endpoint"]}"' in labels
    )
    return float(value)


async def test_a_request_at_zero_is_what_keda_scales_by_and_is_answered(tmp_path: Path) -> None:
    """It is held while there is no worker, and counts until its answer has ended."""
    objects = check.rendered(OVERLAY)
    (trigger,) = next(one for one in objects if one["kind"] == "ScaledObject")["spec"]["triggers"]
    (container,) = next(pod for pod in pods(objects) if pod.component == "gateway").containers
    workers, port = Workers(), free_port()
    async with AsyncExitStack() as stack:
        async with served(workers, port):
            told = {
                **environ(container, objects),
                "HOST": "127.0.0.1",
                "PORT": "0",
                "UPSTREAM_URL": f"http://127.0.0.1:{port}/v1",
                "DATA_DIR": f"{tmp_path}/data",
                "API_KEY": KEY,
                "PATH": os.environ["PATH"],
            }
            process, errors = stack.enter_context(program("gateway", told, tmp_path))
            line = await asyncio.to_thread(first_line, process, "/openai/v1", errors)
        url = next(word for word in line.split() if word.startswith("http://"))
        base = url.partition("/v2/")[0]

        async def reads(value: float) -> None:
            await asyncio.to_thread(until, lambda: as_keda(trigger, base) == value)

        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
        assert (await client.get(base + container["readinessProbe"]["httpGet"]["path"])).status_code == 200
        assert (await client.get(f"{base}/metrics", headers={"x-forwarded-for": "a"})).status_code == 401
        await reads(0)
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"model": told["MODEL_NAME"], "messages": [{"role": "user", "content": "hi"}]}
        asking = asyncio.create_task(client.post(f"{url}/chat/completions", headers=headers, json=body))
        await reads(1)  # nobody is there: it waits
        async with served(workers, port):
            await workers.asked.wait()
            await reads(1)  # it runs
            workers.let.set()
            assert (await asking).status_code == 200
        await reads(0)
