"""RunPod's own SDK as a client of jobs, unmodified: what its user sees, as one line of JSON.

`RUNPOD_ENDPOINT_BASE_URL=.../v2 python -m tests.runpod_client KEY`
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import import_module
from typing import Any

WHOLE = {"prompt": "hi", "sampling_params": {"max_tokens": 5}}
STREAM = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [], "stream": True}}
HELD = {"openai_route": "/v1/embeddings", "openai_input": {"input": "x"}}


def in_turn(endpoint: Any) -> dict[str, Any]:
    """Everything that the synchronous client can do."""
    told: dict[str, Any] = {"run_sync": endpoint.run_sync({"input": WHOLE})}
    job = endpoint.run({"input": WHOLE})
    told["output"] = job.output(timeout=60)
    told["status"] = job.status()
    told["stream"] = list(endpoint.run({"input": STREAM}).stream())
    held = endpoint.run({"input": HELD})
    told["cancelled"] = {**held.cancel(), "id": None}
    told["health"] = endpoint.health()
    told["purged"] = endpoint.purge_queue()
    return told


async def at_once(runpod: Any, key: str) -> dict[str, Any]:
    """And the asynchronous one."""
    aiohttp: Any = import_module("aiohttp")
    async with aiohttp.ClientSession() as session:
        endpoint = runpod.AsyncioEndpoint("local", session, api_key=key)
        job = await endpoint.run(WHOLE)
        told: dict[str, Any] = {"output": await job.output(timeout=60), "status": await job.status()}
        told["stream"] = [chunk async for chunk in (await endpoint.run(STREAM)).stream()]
        told["cancelled"] = {**await (await endpoint.run(HELD)).cancel(), "id": None}
        told["health"] = await endpoint.health()
        told["purged"] = await endpoint.purge_queue()
        return told


def main() -> None:
    """Print it."""
    key = sys.argv[1]
    runpod: Any = import_module("runpod")
    told = {
        "sync": in_turn(runpod.Endpoint("local", api_key=key)),
        "asyncio": asyncio.run(at_once(runpod, key)),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
