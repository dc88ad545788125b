"""RunPod's SDK in workers that a warm parent forks, with the real engine."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers


def children(pid: int) -> Iterator[int]:
    """The processes that `pid` has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                yield int(entry.name)


def worker_of(gateway: int) -> int:
    """The worker that the gateway's warm parent has forked: it leads a group of its own."""
    (parent,) = children(gateway)
    (worker,) = [pid for pid in children(parent) if os.getpgid(pid) == pid]
    return worker


@pytest.mark.timeout(300)
def test_second_worker_takes_jobs_too(tiny_model: Path) -> None:
    """The SDK reads who it is when it is imported: what a worker imports, its parent must not keep."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        own = {"PORT": "0", "API_KEY": servers.KEY, "TMPDIR": folder, "UPSTREAM": "runpod"}
        own["DATA_DIR"] = f"{folder}/data"
        environ = {"VLLM_CACHE_ROOT": f"{folder}/cache", **servers.engine_environ(tiny_model), **own}
        with servers.program("gateway", environ, Path(folder), "serve") as (process, errors):
            ready = servers.first_line(process, "/openai/v1", errors)
            server = servers.Server(next(word for word in ready.split() if word.startswith("http://")))
            with server.sync_client() as client:
                told = []
                for _ in range(2):
                    reply = client.completions.create(
                        model=servers.MODEL, prompt="The capital of France is", max_tokens=8, temperature=0
                    )
                    told.append(reply.choices[0].text)
                    os.kill(worker_of(process.pid), signal.SIGKILL)
                assert told[0]
                assert told[0] == told[1]
