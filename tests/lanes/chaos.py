"""Faults by chance for as long as one likes: `make soak`, `make chaos`.

    python -m tests.lanes.chaos --minutes 10            workers are killed and stopped, the gateway is left
                                                        alone: its memory and files are watched
    python -m tests.lanes.chaos --minutes 5 --gateway   the gateway is killed too, and told to reload

Waves of streams and jobs go through one gateway meanwhile. In the end every job that was accepted has ended,
every answer that a client has whole is counted once, no other more than once, and nothing hangs. The seed of
the faults is printed: `--seed` has the same ones again, if not at the same moments.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp

from tests import servers
from tests.faults import WORKERS, Gateway, Job, Load, Stream, check_all, gateway, made, until_true
from tests.servers import KEY
from tests.until import LOOK_S

STREAMS, JOBS = 60, 40
"""Of one wave."""
PAUSE_S = (0.5, 4.0)
"""Between two faults."""
STOPPED_S = (1.0, 40.0)
"""A worker that is stopped for less than 30 s goes on, one for longer is taken for hung."""
WAVE_TIMEOUT_S = 180.0
FILES_MORE_MAX = 16
MEMORY_MORE_MAX = 64 << 20


class Chaos:
    """Does something to `at` every now and then; `faults` counts what."""

    def __init__(self, chance: random.Random, *, gateway_too: bool) -> None:
        self._chance = chance
        self._kinds = ["kill worker"] * 4 + ["stop worker"] * 2 + (["reload"] * 2 if gateway_too else [])
        self._going_on: set[asyncio.Task[None]] = set()
        self.faults: Counter[str] = Counter()

    async def run(self, at: Gateway, admin: aiohttp.ClientSession) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))
            kind = self._chance.choice(self._kinds)
            with suppress(aiohttp.ClientError, ProcessLookupError, KeyError):
                if kind == "reload":
                    at.process.send_signal(signal.SIGHUP)
                elif workers := await at.workers(admin):
                    pid = self._chance.choice(workers)["pid"]
                    if kind == "kill worker":
                        os.kill(pid, signal.SIGKILL)
                    else:
                        os.kill(pid, signal.SIGSTOP)
                        self._later(pid, self._chance.uniform(*STOPPED_S))
                else:
                    continue
                self.faults[kind] += 1

    def _later(self, pid: int, in_s: float) -> None:
        async def go_on() -> None:
            await asyncio.sleep(in_s)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        task = asyncio.create_task(go_on())
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)


async def one_life(
    folder: Path, load: Load, chaos: Chaos, chance: random.Random, until_s: float, *, killed: bool
) -> tuple[int, int]:
    """One gateway until `until_s`, or a while if it is to be `killed`; files and bytes it has more."""
    async with load.session(KEY) as admin, gateway(folder) as at:
        await load.wave(at, [Stream(name) for name in made("warm", len(load.streams), 2 * WORKERS)], [])
        while len(await at.workers(admin)) < WORKERS:  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(LOOK_S)
        files, memory_bytes = at.files(), at.memory_bytes()
        disturbing = asyncio.create_task(chaos.run(at, admin))
        killing = asyncio.create_task(kill_later(at, chance, chaos)) if killed else None
        try:
            while time.monotonic() < until_s and at.process.returncode is None:
                streams = [Stream(name) for name in made("stream", len(load.streams), STREAMS)]
                jobs = [Job(name) for name in made("job", len(load.jobs), JOBS)]
                async with asyncio.timeout(WAVE_TIMEOUT_S):
                    await load.wave(at, streams, jobs)
        finally:
            disturbing.cancel()
            if killing is not None:
                killing.cancel()
        if at.process.returncode is not None:
            return 0, 0
        async with asyncio.timeout(WAVE_TIMEOUT_S):
            await load.finish(at)
        with suppress(AssertionError):  # told at the end; idle connections are closed after a while
            await until_true(lambda: at.files() <= files + FILES_MORE_MAX)
        more = max(0, at.files() - files), max(0, at.memory_bytes() - memory_bytes)
        if time.monotonic() >= until_s:
            check_all(load, await at.usage(admin))
        return more


async def kill_later(at: Gateway, chance: random.Random, chaos: Chaos) -> None:
    """`kill -9` to the gateway, a while from now."""
    await asyncio.sleep(chance.uniform(5, 20))
    at.process.kill()
    await at.process.wait()
    chaos.faults["kill gateway"] += 1


async def run(minutes: float, seed: int, *, gateway_too: bool) -> None:
    """Waves and faults for `minutes`, then what has to be true. Raises `AssertionError` if it is not."""
    chance = random.Random(seed)
    chaos, load = Chaos(chance, gateway_too=gateway_too), Load()
    files = memory_bytes = lives = 0
    began_s = time.monotonic()
    end_s = began_s + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name:
        folder = Path(name)
        data = {"DATA_DIR": f"{name}/data"}
        load.stream_key, load.job_key = servers.key(data, "streams"), servers.key(data, "jobs")
        while True:
            last = time.monotonic() >= end_s or not gateway_too
            more = await one_life(folder, load, chaos, chance, end_s, killed=not last)
            files, memory_bytes, lives = max(files, more[0]), max(memory_bytes, more[1]), lives + 1
            whole = sum(stream.whole for stream in load.streams)
            say(f"{time.monotonic() - began_s:.0f} s: {len(load.streams)} streams, {len(load.jobs)} jobs")
            if last:
                break
    assert files <= FILES_MORE_MAX, f"{files} file descriptors more than in the beginning"
    assert memory_bytes <= MEMORY_MORE_MAX, f"{memory_bytes >> 20} MiB more than in the beginning"
    result = {
        "seed": seed,
        "minutes": minutes,
        "gateways": lives,
        "faults": dict(sorted(chaos.faults.items())),
        "streams": len(load.streams),
        "streams_whole": whole,
        "jobs": len(load.jobs),
        "jobs_completed": sum(job.last["status"] == "COMPLETED" for job in load.jobs),
        "files_more": files,
        "memory_more_mib": round(memory_bytes / 2**20, 1),
    }
    print(json.dumps(result))


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.lanes.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--gateway", action="store_true", help="the gateway is killed too")
    options = parser.parse_args()
    say(f"seed {options.seed}")
    asyncio.run(run(options.minutes, options.seed, gateway_too=options.gateway))


if __name__ == "__main__":
    main()
