"""Ray Serve on two nodes of one machine, real engines on their CPUs, the gateway in front: `make test-ray`.

Each node is a network namespace, with room for one replica. It takes root, `ip` and minutes.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripts.metrics_page import worker_rows
from tests import ray_nodes
from tests.ray_nodes import Cluster
from tests.servers import KEY, MODEL, ROOT, Server, engine_environ, first_line, program

SLOTS = 8
PORT = "8000"
WAIT_S = 120.0
LONG_TOKENS = 700
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes without a deployment."""
    with tempfile.TemporaryDirectory(prefix="ftr-", dir="/tmp") as folder:
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        environ = {**engine_environ(ROOT / "tests/tinychat/model"), "PYTHONPATH": str(ROOT), "PATH": path}
        with ray_nodes.cluster(2, environ, Path(folder)) as opened:
            yield opened


@contextmanager
def deployed(cluster: Cluster, **settings: str) -> Iterator[None]:
    """`python -m handler ray up`, and `down` after the block."""
    own = {"HOST": "0.0.0.0", "AUTH": "off", "PORT": PORT, "MAX_CONCURRENCY": str(SLOTS), **settings}
    up = cluster.run(sys.executable, "-m", "handler", "ray", "up", **own)
    assert up.returncode == 0, up.stderr[-4000:]
    assert up.stdout.startswith("ready  http://0.0.0.0:8000/v1  model ")
    try:
        yield
    finally:
        down = cluster.run(sys.executable, "-m", "handler", "ray", "down")
        assert down.returncode == 0, down.stderr[-4000:]


@contextmanager
def gateway(cluster: Cluster) -> Iterator[Server]:
    """`python -m gateway` in front of it."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        environ = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "MODEL_NAME": MODEL,
            "UPSTREAM": "http",
            "UPSTREAM_URL": f"http://{cluster.nodes[0].address}:{PORT}/v1",
            "PORT": "0",
            "API_KEY": KEY,
            "DATA_DIR": f"{folder}/data",
            "TMPDIR": folder,
        }
        with program("gateway", environ, Path(folder)) as (process, errors):
            ready = first_line(process, "/openai/v1", errors)
            yield Server(next(word for word in ready.split() if word.startswith("http://")))


async def until_replicas(cluster: Cluster, *wanted: int) -> None:
    """Return once the nodes have so many replicas each, in any order."""
    deadline_s = time.monotonic() + WAIT_S
    while (found := sorted(len(node.replicas()) for node in cluster.nodes)) != sorted(wanted):
        assert time.monotonic() < deadline_s, f"{found} replicas, wanted {wanted}"
        await asyncio.sleep(0.25)


async def until_running(cluster: Cluster, number: int) -> None:
    """Return once Ray says that so many replicas run."""
    deadline_s = time.monotonic() + WAIT_S
    said = ""
    while f", {number} running" not in said:
        assert time.monotonic() < deadline_s, said
        status = await asyncio.to_thread(cluster.run, sys.executable, "-m", "handler", "ray", "status")
        said = status.stdout


@dataclass
class Asked:
    """One stream: how many pieces came, and how it ended."""

    pieces: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: openai.APIError | None = None
    finish: str | None = None


async def stream(client: openai.AsyncOpenAI, asked: Asked) -> None:
    """Read a long answer to its end."""
    try:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            max_tokens=LONG_TOKENS,
            extra_body={"ignore_eos": True},
        )
        async for chunk in answer:
            asked.pieces += 1
            asked.begun.set()
            if chunk.choices and chunk.choices[0].finish_reason:
                asked.finish = chunk.choices[0].finish_reason
    except openai.APIError as error:
        asked.error = error
    finally:
        asked.begun.set()


def listening(session: int) -> set[str]:
    """The addresses, without their ports, at which the processes of `session` listen."""
    said = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {
        line.split()[3].rpartition(":")[0]
        for line in said.splitlines()
        if any(of(int(pid)) == session for pid in re.findall(r"pid=(\d+)", line))
    }


def of(pid: int) -> int | None:
    """The session of a process."""
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def test_one_command_is_enough(tmp_path: Path) -> None:
    """Without RAY_ADDRESS `ray up` has a cluster of its own, and a replica takes what its engine can hold.

    It is started once, and nobody outside is listened to, but for what Serve has in each replica and binds
    everywhere; that wants Ray's token.
    """
    environ = {**engine_environ(ROOT / "tests/tinychat/model"), "PYTHONPATH": str(ROOT), "PORT": "8177"}
    with program("handler", environ, tmp_path, "ray", "up") as (process, errors):
        first_line(process, "ready  http://127.0.0.1:8177/v1", errors)
        models = httpx.get("http://127.0.0.1:8177/v1/models").json()
        assert [model["id"] for model in models["data"]] == [MODEL]
        assert errors.read_text().count("cold start total_s=") == 1
        assert listening(process.pid) == {"127.0.0.1", "[::ffff:127.0.0.1]", "*"}
    assert process.returncode == 0


async def test_from_none_to_two_and_back(cluster: Cluster) -> None:
    """Nobody asks, and there is no replica; requests wait for the first; a load has two; then none again."""
    settings = {"START": "first_request", "MAX_WORKERS": "2", "IDLE_TIMEOUT_S": "5", "MAX_CONCURRENCY": "4"}
    with deployed(cluster, **settings), gateway(cluster) as server:
        await until_replicas(cluster, 0, 0)
        async with server.client() as client:
            asked = [Asked() for _ in range(8)]
            streams = [asyncio.create_task(stream(client, one)) for one in asked]
            await until_replicas(cluster, 1, 1)
            await asyncio.gather(*streams)
            assert [one.finish for one in asked] == ["length"] * 8
            await until_replicas(cluster, 0, 0)
            one = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
            )
            assert one.usage is not None


def test_a_node_without_the_key_serves_nobody(cluster: Cluster) -> None:
    """A key of who deploys is not sent: a replica that lacks it ends, rather than let everybody in."""
    own = {"HOST": "0.0.0.0", "PORT": PORT, "API_KEY": KEY}
    up = cluster.run(sys.executable, "-m", "handler", "ray", "up", **own)
    assert up.returncode == 70, up.stderr[-4000:]
    assert "there is no API_KEY" in up.stderr.splitlines()[-1]
    assert KEY not in up.stderr


def test_the_contract_holds(cluster: Cluster) -> None:
    """Every scenario of tests/contract, through the gateway and Ray, to vLLM."""
    with deployed(cluster, MIN_WORKERS="1"), gateway(cluster) as server:
        suite = [
            "-m",
            "pytest",
            "-q",
            "tests/contract/test_openai_contract.py",
            "-k",
            "elsewhere",
        ]
        done = subprocess.run(
            [sys.executable, *suite],
            cwd=ROOT,
            env={**os.environ, "CONTRACT_URL": server.base_url},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    said = done.stdout[-6000:]
    assert done.returncode == 0, said
    assert "passed" in said


def scraped(urls: list[str]) -> tuple[dict[str, float], set[tuple[str, str]]]:
    """The tokens that each replica has made, and which of the worker's own metrics each has."""
    samples = [
        sample
        for url in urls
        for family in text_string_to_metric_families(httpx.get(url).text)
        for sample in family.samples
    ]
    tokens = {
        sample.labels["ReplicaId"]: sample.value
        for sample in samples
        if sample.name == "ray_vllm_generation_tokens_total" and sample.labels["model_name"] == MODEL
    }
    return tokens, {
        (sample.name.removeprefix("ray_"), sample.labels["replica"])
        for sample in samples
        if sample.name.startswith("ray_firsttoken_")
    }


