"""RunPod's SDK as far as the wire goes, spoken by the test itself: also what the real one never says.

The worker is a process of `tests.scripted_worker` that does nothing (`TAKES_JOBS`); the test has its
environment, and asks the control plane in its place.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.scripted_worker import Worker

TAKES_JOBS: tuple[tuple[str, ...], ...] = (("takes_jobs",),)
"""The start of a worker for which the test speaks."""


class JobsClient:
    """Asks the control plane that `env`, a worker's environment, tells of."""

    def __init__(self, env: Mapping[str, str], session: aiohttp.ClientSession) -> None:
        self.worker_id = env["RUNPOD_POD_ID"]
        self.take_url = env["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", self.worker_id)
        self._stream_url = env["RUNPOD_WEBHOOK_POST_STREAM"].replace("$RUNPOD_POD_ID", self.worker_id)
        self._done_url = env["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", self.worker_id)
        self._ping_url = env["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", self.worker_id)
        self._session = session
        self.held: set[str] = set()
        """The jobs that it has: the SDK tells with each request whether there are any."""

    async def take(self) -> dict[str, Any] | None:
        """One job; None if there was none."""
        job: dict[str, Any] | None = await self._get(
            f"{self.take_url}&job_in_progress={int(bool(self.held))}"
        )
        if job is not None:
            self.held.add(job["id"])
        return job

    async def take_batch(self, most: int) -> list[dict[str, Any]]:
        """Up to `most` jobs."""
        url = self.take_url.replace("/job-take/", "/job-take-batch/")
        jobs = await self._get(f"{url}&batch_size={most}&job_in_progress={int(bool(self.held))}") or []
        self.held.update(job["id"] for job in jobs)
        return list(jobs)

    async def stops(self) -> list[str]:
        """The jobs to stop."""
        told = await self._get(self.take_url.replace("/job-take/", "/job-stop/"))
        return [] if told is None else list(told["jobsToStop"])

    async def ping(self, query: str) -> None:
        """As the SDK's other process does."""
        await self._get(f"{self._ping_url}&{query}")

    async def stream(self, job_id: str, output: Any) -> None:
        """Post one output."""
        await self._post(self._stream_url.replace("$ID", job_id) + "&isStream=false", {"output": output})

    async def done(self, job_id: str, result: Mapping[str, Any], *, generator: bool = True) -> None:
        """Post the result."""
        url = self._done_url.replace("$ID", job_id) + f"&isStream={str(generator).lower()}"
        await self._post(url, result)
        self.held.discard(job_id)

    async def _get(self, url: str) -> Any:
        async with self._session.get(url) as response:
            if response.status == 204:
                assert await response.read() == b""
                return None
            assert (response.status, response.content_type) == (200, "application/json")
            return await response.json()

    async def _post(self, url: str, value: Mapping[str, Any]) -> None:
        headers = {"content-type": "application/x-www-form-urlencoded", "charset": "utf-8"}
        data = json.dumps(value, ensure_ascii=False).encode()
        async with self._session.post(url, data=data, headers=headers) as response:
            assert response.status == 200


@asynccontextmanager
async def speaking_for(worker: Worker) -> AsyncIterator[JobsClient]:
    """The client in the place of `worker`."""
    headers = {"authorization": worker.env["RUNPOD_AI_API_KEY"]}
    async with aiohttp.ClientSession(headers=headers) as session:
        yield JobsClient(worker.env, session)
