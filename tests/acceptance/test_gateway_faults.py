"""500 streams and 500 jobs through one gateway, while workers and the gateway itself are killed and stopped.

Nothing that was accepted is lost, nothing is counted twice, nothing hangs, and memory and file descriptors go
back to where they were.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests import servers
from tests.faults import WORKERS, Job, Load, Stream, begun, check_all, gateway, made, until_true
from tests.servers import KEY
from tests.until import LOOK_S

WAVE = 250
"""Streams and, as many again, jobs of one wave; there are two."""
FILES_MORE_MAX = 8
MEMORY_MORE_MAX = 48 << 20


@pytest.mark.timeout(240)
async def test_what_was_accepted_is_answered_and_counted_once(tmp_path: Path) -> None:
    """See the top of the file."""
    load = Load()
    data = {"DATA_DIR": str(tmp_path / "data")}
    load.stream_key = servers.key(data, "streams")
    load.job_key = servers.key(data, "jobs")

    async with load.session(KEY) as admin, gateway(tmp_path) as at:
        await load.wave(at, [Stream(name) for name in made("warm", 0, 2 * WORKERS)], [])
        while len(await at.workers(admin)) < WORKERS:  # noqa: ASYNC110 - as above
            await asyncio.sleep(LOOK_S)
        files, memory_bytes = at.files(), at.memory_bytes()

        streams = [Stream(name) for name in made("stream", 0, WAVE)]
        wave = asyncio.create_task(load.wave(at, streams, [Job(name) for name in made("job", 0, WAVE)]))
        await begun(streams, WAVE // 5)
        killed, stopped, *_ = await at.workers(admin)
        os.kill(killed["pid"], signal.SIGKILL)
        os.kill(stopped["pid"], signal.SIGSTOP)
        await wave
        await load.finish(at)
        ended = {one["id"]: one for one in (await at.status(admin))["workers"] if one["reason"]}
        assert "SIGKILL" in ended[killed["id"]]["reason"]
        assert "has not answered" in ended[stopped["id"]]["reason"]
        assert all(stream.whole or stream.told == "upstream_failed" for stream in streams)
        assert any(stream.told for stream in streams), "the workers held some"
        assert sum(stream.whole for stream in streams) > WAVE // 3

        shown = await at.status(admin)
        assert (shown["waiting"], shown["in_flight"]) == (0, 0)
        await until_true(lambda: at.files() <= files + FILES_MORE_MAX)
        assert at.memory_bytes() <= memory_bytes + MEMORY_MORE_MAX

        streams = [Stream(name) for name in made("stream", WAVE, WAVE)]
        jobs = [Job(name) for name in made("job", WAVE, WAVE)]
        wave = asyncio.create_task(load.wave(at, streams, jobs))
        await begun(streams, WAVE // 5)
        await until_true(lambda: sum(job.id != "" for job in jobs) > WAVE // 2)
        at.process.kill()
        await wave

    async with load.session(KEY) as admin, gateway(tmp_path) as at:
        await load.finish(at)
        shown = await at.status(admin)
        assert (shown["waiting"], shown["in_flight"]) == (0, 0)
        rows = await at.usage(admin)
        at.process.send_signal(signal.SIGTERM)
        assert await at.process.wait() == 0
    check_all(load, rows)
    assert sum(job.last["status"] == "COMPLETED" for job in load.jobs) > 2 * WAVE * 0.8
    left = await asyncio.to_thread(lambda: list(tmp_path.glob("firsttoken-*")))
    assert not left, "nor what the killed one left"