async def test_nodes_tell_the_metrics_of_their_replicas(cluster: Cluster) -> None:
    """vLLM's have the tokens that clients had, the worker's own are there, and each says whose it is."""
    with deployed(cluster, MIN_WORKERS="2", MAX_WORKERS="2"), gateway(cluster) as server:
        await until_running(cluster, 2)
        status = await asyncio.to_thread(cluster.run, sys.executable, "-m", "handler", "ray", "status")
        urls = re.findall(r"^  metrics: (http://\S+/metrics)$", status.stdout, re.MULTILINE)
        assert len(urls) == len(cluster.nodes)
        before, _ = await asyncio.to_thread(scraped, urls)  # a node still has those of replicas that ended
        async with server.client() as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=40
                    )
                    for _ in range(2 * SLOTS)
                )
            )
        made = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
        deadline_s = time.monotonic() + WAIT_S
        grown: dict[str, float] = {}
        while sum(grown.values()) < made:
            assert time.monotonic() < deadline_s, f"{grown}, wanted {made}"
            await asyncio.sleep(1)
            tokens, own = await asyncio.to_thread(scraped, urls)
            grown = {
                replica: more for replica in tokens if (more := tokens[replica] - before.get(replica, 0))
            }
        assert len(grown) == 2
        assert own >= {(row.name, replica) for row in worker_rows() for replica in grown}
        answer = await asyncio.to_thread(httpx.get, f"http://{cluster.nodes[0].address}:{PORT}/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize("what", ["replica", "node"])
async def test_a_loss_is_repaired_or_told(cluster: Cluster, what: str) -> None:
    """What had no first byte is answered elsewhere; the rest ends with an error frame; nothing hangs."""
    with deployed(cluster, MIN_WORKERS="2", MAX_WORKERS="2"), gateway(cluster) as server:
        await until_running(cluster, 2)
        async with server.client() as client:
            streams = [Asked() for _ in range(2 * SLOTS)]
            tasks = [asyncio.create_task(stream(client, one)) for one in streams]
            await asyncio.gather(*(one.begun.wait() for one in streams))
            whole = [
                asyncio.create_task(
                    client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=40
                    )
                )
                for _ in range(SLOTS)
            ]
            lost = cluster.nodes[1]
            if what == "replica":
                os.kill(lost.replicas()[0], signal.SIGKILL)
            else:
                lost.kill()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*tasks)
                answers = await asyncio.gather(*whole)
            assert all(answer.choices for answer in answers)
            cut = [one for one in streams if one.error]
            assert cut, "the replica that was lost had streams"
            assert all(one.finish == "length" for one in streams if not one.error)
            for one in cut:
                assert one.pieces
                assert one.finish is None
                assert isinstance(one.error, openai.APIError)
                assert one.error.code == "upstream_failed"
            again = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
            )
            assert again.choices
    # The node is not made again: this test is the last of its cluster.
